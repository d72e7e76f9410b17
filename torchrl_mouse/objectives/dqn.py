"""In-context Q-learning with a conservative penalty."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch

from torchrl_mouse.functional import dqn_costs, episode_discount, masked_moments, td_target
from torchrl_mouse.objectives.bootstrap import BootstrappingLoss


class MouseDQNLoss(BootstrappingLoss):
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
        gamma: discount per step, in [0, 1].
        gamma_terminal: discount over an episode's termination, in [0, 1].
        gamma_truncated: discount over an episode's truncation, in [0, 1]; ``gamma`` by default.
        cql_weight: weight of the conservative penalty, at least 0.
        cql_scale_q: scale the penalty of a step with ``|y| + cql_scale_q_eps`` (MOUSE), or leave it plain.
        cql_scale_q_eps: the penalty's factor where ``y`` is zero.
        double_dqn: the online head chooses the next action, which the target head values: it then overestimates less
            (van Hasselt et al. 2016, arXiv:1509.06461).
        options: ``trunk``, ``delay_value``, ``reduction``, ``reward_scale``, ``reward_shift`` and MOUSE's normalisation
            of the reward, see :class:`~torchrl_mouse.objectives.bootstrap.BootstrappingLoss`.

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
    _schedulable_buffers = frozenset({"gamma"})

    def __init__(
        self,
        head: TensorDictModule,
        *,
        gamma: float = 0.99,
        gamma_terminal: float = 0.0,
        gamma_truncated: float | None = None,
        cql_weight: float = 0.0,
        cql_scale_q: bool = True,
        cql_scale_q_eps: float = 1.0,
        double_dqn: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(head, **options)
        for name, value in (("gamma", gamma), ("gamma_terminal", gamma_terminal), ("gamma_truncated", gamma_truncated)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"MouseDQNLoss: {name} must lie in [0, 1], got {value}.")
        if cql_weight < 0:
            raise ValueError(f"MouseDQNLoss: cql_weight must be at least 0, got {cql_weight}.")
        self.register_buffer("gamma", torch.tensor(gamma))
        self.gamma_terminal = gamma_terminal
        self.gamma_truncated = gamma_truncated
        self.cql_weight = cql_weight
        self.cql_scale_q = cql_scale_q
        self.cql_scale_q_eps = cql_scale_q_eps
        self.double_dqn = double_dqn

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
            ValueError: an action is out of range, or the steps have no time dimension.
        """
        steps = self._predict(tensordict)
        action_value = self._output(steps)  # (*, T, A)
        target = self._target_output(steps)
        best = (action_value.detach() if self.double_dqn else target).argmax(-1, keepdim=True)
        discount, next_value, valid = self._bootstrap(steps, target.gather(-1, best).squeeze(-1))
        action = self._actions(steps, action_value.shape[-1], valid)
        reward = self._rewards(steps, valid).to(action_value.dtype)
        y = td_target(reward, next_value, discount, scale=self.reward_scale, shift=self.reward_shift)
        costs = dqn_costs(
            action_value,
            action,
            y,
            cql_weight=self.cql_weight,
            cql_scale_q=self.cql_scale_q,
            cql_scale_q_eps=self.cql_scale_q_eps,
        )
        self._write_priority(tensordict, (costs.chosen_action_value - y).abs(), valid)
        losses = {
            "loss_dqn": self._reduce(costs.dqn, valid, tensordict),
            "loss_cql": self._reduce(costs.cql, valid, tensordict),
        }
        return TensorDict({**losses, **_metrics(costs.chosen_action_value, y, costs.cql_penalty, valid)})

    def _bootstrap(
        self, steps: TensorDictBase, state_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the discounts, the values they apply to, and which steps have both; all ``[*, T]``."""
        done, terminated, truncated = self._ends(steps)
        gamma: Any = self.gamma
        discount = episode_discount(
            terminated,
            truncated,
            gamma=gamma,
            gamma_terminal=self.gamma_terminal,
            gamma_truncated=self.gamma_truncated,
        )
        discount = discount.to(state_value.dtype).masked_fill(done, 0.0)
        # Where returns span episodes, play goes on after the terminal frame, at which nothing is decided.
        beyond = (terminated | truncated) & (self.gamma_terminal > 0)
        next_value, inside = self._ahead(state_value, steps, beyond)
        valid = self._decisions(steps) & (inside | (discount == 0))
        return discount.masked_fill(~valid, 0.0), next_value, valid


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
