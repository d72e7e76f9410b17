"""Whole tasks out of collected batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.utils import unravel_key

from torchrl_mouse import schema
from torchrl_mouse.data.columns import Kind, Records, concatenate, holds, take
from torchrl_mouse.data.images import IMAGE, check_pixels, to_pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensordict.utils import NestedKey

_FLAGS = ("stream", "first", "tail", "ends")
_WHERE = "DatasetStore.extend"


class TaskAssembler:
    """Sorts collected steps by stream and gives each task back in one piece when it ends.

    It works in steps, so that a batch can be refused before anything has changed: :meth:`read` turns steps into a table
    of frames with the flags that say how they hang together, :meth:`check_joins` looks whether they do, :meth:`add`
    takes the table in.

    Examples:
        >>> assembler = TaskAssembler()
        >>> assembler.open
        tensor([], dtype=torch.int64)
    """

    def __init__(self) -> None:
        self.waiting: list[Records] = []
        self._latest: Records = {}  # the last frame of each open stream, where its next step has to begin

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the records that wait for their task's end."""
        return record_columns(self.waiting[0]) if self.waiting else ()

    @property
    def open(self) -> torch.Tensor:
        """The streams whose task goes on, int64, increasing."""
        return self._latest["stream"] if self._latest else torch.zeros(0, dtype=torch.int64)

    def read(self, steps: TensorDictBase, check: Callable[[Records, str], None]) -> Records:
        """Turns a batch into frames sorted by stream, each step's root followed by its ``next`` frame (a tail).

        Args:
            steps: the batch.
            check: raises where records, in the order of the flattened batch, break a rule; it is told which part of a
                row they are.
        """
        if not isinstance(steps, TensorDictBase):
            got, remedy = type(steps).__name__, "Join several by torch.cat, or give one after the other"
            raise TypeError(f"{_WHERE}: steps must be a tensordict, got {got}. {remedy}.")
        if not steps.shape.numel() or not steps.ndim:  # `TensorDict.numel` is 1 at least
            raise ValueError(
                f"{_WHERE}: steps must have a batch dimension and rows, got shape {tuple(steps.shape)}. Leave empty "
                "batches out, and give a single transition as steps.unsqueeze(0)."
            )
        stream = _scalars(steps, schema.STREAM, "integers").long()
        order = _by_stream(stream)
        stream = stream[order]
        first = _scalars(steps, schema.IS_INIT, "booleans")[order]
        done = _scalars(steps, ("next", "done"), "booleans")[order]
        no, yes = torch.zeros_like(done), torch.ones_like(done)
        enters = torch.cat([yes[:1], stream[1:] != stream[:-1]])  # the stream's first row in this batch
        after_end = torch.cat([no[:1], done[:-1]]) & ~enters
        lost = (after_end | enters & ~torch.isin(stream, self.open)) & ~first
        if lost.any():
            row = int(lost.nonzero()[0])
            raise ValueError(
                f"{_WHERE}: a row must start its task (is_init) or go on with one, got stream {int(stream[row])} in "
                f"the middle of a task at row {int(order[row])}. Reset the environment, or give all its batches."
            )
        roots, tails = _frame_records(steps, ()), _frame_records(steps, ("next",))
        for records, part in ((roots, ""), (tails, " under 'next'")):
            check(records, part)
        if differ := (roots.keys() ^ tails.keys()) - {"metadata_q_star"}:
            raise KeyError(
                f"{_WHERE}: frames must have the same entries at the root and under 'next', got a difference in "
                f"{', '.join(sorted(differ))}. Add the entry where it is missing."
            )
        roots, tails = take(roots, order), take(tails, order)
        if "metadata_q_star" in roots and "metadata_q_star" not in tails:
            tails["metadata_q_star"] = torch.full((len(order), 1), -torch.inf)
        roots.update(stream=stream, first=first, tail=no, ends=no)
        tails.update(stream=stream, first=no, tail=yes, ends=done)
        return take(concatenate([roots, tails]), torch.arange(2 * len(order)).reshape(2, -1).T.flatten())

    def check_joins(self, table: Records) -> None:
        """Raises where a stream's next root is not the frame that its last step led to."""
        table = _sorted([self._latest, table] if self._latest else [table])
        joins, breaks = _repeats(table)[:-1], torch.zeros(len(table["stream"]) - 1, dtype=torch.bool)
        for name in record_columns(table):
            if name != "metadata_q_star":  # which a tail may lack
                differs = table[name][1:] != table[name][:-1]
                breaks |= joins & differs.reshape(len(joins), -1).any(-1)
        if breaks.any():
            stream = int(table["stream"][:-1][breaks][0])
            raise ValueError(
                f"{_WHERE}: a stream's step must begin with the frame that its last step led to, got another one in "
                f"stream {stream}: a batch is missing or repeated. Give every batch once, in the order of time."
            )

    def add(self, table: Records) -> tuple[Records, torch.Tensor] | None:
        """Takes a table in; returns the records of the tasks that it ends, and where each begins, if any."""
        stream, root = table["stream"], ~table["tail"]
        known = torch.isin(stream, self.open)
        enters = torch.cat([torch.tensor([True]), stream[1:] != stream[:-1]])
        self._latest = _last_frames([self._latest, table] if self._latest else [table])
        self.waiting.append(take(table, ~_repeats(table)))
        if not bool(table["ends"].any() or (root & table["first"] & (known | ~enters)).any()):
            return None
        table = _sorted(self.waiting)
        table = take(table, ~_repeats(table))
        goes_on = torch.cat([table["stream"][1:] == table["stream"][:-1], torch.tensor([False])])
        starts_next = torch.cat([table["first"][1:], torch.tensor([True])])
        finished = (table["ends"] | goes_on)[starts_next]
        finished = finished[table["first"].cumsum(0) - 1]
        done = take(table, finished)
        self.restore(take(table, ~finished))
        return {name: done[name] for name in record_columns(done)}, done["first"].nonzero().squeeze(-1)

    def state(self) -> Records:
        """The waiting records as one table, empty if there are none."""
        return concatenate(self.waiting) if self.waiting else {}

    def restore(self, table: Records) -> None:
        """Makes a table the only one that waits."""
        self.waiting = [dict(table)] if table and len(table["stream"]) else []
        self._latest = _last_frames(self.waiting) if self.waiting else {}


def record_columns(table: Records) -> tuple[str, ...]:
    """A table's columns without the flags."""
    return tuple(name for name in table if name not in _FLAGS)


def _values(steps: TensorDictBase, key: NestedKey, kind: Kind) -> torch.Tensor:
    """Reads an entry as ``[rows, ...]``."""
    value = schema.require(steps, key)
    if not isinstance(value, torch.Tensor) or not holds(value, kind):
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{_WHERE}: entry {key!r} must hold {kind}, got {got}. Convert it.")
    return value.detach().cpu().flatten(0, steps.ndim - 1)


def _scalars(steps: TensorDictBase, key: NestedKey, kind: Kind) -> torch.Tensor:
    """Reads an entry as ``[rows]``."""
    value = _values(steps, key, kind)
    if value.numel() != len(value):
        shape = tuple(value.shape[1:])
        raise ValueError(f"{_WHERE}: entry {key!r} must hold one value a step, got trailing shape {shape}. Reshape it.")
    return value.reshape(-1)


def _frame_records(steps: TensorDictBase, at: tuple[str, ...]) -> Records:
    """Reads the frames at the root (``at=()``) or under ``("next",)`` as records, in the order of the batch."""
    present = steps.keys(include_nested=True)

    def path(key: NestedKey) -> NestedKey:
        return unravel_key((*at, key))

    def number(key: NestedKey) -> torch.Tensor:
        return _scalars(steps, path(key), "numbers").float()

    def ids(key: NestedKey) -> torch.Tensor:
        value = _values(steps, path(key), "numbers")
        return schema.to_ids(value, value.shape[-1] if value.ndim > 1 else 1, 1, path(key))

    ends = (_scalars(steps, path(key), "booleans") for key in (schema.PREVIOUS_TERMINATED, schema.PREVIOUS_TRUNCATED))
    records = {
        "action": ids(schema.PREVIOUS_ACTION),
        "reward": number(schema.PREVIOUS_REWARD),
        "done": schema.done_code(*ends),
        "episode_step": _scalars(steps, path(schema.EPISODE_STEP), "integers").long(),
    }
    if path(schema.PREVIOUS_XFORMED_REWARD) in present:
        records["xformed_reward"] = number(schema.PREVIOUS_XFORMED_REWARD)
    if path(schema.OBSERVATION_DISCRETE) in present:
        records["observation_discrete"] = ids(schema.OBSERVATION_DISCRETE)
    if path(schema.OBSERVATION) in present:
        records["observation"] = _values(steps, path(schema.OBSERVATION), "numbers").float()
    if path(schema.PIXELS) in present:
        value = _values(steps, path(schema.PIXELS), "numbers").flatten(1)
        check_pixels(value, _WHERE, part=" under 'next'" if at else "")
        records[IMAGE] = to_pixels(value)
    if path(schema.Q_STAR) in present:
        records["metadata_q_star"] = _values(steps, path(schema.Q_STAR), "numbers").float()
    if path(schema.ACTION_MASK) in present:
        records["action_mask"] = _values(steps, path(schema.ACTION_MASK), "booleans")
    return records


def _by_stream(stream: torch.Tensor) -> torch.Tensor:
    """Sorts by stream, in time order within each; streams in order of appearance, for their ids are random."""
    _, seen, inverse = np.unique(stream.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(seen[inverse]).argsort(stable=True)


def _sorted(tables: Sequence[Records]) -> Records:
    """Joins tables and sorts them by stream, in time order within each."""
    table = concatenate(tables)
    return take(table, _by_stream(table["stream"]))


def _repeats(table: Records) -> torch.Tensor:
    """Marks the tails that come again as the root of the stream's next step: that root is the record."""
    follows = (table["stream"][1:] == table["stream"][:-1]) & ~table["tail"][1:] & ~table["first"][1:]
    return table["tail"] & ~table["ends"] & torch.cat([follows, torch.tensor([False])])


def _last_frames(tables: Sequence[Records]) -> Records:
    """The last frame of each stream, sorted by stream."""
    table = concatenate(tables)
    order = table["stream"].argsort(stable=True)
    stream = table["stream"][order]
    return take(table, order[torch.cat([stream[1:] != stream[:-1], torch.tensor([True])])])
