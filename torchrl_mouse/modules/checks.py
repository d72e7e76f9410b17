"""What the modules ask of their options."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "dict": (dict,),
    "Mapping": (dict,),
    "None": (type(None),),
}


MAX_INT = 2**31 - 1
MAX_FLOAT = 1e30


def check_size(where: str, name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """Raises unless a size is an integer in its range.

    Args:
        where: whose argument it is, for the error.
        name: the argument's name.
        value: the size.
        least: the smallest allowed.
        most: the largest allowed; ``None`` for any.

    Raises:
        TypeError: it is no integer; a boolean is none.
        ValueError: it is too small or too large.

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
    if most is not None and value > most:
        raise ValueError(f"{where}: {name} must be at most {most}, got {value}.")


def check_heads(where: str, width: int, num_heads: int) -> None:
    """Raises unless an attention's width is a multiple of its number of heads, both at least 1.

    Args:
        where: whose arguments they are, for the error.
        width: the attention's.
        num_heads: number of heads.

    Raises:
        TypeError: one is no integer.
        ValueError: one is less than 1, or the width no multiple of the other.

    Examples:
        >>> check_heads("AttentionContextEncoder", 6, 4)
        Traceback (most recent call last):
            ...
        ValueError: AttentionContextEncoder: width must be a multiple of num_heads, got 6 and 4. Change one of them.
    """
    check_size(where, "width", width)
    check_size(where, "num_heads", num_heads)
    if width % num_heads:
        raise ValueError(
            f"{where}: width must be a multiple of num_heads, got {width} and {num_heads}. Change one of them."
        )


def check_options(
    where: str, options: Mapping[str, Any], *builders: type, given: Collection[str] = (), complete: bool = True
) -> None:
    """Raises unless options name arguments of classes, and are of the simple types that these are annotated with.

    What comes from a file gets so a clear error before anything is built.

    Args:
        where: whose options they are, for the error.
        options: by name.
        builders: the class that takes them, then those that it passes its ``**kwargs`` on to; where the last one takes
            ``**kwargs``, unknown names are left to it.
        given: arguments that are given elsewhere, and must not be in ``options``.
        complete: raise also where an argument without a default is missing.

    Raises:
        TypeError: an unknown or missing option, or a value of another type.
        ValueError: an integer so large that no size can be meant, or a number that is not finite.

    Examples:
        >>> from torchrl_mouse.modules import StepEmbedder
        >>> check_options("embedding_kwargs", {"token_data_len": "2"}, StepEmbedder)
        Traceback (most recent call last):
            ...
        TypeError: embedding_kwargs: token_data_len must be int, got '2'.
    """
    known: dict[str, str] = {}
    required: set[str] = set()
    for build in builders:
        parameters = inspect.signature(build).parameters.values()
        options_of = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
        known |= {p.name: str(p.annotation) for p in options_of}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        required |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    if complete and (missing := sorted(required - set(given) - set(options))):
        raise TypeError(f"{where}: option {missing[0]!r} must be given, got only {', '.join(options) or 'none'}.")
    for name in given:
        known.pop(name, None)
    for name, value in options.items():
        if name in given:
            raise TypeError(f"{where}: option {name!r} must be given beside {where}, got it inside. Take it out.")
        if name not in known:
            if open_ended:
                continue
            raise TypeError(f"{where}: unknown option {name!r}. The options are {', '.join(sorted(known))}.")
        kinds = [part.partition("[")[0] for part in known[name].split(" | ")]
        if not all(kind in _TYPES for kind in kinds):
            continue  # A choice of words, which the class itself checks.
        types = tuple(kind for part in kinds for kind in _TYPES[part])
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"{where}: {name} must be {' or '.join(kinds)}, got {value!r}.")
        most = MAX_INT if isinstance(value, int) else MAX_FLOAT
        if isinstance(value, int | float) and not abs(value) <= most:
            raise ValueError(f"{where}: {name} must lie within +-{most:g}, got {value}.")
