"""Learning from a teacher's action values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch

from torchrl_mouse import schema
from torchrl_mouse.functional import teacher_cross_entropy
from torchrl_mouse.objectives.common import InContextLoss

if TYPE_CHECKING:
    from tensordict.utils import NestedKey


class SupervisedPolicyLoss(InContextLoss):
    """Cross-entropy of a policy head with the teacher's best action, at every decision.

    A policy that imitates the optimal action given only what was seen so far acts by posterior sampling: it explores
    while tasks look alike, and exploits once they are told apart (Lee et al. 2023, arXiv:2306.14892).

    Args:
        head: reads ``hidden`` and writes logits ``[*, A]`` as its only output.
        trunk: writes ``hidden``; ``None`` where the input holds it already.
        label_smoothing: in [0, 1), share of the label that is spread over the task's actions.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an option is out of range.

    Examples:
        >>> import torch
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> from torchrl_mouse.schema import from_mouse_records
        >>> heads = {"embedding_kwargs": {"max_num_actions": 3}, "sp_head_kwargs": {"scale": 0.0}}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, backbone_kwargs=None, **heads))
        >>> records = {"action": [[0, 2]], "reward": [[0.0, 1.0]], "done": [[0, 0]], "time": [[0, 1]]}
        >>> records["q_star"] = [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
        >>> loss = SupervisedPolicyLoss(model.head("sp"), trunk=model.trunk)
        >>> round(loss(from_mouse_records(TensorDict(records, [1, 2])))["loss_sp"].item(), 4)  # log 3
        1.0986
    """

    @dataclass
    class _AcceptedKeys(InContextLoss._AcceptedKeys):
        q_star: NestedKey = schema.Q_STAR

    default_keys = _AcceptedKeys
    out_keys = ["loss_sp"]  # noqa: RUF012 - TorchRL's contract

    def __init__(
        self,
        head: TensorDictModule,
        *,
        trunk: TensorDictModuleBase | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(head, trunk=trunk, reduction=reduction)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"SupervisedPolicyLoss: label_smoothing must lie in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    def _loss_keys(self) -> list[NestedKey]:
        return [*super()._loss_keys(), self.tensor_keys.q_star]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes ``loss_sp`` over the decisions for which the teacher has a finite value.

        Args:
            tensordict: steps ``[*, T]`` with ``q_star`` ``[*, T, A]``.

        Raises:
            KeyError: an entry is missing.
            TypeError: a mark of an episode's end, or the mask, is not boolean.
            ValueError: the teacher has another number of actions than the head.
        """
        q_star = schema.require(tensordict, self.tensor_keys.q_star)
        logits = self._predict(tensordict).get(self.head.out_keys[0])
        if q_star.shape != logits.shape:
            raise ValueError(
                f"SupervisedPolicyLoss: entry {self.tensor_keys.q_star!r} must have the head's shape "
                f"{tuple(logits.shape)}, got {tuple(q_star.shape)}. Give both the same number of actions."
            )
        cost = teacher_cross_entropy(logits, q_star, self.label_smoothing)
        valid = self._decisions(tensordict) & q_star.isfinite().any(-1)
        return TensorDict({"loss_sp": self._reduce(cost, valid, tensordict)})
