"""What the modules ask of their sizes."""

from __future__ import annotations


def check_size(where: str, name: str, value: int, least: int = 1) -> None:
    """Raises unless a size is an integer that is large enough.

    Args:
        where: whose argument it is, for the error.
        name: the argument's name.
        value: the size.
        least: the smallest allowed.

    Raises:
        TypeError: it is no integer; a boolean is none.
        ValueError: it is too small.

    Examples:
        >>> check_size("Trunk", "window", 0)
        Traceback (most recent call last):
            ...
        ValueError: Trunk: window must be at least 1, got 0.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}.")
