"""The columns of a store: their names, sizes and the rules that their values keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import datasets
import torch

from torchrl_mouse import schema
from torchrl_mouse.data.images import IMAGE, read_image, to_pixels

Kind = Literal["booleans", "integers", "numbers"]
Records = dict[str, torch.Tensor]
"""Column name -> values ``[rows]``, or ``[rows, width]`` for the columns that hold lists."""

REQUIRED_COLUMNS = ("action", "reward", "done", "episode_step")
INTEGER_COLUMNS = ("action", "done", "episode_step", "observation_discrete")
PADDING = {"observation": 0.0, IMAGE: 0, "metadata_q_star": -torch.inf, "action_mask": False}
"""The columns that hold lists, and what fills the shorter rows."""
COLUMNS = (*REQUIRED_COLUMNS, "xformed_reward", "observation_discrete", *PADDING)
RECORD_NAMES = {
    "episode_step": "time",
    "observation": "obs_continuous",
    "observation_discrete": "obs_discrete",
    IMAGE: "obs_image",
    "metadata_q_star": "q_star",
}
"""What MOUSE calls columns in memory, where that differs."""
DTYPES = {
    **dict.fromkeys(COLUMNS, torch.float32),
    **dict.fromkeys(INTEGER_COLUMNS, torch.int64),
    IMAGE: torch.uint8,
    "action_mask": torch.bool,
}
"""The types of a store's columns, whatever they are on disk."""
TASK = "task"
"""The column that tells tasks apart on disk; a store keeps their bounds instead."""
UNLIMITED = torch.iinfo(torch.int64).max
_SIZE_NAMES = {
    "observation": "max_obs_continuous_dim",
    "observation_discrete": "max_obs_discrete_dim",
    IMAGE: "max_obs_image_pixels",
}
UNCHECKED = (IMAGE, "metadata_q_star", "action_mask")
"""Columns of which every value is allowed: images are checked where they become pixels; no teacher is -inf or NaN."""


class Columns:
    """The sizes of the spaces, and what follows from them for each column.

    Args:
        max_action_dim: actions lie in ``[0, max_action_dim)``; teacher values and action masks have this width.
        max_obs_continuous_dim: width of ``observation``; 0: not read.
        max_obs_discrete_dim: number of ids of ``observation_discrete``; 0: not read.
        max_obs_image_pixels: width of ``observation_image``; 0: not read.

    Examples:
        >>> Columns(5, 0, 9, 0).readable[-3:]
        ('observation_discrete', 'metadata_q_star', 'action_mask')
    """

    def __init__(
        self, max_action_dim: int, max_obs_continuous_dim: int, max_obs_discrete_dim: int, max_obs_image_pixels: int
    ) -> None:
        self.widths = {
            "observation": max_obs_continuous_dim,
            IMAGE: max_obs_image_pixels,
            "metadata_q_star": max_action_dim,
            "action_mask": max_action_dim,
        }
        self._bounds = {  # column -> [low, high), and the remedy
            "action": (0, max_action_dim, "Raise max_action_dim, or fix the data."),
            "done": (0, schema.NUM_DONE_CODES, "Done codes are 0 running, 1 terminated, 2 truncated."),
            "episode_step": (0, UNLIMITED, "It counts from 0 at an episode's first frame."),
            "observation_discrete": (0, max_obs_discrete_dim, "Raise max_obs_discrete_dim, or fix the data."),
        }
        sizes = {
            "observation": max_obs_continuous_dim,
            "observation_discrete": max_obs_discrete_dim,
            IMAGE: max_obs_image_pixels,
        }
        if max_action_dim < 1 or min(sizes.values()) < 0:
            got = ", ".join(map(str, (max_action_dim, *sizes.values())))
            raise ValueError(
                f"DatasetStore: sizes must be at least 1, 0, 0 and 0, got {got}. Give the sizes of the spaces."
            )
        self.readable = tuple(name for name in COLUMNS if sizes.get(name, 1) > 0)

    def convert(self, name: str, value: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """Brings a column's rows, read flat, to the store's dtype and width and to a shape; no teacher is padding."""
        if value is None:
            if name != "metadata_q_star":  # the one column that some rows of a store may lack
                raise KeyError(f"DatasetStore: column {name!r} must be in all rows, got rows without it. Add it there.")
            return torch.full((*shape, self.widths[name]), PADDING[name])
        if name not in PADDING:
            dtype = DTYPES[name]
            # Even where nothing changes, `to` takes a microsecond.
            return (value if value.dtype == dtype else value.to(dtype)).reshape(shape)
        value = to_pixels(value) if name == IMAGE else value.to(DTYPES[name])
        return fit(
            value.reshape(*shape, -1) if shape.numel() else value.reshape(*shape, 0), self.widths[name], PADDING[name]
        )

    def from_record(self, record: Mapping[str, Any], where: str, row: int) -> Records:
        """Turns one record's values, those of the store's row ``row``, into columns of one row."""
        if unknown := set(record).difference((*COLUMNS, TASK)):
            known, got = ", ".join((*COLUMNS, TASK)), ", ".join(sorted(map(repr, unknown)))
            raise KeyError(f"{where}: columns must be among {known}, got {got}. Correct the name, or leave it out.")
        given = {name: value for name, value in record.items() if value is not None}
        for name in REQUIRED_COLUMNS:
            if name not in given:
                got = ", ".join(given) or "none"
                raise KeyError(f"{where}: column {name!r} must be present, got only {got} in row {row}. Add it.")
        self.check_read(tuple(given), where)
        return {name: one_row(name, given[name], where, row) for name in self.readable if name in given}

    def row_width(self, names: Iterable[str]) -> int:
        """The number of values that a row's lists are read as, also where those on disk are shorter."""
        return sum(self.widths[name] for name in PADDING.keys() & names)

    def features(self, names: Iterable[str], blocks: Sequence[Any]) -> datasets.Features:
        """The types on disk, with the task column; lists as long as the blocks' longest, at most the store's."""
        features = {name: datasets.Value(str(DTYPES[name]).removeprefix("torch.")) for name in names}
        for name in PADDING.keys() & features:
            width = max(block.width(name) for block in blocks if name in block.names)
            # Parquet has no lists of length 0; one element of padding reads the same.
            features[name] = datasets.List(features[name], length=max(min(width, self.widths[name]), 1))
        return datasets.Features({**features, TASK: datasets.Value("int64")})

    def check_read(self, names: Sequence[str], where: str) -> None:
        """Raises where a column is given that the store does not read, rather than losing it."""
        for name in set(_SIZE_NAMES).intersection(names).difference(self.readable):
            size = _SIZE_NAMES[name]
            raise ValueError(
                f"{where}: column {name!r} must be one that the store reads, got {size}=0. "
                f"Give {size}, or leave the entry out."
            )

    def check_values(
        self,
        records: Records,
        where: str,
        first_row: int = 0,
        part: str = "",
        name_row: Callable[[int], str] = "row {}".format,
    ) -> None:
        """Raises at the first value that breaks its column's rule, and names its row (and the part of it)."""
        for name, value in records.items():
            if name in PADDING:
                self.check_width(name, value.shape[-1], where)
            if name in UNCHECKED or not value.numel():
                continue
            least, most = value.aminmax()  # NaN where there is one
            if name in self._bounds:
                low, high, remedy = self._bounds[name]
                if least >= low and most < high:
                    continue
                wrong, rule = (value < low) | (value >= high), f"lie in [{low}, {high})"
                if high == UNLIMITED:
                    rule = f"be at least {low}"
            elif least > -torch.inf and most < torch.inf:
                continue
            else:
                wrong, rule, remedy = ~value.isfinite().reshape(len(value), -1).all(-1), "be finite", "Fix the data."
            row = int(wrong.nonzero()[0])
            got = f"{value[row].tolist()} in {name_row(first_row + row)}{part}"
            raise ValueError(f"{where}: column {name!r} must {rule}, got {got}. {remedy}")

    def check_width(self, name: str, width: int, where: str, row: int | None = None) -> None:
        """Raises where more than numbers without a meaning of their own would have to be cut."""
        if name != "observation" and width > self.widths[name]:
            size = _SIZE_NAMES.get(name, "max_action_dim")
            raise ValueError(
                f"{where}: column {name!r} must have at most {size}={self.widths[name]} values a row, got "
                f"{width}{'' if row is None else f' in row {row}'}. Raise {size}."
            )


def check_same(held: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raises where rows have other columns than those held: every read has the same entries, a teacher excepted."""
    if differ := set(held).symmetric_difference(names) - {"metadata_q_star"}:
        raise KeyError(
            f"{where}: columns must be those in the store ({', '.join(sorted(held))}), got a difference "
            f"in {', '.join(sorted(differ))}. Add or remove the column, or use a second store."
        )


def holds(value: torch.Tensor, kind: Kind) -> bool:
    """Says whether a tensor's dtype can hold a kind of values without losing any; numbers may be of any real dtype."""
    if kind == "booleans":
        return value.dtype == torch.bool
    return not value.is_complex() and (
        kind == "numbers" or not (value.is_floating_point() or value.dtype == torch.bool)
    )


def one_row(name: str, given: Any, where: str, row: int) -> torch.Tensor:
    """Turns one value of a record, that of row ``row``, into a column of one row."""
    if name == IMAGE:
        return read_image(given, where, row).unsqueeze(0)
    dtype = DTYPES.get(name, torch.int64)
    kind: Kind = "booleans" if dtype == torch.bool else "numbers" if dtype.is_floating_point else "integers"
    rule = f"{where}: column {name!r} must hold {kind}"
    try:
        value = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{rule}, got {given!r} in row {row}. Convert it.") from error
    if not holds(value, kind):
        raise TypeError(f"{rule}, got {value.dtype} in row {row}. Convert it.")
    if value.ndim > 1 if name in PADDING else value.numel() != 1:
        rule, remedy = ("a list", "Flatten it") if name in PADDING else ("one value", "Append one by one")
        got = f"shape {tuple(value.shape)} in row {row}"
        raise ValueError(f"{where}: column {name!r} must hold {rule} a record, got {got}. {remedy}.")
    return value.to(dtype).reshape(1, -1) if name in PADDING else value.to(dtype).reshape(1)


def fit(value: torch.Tensor, width: int, padding: float) -> torch.Tensor:
    """Cuts or pads the last dimension."""
    return (
        torch.nn.functional.pad(value, (0, width - value.shape[-1]), value=padding)
        if value.shape[-1] != width
        else value
    )


def take(table: Records, rows: torch.Tensor) -> Records:
    """Picks rows by number or by mask."""
    return {name: value[rows] for name, value in table.items()}


def concatenate(tables: Sequence[Records]) -> Records:
    """Joins tables row by row; lists of several widths, or teacher values absent in some, are padded."""
    joined = {}
    for name in {name: None for table in tables for name in table}:
        parts = [table[name] if name in table else torch.zeros(len(table["action"]), 0) for table in tables]
        if name in PADDING:
            width = max(part.shape[1] for part in parts)
            parts = [fit(part, width, PADDING[name]) for part in parts]
        joined[name] = torch.cat(parts)
    return joined
