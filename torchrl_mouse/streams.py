"""The stream: the identity of an environment row, by which a policy finds the row's context."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import torch
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer

from torchrl_mouse import schema

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.data import Composite
    from torchrl.envs import EnvBase, Transform


def draw_streams(batch_size: torch.Size, device: torch.device | None = None) -> torch.Tensor:
    """Draws one new stream id per environment row.

    The operating system's entropy is used, and not torch's generator: workers and environments that share a seed must
    still not share a stream.

    Args:
        batch_size: the environment's batch size ``[*]``.
        device: where the ids live.

    Returns:
        int64 ``[*, 1]``, uniform in ``[0, 2**63)``.

    Examples:
        >>> a, b = draw_streams(torch.Size([2])), draw_streams(torch.Size([2]))
        >>> a.shape, torch.cat([a, b]).unique().numel()
        (torch.Size([2, 1]), 4)
    """
    ids = [secrets.randbits(63) for _ in range(batch_size.numel())]
    return torch.tensor(ids, dtype=torch.int64, device=device).reshape(*batch_size, 1)


class StreamTracker(TensorDictPrimer):
    """Writes ``stream``, the identity of each environment row, for an environment that has none.

    A policy with a context finds its rows by it. It is constant for a row and unique per environment;
    :class:`~torchrl_mouse.envs.TaskEnv` writes its own. It is a primer, so that TorchRL adds it by itself where a
    policy asks for it (``Collector(..., auto_register_policy_transforms=True)``,
    :func:`~torchrl.modules.utils.get_env_transforms_from_module`); unlike other primers, it draws once and not at each
    reset.

    Examples:
        >>> from torchrl.envs import GymEnv, InitTracker, TransformedEnv
        >>> env = TransformedEnv(GymEnv("CartPole-v1"))
        >>> env = env.append_transform(InitTracker()).append_transform(StreamTracker())
        >>> steps = env.rollout(30, break_when_any_done=False)
        >>> steps["stream"].shape, steps["stream"].unique().numel()
        (torch.Size([30, 1]), 1)
    """

    def __init__(self) -> None:
        super().__init__({schema.STREAM: Unbounded((1,), dtype=torch.int64)}, expand_specs=True)
        self._stream: torch.Tensor | None = None

    def set_container(self, container: Transform | EnvBase) -> None:
        """Forgets the stream: another environment is another stream."""
        self._stream = None
        super().set_container(container)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_stream": None}

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        if self._stream is None:
            self._stream = draw_streams(next_tensordict.batch_size, next_tensordict.device)
        return next_tensordict.set(schema.STREAM, self._stream.clone())

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._call(next_tensordict)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Raises: a replay buffer has no environment row."""
        raise NotImplementedError("StreamTracker: must be a transform of an environment. Do not add it to a buffer.")

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Leaves the inputs as they are: the stream is never read back from them."""
        return input_spec

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the entry's spec."""
        shape = (*observation_spec.shape, 1)
        observation_spec[schema.STREAM] = Unbounded(shape, dtype=torch.int64, device=observation_spec.device)
        return observation_spec
