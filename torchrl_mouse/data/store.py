"""Stored experience: Hugging Face data sets read in place, and rows appended while learning goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import datasets
import numpy as np
import pyarrow as pa
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data.replay_buffers.storages import Storage

from torchrl_mouse.data.collected import TaskAssembler, record_columns
from torchrl_mouse.data.columns import COLUMNS, TASK, UNLIMITED, Columns, Records, check_same, one_row
from torchrl_mouse.data.rows import ArrowRows, TensorRows, dataset_parts, load_rows, pieces, read_columns, to_arrow
from torchrl_mouse.data.saving import StoreCheckpointer, check_datasets
from torchrl_mouse.data.steps import OWN, Part, Selection, as_rows

if TYPE_CHECKING:
    from tensordict.utils import NestedKey


class DatasetStore(Storage):
    """A TorchRL storage over Hugging Face data sets and appended rows: one live sequence of records.

    A record is an observation with the action, reward and done code that *led to it*. Reading index ``i`` gives the
    step in TorchRL's layout: the root from record ``i``, ``action`` and ``"next"`` from record ``i + 1`` of the same
    task. A task's last record carries no decision: ``("collector", "mask")`` is false there and only there, and its
    ``"next"`` repeats its own frame. ``("next", "done")`` is the end of the *task*, ``terminated`` where its last
    record's done code is 1, else ``truncated``.

    Loaded rows stay in their Arrow buffers (memory-mapped where the data set is on disk); a read copies the columns
    and rows asked for and nothing else, at a cost that does not grow with the number of rows or chunks. Image files
    are decoded when they are read.

    Args:
        max_action_dim: actions lie in ``[0, max_action_dim)``; teacher values are padded to this width by ``-inf``,
            action masks by false. Set it to the model's number of actions: the default is only MOUSE's own.
        max_obs_continuous_dim: width ``C`` to which ``observation`` is cut or zero-padded; 0: it is not read.
        max_obs_discrete_dim: ``observation_discrete`` lies in ``[0, max_obs_discrete_dim)``; 0: it is not read.
        max_obs_image_pixels: width ``P`` to which the values of an ``observation_image`` (height, width, channel, one
            row) are zero-padded; 0: it is not read.
        keys: the entries that a read returns, see :meth:`select`; ``None``: all that the columns allow.

    .. note::
        Only finished tasks are visible after :meth:`extend`; unfinished ones wait aside. Build the buffer with
        :func:`~torchrl_mouse.data.replay_buffer`: an unknown storage otherwise lacks a ``collate_fn``, and TorchRL's
        default writer overwrites rows, which this storage refuses.

    Examples:
        >>> rows = {"action": [0, 3, 1], "reward": [0.0, 0.5, 1.0], "done": [0, 0, 1], "episode_step": [0, 1, 2]}
        >>> store = DatasetStore().from_dataset(datasets.Dataset.from_dict(rows))
        >>> store
        DatasetStore(steps=3, tasks=1)
        >>> steps = store[0:3]
        >>> steps["action"].tolist(), steps["next", "reward"].squeeze(-1).tolist()
        ([3, 1, 0], [0.5, 1.0, 0.0])
        >>> steps["collector", "mask"].tolist()
        [True, True, False]
    """

    _default_checkpointer = StoreCheckpointer

    def __init__(
        self,
        max_action_dim: int = 1000,
        max_obs_continuous_dim: int = 0,
        max_obs_discrete_dim: int = 0,
        max_obs_image_pixels: int = 0,
        keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__(max_size=UNLIMITED)
        self._columns = Columns(max_action_dim, max_obs_continuous_dim, max_obs_discrete_dim, max_obs_image_pixels)
        self.select(keys)
        self._clear()

    def _clear(self) -> None:
        self._blocks: list[ArrowRows | TensorRows] = []
        self._block_starts = torch.zeros(1, dtype=torch.int64)
        self._task_bounds = torch.zeros(1, dtype=torch.int64)  # each task's first row, then the number of rows
        self._names: tuple[str, ...] = ()
        self._unfinished = TaskAssembler()
        self._appended_task: list[int] = []  # the task id that `append` goes on with, if it may

    def select(self, keys: Sequence[NestedKey] | None) -> Self:
        """Limits reads to some entries, so that columns that nobody needs are never touched.

        Args:
            keys: what a model and a loss declare, for instance ``[*model.in_keys, *loss.in_keys]``; keys that the store
                does not hold are what other modules write, and are left to them. ``("collector", "mask")`` is always
                read. ``None``: every entry.

        Returns:
            The store itself.

        Raises:
            TypeError: a plain string instead of a list.

        Examples:
            >>> rows = {"action": [0, 3], "reward": [0.0, 1.0], "done": [0, 1], "episode_step": [0, 1]}
            >>> store = DatasetStore().from_dataset(datasets.Dataset.from_dict(rows)).select(["action"])
            >>> sorted(store[0:2].keys(include_nested=True, leaves_only=True), key=str)
            [('collector', 'mask'), 'action']
        """
        self._selection = Selection(keys)
        return self

    def get(self, index: Any) -> TensorDict:
        """Reads steps.

        Args:
            index: an int, a slice, a range, a list, an integer tensor of any shape ``[*]``, or a 1-tuple of one;
                negative indices count from the end.

        Returns:
            Steps ``[*]``, with no batch dimension for an int. Every call returns fresh, writable tensors.

        Raises:
            IndexError: an index is out of range.
            RuntimeError: the store has no rows.
            TypeError: the index is none of the above.
            ValueError: an image file cannot be decoded.

        Examples:
            >>> rows = {"action": [0, 3], "reward": [0.0, 1.0], "done": [0, 1], "episode_step": [0, 1]}
            >>> store = DatasetStore().from_dataset(datasets.Dataset.from_dict(rows))
            >>> store.get(torch.tensor([[0, 1], [1, 1]])).shape, store.get(-1)["episode_step"].tolist()
            (torch.Size([2, 2]), [1])
        """
        rows = as_rows(index, self._require_rows("read"))
        # NumPy takes less time than torch for arithmetic on some thousand integers.
        own, bounds = rows.numpy(), self._task_bounds.numpy()
        task = bounds[1:].searchsorted(own, "right")
        last = (bounds[1:] - 1).take(task)
        pair = np.empty((2, *own.shape), np.int64)
        pair[0], pair[1] = own, np.minimum(own + 1, last)
        records = self._read_pairs(torch.from_numpy(pair), self._selection.parts)
        begins = torch.as_tensor(own == bounds.take(task))
        ends, next_ends = torch.from_numpy(pair == last).unbind()
        return self._selection.steps(records, begins=begins, ends=ends, next_ends=next_ends)

    def _require_rows(self, what: str) -> int:
        if not (length := len(self)):
            raise RuntimeError(
                f"DatasetStore: a store with no rows cannot be {what}, got 0 rows and "
                f"{len(self._unfinished.open)} unfinished tasks. Fill it with from_dataset, append or extend."
            )
        return length

    def _read(self, rows: torch.Tensor, names: Iterable[str]) -> Records:
        """Reads columns in the store's dtypes and widths: ``[n]``, or ``[n, width]`` for those that hold lists."""
        return self._read_pairs(rows.unsqueeze(0), dict.fromkeys(names, OWN))

    def _read_pairs(self, rows: torch.Tensor, parts: Mapping[str, Part]) -> Records:
        """Reads columns at ``rows[part]``, for ``rows`` ``[2, *]`` the steps' own and the next ones."""
        parts = {name: part for name, part in parts.items() if name in self._names}
        if len(self._blocks) == 1 or not rows.numel():
            return read_columns(self._blocks[0], self._columns, rows, parts)
        flat = rows.reshape(-1)
        block_of = torch.searchsorted(self._block_starts, flat, right=True) - 1
        order = block_of.argsort(stable=True)
        blocks, counts = np.unique(block_of.numpy(), return_counts=True)
        local = torch.split((flat - self._block_starts[block_of])[order], counts.tolist())
        pieces_of = [
            read_columns(self._blocks[block], self._columns, here.unsqueeze(0), dict.fromkeys(parts, OWN))
            for block, here in zip(blocks, local, strict=True)
        ]
        back = order.argsort()
        records = {name: torch.cat([piece[name] for piece in pieces_of])[back] for name in parts}
        return {name: value.reshape(rows.shape + value.shape[1:])[parts[name]] for name, value in records.items()}

    def from_dataset(
        self,
        dataset: datasets.Dataset | datasets.DatasetDict,
        splits: str | Sequence[str] | None = None,
        split_pattern: str | Sequence[str] | None = None,
        task: str | None = "task",
    ) -> Self:
        """Adds the rows of a data set, which stay where they are.

        Args:
            dataset: columns ``action``, ``reward``, ``done``, ``episode_step`` and any of ``observation``,
                ``observation_discrete``, ``observation_image`` (files, or arrays of integers in 0..255 or floats in
                0..1), ``metadata_q_star``, ``action_mask`` (booleans), ``xformed_reward``. Others are not read, nor are
                those that are all null.
            splits: exact names of a ``DatasetDict``'s splits; by default all.
            split_pattern: glob patterns of such names instead.
            task: integer column that names the task; each run of equal ids is one task. Without the column, each split
                is one task. Rows added by separate calls, or from separate splits, never share a task.

        Returns:
            The store itself.

        Raises:
            KeyError: a column or split is missing.
            TypeError: not a data set, or a column of the wrong type.
            ValueError: no rows, a null, a number that is infinite, NaN or out of range, or an image that is unreadable
                or too large; both ``splits`` and ``split_pattern``. Nothing is added then.

        .. note::
            One vectorised pass checks the values of every column but the teacher's, at some million rows a second, and
            so reads the file once; it keeps the tasks' first rows only. Lists of several lengths cost 12 bytes a row.
            Of image files only the header is read, some 50,000 a second: damage behind it shows when they are read.

        Examples:
            >>> rows = {"action": [0, 1, 0], "reward": [0.0, 1.0, 0.0], "done": [0, 2, 0], "episode_step": [0, 1, 0]}
            >>> dataset = datasets.Dataset.from_dict({**rows, "task": [7, 7, 8]})
            >>> DatasetStore().from_dataset(dataset).task_starts.tolist()
            [0, 2]
        """
        parts = dataset_parts(dataset, splits, split_pattern)
        loaded = [load_rows(part, self._columns, task, where) for part, where in parts]
        for block, _ in loaded:
            self._check_names(block.names, "DatasetStore.from_dataset", loaded[0][0].names)
        for block, starts in loaded:
            self._add_block(block, starts)
        return self

    def _check_names(self, names: Sequence[str], where: str, default: Sequence[str] = ()) -> None:
        """All rows have the same columns, so that every read has the same entries; a teacher may be absent."""
        self._columns.check_read(names, where)
        check_same(self._names or self._unfinished.columns or default or names, names, where)

    def append(self, record: dict[str, Any]) -> None:
        """Appends one record, visible at once.

        Args:
            record: values under the column names; ``task`` (an int) starts a new task where it differs from the last
                appended record's. Without it, records go on with the task that ``append`` began.

        Raises:
            KeyError: a column is missing or unknown.
            TypeError: a value of the wrong type.
            ValueError: a number that is infinite, NaN or out of range, several values in one, an unreadable image, or a
                column that the store's sizes leave out. Nothing is stored then.

        Examples:
            >>> store = DatasetStore()
            >>> store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0})
            >>> store.append({"action": 4, "reward": 1.0, "done": 1, "episode_step": 1})
            >>> store, store[0]["action"].item()
            (DatasetStore(steps=2, tasks=1), 4)
        """
        where = "DatasetStore.append"
        records = self._columns.from_record(record, where, len(self))
        self._check_names(tuple(records), where)
        self._columns.check_values(records, where, len(self))
        given = record.get(TASK)
        go_on = next(iter(self._appended_task), 0)
        task = go_on if given is None else int(one_row(TASK, given, where, len(self)))
        starts = [] if self._appended_task == [task] else [0]
        self._add_records(records, torch.tensor(starts, dtype=torch.int64))
        self._appended_task = [task]

    def extend(self, steps: TensorDictBase) -> None:
        """Appends collected transitions: a task is written in one piece when it ends, until then it waits aside.

        Rows are told apart by ``stream``, so any mixture of environments and any cut of their time into batches gives
        the same tasks. A stream that starts a new task before the old one ended (a reset from outside) ends the old one
        there. A task of ``n`` steps becomes ``n + 1`` records: one per root, and its last ``"next"`` frame.

        Args:
            steps: transitions ``[*]``, time in order along the last dimension, with ``stream``, ``is_init``,
                ``("next", "done")`` and the frame entries at the root and under ``"next"``; other entries are not
                stored. Actions and discrete observations may be one-hot.

        Raises:
            KeyError: an entry is missing.
            TypeError: not a tensordict, or an entry of the wrong dtype.
            ValueError: a number that is infinite, NaN or out of range, a row that begins in the middle of an unknown
                task, or one that does not go on where its stream's last step ended. Nothing is stored then.

        Examples:
            >>> def frame(time, reward, done):
            ...     flag = torch.tensor([[[done]]])
            ...     previous = {"action": torch.tensor([[2]]), "reward": torch.tensor([[[reward]]])}
            ...     previous = previous | {"terminated": flag, "truncated": torch.zeros_like(flag)}
            ...     return {"previous": previous, "episode_step": torch.tensor([[[time]]])}
            >>> flag = torch.tensor([[[True]]])
            >>> step = {**frame(0, 0.0, False), "next": {**frame(1, 1.0, True), "done": flag}}
            >>> step = TensorDict({**step, "is_init": flag, "stream": torch.tensor([[[81]]])}, [1, 1])
            >>> store = DatasetStore()
            >>> store.extend(step)
            >>> store[:]["next", "reward"].squeeze(-1).tolist()
            [1.0, 0.0]
        """
        where = "DatasetStore.extend"

        def check(records: Records, part: str) -> None:
            self._columns.check_read(tuple(records), where)
            self._columns.check_values(records, where, part=part)

        table = self._unfinished.read(steps, check)
        self._check_names(record_columns(table), where)
        self._unfinished.check_joins(table)
        finished = self._unfinished.add(table)
        if finished is not None:
            self._add_records(*finished)
            self._appended_task = []

    def _add_records(self, records: Records, starts: torch.Tensor) -> None:
        last = self._blocks[-1] if self._blocks else None
        if isinstance(last, TensorRows):
            last.extend(records)
            self._account(len(records["action"]), starts, records)
        else:
            self._add_block(TensorRows(records), starts)

    def _add_block(self, block: ArrowRows | TensorRows, starts: torch.Tensor) -> None:
        self._block_starts = torch.cat([self._block_starts[: len(self._blocks)], torch.tensor([len(self)])])
        self._blocks.append(block)
        self._account(len(block), starts, block.names)
        self._appended_task = []

    def _account(self, rows: int, starts: torch.Tensor, names: Iterable[str]) -> None:
        self._names = tuple(name for name in COLUMNS if name in {*self._names, *names})
        end = self._task_bounds[-1:]
        self._task_bounds = torch.cat([self._task_bounds[:-1], starts + end, end + rows])
        self._bump_mutation_revision()

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Refuses to write at an index: stored rows never change.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"DatasetStore: rows must be appended, got a write at index {cursor}. Use store.extend or store.append; a "
            "buffer built by torchrl_mouse.data.replay_buffer does so in rb.extend."
        )

    def __len__(self) -> int:
        return int(self._task_bounds[-1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={len(self)}, tasks={self.num_tasks})"

    @property
    def task_starts(self) -> torch.Tensor:
        """The first record of each task, int64 ``[num_tasks]``, increasing; read only."""
        return self._task_bounds[:-1]

    @property
    def source_starts(self) -> torch.Tensor:
        """The first task of each data set that was loaded, and of each run of appended rows; int64, increasing."""
        appended = [isinstance(block, TensorRows) for block in self._blocks]
        first = [number for number, own in enumerate(appended) if not (own and number and appended[number - 1])]
        return torch.searchsorted(self.task_starts, self._block_starts[first])

    @property
    def num_tasks(self) -> int:
        """The number of tasks that can be read; unfinished collected ones are not counted."""
        return len(self._task_bounds) - 1

    def contains(self, item: int | torch.Tensor) -> bool | torch.Tensor:
        """Says whether records exist at an index or at each index of a tensor."""
        return (item >= -len(self)) & (item < len(self))

    def clear(self) -> None:
        """Forgets all rows and unfinished tasks; data sets on disk are left as they are."""
        self._clear()
        self._bump_mutation_revision()

    def _empty(self) -> None:
        self.clear()

    def to_dataset(self) -> datasets.Dataset:
        """Writes the finished tasks as a data set that :meth:`from_dataset` reads back to the same steps.

        Returns:
            The rows in order, with a ``task`` column that numbers the tasks; teacher values as wide as the widest.

        Raises:
            RuntimeError: the store has no rows.

        .. note::
            The result lies in memory; images are written as arrays of pixels.

        Examples:
            >>> store = DatasetStore()
            >>> store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0})
            >>> store.to_dataset().column_names
            ['action', 'reward', 'done', 'episode_step', 'task']
        """
        length = self._require_rows("written")
        features, names = self._columns.features(self._names, self._blocks), set(self._names)
        batches = []
        for rows in pieces(length, self._columns.row_width(names)):
            records = self._read(rows, names)
            task = torch.searchsorted(self.task_starts, rows, right=True) - 1
            batches.append(to_arrow({**records, "task": task}, features))
        table = datasets.table.InMemoryTable(pa.Table.from_batches(batches))
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))

    def state_dict(self) -> dict[str, Any]:
        """Returns what a data set on disk does not hold: appended rows, unfinished tasks, and where tasks start.

        Of a data set it holds the path, the sizes of the files, the number of rows and the fingerprint.
        """
        return {
            "blocks": [block.state() for block in self._blocks],
            "task_bounds": self._task_bounds.clone(),
            "unfinished": self._unfinished.state(),
            "appended_task": list(self._appended_task),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a saved state; the data sets that were loaded then must be loaded first.

        Raises:
            KeyError: the saved columns are not those of the loaded data sets.
            ValueError: the loaded data sets are not those of the saved store, or changed on disk since; or the saved
                rows, or those of unfinished tasks, do not fit the store's sizes. The store is as it was then.

        Examples:
            >>> store, other = DatasetStore(), DatasetStore()
            >>> store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0})
            >>> other.load_state_dict(store.state_dict())
            >>> other
            DatasetStore(steps=1, tasks=1)
        """
        where = "DatasetStore.load_state_dict"
        loaded = [block for block in self._blocks if isinstance(block, ArrowRows)]
        check_datasets(
            [state for state in state_dict["blocks"] if "fingerprint" in state], [block.state() for block in loaded]
        )
        remaining = iter(loaded)
        blocks = [next(remaining) if "fingerprint" in s else TensorRows(s) for s in state_dict["blocks"]]
        unfinished = TaskAssembler()
        unfinished.restore(state_dict["unfinished"])
        held = [names for names in (*(block.names for block in blocks), unfinished.columns) if names]
        for names in held:
            self._columns.check_read(names, where)
            check_same(held[0], names, where)
        for state in state_dict["blocks"]:
            if "fingerprint" not in state:
                self._columns.check_values(state, where)
        waiting = {name: unfinished.waiting[0][name] for name in unfinished.columns}
        self._columns.check_values(waiting, where, part=" of an unfinished task")
        self._clear()
        for block in blocks:
            self._add_block(block, torch.zeros(0, dtype=torch.int64))
        self._task_bounds = state_dict["task_bounds"].clone()
        self._unfinished = unfinished
        self._appended_task = list(state_dict["appended_task"])
        self._bump_mutation_revision()
