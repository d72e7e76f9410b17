"""In-context implicit Q-learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch

from torchrl_mouse.functional import expectile_cost
from torchrl_mouse.objectives.bootstrap import DiscountedLoss

if TYPE_CHECKING:
    from tensordict import TensorDictParams

MAX_WEIGHT = 100.0
"""The most that one step's action counts for in the policy's loss, as in the paper."""


class MouseIQLLoss(DiscountedLoss):
    """The in-context IQL loss: action values that never ask about actions the data does not hold, and a policy.

    .. code-block:: text

        hidden    = trunk(steps)                                       # once, over the root sequence
        Q         = head(hidden)[t, action[t]]
        V         = value_head(hidden)[t]
        advantage = target_head(hidden)[t, action[t]] - V
        y         = reward_scale * reward[t + 1] + reward_shift + discount[t] * V[t + 1]
        loss_qvalue = mean (Q - y)^2
        loss_value  = mean |expectile - 1(advantage < 0)| * advantage^2
        loss_actor  = mean min(exp(temperature * advantage), 100) * -log softmax(policy_head(hidden)[t])[action[t]]

    What ``discount`` is, which steps count and how returns span episodes:
    :class:`~torchrl_mouse.objectives.bootstrap.DiscountedLoss`. One acts with the policy, so its head is a model's
    ``sp`` head; the value head is used in training only. Where actions are not always allowed, the policy is over those
    that are. (Kostrikov et al. 2021, arXiv:2110.06169; in context: arXiv:2502.17666.)

    Args:
        head: reads ``hidden`` and writes action values ``[*, A]`` as its only output.
        value_head: reads ``hidden`` and writes state values ``[*, 1]`` as its only output.
        policy_head: reads ``hidden`` and writes logits ``[*, A]`` as its only output.
        expectile: in (0, 1); at 0.5 the policy of the data is valued, near 1 the best of its actions.
        temperature: how much better actions are preferred over the data's, at least 0.
        options: ``trunk``, ``delay_value``, ``reduction``, ``reward_scale``, ``reward_shift`` and MOUSE's normalisation
            of the reward, see :class:`~torchrl_mouse.objectives.bootstrap.BootstrappingLoss`; ``gamma`` (one),
            ``gamma_terminal``, ``gamma_truncated`` and ``n_steps``, see
            :class:`~torchrl_mouse.objectives.bootstrap.DiscountedLoss`.

    Raises:
        ValueError: an option is out of range.

    Examples:
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> from torchrl_mouse.modules import SwiGLUHead
        >>> from torchrl_mouse.schema import from_mouse_records
        >>> heads = {"embedding_kwargs": {"max_num_actions": 3}, "dqn_head_kwargs": {}, "sp_head_kwargs": {}}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, backbone_kwargs=None, **heads))
        >>> value = ValueOperator(SwiGLUHead(16, 1), in_keys=["hidden"])
        >>> loss = MouseIQLLoss(model.head("dqn"), value, model.head("sp"), trunk=model.trunk, delay_value=False)
        >>> records = {"action": [[0, 2, 1]], "reward": [[0.0, 0.0, 1.0]], "done": [[0, 0, 1]], "time": [[0, 1, 2]]}
        >>> sorted(loss(from_mouse_records(TensorDict(records, [1, 3]))).keys())
        ['advantage_mean', 'loss_actor', 'loss_qvalue', 'loss_value']
    """

    heads = ("head", "value_head", "policy_head")
    out_keys = ["loss_actor", "loss_qvalue", "loss_value", "advantage_mean"]  # noqa: RUF012 - TorchRL's contract
    value_head: TensorDictModule
    value_head_params: TensorDictParams
    target_value_head_params: TensorDictParams
    policy_head: TensorDictModule
    policy_head_params: TensorDictParams
    target_policy_head_params: TensorDictParams

    def __init__(
        self,
        head: TensorDictModule,
        value_head: TensorDictModule,
        policy_head: TensorDictModule,
        *,
        expectile: float = 0.7,
        temperature: float = 3.0,
        **options: Any,
    ) -> None:
        super().__init__(head, **options)
        if not 0 < expectile < 1:
            raise ValueError(f"MouseIQLLoss: expectile must lie in (0, 1), got {expectile}.")
        if not temperature >= 0:
            raise ValueError(f"MouseIQLLoss: temperature must be at least 0, got {temperature}.")
        if self.gamma.ndim:
            raise ValueError(f"MouseIQLLoss: gamma must be one discount, got {self.gamma.tolist()}.")
        self.expectile = expectile
        self.temperature = temperature
        self._add_head("value_head", value_head)
        self._add_head("policy_head", policy_head)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the losses, and writes ``td_error`` (absolute, ``[*, T, 1]``, zero where invalid) into the input.

        Args:
            tensordict: steps ``[*, T]``.

        Returns:
            ``loss_actor``, ``loss_qvalue``, ``loss_value`` and, without gradient, the mean of the advantages
            (``advantage_mean``).

        Raises:
            KeyError: an entry is missing.
            TypeError: a mark of an end or a start is not boolean.
            ValueError: an action is out of range or not allowed, a reward is not finite, the window has one step, or
                a head writes another shape.
        """
        steps = self._with_hidden(tensordict)
        action_value, state_value, logits = (self._output(steps, name) for name in self.heads)
        num_actions = action_value.shape[-1]
        if state_value.shape[-1] != 1 or logits.shape[-1] != num_actions:
            raise ValueError(
                f"MouseIQLLoss: value_head must write 1 and policy_head as many numbers as head, {num_actions}, got "
                f"{state_value.shape[-1]} and {logits.shape[-1]}. Give heads of these sizes."
            )
        y, valid = self._returns(steps, state_value.detach())
        self._warn_of_nothing(valid)
        mask = self._action_mask(steps, num_actions)
        action = self._actions(steps, num_actions, valid, mask).unsqueeze(-1)
        if mask is not None:
            logits = torch.where(mask, logits, torch.finfo(logits.dtype).min)
        advantage = self._output(steps, target=True).gather(-1, action) - state_value
        weight = (self.temperature * advantage.detach()).exp().clamp_max(MAX_WEIGHT)
        error = action_value.gather(-1, action) - y
        terms = {
            "loss_actor": -weight * logits.log_softmax(-1).gather(-1, action),
            "loss_qvalue": error.square(),
            "loss_value": expectile_cost(advantage, self.expectile),
        }
        self._write_priority(tensordict, error.abs().squeeze(-1), valid)
        out = {name: self._reduce(cost.squeeze(-1), valid, tensordict) for name, cost in terms.items()}
        mean = torch.where(valid, advantage.detach().squeeze(-1), 0.0).sum() / valid.sum().clamp_min(1)
        return TensorDict({**out, "advantage_mean": mean})
