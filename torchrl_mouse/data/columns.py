"""The columns of a store: their names, sizes and the rules that their values keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import datasets
import torch

Kind = Literal["booleans", "integers", "numbers"]
Records = dict[str, torch.Tensor]
"""Column name -> values ``[rows]``, or ``[rows, width]`` for the columns that hold lists."""

REQUIRED_COLUMNS = ("action", "reward", "done", "episode_step")
INTEGER_COLUMNS = ("action", "done", "episode_step", "observation_discrete")
PADDING = {"observation": 0.0, "metadata_q_star": -torch.inf}
"""The columns that hold lists, and what fills the shorter rows."""
COLUMNS = (*REQUIRED_COLUMNS, "xformed_reward", "observation_discrete", *PADDING)
TASK = "task"
"""The column that tells tasks apart on disk; a store keeps their bounds instead."""
UNLIMITED = torch.iinfo(torch.int64).max


class Columns:
    """The sizes of the spaces, and what follows from them for each column.

    Args:
        max_action_dim: actions lie in ``[0, max_action_dim)``; teacher values have this width.
        max_obs_continuous_dim: width of ``observation``; 0: not read.
        max_obs_discrete_dim: number of ids of ``observation_discrete``; 0: not read.

    Examples:
        >>> Columns(5, 0, 9).readable[-2:]
        ('observation_discrete', 'metadata_q_star')
    """

    def __init__(self, max_action_dim: int, max_obs_continuous_dim: int, max_obs_discrete_dim: int) -> None:
        self.widths = {"observation": max_obs_continuous_dim, "metadata_q_star": max_action_dim}
        self._bounds = {  # column -> [low, high), and the remedy
            "action": (0, max_action_dim, "Raise max_action_dim, or fix the data."),
            "done": (0, 3, "Done codes are 0 running, 1 terminated, 2 truncated."),
            "episode_step": (0, UNLIMITED, "It counts from 0 at an episode's first frame."),
            "observation_discrete": (0, max_obs_discrete_dim, "Raise max_obs_discrete_dim, or fix the data."),
        }
        unread = {"observation": max_obs_continuous_dim, "observation_discrete": max_obs_discrete_dim}
        if max_action_dim < 1 or min(unread.values()) < 0:
            got = f"{max_action_dim}, {max_obs_continuous_dim}, {max_obs_discrete_dim}"
            raise ValueError(
                f"DatasetStore: sizes must be at least 1, 0 and 0, got {got}. Give the sizes of the spaces."
            )
        self.readable = tuple(name for name in COLUMNS if unread.get(name, 1) > 0)

    def convert(self, records: Records, names: Iterable[str], rows: int) -> Records:
        """Brings columns to the store's dtypes and widths; teacher values that are absent become -inf."""
        for name in names:
            if name not in records:  # rows without a teacher
                records[name] = torch.full((rows, self.widths[name]), PADDING[name])
            elif name in PADDING:
                value = records[name].to(torch.float32)
                value = value.unsqueeze(-1) if value.ndim == 1 else value
                records[name] = fit(value, self.widths[name], PADDING[name])
            else:
                kind = torch.int64 if name in INTEGER_COLUMNS else torch.float32
                records[name] = records[name].to(kind).reshape(rows)
        return records

    def from_record(self, record: Mapping[str, Any], where: str) -> Records:
        """Turns one record's values into columns of one row."""
        if unknown := set(record).difference((*COLUMNS, TASK)):
            known, got = ", ".join((*COLUMNS, TASK)), ", ".join(sorted(map(repr, unknown)))
            raise KeyError(f"{where}: columns must be among {known}, got {got}. Correct the name, or leave it out.")
        for name in REQUIRED_COLUMNS:
            if name not in record:
                raise KeyError(f"{where}: column {name!r} must be present, got only {', '.join(record)}. Add it.")
        return {name: one_row(name, record[name], where) for name in self.readable if record.get(name) is not None}

    def features(self, names: Iterable[str], widths: Mapping[str, int]) -> datasets.Features:
        """The types on disk, with the task column; lists have one length, at most the store's."""
        features = {name: datasets.Value("int64" if name in INTEGER_COLUMNS else "float32") for name in names}
        for name, width in widths.items():
            length = min(width, self.widths[name])
            features[name] = datasets.List(datasets.Value("float32"), length=length)
        return datasets.Features({**features, "task": datasets.Value("int64")})

    def check_read(self, names: Sequence[str], where: str) -> None:
        """Raises where a column is given that the store does not read, rather than losing it."""
        for name in {"observation", "observation_discrete"}.intersection(names).difference(self.readable):
            size = "max_obs_continuous_dim" if name == "observation" else "max_obs_discrete_dim"
            raise ValueError(
                f"{where}: column {name!r} must be one that the store reads, got {size}=0. "
                f"Give {size}, or leave the entry out."
            )

    def check_values(self, records: Records, where: str, first_row: int = 0) -> None:
        """Raises at the first value that breaks its column's rule, and names its row."""
        for name, value in records.items():
            if name in PADDING:
                self.check_width(name, value.shape[-1], where)
            if name in self._bounds:
                low, high, remedy = self._bounds[name]
                least, most = value.aminmax()
                if least >= low and most < high:
                    continue
                wrong, rule = (value < low) | (value >= high), f"lie in [{low}, {high})"
                if high == UNLIMITED:
                    rule = f"be at least {low}"
            elif name != "metadata_q_star" and value.min().isnan():  # which any NaN in it makes so
                wrong, rule, remedy = value.isnan().reshape(len(value), -1).any(-1), "not be NaN", "Fix the data."
            else:
                continue
            row = int(wrong.nonzero()[0])
            got = value[row].tolist()
            raise ValueError(f"{where}: column {name!r} must {rule}, got {got} in row {first_row + row}. {remedy}")

    def check_width(self, name: str, width: int, where: str) -> None:
        """Raises where teacher values would have to be cut."""
        if name == "metadata_q_star" and width > self.widths[name]:
            raise ValueError(
                f"{where}: column {name!r} must have at most max_action_dim={self.widths[name]} values a row, got "
                f"{width}. Raise max_action_dim."
            )


def holds(value: torch.Tensor, kind: Kind) -> bool:
    """Says whether a tensor's dtype can hold a kind of values without losing any; numbers may be of any real dtype."""
    if kind == "booleans":
        return value.dtype == torch.bool
    return not value.is_complex() and (
        kind == "numbers" or not (value.is_floating_point() or value.dtype == torch.bool)
    )


def one_row(name: str, given: Any, where: str) -> torch.Tensor:
    """Turns one value of a record into a column of one row."""
    kind: Kind = "integers" if name in (*INTEGER_COLUMNS, TASK) else "numbers"
    try:
        value = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where}: column {name!r} must hold {kind}, got {given!r}. Convert it.") from error
    if not holds(value, kind):
        raise TypeError(f"{where}: column {name!r} must hold {kind}, got {value.dtype}. Convert it.")
    if name not in PADDING and value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(
            f"{where}: column {name!r} must hold one value a record, got shape {shape}. Append one by one."
        )
    value = value.long() if kind == "integers" else value.float()
    return value.reshape(1, -1) if name in PADDING else value.reshape(1)


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
    """Joins tables row by row; teacher values of several widths, or absent in some, are padded."""
    joined = {}
    for name in {name: None for table in tables for name in table}:
        parts = [table[name] if name in table else torch.zeros(len(table["action"]), 0) for table in tables]
        if name in PADDING:
            width = max(part.shape[1] for part in parts)
            parts = [fit(part, width, PADDING[name]) for part in parts]
        joined[name] = torch.cat(parts)
    return joined
