"""The layout: which entry of a step is read from which column of which record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDict
from tensordict.utils import unravel_key

from torchrl_mouse import schema
from torchrl_mouse.data.columns import COLUMNS

if TYPE_CHECKING:
    from tensordict.utils import NestedKey

    from torchrl_mouse.data.columns import Records


Part = int | EllipsisType
OWN, BOTH = 0, ...
"""Which of a pair of records ``[2, *]`` a column is read from: a step's own, the next one (1), or both."""


class _Marks(NamedTuple):
    """How steps lie in their tasks, bool ``[*]``."""

    begins: torch.Tensor  # the task's first record
    ends: torch.Tensor  # its last, where nothing is decided
    next_ends: torch.Tensor  # the next record is its last


class _Entry(NamedTuple):
    """What an entry of a step is made of."""

    column: str | None  # None: known without reading one
    of_next: bool  # of the next record, or the step's own
    form: Callable[[torch.Tensor], torch.Tensor]  # which both records' values take at once, for all entries of one form
    finish: Callable[[torch.Tensor, _Marks], torch.Tensor] | None = None  # what the entry alone makes of it


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _in_a_column(value: torch.Tensor) -> torch.Tensor:
    return value.unsqueeze(-1)


def _is_terminated(done: torch.Tensor) -> torch.Tensor:
    return _equals(done, schema.TERMINATED)


def _is_truncated(done: torch.Tensor) -> torch.Tensor:
    return _equals(done, schema.TRUNCATED)


def _equals(done: torch.Tensor, code: int) -> torch.Tensor:
    return torch.from_numpy(_in_a_column(done).numpy() == code)  # torch takes four times as long


def _is_known(make: Callable[[_Marks], torch.Tensor]) -> _Entry:
    return _Entry(None, False, _same, lambda _, marks: make(marks))


_FRAME: dict[NestedKey, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    schema.OBSERVATION: ("observation", _same),
    schema.OBSERVATION_DISCRETE: ("observation_discrete", _same),
    schema.PIXELS: ("observation_image", _same),
    schema.ACTION_MASK: ("action_mask", _same),
    schema.PREVIOUS_ACTION: ("action", _same),
    schema.PREVIOUS_REWARD: ("reward", _in_a_column),
    schema.PREVIOUS_XFORMED_REWARD: ("xformed_reward", _in_a_column),
    schema.PREVIOUS_TERMINATED: ("done", _is_terminated),
    schema.PREVIOUS_TRUNCATED: ("done", _is_truncated),
    schema.EPISODE_STEP: ("episode_step", _in_a_column),
}
_LAYOUT: dict[NestedKey, _Entry] = {
    **{key: _Entry(column, False, form) for key, (column, form) in _FRAME.items()},
    **{unravel_key(("next", key)): _Entry(column, True, form) for key, (column, form) in _FRAME.items()},
    schema.IS_INIT: _is_known(lambda marks: marks.begins.unsqueeze(-1)),
    ("next", schema.IS_INIT): _is_known(lambda marks: torch.zeros_like(marks.begins).unsqueeze(-1)),
    schema.MASK: _is_known(lambda marks: ~marks.ends),
    schema.Q_STAR: _Entry("metadata_q_star", False, _same),
    # The last record's own transition is not decided there.
    schema.ACTION: _Entry("action", True, _same, lambda action, marks: action.masked_fill(marks.ends, 0)),
    **{
        ("next", name): _Entry(
            name, True, _in_a_column, lambda value, marks: value.masked_fill(marks.ends.unsqueeze(-1), 0.0)
        )
        for name in ("reward", "xformed_reward")
    },
    ("next", "done"): _is_known(lambda marks: marks.next_ends.unsqueeze(-1)),
    ("next", "terminated"): _Entry(
        "done", True, _is_terminated, lambda terminated, marks: terminated & marks.next_ends.unsqueeze(-1)
    ),
    ("next", "truncated"): _Entry(
        "done", True, _is_terminated, lambda terminated, marks: ~terminated & marks.next_ends.unsqueeze(-1)
    ),
}


def as_rows(index: Any, length: int) -> torch.Tensor:
    """Turns any index of a store of ``length`` records into row numbers.

    Args:
        index: an int, a slice, a range, a list, an integer tensor, or a 1-tuple of one; may count from the end.
        length: number of records.

    Returns:
        int64, of the index's shape, in ``[0, length)``.

    Raises:
        IndexError: an index is out of range.
        TypeError: it is none of the above.

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
    try:
        if isinstance(index, str | tuple):  # which torch would read as a list
            raise TypeError("one index is needed")
        rows = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"DatasetStore: an index must be an int, a slice, a range, a list or an integer tensor, got {index!r} "
            f"({error}). The store has one dimension, its records; store.select limits the entries."
        ) from error
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


class Selection:
    """The entries that are asked for, and the columns that these are read from.

    Args:
        keys: entries; a nested one, such as ``"next"``, stands for all in it; unknown ones ask for nothing.
            ``None``: every entry.

    Raises:
        TypeError: a plain string instead of a list.

    Examples:
        >>> Selection([("next", "previous", "reward"), "action", schema.PREVIOUS_ACTION, "value"]).parts
        {'action': Ellipsis, 'reward': 1}
    """

    def __init__(self, keys: Iterable[NestedKey] | None) -> None:
        if isinstance(keys, str):
            raise TypeError(f"DatasetStore.select: keys must be a list of keys, got {keys!r}. Write [{keys!r}].")
        self._keys = keys = None if keys is None else list(keys)
        asked = {schema.MASK, *(_LAYOUT if keys is None else map(unravel_key, keys))}
        entries = {
            key: entry
            for key, entry in _LAYOUT.items()
            if key in asked or (isinstance(key, tuple) and asked & {key[0], key[:2]})
        }
        self._entries = [((key,) if isinstance(key, str) else key, entry) for key, entry in entries.items()]
        read = {column: {entry.of_next for _, entry in self._entries if entry.column == column} for column in COLUMNS}
        self.parts: dict[str, Part] = {
            column: BOTH if len(of_next) == 2 else int(*of_next) for column, of_next in read.items() if of_next
        }

    def __reduce__(self) -> tuple[type[Selection], tuple[Any, ...]]:
        return Selection, (self._keys,)

    def steps(
        self, records: Records, *, begins: torch.Tensor, ends: torch.Tensor, next_ends: torch.Tensor
    ) -> TensorDict:
        """Builds steps ``[*]`` from pairs of records.

        Args:
            records: the parts of columns, of each step's own record and of the next one of its task (or of itself, at
                the end): ``[*, ...]``, or ``[2, *, ...]`` of both.
            begins: bool ``[*]``, true at a task's first record.
            ends: bool ``[*]``, true at its last, where nothing is decided.
            next_ends: bool ``[*]``, true where the next record is its last.
        """
        marks = _Marks(begins, ends, next_ends)
        formed: dict[tuple[str, Callable[[torch.Tensor], torch.Tensor]], Sequence[torch.Tensor]] = {}
        nested: dict[str, Any] = {}
        for (*parents, leaf), (column, of_next, form, finish) in self._entries:
            value = begins
            if column is not None:
                if column not in records:
                    continue
                if (column, form) not in formed:
                    value = form(records[column])
                    formed[column, form] = value.unbind() if self.parts[column] is BOTH else (value, value)
                value = formed[column, form][of_next]
            level: dict[str, Any] = nested
            for parent in parents:
                level = level.setdefault(parent, {})
            level[leaf] = value if finish is None else finish(value, marks)
        # The shapes are right by construction; to check them would take as long as half of the reading.
        return TensorDict._new_unsafe(nested, batch_size=begins.shape)
