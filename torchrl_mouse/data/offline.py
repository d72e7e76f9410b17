"""Stored experience where a trainer wants a collector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import GlobalRNGState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchrl.data import ReplayBuffer


class OfflineSource:
    """Stands where a :class:`~torchrl.trainers.Trainer` wants a collector when all data is stored already.

    A ``Trainer`` advances by collected batches and counts their frames. Each of ours is empty and counts as one frame,
    so that one frame is one update; the batch to learn from is drawn from the replay buffer by :meth:`sample`. The
    state holds every random generator involved, those of transforms included, which makes a resumed run equal to one
    that was never stopped (with ``prefetch``, up to the batches that were in flight).

    Args:
        replay_buffer: where batches come from.
        device: where batches are put; left where they are by default.

    Examples:
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), batch_size=2)
        >>> _ = buffer.extend(TensorDict({"reward": torch.zeros(4, 1)}, [4]))
        >>> source = OfflineSource(buffer)
        >>> next(iter(source)).numel(), source.sample(TensorDict())["reward"].shape
        (1, torch.Size([2, 1]))
    """

    init_random_frames = 0

    def __init__(self, replay_buffer: ReplayBuffer, *, device: torch.device | None = None) -> None:
        self.replay_buffer = replay_buffer
        self.device = device
        self._generator = torch.Generator()
        replay_buffer.set_rng(self._generator)

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yields forever a batch that counts as one frame."""
        while True:
            yield TensorDict({}, [1])

    def sample(self, _: TensorDictBase) -> TensorDictBase:
        """Draws the batch of the next update."""
        batch: TensorDictBase = self.replay_buffer.sample()
        return batch if self.device is None else batch.to(self.device)

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the sampling of batches; returns the seed, which the trainer gives to torch and numpy."""
        self._generator.manual_seed(seed)
        return seed

    def shutdown(self, *_: Any, **__: Any) -> None:
        """Does nothing: there is no environment to close."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the sampler, of the buffer's transforms and of the random generators."""
        return {
            "sampler": self.replay_buffer.sampler.state_dict(),
            "transforms": self.replay_buffer.transform.state_dict(),
            "sampling_rng": self._generator.get_state(),
            "global_rng": GlobalRNGState().state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.replay_buffer.sampler.load_state_dict(state["sampler"])
        self.replay_buffer.transform.load_state_dict(state["transforms"])
        self._generator.set_state(state["sampling_rng"])
        GlobalRNGState().load_state_dict(state["global_rng"])
