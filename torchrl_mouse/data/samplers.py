"""Windows of stored steps, and the replay buffer that samples them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.writers import Writer

from torchrl_mouse.data.store import DatasetStore

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.data.replay_buffers.storages import Storage


class WindowSampler(Sampler):
    """Draws windows of consecutive steps that never leave a task.

    ``batch_size`` counts windows, so a buffer's sample has shape ``[batch_size, window]``. Every start at which a
    whole window fits into its task is equally likely, over all tasks; a task shorter than the window has one window,
    padded on the right by its last record, whose ``("collector", "mask")`` is false. Index 0 of a window is where a
    context starts; ``is_init`` and ``("next", "truncated")`` stay what they are in the task, at a window's edges too.

    The task index of the store is followed live: steps that arrive later are sampled as soon as their task is written.

    Args:
        window: steps per window, at least 2.
        start_share: probability, in [0, 1], that a window starts at a task's first step instead, with tasks equally
            likely. A model that learns inside its context has to learn how a task begins, which is rare among uniform
            starts of long tasks.

    .. note::
        Numbers come from the buffer's generator, which the buffer saves and restores: equal seeds give equal batches,
        and a resumed run goes on exactly. With ``prefetch`` above 1, TorchRL's threads may swap neighbouring batches.

    Examples:
        >>> store = DatasetStore()
        >>> for step in range(4):
        ...     store.append({"action": step, "reward": 0.0, "done": 0, "episode_step": step})
        >>> rows, _ = WindowSampler(3, start_share=1.0).sample(store, 2)
        >>> rows.tolist()
        [[0, 1, 2], [0, 1, 2]]
    """

    _rng: torch.Generator | None

    def __init__(self, window: int, *, start_share: float = 0.0) -> None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(
                f"WindowSampler: window must be an int, got {type(window).__name__}. Give a number of steps."
            )
        if window < 2:
            raise ValueError(
                f"WindowSampler: window must be at least 2 steps, got {window}. One step has no successor."
            )
        if not 0.0 <= start_share <= 1.0:
            raise ValueError(f"WindowSampler: start_share must lie in [0, 1], got {start_share}. It is a probability.")
        self.window = window
        self.start_share = start_share
        self._indexed: tuple[DatasetStore, int] | None = None

    def sample(self, storage: Storage, batch_size: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Draws the record indices of windows.

        Args:
            storage: a :class:`DatasetStore`.
            batch_size: the number of windows ``B``.

        Returns:
            int64 ``[B, window]``, and an empty dictionary: the store knows by itself which steps are padding.

        Raises:
            RuntimeError: the store has no rows.
            TypeError: another kind of storage.
        """
        if not isinstance(storage, DatasetStore):
            raise TypeError(f"WindowSampler: the storage must be a DatasetStore, got {type(storage).__name__}.")
        storage._require_rows("sampled")
        self._index(storage)
        draw = torch.randint(int(self._ends[-1]), (batch_size,), generator=self._rng)
        task = torch.searchsorted(self._ends, draw, right=True)
        start = draw + self._shift[task]
        if self.start_share:
            at_start = torch.rand(batch_size, generator=self._rng) < self.start_share
            other = torch.randint(len(self._ends), (batch_size,), generator=self._rng)
            task = torch.where(at_start, other, task)
            start = torch.where(at_start, self._starts[task], start)
        rows = start.unsqueeze(-1) + torch.arange(self.window)
        return torch.minimum(rows, self._last[task].unsqueeze(-1)), {}

    def _index(self, store: DatasetStore) -> None:
        """Counts the windows per task; only when the store has changed."""
        revision = int(store._mutation_revision)
        if self._indexed is not None and self._indexed[0] is store and self._indexed[1] == revision:
            return
        self._starts = store.task_starts.clone()
        after = torch.cat([self._starts[1:], torch.tensor([len(store)])])
        self._last = after - 1
        counts = (after - self._starts - self.window + 1).clamp(min=1)
        self._ends = counts.cumsum(0)
        self._shift = self._starts - (self._ends - counts)
        self._indexed = (store, revision)

    def state_dict(self) -> dict[str, Any]:
        """Returns the generator's state, where there is a generator."""
        return {} if self._rng is None else {"rng": self._rng.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the generator, in place."""
        if "rng" in state_dict:
            self._rng = torch.Generator() if self._rng is None else self._rng
            self._rng.set_state(state_dict["rng"])

    def dumps(self, path: str | Path) -> None:
        """Writes nothing: the buffer saves the generator, and the rest follows from the store."""

    def loads(self, path: str | Path) -> None:
        """Reads nothing, see :meth:`dumps`."""

    def _empty(self) -> None:
        self._indexed = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(window={self.window}, start_share={self.start_share})"


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
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "writer.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        """Reads the number of steps handed over."""
        self.load_state_dict(json.loads((Path(path) / "writer.json").read_text()))


def replay_buffer(
    store: DatasetStore,
    *,
    window: int,
    batch_size: int,
    start_share: float = 0.0,
    seed: int | None = None,
    **kwargs: Any,
) -> TensorDictReplayBuffer:
    """Builds the TorchRL replay buffer of a store: ``rb.sample()`` gives windows, ``rb.extend(batch)`` appends tasks.

    It sets the writer, the ``collate_fn`` and the generator that a store needs and that TorchRL's defaults get wrong.
    Transforms see the sample ``[batch_size, window]``; one that changes that shape fails when the buffer adds its
    ``"index"`` entry.

    Args:
        store: where the rows are, or will be.
        window: steps per window ``T``, at least 2.
        batch_size: windows per sample ``B``.
        start_share: see :class:`WindowSampler`.
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
    return TensorDictReplayBuffer(
        storage=store,
        sampler=WindowSampler(window, start_share=start_share),
        writer=TaskWriter(),
        collate_fn=_as_is,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


def _as_is(steps: TensorDictBase) -> TensorDictBase:
    """The store's reads are batches already; a named function, so that the buffer can be pickled."""
    return steps
