"""Whole tasks out of collected batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from torchrl_mouse import schema
from torchrl_mouse.data.columns import Records, concatenate, take

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey

_FLAGS = ("stream", "first", "tail", "ends")
_WHERE = "DatasetStore.extend"


class TaskAssembler:
    """Sorts collected steps by stream and gives each task back in one piece when it ends.

    It works in two steps, so that a batch can be refused before anything has changed: :meth:`read` turns steps into a
    table of records with the flags that say how they hang together, :meth:`add` takes the table in.

    Examples:
        >>> assembler = TaskAssembler()
        >>> assembler.open
        set()
    """

    def __init__(self) -> None:
        self.waiting: list[Records] = []
        self.open: set[int] = set()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the records that wait for their task's end."""
        return record_columns(self.waiting[0]) if self.waiting else ()

    def add(self, table: Records) -> tuple[Records, torch.Tensor] | None:
        """Takes a table in; returns the records of the tasks that it ends, and where each begins, if any."""
        stream, root = table["stream"], ~table["tail"]
        known = torch.isin(stream, torch.tensor(sorted(self.open), dtype=torch.int64))
        enters = torch.cat([torch.tensor([True]), stream[1:] != stream[:-1]])
        self.waiting.append(table)
        if not bool(table["ends"].any() or (root & table["first"] & (known | ~enters)).any()):
            self.open.update(_distinct(stream))
            return None
        table = concatenate(self.waiting)
        table = take(table, _by_stream(table["stream"]))
        goes_on = torch.cat([table["stream"][1:] == table["stream"][:-1], torch.tensor([False])])
        starts_next = torch.cat([table["first"][1:], torch.tensor([True])])
        # The last frame of an earlier batch comes again as the root of the next one: the root is the record.
        again = table["tail"] & ~table["ends"] & goes_on & ~starts_next
        finished = (table["ends"] | goes_on)[starts_next]
        finished = finished[table["first"].cumsum(0) - 1]
        done, rest = take(table, finished & ~again), take(table, ~finished & ~again)
        self.restore(rest)
        return {name: done[name] for name in record_columns(done)}, done["first"].nonzero().squeeze(-1)

    def state(self) -> Records:
        """The waiting records as one table, empty if there are none."""
        return concatenate(self.waiting) if self.waiting else {}

    def restore(self, table: Records) -> None:
        """Makes a table the only one that waits."""
        self.waiting = [dict(table)] if table and len(table["stream"]) else []
        self.open = _distinct(table["stream"]) if self.waiting else set()

    def read(self, steps: TensorDictBase) -> Records:
        """Turns a batch into records sorted by stream, each run followed by its last ``next`` frame (its tail)."""
        if not steps.numel() or not steps.ndim:
            raise ValueError(f"{_WHERE}: steps must have a batch dimension and rows, got shape {tuple(steps.shape)}.")
        flat = {key: schema.require(steps, key).detach().cpu().reshape(-1) for key in (schema.STREAM, schema.IS_INIT)}
        done = schema.require(steps, ("next", "done")).detach().cpu().reshape(-1)
        order = _by_stream(flat[schema.STREAM])
        stream, first, done = flat[schema.STREAM][order], flat[schema.IS_INIT][order], done[order]
        changes = stream[1:] != stream[:-1]
        true = torch.tensor([True])
        enters = torch.cat([true, changes])  # the stream's first row in this batch
        known = torch.isin(stream, torch.tensor(sorted(self.open), dtype=torch.int64))
        after_end = torch.cat([~true, done[:-1]]) & ~enters
        lost = (after_end | enters & ~known) & ~first
        if lost.any():
            row = int(lost.nonzero()[0])
            raise ValueError(
                f"{_WHERE}: a row must start its task (is_init) or go on with one, got stream {int(stream[row])} in "
                f"the middle of a task at row {int(order[row])}. Reset the environment, or give all its batches."
            )
        tail = (done | torch.cat([changes | first[1:], true])).nonzero().squeeze(-1)
        roots = _frame_records(steps, order)
        tails = _frame_records(steps.get("next"), order[tail])
        if "metadata_q_star" in roots and "metadata_q_star" not in tails:
            tails["metadata_q_star"] = torch.full((len(tail), 1), -torch.inf)
        no, yes = torch.zeros(len(order), dtype=torch.bool), torch.ones(len(tail), dtype=torch.bool)
        roots.update(stream=stream, first=first, tail=no, ends=no)
        tails.update(stream=stream[tail], first=~yes, tail=yes, ends=done[tail])
        position = torch.cat([torch.arange(len(order)) * 2, tail * 2 + 1]).argsort()
        return take(concatenate([roots, tails]), position)


def record_columns(table: Records) -> tuple[str, ...]:
    """A table's columns without the flags."""
    return tuple(name for name in table if name not in _FLAGS)


def _frame_records(frames: TensorDictBase, rows: torch.Tensor) -> Records:
    def flat(key: NestedKey) -> torch.Tensor:
        return schema.require(frames, key).detach().cpu().flatten(0, frames.ndim - 1)[rows]

    def ids(key: NestedKey) -> torch.Tensor:
        value = flat(key)
        return schema.to_ids(value, value.shape[-1] if value.ndim > 1 else 1, 1, key)

    records = {
        "action": ids(schema.PREVIOUS_ACTION),
        "reward": flat(schema.PREVIOUS_REWARD).float().reshape(-1),
        "done": schema.done_code(flat(schema.PREVIOUS_TERMINATED), flat(schema.PREVIOUS_TRUNCATED)).reshape(-1),
        "episode_step": flat(schema.EPISODE_STEP).long().reshape(-1),
    }
    present = frames.keys(include_nested=True)
    if schema.PREVIOUS_XFORMED_REWARD in present:
        records["xformed_reward"] = flat(schema.PREVIOUS_XFORMED_REWARD).float().reshape(-1)
    if schema.OBSERVATION_DISCRETE in present:
        records["observation_discrete"] = ids(schema.OBSERVATION_DISCRETE)
    if schema.OBSERVATION in present:
        records["observation"] = flat(schema.OBSERVATION).float()
    if schema.Q_STAR in present:
        records["metadata_q_star"] = flat(schema.Q_STAR).float()
    return records


def _by_stream(stream: torch.Tensor) -> torch.Tensor:
    """Sorts by stream, in time order within each; streams in order of appearance, for their ids are random."""
    _, seen, inverse = np.unique(stream.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(seen[inverse]).argsort(stable=True)


def _distinct(stream: torch.Tensor) -> set[int]:
    return set(np.unique(stream.numpy()).tolist())
