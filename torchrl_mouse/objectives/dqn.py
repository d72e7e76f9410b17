"""In-context Q-learning with a conservative penalty."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch

from torchrl_mouse.functional import dqn_costs, masked_moments
from torchrl_mouse.objectives.bootstrap import DiscountedLoss

if TYPE_CHECKING:
    from collections.abc import Sequence


class MouseDQNLoss(DiscountedLoss):
    """The in-context DQN loss with CQL, over whole windows of experience.

    .. code-block:: text

        hidden   = trunk(steps)                                        # once, over the root sequence
        Q        = head(hidden)[t, action[t]]
        y        = reward_scale * reward[t + 1] + reward_shift + discount[t] * max_a target_head(hidden)[t + 1, a]
        loss_dqn = mean (Q - y)^2
        loss_cql = mean cql_weight * (|y| + cql_scale_q_eps) * (logsumexp_a head(hidden)[t] - Q)

    What ``discount`` is, which steps count and how returns span episodes:
    :class:`~torchrl_mouse.objectives.bootstrap.DiscountedLoss`. Actions that are not allowed are no maximum, and are
    not pushed down. The trunk is shared and moves; the head alone has a target. (Mnih et al. 2015; Kumar et al. 2020,
    arXiv:2006.04779; in context: arXiv:2502.17666.)

    Args:
        head: reads ``hidden`` and writes action values ``[*, A]`` as its only output; with several discounts
            ``[*, D, A]`` (a :class:`~torchrl_mouse.modules.DQNHead` with ``num_discounts``).
        gamma: discount per step, in [0, 1]; or several. The first is the one to act by, and that metrics and
            priorities are about; what is learned for the others shapes the trunk (Fedus et al. 2019, arXiv:1902.06865).
            The losses are means over them.
        cql_weight: weight of the conservative penalty, at least 0.
        cql_scale_q: scale the penalty of a step with ``|y| + cql_scale_q_eps`` (MOUSE), or leave it plain.
        cql_scale_q_eps: the penalty's factor where ``y`` is zero.
        double_dqn: the online head chooses the next action, which the target head values: it then overestimates less
            (van Hasselt et al. 2016, arXiv:1509.06461).
        actor: the policy on this head, whose weights TorchRL's ``DQNTrainer`` sends to its collector. (Give the trainer
            ``model.trunk.mark_weight_update`` as a ``"post_optim"`` hook: contexts are then computed anew.)
        options: ``trunk``, ``delay_value``, ``reduction``, ``reward_scale``, ``reward_shift`` and MOUSE's normalisation
            of the reward, see :class:`~torchrl_mouse.objectives.bootstrap.BootstrappingLoss`; ``gamma_terminal``,
            ``gamma_truncated`` and ``n_steps``, see :class:`~torchrl_mouse.objectives.bootstrap.DiscountedLoss`.

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

    out_keys = [  # noqa: RUF012 - TorchRL's contract
        "loss_dqn",
        "loss_cql",
        "q_values_mean",
        "q_values_std",
        "q_values_min",
        "q_values_max",
        "q_values_target",
        "cql_penalty",
    ]

    def __init__(
        self,
        head: TensorDictModule,
        *,
        gamma: float | Sequence[float] = 0.99,
        cql_weight: float = 0.0,
        cql_scale_q: bool = True,
        cql_scale_q_eps: float = 1.0,
        double_dqn: bool = False,
        actor: TensorDictModuleBase | None = None,
        **options: Any,
    ) -> None:
        super().__init__(head, gamma=gamma, **options)
        if actor is not None:  # Not as a module of the loss: its weights are there already.
            self.__dict__["value_network"] = actor
        for name, value in (("cql_weight", cql_weight), ("cql_scale_q_eps", cql_scale_q_eps)):
            if not value >= 0:
                raise ValueError(f"MouseDQNLoss: {name} must be at least 0, got {value}.")
        if self.gamma.ndim:
            self.output_dims = ("D", "A")
        self.cql_weight = cql_weight
        self.cql_scale_q = cql_scale_q
        self.cql_scale_q_eps = cql_scale_q_eps
        self.double_dqn = double_dqn

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # `TensorDictParams` do not tell `deepcopy` of their weights, and the actor's copy would have others.
        for params in (child for child in self.children() if isinstance(child, TensorDictParams)):
            copied = memo[id(params)] = copy.deepcopy(params, memo)
            for key, weight in params.items(True, True):
                memo[id(weight)] = copied.get(key)
        duplicate = memo[id(self)] = type(self).__new__(type(self))
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the loss, and writes ``td_error`` (absolute, ``[*, T, 1]``, zero where invalid) into the input.

        Args:
            tensordict: steps ``[*, T]``.

        Returns:
            ``loss_dqn``, ``loss_cql`` and, without gradient and over valid steps, the taken actions' values
            (``q_values_mean``, ``_std``, ``_min``, ``_max``), the means of their targets (``q_values_target``) and of
            the plain penalty (``cql_penalty``).

        Raises:
            KeyError: an entry is missing.
            TypeError: a mark of an end or a start is not boolean.
            ValueError: an action is out of range or not allowed, a reward is not finite, the window has one step, or
                the head writes another shape.
        """
        steps = self._with_hidden(tensordict)
        action_value = self._by_discount(self._output(steps))
        target = self._by_discount(self._output(steps, target=True))
        mask = self._action_mask(steps, action_value.shape[-1])
        choice = action_value.detach() if self.double_dqn else target
        if mask is not None:
            choice = choice.masked_fill(~mask.unsqueeze(-2), -torch.inf)
        y, valid = self._returns(steps, target.gather(-1, choice.argmax(-1, keepdim=True)).squeeze(-1))
        self._warn_of_nothing(valid)
        action = self._actions(steps, action_value.shape[-1], valid, mask)
        costs = dqn_costs(
            action_value,
            action.unsqueeze(-1).expand_as(y),
            y,
            cql_weight=self.cql_weight,
            cql_scale_q=self.cql_scale_q,
            cql_scale_q_eps=self.cql_scale_q_eps,
            action_mask=None if mask is None else mask.unsqueeze(-2),
        )
        chosen, y, penalty = costs.chosen_action_value[..., 0], y[..., 0], costs.cql_penalty[..., 0]
        self._write_priority(tensordict, (chosen - y).abs(), valid)
        losses = {
            "loss_dqn": self._reduce(costs.dqn.mean(-1), valid, tensordict),
            "loss_cql": self._reduce(costs.cql.mean(-1), valid, tensordict),
        }
        return TensorDict({**losses, **_metrics(chosen, y, penalty, valid)})

    def _by_discount(self, action_value: torch.Tensor) -> torch.Tensor:
        """Returns action values ``[*, T, D, A]``, with ``D`` 1 where there is one discount."""
        if not self.gamma.ndim:
            return action_value.unsqueeze(-2)
        if action_value.shape[-2] != len(self.gamma):
            raise ValueError(
                f"MouseDQNLoss: the head must write action values for each of gamma's {len(self.gamma)} discounts, "
                f"got {action_value.shape[-2]}. Build it with num_discounts={len(self.gamma)}."
            )
        return action_value


@torch.no_grad()
def _metrics(
    chosen: torch.Tensor, target: torch.Tensor, penalty: torch.Tensor, valid: torch.Tensor
) -> dict[str, torch.Tensor]:
    chosen, target, penalty, valid = (entry.flatten() for entry in (chosen, target, penalty, valid))
    mean, std = masked_moments(chosen, valid)
    metrics = {
        "q_values_mean": mean,
        "q_values_std": std,
        "q_values_min": chosen.masked_fill(~valid, torch.inf).amin(0, keepdim=True),
        "q_values_max": chosen.masked_fill(~valid, -torch.inf).amax(0, keepdim=True),
        "q_values_target": masked_moments(target, valid)[0],
        "cql_penalty": masked_moments(penalty, valid)[0],
    }
    return {name: torch.where(valid.any(), value.squeeze(0), 0.0) for name, value in metrics.items()}
