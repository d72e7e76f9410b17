"""What losses share that compare a step with the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict.utils import unravel_key

from torchrl_mouse import schema
from torchrl_mouse.functional import normalize_reward
from torchrl_mouse.objectives.common import InContextLoss

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModule, TensorDictModuleBase
    from tensordict.utils import NestedKey


class BootstrappingLoss(InContextLoss):
    """Base of the losses that learn from a reward and a target head's output at a later frame.

    Args:
        head: reads ``hidden`` and writes its output as its only entry.
        trunk: writes ``hidden``; ``None`` where the input holds it already.
        reward_scale: factor of the reward, applied after normalisation.
        reward_shift: added to the scaled reward.
        normalize_reward_mean: subtract the mean of each sequence's rewards, over its valid steps.
        normalize_reward_std: divide by their unbiased standard deviation; see
            :func:`~torchrl_mouse.functional.normalize_reward`.
        normalize_reward_eps: added to the standard deviation; positive.
        normalize_reward_std_target: what the standard deviation becomes; positive.
        delay_value: use a target head.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an option is out of range.
    """

    @dataclass
    class _AcceptedKeys(InContextLoss._AcceptedKeys):
        action: NestedKey = schema.ACTION
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        is_init: NestedKey = schema.IS_INIT
        priority: NestedKey = "td_error"

    default_keys = _AcceptedKeys

    def __init__(
        self,
        head: TensorDictModule,
        *,
        trunk: TensorDictModuleBase | None = None,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        normalize_reward_mean: bool = False,
        normalize_reward_std: bool = False,
        normalize_reward_eps: float = 1e-8,
        normalize_reward_std_target: float = 1.0,
        delay_value: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(head, trunk=trunk, delay_value=delay_value, reduction=reduction)
        self.reward_scale = reward_scale
        self.reward_shift = reward_shift
        self.normalization: dict[str, Any] = {
            "normalize_reward_mean": normalize_reward_mean,
            "normalize_reward_std": normalize_reward_std,
            "normalize_reward_eps": normalize_reward_eps,
            "normalize_reward_std_target": normalize_reward_std_target,
        }
        for name in ("normalize_reward_eps", "normalize_reward_std_target"):
            if self.normalization[name] <= 0:
                raise ValueError(f"{type(self).__name__}: {name} must be positive, got {self.normalization[name]}.")

    def _loss_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        following = [("next", key) for key in (keys.reward, keys.done, keys.terminated, keys.truncated)]
        return [keys.is_init, keys.terminated, keys.truncated, keys.action, *following]

    def _target_output(self, steps: TensorDictBase) -> torch.Tensor:
        """Returns the target head's output at the same frames, without gradient."""
        with torch.no_grad(), self.target_head_params.to_module(self.head, preserve_module_state=False):
            return self._output(self.head(steps.select(*self.head.in_keys)))

    def _actions(self, steps: TensorDictBase, num_actions: int, valid: torch.Tensor) -> torch.Tensor:
        """Returns the actions in the data, int64 ``[*, T]``; 0 where invalid."""
        key = self.tensor_keys.action
        action = schema.to_ids(schema.require(steps, key), num_actions, steps.ndim, key)
        action = action.masked_fill(~valid, 0)
        schema.check_ids(action, num_actions, key)
        return action

    def _rewards(self, steps: TensorDictBase, valid: torch.Tensor) -> torch.Tensor:
        """Returns the rewards ``[*, T]``, normalised where asked; 0 where invalid, whatever stands there."""
        reward = self._next(steps, self.tensor_keys.reward)
        reward = reward.to(torch.promote_types(reward.dtype, torch.float32))
        return normalize_reward(reward, valid, **self.normalization)

    def _ends(self, steps: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns where a step ends the task, terminates an episode, cuts one by a step limit; bool ``[*, T]``."""
        keys = self.tensor_keys
        done, terminated, truncated = (
            self._next(steps, key, "bool") for key in (keys.done, keys.terminated, keys.truncated)
        )
        return done, terminated, truncated

    def _ahead(self, value: torch.Tensor, steps: TensorDictBase, beyond: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Returns the value of the next frame, or the frame after it, and whether that one is in window and task.

        Args:
            value: ``[*, T]`` or ``[*, T, V]``.
            steps: steps ``[*, T]``.
            beyond: bool ``[*, T]``: the frame after the next one, as the next is a terminal frame.
        """
        is_init = schema.require(steps, self.tensor_keys.is_init, "bool").reshape(steps.shape)
        num = is_init.shape[-1]
        index = torch.arange(num, device=is_init.device) + 1 + beyond.long()
        at = index.clamp(max=num - 1)
        task = is_init.cumsum(-1)
        inside = (index < num) & (task.gather(-1, at) == task)
        return value.take_along_dim(at.reshape(at.shape + (1,) * (value.ndim - at.ndim)), is_init.ndim - 1), inside

    def _write_priority(self, tensordict: TensorDictBase, error: torch.Tensor, valid: torch.Tensor) -> None:
        priority = torch.where(valid, error.detach(), 0.0).unsqueeze(-1)
        tensordict.set(self.tensor_keys.priority, priority)

    @staticmethod
    def _next(steps: TensorDictBase, key: NestedKey, kind: Literal["bool"] | None = None) -> torch.Tensor:
        return schema.require(steps, unravel_key(("next", key)), kind).reshape(steps.shape)
