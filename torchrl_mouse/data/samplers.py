"""Windows of stored steps, and the replay buffer that samples them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.writers import Writer

from torchrl_mouse import schema
from torchrl_mouse.data.saving import replace_json
from torchrl_mouse.data.store import DatasetStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensordict import TensorDictBase
    from torchrl.data.replay_buffers.storages import Storage


Sampling = Literal["random", "last", "sequential", "batch"]


class WindowSampler(Sampler):
    """Draws windows of consecutive steps that never leave a task.

    ``batch_size`` counts windows, so a buffer's sample has shape ``[batch_size, window]``. Index 0 of a window is where
    a context starts; ``is_init`` and ``("next", "truncated")`` stay what they are in the task, at a window's edges too.
    A window that reaches beyond its task's end is padded on the right by the task's last record, whose
    ``("collector", "mask")`` is false.

    Every start at which a whole window fits into its task is a window of ``"random"`` and ``"last"``, and so is the
    start of each task that is shorter. ``"sequential"`` and ``"batch"`` go through epochs instead: windows from each
    task's start to its end, of which neighbours share one step. The first window shows it as a successor only,
    ``("collector", "mask")`` false; the second begins with it. So each decision counts once an epoch, together with its
    successor. (A loss that looks two frames ahead, as DQN with ``gamma_terminal`` above 0 does at an episode's end,
    misses a decision where the second frame is outside.) An epoch's last batch holds the windows that are left; the
    next :meth:`sample` begins a new epoch. ``for batch in rb`` ends with the epoch.

    The task index of the store is followed live: steps that arrive later are sampled as soon as their task is written,
    or from the next epoch on.

    Args:
        window: steps per window, at least 2; ``None``: whole tasks, padded to the longest of the batch. Memory then
            follows the longest task.
        sampling: ``"random"`` draws windows independently, each equally likely over all tasks; ``"last"`` gives the
            newest ``batch_size`` windows, the last one ending at the newest record, and fewer if there are fewer;
            ``"sequential"`` gives an epoch's windows in order; ``"batch"`` shuffles them anew in every epoch.
        start_share: probability, in [0, 1], that a ``"random"`` window starts at a task's first step instead, with
            tasks equally likely. A model that learns inside its context has to learn how a task begins, which is rare
            among uniform starts of long tasks.
        weights: shares of ``"random"`` windows, one for each data set in the order in which they were added, whatever
            their sizes; at least 0, any sum. Each split loaded is one data set, and so is each run of appended or
            collected rows; until one is there, its share falls to the others. By default all windows are alike.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or has no effect on this kind of sampling.

    .. note::
        Numbers come from the buffer's generator, which the buffer saves and restores: equal seeds give equal batches,
        and a resumed run goes on exactly, in the middle of an epoch too. A ``"batch"`` epoch keeps 4 bytes a window.
        With ``prefetch`` above 1, TorchRL's threads may swap neighbouring batches.

    Examples:
        >>> store = DatasetStore()
        >>> for step in range(4):
        ...     store.append({"action": step, "reward": 0.0, "done": 0, "episode_step": step})
        >>> rows, _ = WindowSampler(3, start_share=1.0).sample(store, 2)
        >>> rows.tolist()
        [[0, 1, 2], [0, 1, 2]]
        >>> rows, _ = WindowSampler(3, sampling="sequential").sample(store, 2)
        >>> rows.tolist()
        [[0, 1, 2], [2, 3, 3]]
        >>> rows, _ = WindowSampler(3, sampling="last").sample(store, 2)
        >>> rows.tolist()
        [[0, 1, 2], [1, 2, 3]]
        >>> rows, _ = WindowSampler(None).sample(store, 1)
        >>> rows.tolist()
        [[0, 1, 2, 3]]
    """

    _rng: torch.Generator | None

    def __init__(
        self,
        window: int | None,
        *,
        sampling: Sampling = "random",
        start_share: float = 0.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
            raise TypeError(
                f"WindowSampler: window must be an int or None, got {type(window).__name__}. Give a number of steps."
            )
        if window is not None and window < 2:
            raise ValueError(
                f"WindowSampler: window must be at least 2 steps, got {window}. One step has no successor."
            )
        if sampling not in get_args(Sampling):
            modes = ", ".join(get_args(Sampling))
            raise ValueError(f"WindowSampler: sampling must be one of {modes}, got {sampling!r}.")
        if not 0.0 <= start_share <= 1.0:
            raise ValueError(f"WindowSampler: start_share must lie in [0, 1], got {start_share}. It is a probability.")
        if sampling != "random" and (start_share or weights is not None):
            raise ValueError(
                f'WindowSampler: sampling must be "random" where start_share or weights are given, got {sampling!r}. '
                "The other samplings draw nothing that these could weigh."
            )
        shares = torch.as_tensor([1.0] if weights is None else weights, dtype=torch.float64)
        if shares.ndim != 1 or not (shares >= 0).all() or not 0 < shares.sum() < torch.inf:
            raise ValueError(
                f"WindowSampler: weights must be numbers of at least 0, one of them positive, got {weights}. Give one "
                "for each data set."
            )
        self.window = window
        self.sampling = sampling
        self.start_share = start_share
        self.weights = None if weights is None else shares
        self._epochs = sampling in ("sequential", "batch")
        self._stride = window - 1 if self._epochs and window is not None else 1
        self._empty()

    def _empty(self) -> None:
        self._indexed: tuple[DatasetStore, int] | None = None
        self._epoch: _Epoch | None = None
        self._order: torch.Tensor | None = None
        self._ran_out = False
        self._remaining_batches = Sampler._remaining_batches

    def sample(self, storage: Storage, batch_size: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Chooses the record indices of windows.

        Args:
            storage: a :class:`DatasetStore`.
            batch_size: the number of windows ``B``.

        Returns:
            int64 ``[B, window]``, with fewer windows at the end of an epoch and where ``"last"`` finds fewer; and in
            epochs, the mask that the buffer writes over the store's own.

        Raises:
            RuntimeError: the store has no rows.
            TypeError: another kind of storage.
            ValueError: no windows are asked for, or the store does not match the weights, or a restored epoch.
        """
        if not isinstance(storage, DatasetStore):
            raise TypeError(f"WindowSampler: the storage must be a DatasetStore, got {type(storage).__name__}.")
        if batch_size < 1:
            raise ValueError(f"WindowSampler: batch_size must be at least 1, got {batch_size}. It counts windows.")
        storage._require_rows("sampled")
        if self._epochs:
            numbers = self._advance(storage, batch_size)
        else:
            self._follow(storage)
            first = max(self._windows.total - batch_size, 0)
            random = self.sampling == "random"
            numbers = self._draw(batch_size) if random else torch.arange(first, self._windows.total)
        rows = self._windows.rows(numbers)
        followed = rows[:, 1:] > rows[:, :-1]
        return rows, {schema.MASK: torch.nn.functional.pad(followed, (0, 1))} if self._epochs else {}

    def _follow(self, store: DatasetStore) -> None:
        """Counts the windows at which a start is possible; only when the store has changed."""
        now = (store, int(store._mutation_revision))
        if self._indexed == now:
            return
        self._windows = _Windows(store, store.num_tasks, self.window, self._stride)
        self._bounds = torch.tensor([0, store.num_tasks])  # each data set's first task, then the number of tasks
        if self.weights is not None:
            self._bounds = torch.cat([store.source_starts, self._bounds[1:]])
            present = len(self._bounds) - 1
            if present > len(self.weights) or not self.weights[:present].any():
                raise ValueError(
                    f"WindowSampler: weights must have one for each of the store's {present} data sets, one of them "
                    f"positive, got {self.weights.tolist()}. Each split and each run of appended rows is one."
                )
        self._indexed = now

    def _draw(self, batch_size: int) -> torch.Tensor:
        """Draws window numbers, by the shares of data sets and of task starts."""
        data_set = torch.zeros(batch_size, dtype=torch.int64)
        if self.weights is not None:
            shares = self.weights[: len(self._bounds) - 1]
            data_set = torch.multinomial(shares, batch_size, replacement=True, generator=self._rng)
        first_of = self._windows.first
        numbers = self._uniform(first_of[self._bounds], data_set)
        if self.start_share:
            at_start = torch.rand(batch_size, generator=self._rng) < self.start_share
            numbers = torch.where(at_start, first_of[self._uniform(self._bounds, data_set)], numbers)
        return numbers

    def _uniform(self, bounds: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Draws integers in ``[bounds[part], bounds[part + 1])``; 53 random bits are even enough."""
        share = torch.rand(part.shape, dtype=torch.float64, generator=self._rng)
        return bounds[part] + (share * (bounds[part + 1] - bounds[part])).long()

    def _advance(self, store: DatasetStore, batch_size: int) -> torch.Tensor:
        """Returns the next window numbers of the epoch."""
        epoch, now = self._epoch, (store, int(store._mutation_revision))
        if epoch and (epoch.position == epoch.windows or (self._indexed != now and not self._goes_on(epoch, store))):
            epoch = None
        if epoch is None:
            self._windows = _Windows(store, store.num_tasks, self.window, self._stride)
            seed = int(torch.randint(2**62, (), generator=self._rng)) if self.sampling == "batch" else 0
            self._epoch = epoch = _Epoch(tasks=store.num_tasks, windows=self._windows.total, seed=seed)
            self._order = None
        self._indexed = now
        stop = min(epoch.position + batch_size, epoch.windows)
        if self.sampling == "batch":
            if self._order is None:
                generator = torch.Generator().manual_seed(epoch.seed)
                self._order = torch.randperm(epoch.windows, generator=generator, dtype=torch.int32)
            numbers = self._order[epoch.position : stop].long()
        else:
            numbers = torch.arange(epoch.position, stop)
        epoch.position = stop
        self._ran_out = stop == epoch.windows
        self._remaining_batches = -((stop - epoch.windows) // batch_size)
        return numbers

    def _goes_on(self, epoch: _Epoch, store: DatasetStore) -> bool:
        """Says whether a changed or restored store still has the epoch's windows, and reads where they lie now.

        Rows are only ever appended, so the epoch's windows keep their numbers; the last task may have grown.
        """
        windows = _Windows(store, epoch.tasks, self.window, self._stride)
        fits = len(windows.starts) == epoch.tasks and int(windows.first[-2]) < epoch.windows <= windows.total
        if self._indexed is not None:
            fits = fits and self._indexed[0] is store and torch.equal(windows.starts, self._windows.starts)
        elif not fits:
            raise ValueError(
                f"WindowSampler: the store must be that of the restored epoch ({epoch.tasks} tasks, {epoch.windows} "
                f"windows), got {store}. Restore the store as well, and give the same window and sampling."
            )
        if fits:
            self._windows = windows
        return fits

    @property
    def ran_out(self) -> bool:
        """Whether the last sample was an epoch's last; TorchRL sets it to false to iterate again."""
        return self._ran_out

    @ran_out.setter
    def ran_out(self, value: bool) -> None:
        self._ran_out = value

    def state_dict(self) -> dict[str, Any]:
        """Returns where the epoch stands, and the generator's state where there is a generator."""
        epoch = None if self._epoch is None else asdict(self._epoch)
        state = {"epoch": epoch, "ran_out": self._ran_out, "remaining_batches": self._remaining_batches}
        return state if self._rng is None else {**state, "rng": self._rng.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the epoch, and the generator in place."""
        self._empty()
        self._epoch = None if state_dict["epoch"] is None else _Epoch(**state_dict["epoch"])
        self._ran_out = state_dict["ran_out"]
        self._remaining_batches = state_dict["remaining_batches"]
        if "rng" in state_dict:
            self._rng = torch.Generator() if self._rng is None else self._rng
            self._rng.set_state(state_dict["rng"])

    def dumps(self, path: str | Path) -> None:
        """Writes where the epoch stands; the buffer saves the generator."""
        state = {name: value for name, value in self.state_dict().items() if name != "rng"}
        replace_json(Path(path) / "sampler.json", state)

    def loads(self, path: str | Path) -> None:
        """Reads where the epoch stands."""
        self.load_state_dict(json.loads((Path(path) / "sampler.json").read_text()))

    def __repr__(self) -> str:
        weights = None if self.weights is None else self.weights.tolist()
        return (
            f"{type(self).__name__}(window={self.window}, sampling={self.sampling!r}, start_share={self.start_share}, "
            f"weights={weights})"
        )


@dataclass
class _Epoch:
    """One pass over the windows that there were when it began."""

    tasks: int
    windows: int
    seed: int
    position: int = 0


class _Windows:
    """The windows of a store's first tasks, numbered through from task to task; memory per task only.

    Args:
        store: the store.
        tasks: how many tasks to read.
        window: steps per window; ``None``: one window per task.
        stride: steps from one window's start to the next one's.
    """

    def __init__(self, store: DatasetStore, tasks: int, window: int | None, stride: int) -> None:
        ends = torch.cat([store.task_starts[1:], torch.tensor([len(store)])])[:tasks]
        self.starts, self.last = store.task_starts[:tasks].clone(), ends - 1
        lengths = ends - self.starts
        # As many as it takes to reach the last record.
        beyond = torch.zeros_like(lengths) if window is None else (lengths - window).clamp(min=0)
        counts = 1 - (-beyond).div(stride, rounding_mode="floor")
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])  # of each task, then the total
        self.total = int(self.first[-1])
        self._window, self._stride = window, stride

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns the records of windows, int64 ``[B, window]``, padded by their task's last."""
        task = torch.searchsorted(self.first[1:], numbers, right=True)
        start = self.starts[task] + (numbers - self.first[task]) * self._stride
        last = self.last[task].unsqueeze(-1)
        # A step and its successor is the least that a loss can learn from.
        window = max(2, int((last - start.unsqueeze(-1)).max()) + 1) if self._window is None else self._window
        return torch.minimum(start.unsqueeze(-1) + torch.arange(window), last)


class TaskWriter(Writer):
    """The writer of a :class:`DatasetStore`: hands batches to the store, which appends each task when it ends.

    TorchRL's default writer chooses an index for each row and goes round; here rows wait for the end of their task, so
    no index is known yet and ``rb.extend`` returns ``None``. ``rb.write_count`` counts the steps handed over.

    Examples:
        >>> TaskWriter()
        TaskWriter()
    """

    def __init__(self) -> None:
        super().__init__()
        self._write_count = 0

    def add(self, data: TensorDictBase) -> None:
        """Hands over one step."""
        self.extend(data.unsqueeze(0))

    def extend(self, data: TensorDictBase) -> None:
        """Hands over a batch of steps, see :meth:`DatasetStore.extend`."""
        self._storage.extend(data)
        self._write_count += data.numel()

    def _empty(self, empty_write_count: bool = True) -> None:
        if empty_write_count:
            self._write_count = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps handed over."""
        return {"write_count": self._write_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of steps handed over."""
        self._write_count = state_dict["write_count"]

    def dumps(self, path: str | Path) -> None:
        """Writes the number of steps handed over."""
        replace_json(Path(path) / "writer.json", self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Reads the number of steps handed over."""
        self.load_state_dict(json.loads((Path(path) / "writer.json").read_text()))


class _EpochBuffer(TensorDictReplayBuffer):
    """Iterates to the end of an epoch, also where a loop goes on with one whose last batches lie prefetched."""

    def __iter__(self) -> Iterator[TensorDictBase]:
        # TorchRL begins a new epoch here whenever the sampler has run out, and so joins the old one's rest to it.
        if not self._prefetch_queue:
            self.sampler.ran_out = False
        while not self.sampler.ran_out or self._prefetch_queue:
            yield self.sample()


def replay_buffer(
    store: DatasetStore,
    *,
    window: int | None,
    batch_size: int,
    sampling: Sampling = "random",
    start_share: float = 0.0,
    weights: Sequence[float] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> TensorDictReplayBuffer:
    """Builds the TorchRL replay buffer of a store: ``rb.sample()`` gives windows, ``rb.extend(batch)`` appends tasks.

    It sets the writer, the ``collate_fn`` and the generator that a store needs and that TorchRL's defaults get wrong.
    Transforms see the sample ``[batch_size, window]``; one that changes that shape fails when the buffer adds its
    ``"index"`` entry.

    Args:
        store: where the rows are, or will be.
        window: steps per window ``T``, at least 2; ``None``: whole tasks.
        batch_size: windows per sample ``B``.
        sampling: ``"random"``, ``"last"``, ``"sequential"`` or ``"batch"``, see :class:`WindowSampler`.
        start_share: the share of windows at task starts, see :class:`WindowSampler`.
        weights: the shares of the store's data sets, see :class:`WindowSampler`.
        seed: of the windows drawn; by default one is drawn from torch's global generator, so that
            :func:`torch.manual_seed` decides it.
        kwargs: passed on to :class:`torchrl.data.TensorDictReplayBuffer`, for instance ``prefetch=``, ``pin_memory=``
            or ``transform=``.

    Returns:
        A buffer whose samples are steps ``[B, T]`` with their record numbers under ``"index"``.

    Examples:
        >>> store = DatasetStore()
        >>> for step in range(5):
        ...     store.append({"action": step, "reward": 0.0, "done": 0, "episode_step": step})
        >>> rb = replay_buffer(store, window=3, batch_size=4, seed=0)
        >>> batch = rb.sample()
        >>> batch.shape, bool((batch["action"][:, :-1] == batch["index"][:, :-1] + 1).all())
        (torch.Size([4, 3]), True)
    """
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    return _EpochBuffer(
        storage=store,
        sampler=WindowSampler(window, sampling=sampling, start_share=start_share, weights=weights),
        writer=TaskWriter(),
        collate_fn=_as_is,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


def _as_is(steps: TensorDictBase) -> TensorDictBase:
    """The store's reads are batches already; a named function, so that the buffer can be pickled."""
    return steps
