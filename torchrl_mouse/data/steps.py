"""The layout: which entry of a step is read from which column of which record."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from tensordict.utils import unravel_key

from torchrl_mouse import schema

if TYPE_CHECKING:
    from tensordict.utils import NestedKey

    from torchrl_mouse.data.columns import Records

# Entry -> the column it is read from, at the root and under "next" (None: known without reading a column).
_FRAME: dict[NestedKey, str | None] = {
    schema.OBSERVATION: "observation",
    schema.OBSERVATION_DISCRETE: "observation_discrete",
    schema.PIXELS: "observation_image",
    schema.ACTION_MASK: "action_mask",
    schema.PREVIOUS_ACTION: "action",
    schema.PREVIOUS_REWARD: "reward",
    schema.PREVIOUS_XFORMED_REWARD: "xformed_reward",
    schema.PREVIOUS_TERMINATED: "done",
    schema.PREVIOUS_TRUNCATED: "done",
    schema.EPISODE_STEP: "episode_step",
    schema.IS_INIT: None,
}
_AS_READ = ("action", "observation", "observation_discrete", "observation_image", "action_mask")
"""Columns whose entries have no dimension of size 1 at the end."""
_NEXT = {key: unravel_key(("next", key)) for key in _FRAME}
_ROOT: dict[NestedKey, str | None] = {**_FRAME, schema.Q_STAR: "metadata_q_star", schema.MASK: None}
_FOLLOWING: dict[NestedKey, str | None] = {
    schema.ACTION: "action",
    **{_NEXT[key]: column for key, column in _FRAME.items()},
    ("next", "reward"): "reward",
    ("next", "xformed_reward"): "xformed_reward",
    ("next", "done"): None,
    ("next", "terminated"): "done",
    ("next", "truncated"): "done",
}


def as_rows(index: Any, length: int) -> torch.Tensor:
    """Turns any index of a store of ``length`` records into row numbers.

    Args:
        index: an int, a slice, a range, a list, an integer tensor, or a 1-tuple of one; may count from the end.
        length: number of records.

    Returns:
        int64, of the index's shape, in ``[0, length)``.

    Examples:
        >>> as_rows(slice(-2, None), 5).tolist(), as_rows([[-1, 0]], 5).tolist()
        ([3, 4], [[4, 0]])
    """
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if isinstance(index, slice):
        index = range(length)[index]
    if isinstance(index, range):
        index = index.start + index.step * torch.arange(len(index))
    rows = torch.as_tensor(index)
    if rows.numel() and (rows.is_floating_point() or rows.dtype == torch.bool):
        raise TypeError(f"DatasetStore: an index must be an integer, got {rows.dtype}. Convert it with .long().")
    rows = rows.to("cpu", torch.int64)
    if not rows.numel():
        return rows
    low, high = (int(bound) for bound in rows.aminmax())
    if low < -length or high >= length:
        wrong = low if low < -length else high
        raise IndexError(
            f"DatasetStore: an index must lie in [{-length}, {length}), got {wrong}. The store counts records."
        )
    return torch.where(rows < 0, rows + length, rows) if low < 0 else rows


def selection(keys: Iterable[NestedKey] | None) -> tuple[set[NestedKey], set[str]]:
    """Returns the entries that some keys ask for, and the columns that these are read from.

    Args:
        keys: entries; a nested one, such as ``"next"``, stands for all in it; unknown ones ask for nothing.
            ``None``: every entry.

    Examples:
        >>> sorted(selection([("next", "previous", "reward"), "value"])[1])
        ['reward']
    """
    if isinstance(keys, str):
        raise TypeError(f"DatasetStore.select: keys must be a list of keys, got {keys!r}. Write [{keys!r}].")
    layout = {**_ROOT, **_FOLLOWING}
    asked = {schema.MASK, *(layout if keys is None else map(unravel_key, keys))}
    wanted = {key for key in layout if key in asked or (isinstance(key, tuple) and asked & {key[0], key[:2]})}
    return wanted, {column for key in wanted if (column := layout[key])}


def to_steps(
    records: Records, wanted: Collection[NestedKey], begins: torch.Tensor, ends: torch.Tensor, next_ends: torch.Tensor
) -> TensorDict:
    """Builds steps from pairs of records.

    Args:
        records: columns ``[2, *, ...]``: each step's own record, and the next one of its task (or itself, at the end).
        wanted: the entries to return.
        begins: bool ``[*]``, true at a task's first record.
        ends: bool ``[*]``, true at its last, where nothing is decided.
        next_ends: bool ``[*]``, true where the next record is its last.
    """
    entries: dict[Any, torch.Tensor] = {}
    for key, value in _frame_entries(records).items():
        entries[key], entries[_NEXT[key]] = value.unbind(0)
    entries[schema.IS_INIT] = begins.unsqueeze(-1)
    entries["next", "is_init"] = torch.zeros_like(entries[schema.IS_INIT])
    entries[schema.MASK] = ~ends
    if "metadata_q_star" in records:
        entries[schema.Q_STAR] = records["metadata_q_star"][0]
    if "action" in records:
        entries[schema.ACTION] = records["action"][1].masked_fill(ends, 0)
    for name in {"reward", "xformed_reward"} & records.keys():
        entries["next", name] = records[name][1].masked_fill(ends, 0.0).unsqueeze(-1)
    entries["next", "done"] = task_ends = next_ends.unsqueeze(-1)
    if "done" in records:
        terminated = entries["next", "previous", "terminated"]
        entries["next", "terminated"] = task_ends & terminated
        entries["next", "truncated"] = task_ends & ~terminated

    nested: dict[Any, Any] = {}
    for key, value in entries.items():
        if key in wanted:
            *parents, leaf = (key,) if isinstance(key, str) else key
            level = nested
            for parent in parents:
                level = level.setdefault(parent, {})
            level[leaf] = value
    return TensorDict(nested, begins.shape)


def _frame_entries(records: Records) -> dict[Any, torch.Tensor]:
    """The entries of a frame that are read from its record."""
    entries: dict[Any, torch.Tensor] = {
        key: records[column] if column in _AS_READ else records[column].unsqueeze(-1)
        for key, column in _FRAME.items()
        if column in records and column != "done"
    }
    if "done" in records:
        done = records["done"].unsqueeze(-1)
        entries[schema.PREVIOUS_TERMINATED] = done == schema.TERMINATED
        entries[schema.PREVIOUS_TRUNCATED] = done == schema.TRUNCATED
    return entries
