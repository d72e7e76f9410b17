"""Transforms that mark decisions, or clear a policy's context."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchrl.data import Categorical
from torchrl.envs import Transform

from torchrl_mouse import schema

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.data import Composite


class _FrameTransform(Transform):
    """A transform that writes the same entry into every frame, the first one included."""

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)


class DecisionMask(_FrameTransform):
    """Writes ``("collector", "mask")``, bool ``[*]``: false at terminal frames, where nothing is decided.

    TorchRL's losses leave out the steps that this entry marks false. It may transform an environment, collected steps
    (``Collector(..., postproc=DecisionMask())``) or a replay buffer.

    .. note:: ``Collector`` keeps its trajectory ids beside the mask and carries both from step to step, so that what an
        environment wrote at the root is lost, and every step a decision. Use ``postproc=`` or ``track_traj_ids=False``.

    Raises:
        RuntimeError: such a collector steps the environment (inside a worker this cannot be seen).

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
        >>> env = TransformedEnv(TaskEnv(DarkRoomEnv([0], max_steps=2), episodes_per_task=2), DecisionMask())
        >>> env.rollout(5)["collector", "mask"].tolist()
        [[True, True, False, True, True]]
    """

    def __init__(self) -> None:
        super().__init__(in_keys=[schema.PREVIOUS_TERMINATED, schema.PREVIOUS_TRUNCATED], out_keys=[schema.MASK])

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        if tensordict.get(("collector", "traj_ids"), None) is not None:
            raise RuntimeError(
                "DecisionMask: the environment's mask must reach the batch, but a collector that tracks trajectories "
                "overwrites it. Take it off the environment and give Collector(..., postproc=DecisionMask())."
            )
        return self._call(next_tensordict)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set(schema.MASK, ~schema.is_terminal_frame(next_tensordict))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the mask into steps that come from elsewhere."""
        return self._call(tensordict)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the entry's spec."""
        observation_spec[schema.MASK] = Categorical(
            2, shape=observation_spec.shape, dtype=torch.bool, device=observation_spec.device
        )
        return observation_spec


class ClearContext(_FrameTransform):
    """Marks ``is_init`` at every episode's first frame: the control "context cleared at each episode".

    A policy that learns inside its context then starts each episode anew; what it gains over this control is what it
    learned from earlier episodes.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
        >>> env = TransformedEnv(TaskEnv(DarkRoomEnv([0], max_steps=2), episodes_per_task=2), ClearContext())
        >>> env.rollout(5)["is_init"].squeeze(-1).tolist()
        [[True, False, False, True, False]]
    """

    def __init__(self) -> None:
        super().__init__(in_keys=[schema.EPISODE_STEP], out_keys=[schema.IS_INIT])

    def _apply_transform(self, obs: torch.Tensor) -> torch.Tensor:
        return obs == 0
