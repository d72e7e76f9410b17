"""In-context Q-learning with a conservative penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch

from torchrl_mouse import schema
from torchrl_mouse.functional import conservative_penalty, td_target
from torchrl_mouse.objectives.common import InContextLoss

if TYPE_CHECKING:
    from tensordict.utils import NestedKey


class MouseDQNLoss(InContextLoss):
    """The in-context DQN loss with CQL, over whole windows of experience.

    .. code-block:: text

        hidden   = trunk(steps)                                        # once, over the root sequence
        Q        = head(hidden)[t, action[t]]
        y        = reward_scale * reward[t + 1] + reward_shift + discount[t] * max_a target_head(hidden)[t + 1, a]
        loss_dqn = mean (Q - y)^2
        loss_cql = mean cql_weight * (|y| + cql_scale_q_eps) * (logsumexp_a head(hidden)[t] - Q)

    ``discount`` is ``gamma`` while an episode runs, ``gamma_truncated`` where a step limit cuts it and
    ``gamma_terminal`` where it terminates. With ``gamma_terminal > 0`` returns span episodes, so that what is learned
    about a task is worth something: an episode's last transition, however it ended, bootstraps from the next episode's
    first frame. The discount is zero where the task ends. Steps at terminal frames, padding, and steps whose successor
    lies outside the window are left out.

    The trunk is shared and moves; the head alone has a target. (Mnih et al. 2015; Kumar et al. 2020,
    arXiv:2006.04779; in context: arXiv:2502.17666.)

    Args:
        head: reads ``hidden`` and writes action values ``[*, A]`` as its only output.
        trunk: writes ``hidden``; ``None`` where the input holds it already.
        gamma: discount per step, in [0, 1].
        gamma_terminal: discount over an episode's termination, in [0, 1].
        gamma_truncated: discount over an episode's truncation, in [0, 1]; ``gamma`` by default.
        reward_scale: factor of the reward.
        reward_shift: added to the scaled reward.
        cql_weight: weight of the conservative penalty, at least 0.
        cql_scale_q: scale the penalty of a step with ``|y| + cql_scale_q_eps`` (MOUSE), or leave it plain.
        cql_scale_q_eps: the penalty's factor where ``y`` is zero.
        delay_value: use a target head.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an option is out of range.

    Examples:
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> from torchrl_mouse.schema import from_mouse_records
        >>> heads = {"embedding_kwargs": {"max_num_actions": 3}, "dqn_head_kwargs": {}}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, backbone_kwargs=None, **heads))
        >>> loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
        >>> records = {"action": [[0, 2, 1]], "reward": [[0.0, 0.0, 1.0]], "done": [[0, 0, 1]], "time": [[0, 1, 2]]}
        >>> loss(from_mouse_records(TensorDict(records, [1, 3])))["loss_dqn"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys(InContextLoss._AcceptedKeys):
        action: NestedKey = schema.ACTION
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        is_init: NestedKey = schema.IS_INIT
        priority: NestedKey = "td_error"

    default_keys = _AcceptedKeys
    out_keys = ["loss_dqn", "loss_cql", "q_values_mean", "q_values_target"]  # noqa: RUF012 - TorchRL's contract
    _schedulable_buffers = frozenset({"gamma"})

    def __init__(
        self,
        head: TensorDictModule,
        *,
        trunk: TensorDictModuleBase | None = None,
        gamma: float = 0.99,
        gamma_terminal: float = 0.0,
        gamma_truncated: float | None = None,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        cql_weight: float = 0.0,
        cql_scale_q: bool = True,
        cql_scale_q_eps: float = 1.0,
        delay_value: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__(head, trunk=trunk, delay_value=delay_value, reduction=reduction)
        for name, value in (("gamma", gamma), ("gamma_terminal", gamma_terminal), ("gamma_truncated", gamma_truncated)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"MouseDQNLoss: {name} must lie in [0, 1], got {value}.")
        if cql_weight < 0:
            raise ValueError(f"MouseDQNLoss: cql_weight must be at least 0, got {cql_weight}.")
        self.register_buffer("gamma", torch.tensor(gamma))
        self.gamma_terminal = gamma_terminal
        self.gamma_truncated = gamma_truncated
        self.reward_scale = reward_scale
        self.reward_shift = reward_shift
        self.cql_weight = cql_weight
        self.cql_scale_q = cql_scale_q
        self.cql_scale_q_eps = cql_scale_q_eps

    def _loss_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        following = [("next", key) for key in (keys.reward, keys.done, keys.terminated, keys.truncated)]
        return [keys.is_init, keys.terminated, keys.truncated, keys.action, *following]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the loss, and writes ``td_error`` (absolute, ``[*, T, 1]``, zero where invalid) into the input.

        Args:
            tensordict: steps ``[*, T]``.

        Returns:
            ``loss_dqn``, ``loss_cql`` and, without gradient, the means over valid steps of the taken actions' values
            (``q_values_mean``) and of their targets (``q_values_target``).

        Raises:
            KeyError: an entry is missing.
            TypeError: a mark of an end or a start is not boolean.
            ValueError: an action is out of range, or the steps have no time dimension.
        """
        steps = self._predict(tensordict)
        value_key = self.head.out_keys[0]
        action_value = steps.get(value_key)  # (*, T, A)
        with torch.no_grad(), self.target_head_params.to_module(self.head, preserve_module_state=False):
            target = steps.select(*self.head.in_keys)
            state_value = self.head(target).get(value_key).amax(-1)  # (*, T)
        discount, next_value, valid = self._bootstrap(steps, state_value)

        num_actions = action_value.shape[-1]
        action = schema.to_ids(schema.require(steps, self.tensor_keys.action), num_actions, steps.ndim, "action")
        action = action.masked_fill(~valid, 0)
        schema.check_ids(action, num_actions, self.tensor_keys.action)
        chosen = action_value.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        reward = self._next(steps, self.tensor_keys.reward).to(chosen.dtype)
        y = td_target(reward, next_value, discount, scale=self.reward_scale, shift=self.reward_shift)
        y = y.masked_fill(~valid, 0.0)  # Garbage there would turn gradients to NaN, though it costs nothing.

        penalty = self.cql_weight * conservative_penalty(action_value, chosen)
        if self.cql_scale_q:
            penalty = penalty * (y.abs() + self.cql_scale_q_eps)
        error = chosen - y
        td_error = torch.where(valid, error.detach().abs(), 0.0)
        tensordict.set(self.tensor_keys.priority, td_error.unsqueeze(-1))
        count = valid.sum().clamp_min(1)
        return TensorDict(
            {
                "loss_dqn": self._reduce(error.square(), valid, tensordict),
                "loss_cql": self._reduce(penalty, valid, tensordict),
                "q_values_mean": torch.where(valid, chosen.detach(), 0.0).sum() / count,
                "q_values_target": torch.where(valid, y, 0.0).sum() / count,
            }
        )

    @staticmethod
    def _next(steps: TensorDictBase, key: NestedKey, kind: Literal["bool"] | None = None) -> torch.Tensor:
        path = ("next", *key) if isinstance(key, tuple) else ("next", key)
        return schema.require(steps, path, kind).reshape(steps.shape)

    def _bootstrap(
        self, steps: TensorDictBase, state_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the discounts, the values they apply to, and which steps have both; all ``[*, T]``."""
        keys = self.tensor_keys
        ends = (keys.done, keys.terminated, keys.truncated)
        done, terminated, truncated = (self._next(steps, key, "bool") for key in ends)
        truncated = truncated & ~terminated
        gamma: Any = self.gamma
        discount = torch.where(terminated, self.gamma_terminal, gamma)
        if self.gamma_truncated is not None:
            discount = torch.where(truncated, self.gamma_truncated, discount)
        discount = discount.to(state_value.dtype).masked_fill(done, 0.0)

        is_init = schema.require(steps, keys.is_init, "bool").reshape(steps.shape)
        next_value, inside = _ahead(state_value, is_init, 1)
        if self.gamma_terminal > 0:
            # Returns span episodes: play goes on after the terminal frame, at which nothing is decided.
            ended = terminated | truncated
            beyond, inside_beyond = _ahead(state_value, is_init, 2)
            next_value, inside = torch.where(ended, beyond, next_value), torch.where(ended, inside_beyond, inside)
        known = inside | (discount == 0)
        return discount, next_value, self._decisions(steps) & known


def _ahead(value: torch.Tensor, is_init: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the value ``by`` steps on, and whether that step lies in the window and in the same task."""
    num = value.shape[-1]
    at = (torch.arange(num, device=value.device) + by).clamp(max=num - 1)
    task = is_init.cumsum(-1)
    inside = (task[..., at] - task == 0) & (torch.arange(num, device=value.device) + by < num)
    return value[..., at], inside
