"""What losses share that compare a step with the next one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from tensordict.utils import unravel_key

from torchrl_mouse import schema
from torchrl_mouse.functional import episode_discount, normalize_reward, td_target
from torchrl_mouse.objectives.common import InContextLoss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    min_steps = 2

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
        for name, value in (("reward_scale", reward_scale), ("reward_shift", reward_shift)):
            if not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}: {name} must be finite, got {value}.")
        self.reward_scale = reward_scale
        self.reward_shift = reward_shift
        self.normalization: dict[str, Any] = {
            "normalize_reward_mean": normalize_reward_mean,
            "normalize_reward_std": normalize_reward_std,
            "normalize_reward_eps": normalize_reward_eps,
            "normalize_reward_std_target": normalize_reward_std_target,
        }
        for name in ("normalize_reward_eps", "normalize_reward_std_target"):
            if not self.normalization[name] > 0:
                raise ValueError(f"{type(self).__name__}: {name} must be positive, got {self.normalization[name]}.")

    def _loss_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        following = [("next", key) for key in (keys.reward, keys.done, keys.terminated, keys.truncated)]
        return [keys.is_init, keys.terminated, keys.truncated, keys.action, *following]

    def _actions(
        self, steps: TensorDictBase, num_actions: int, valid: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the actions in the data, int64 ``[*, T]``; 0 where invalid."""
        key = self.tensor_keys.action
        action = schema.to_ids(schema.require(steps, key), num_actions, steps.ndim, key)
        action = action.masked_fill(~valid, 0)
        schema.check_ids(action, num_actions, key)
        if mask is not None and schema.can_look_at(action):
            forbidden = valid & ~mask.gather(-1, action.unsqueeze(-1)).squeeze(-1)
            if forbidden.any():
                where = tuple(forbidden.nonzero()[0].tolist())
                raise ValueError(
                    f"{type(self).__name__}: entry {key!r} must hold actions that {self.tensor_keys.action_mask!r} "
                    f"allows, got {int(action[where])} at {where}. Fix the mask, or leave the step out of the loss."
                )
        return action

    def _rewards(self, steps: TensorDictBase, valid: torch.Tensor) -> torch.Tensor:
        """Returns the rewards ``[*, T]``, normalised where asked; 0 where invalid, whatever stands there."""
        reward = self._next(steps, self.tensor_keys.reward)
        reward = reward.to(torch.promote_types(reward.dtype, torch.float32))
        key, remedy = ("next", self.tensor_keys.reward), "Fix the data, or leave the step out of the loss."
        schema.check_finite(torch.where(valid, reward, 0.0), key, type(self).__name__, remedy)
        return normalize_reward(reward, valid, **self.normalization)

    def _ends(self, steps: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns where a step ends the task, terminates an episode, cuts one by a step limit; bool ``[*, T]``."""
        keys = self.tensor_keys
        done, terminated, truncated = (
            self._next(steps, key, "bool") for key in (keys.done, keys.terminated, keys.truncated)
        )
        return done, terminated, truncated

    def _successor(self, steps: TensorDictBase, beyond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns where the next frame is, or the frame after it, and whether that one is in window and task.

        Args:
            steps: steps ``[*, T]``.
            beyond: bool ``[*, T]``: the frame after the next one, as the next is a terminal frame.

        Returns:
            int64 ``[*, T, 1]``, for ``take_along_dim(..., -2)``, and bool ``[*, T]``.
        """
        is_init = schema.per_step(steps, self.tensor_keys.is_init, "bool")
        num = is_init.shape[-1]
        index = torch.arange(num, device=is_init.device) + 1 + beyond.long()
        at = index.clamp(max=num - 1)
        task = is_init.cumsum(-1)
        inside = (index < num) & (task.gather(-1, at) == task)
        return at.unsqueeze(-1), inside

    def _write_priority(self, tensordict: TensorDictBase, error: torch.Tensor, valid: torch.Tensor) -> None:
        priority = torch.where(valid, error.detach(), 0.0).unsqueeze(-1)
        tensordict.set(self.tensor_keys.priority, priority)

    @staticmethod
    def _next(steps: TensorDictBase, key: NestedKey, kind: Literal["bool"] | None = None) -> torch.Tensor:
        return schema.per_step(steps, unravel_key(("next", key)), kind)


class DiscountedLoss(BootstrappingLoss):
    """Base of the losses whose target is a discounted return.

    .. code-block:: text

        y[t] = reward_scale * reward[t + 1] + reward_shift + discount[t] * V[t + 1]

    ``discount`` is ``gamma`` while an episode runs, ``gamma_truncated`` where a step limit cuts it and
    ``gamma_terminal`` where it terminates. With ``gamma_terminal > 0`` returns span episodes, so that what is learned
    about a task is worth something: an episode's last transition, however it ended, bootstraps from the next episode's
    first frame. The discount is zero where the task ends. Steps at terminal frames, padding, and steps whose successor
    lies outside the window are left out.

    .. note:: Without ``gamma_terminal`` a cut episode bootstraps from its terminal frame, at which nothing is decided
        and so nothing is learned: the value there is what the network makes of all other frames. Where many episodes
        are cut, let returns span them, or set ``gamma_truncated=0``.

    Args:
        head: as in :class:`BootstrappingLoss`.
        gamma: discount per step, in [0, 1]; or several, for a head with an output for each. It can be scheduled by
            assigning to ``loss.gamma``, a number, or for several discounts a tensor of as many.
        gamma_terminal: discount over an episode's termination, in [0, 1].
        gamma_truncated: discount over an episode's truncation, in [0, 1]; ``gamma`` by default.
        n_steps: how many rewards a target adds up before it bootstraps; fewer where the window ends, or a step limit
            cuts an episode over which returns do not span. They are the data's, as is: good actions of a bad policy
            are valued too low, but what is learned spreads faster.
        options: of :class:`BootstrappingLoss`.

    Raises:
        TypeError: ``gamma`` is no number and no list of them.
        ValueError: an option is out of range.
    """

    _schedulable_buffers = frozenset({"gamma"})
    gamma: torch.Tensor

    def __init__(
        self,
        head: TensorDictModule,
        *,
        gamma: float | Sequence[float] = 0.99,
        gamma_terminal: float = 0.0,
        gamma_truncated: float | None = None,
        n_steps: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(head, **options)
        where = type(self).__name__
        try:
            discounts = torch.as_tensor(gamma, dtype=torch.float32).clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where}: gamma must be a number or a list of numbers, got {gamma!r}.") from error
        if discounts.ndim > 1 or not discounts.numel() or not ((discounts >= 0) & (discounts <= 1)).all():
            raise ValueError(f"{where}: gamma must lie in [0, 1], one number or a list of some, got {gamma}.")
        if not 0 <= gamma_terminal <= 1:
            raise ValueError(f"{where}: gamma_terminal must lie in [0, 1], got {gamma_terminal}.")
        if gamma_truncated is not None and not 0 <= gamma_truncated <= 1:
            raise ValueError(f"{where}: gamma_truncated must lie in [0, 1], got {gamma_truncated}.")
        if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
            raise ValueError(f"{where}: n_steps must be an integer of at least 1, got {n_steps!r}.")
        self.register_buffer("gamma", discounts)
        self.gamma_terminal = gamma_terminal
        self.gamma_truncated = gamma_truncated
        self.n_steps = n_steps

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        exact = self.gamma
        super()._apply(fn)
        # A discount of .999 is 1 in bfloat16.
        self.gamma = exact.to(self.gamma.device, torch.promote_types(self.gamma.dtype, torch.float32))
        return self

    def _returns(self, steps: TensorDictBase, state_value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the targets of a step's value for each discount ``[*, T, D]``, and which steps have one ``[*, T]``.

        Args:
            steps: steps ``[*, T]``.
            state_value: the values to bootstrap from, ``[*, T, D]``.
        """
        done, terminated, truncated = (end.unsqueeze(-1) for end in self._ends(steps))
        discount = episode_discount(
            terminated,
            truncated,
            gamma=self.gamma,
            gamma_terminal=self.gamma_terminal,
            gamma_truncated=self.gamma_truncated,
        )
        discount = discount.to(state_value.dtype).masked_fill(done, 0.0)
        # Where returns span episodes, play goes on after the terminal frame, at which nothing is decided.
        beyond = ((terminated | truncated) & (self.gamma_terminal > 0)).squeeze(-1)
        successor, inside = self._successor(steps, beyond)
        valid = self._decisions(steps) & (inside | (discount == 0).all(-1))
        discount = discount.masked_fill(~valid.unsqueeze(-1), 0.0)
        reward = self._rewards(steps, valid).to(state_value.dtype).unsqueeze(-1)
        value = state_value
        for _ in range(self.n_steps):  # Each round makes the returns from every valid step one reward longer.
            following = value.take_along_dim(successor, -2)
            target = td_target(reward, following, discount, scale=self.reward_scale, shift=self.reward_shift)
            value = torch.where(valid.unsqueeze(-1), target, state_value)
        return target, valid
