"""In-context Q-learning with vectors as action values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch

from torchrl_mouse.functional import greedy_vector, vec_dqn_cost, vec_dqn_scores
from torchrl_mouse.objectives.bootstrap import BootstrappingLoss

if TYPE_CHECKING:
    from tensordict.utils import NestedKey


class VecDQNLoss(BootstrappingLoss):
    """Q-learning in which a reward turns a vector instead of adding to a value.

    .. code-block:: text

        hidden       = trunk(steps)                                    # once, over the root sequence
        v            = head(hidden)[t, action[t]]
        v'           = greedy vector of target_head(hidden)[t + 1]     # by vec_dqn_scores
        loss_vec_dqn = mean 1 - cosine(v, rope_rotate(v', reward_scale * reward[t + 1] + reward_shift))

    Only how far actions are ahead of one another counts, so there is no discount to choose: returns span episodes, and
    an episode's last transition, however it ended, is compared with the next episode's first frame. Steps at terminal
    frames, padding, the task's last step, which has no successor, and steps whose successor lies outside the window
    are left out.

    Args:
        head: reads ``hidden`` and writes vectors ``[*, A, V]``, ``V`` even, as its only output.
        options: ``trunk``, ``delay_value``, ``reduction``, ``reward_scale``, ``reward_shift`` and MOUSE's normalisation
            of the reward, see :class:`~torchrl_mouse.objectives.bootstrap.BootstrappingLoss`.

    Raises:
        ValueError: an option is out of range.

    Examples:
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> from torchrl_mouse.schema import from_mouse_records
        >>> heads = {"embedding_kwargs": {"max_num_actions": 3}, "vec_dqn_head_kwargs": {"vec_dim": 2}}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, backbone_kwargs=None, **heads))
        >>> loss = VecDQNLoss(model.head("vec_dqn"), trunk=model.trunk, delay_value=False)
        >>> records = {"action": [[0, 2, 1]], "reward": [[0.0, 0.0, 1.0]], "done": [[0, 0, 0]], "time": [[0, 1, 2]]}
        >>> loss(from_mouse_records(TensorDict(records, [1, 3])))["loss_vec_dqn"].shape
        torch.Size([])
    """

    @dataclass
    class _AcceptedKeys(BootstrappingLoss._AcceptedKeys):
        # Not the DQN loss's: both may run on one trunk.
        priority: NestedKey = "vec_td_error"

    default_keys = _AcceptedKeys
    output_dims = ("A", "V")
    out_keys = [  # noqa: RUF012 - TorchRL's contract
        "loss_vec_dqn",
        "vec_dqn_score_abs_min",
        "vec_dqn_score_abs_max",
        "vec_dqn_score_abs_mean",
    ]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the loss, and writes ``vec_td_error`` (``1 - cosine``, ``[*, T, 1]``, 0 where invalid) to the input.

        Args:
            tensordict: steps ``[*, T]``.

        Returns:
            ``loss_vec_dqn`` and, without gradient, the least, greatest and mean size of an action's score at each
            sequence's last decision, in half turns (``vec_dqn_score_abs_min``, ``_max``, ``_mean``).

        Raises:
            KeyError: an entry is missing.
            TypeError: a mark of an end or a start is not boolean.
            ValueError: an action is out of range, or the steps have no time dimension.
        """
        steps = self._with_hidden(tensordict)
        vectors = self._output(steps)  # (*, T, A, V)
        if vectors.shape[-1] % 2:
            raise ValueError(
                f"VecDQNLoss: the head must write [*, T, A, V] with V even, got {tuple(vectors.shape)}. Take a vec_dqn "
                "head."
            )
        mask = self._action_mask(steps, vectors.shape[-2])
        done, terminated, truncated = self._ends(steps)
        successor, inside = self._successor(steps, terminated | truncated)
        next_vector = greedy_vector(self._output(steps, target=True), mask).take_along_dim(successor, -2)
        decisions = self._decisions(steps)
        valid = decisions & inside & ~done
        self._warn_of_nothing(valid)
        action = self._actions(steps, vectors.shape[-2], valid, mask)
        reward = self._rewards(steps, valid).to(vectors.dtype)
        cost = vec_dqn_cost(vectors, action, next_vector, self.reward_scale * reward + self.reward_shift)
        self._write_priority(tensordict, cost, valid)
        loss = self._reduce(cost, valid, tensordict)
        return TensorDict({"loss_vec_dqn": loss, **_metrics(vectors, decisions, mask)})


@torch.no_grad()
def _metrics(
    vectors: torch.Tensor, decisions: torch.Tensor, action_mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    step = torch.arange(decisions.shape[-1], device=decisions.device)
    last = torch.where(decisions, step, 0).amax(-1)[..., None, None]
    at_last = vectors.take_along_dim(last.unsqueeze(-1), -3).squeeze(-3)
    allowed = None if action_mask is None else action_mask.take_along_dim(last, -2).squeeze(-2)
    size = (vec_dqn_scores(at_last, allowed).abs() / torch.pi).to(vectors.dtype)  # (*, A)
    known = decisions.any(-1, keepdim=True).expand_as(size)
    known = known if allowed is None else known & allowed
    metrics = {
        "min": size.masked_fill(~known, torch.inf).amin(),
        "max": size.masked_fill(~known, -torch.inf).amax(),
        "mean": torch.where(known, size, 0.0).sum() / known.sum().clamp_min(1),
    }
    return {f"vec_dqn_score_abs_{name}": torch.where(known.any(), value, 0.0) for name, value in metrics.items()}
