"""Learning from a teacher's action values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch

from torchrl_mouse import schema
from torchrl_mouse.functional import SP_LOSSES, SV_LOSSES
from torchrl_mouse.objectives.common import InContextLoss

if TYPE_CHECKING:
    from tensordict.utils import NestedKey


class _TeacherLoss(InContextLoss):
    """Base of the losses that compare a head's output ``[*, T, A]`` with a teacher's action values."""

    @dataclass
    class _AcceptedKeys(InContextLoss._AcceptedKeys):
        q_star: NestedKey = schema.Q_STAR

    default_keys = _AcceptedKeys
    losses: dict[str, Any]

    def __init__(
        self, head: TensorDictModule, *, trunk: TensorDictModuleBase | None, loss_type: str, reduction: str
    ) -> None:
        super().__init__(head, trunk=trunk, reduction=reduction)
        if loss_type not in list(self.losses):
            raise ValueError(
                f"{type(self).__name__}: loss_type must be one of {', '.join(self.losses)}, got {loss_type!r}."
            )
        self.loss_type = loss_type

    @property
    def _options(self) -> dict[str, float]:
        """Options of the function in ``losses``."""
        return {}

    def _loss_keys(self) -> list[NestedKey]:
        return [*super()._loss_keys(), self.tensor_keys.q_star]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the loss over the decisions for which the teacher has a finite value.

        Args:
            tensordict: steps ``[*, T]`` with ``q_star`` ``[*, T, A]``.

        Returns:
            ``loss_sp``, or ``loss_sv``.

        Raises:
            KeyError: an entry is missing.
            TypeError: a mark of an episode's end, or the mask, is not boolean.
            ValueError: the teacher has another number of actions than the head.
        """
        q_star = schema.require(tensordict, self.tensor_keys.q_star)
        output = self._output(self._with_hidden(tensordict))
        if q_star.shape != output.shape:
            raise ValueError(
                f"{type(self).__name__}: entry {self.tensor_keys.q_star!r} must have the head's shape "
                f"{tuple(output.shape)}, got {tuple(q_star.shape)}. Give both the same number of actions."
            )
        if (mask := self._action_mask(tensordict, output.shape[-1])) is not None:
            q_star = q_star.masked_fill(~mask, -torch.inf)
        cost = self.losses[self.loss_type](output, q_star.to(output.dtype), **self._options)
        valid = self._decisions(tensordict) & q_star.isfinite().any(-1)
        self._warn_of_nothing(valid)
        return TensorDict({self.out_keys[0]: self._reduce(cost, valid, tensordict)})


class SupervisedPolicyLoss(_TeacherLoss):
    """Compares a policy head with a teacher's action values, by default its best action, at every decision.

    A policy that imitates the optimal action given only what was seen so far acts by posterior sampling: it explores
    while tasks look alike, and exploits once they are told apart (Lee et al. 2023, arXiv:2306.14892).

    Args:
        head: reads ``hidden`` and writes logits ``[*, A]`` as its only output.
        trunk: writes ``hidden``; ``None`` where the input holds it already.
        loss_type: one of :data:`~torchrl_mouse.functional.SP_LOSSES`: ``"ce"`` (the best action), ``"ce-soft-fwd"``,
            ``"ce-soft-bwd"``, ``"kl-fwd"``, ``"kl-bwd"`` or ``"js"`` (the teacher's softmax).
        temperature: of the teacher's softmax; positive.
        label_smoothing: in [0, 1), share of the teacher's probability that is spread over the task's actions.
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

    out_keys = ["loss_sp"]  # noqa: RUF012 - TorchRL's contract
    losses = SP_LOSSES

    def __init__(
        self,
        head: TensorDictModule,
        *,
        trunk: TensorDictModuleBase | None = None,
        loss_type: str = "ce",
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(head, trunk=trunk, loss_type=loss_type, reduction=reduction)
        if not temperature > 0:
            raise ValueError(f"SupervisedPolicyLoss: temperature must be positive, got {temperature}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"SupervisedPolicyLoss: label_smoothing must lie in [0, 1), got {label_smoothing}.")
        self.temperature = temperature
        self.label_smoothing = label_smoothing

    @property
    def _options(self) -> dict[str, float]:
        return {"temperature": self.temperature, "label_smoothing": self.label_smoothing}


class SupervisedValueLoss(_TeacherLoss):
    """Regresses a value head on a teacher's action values, at every decision.

    A decision costs the mean over the actions for which the teacher's value is finite; every decision that has one
    weighs the same, however many actions its task has.

    Args:
        head: reads ``hidden`` and writes values ``[*, A]`` as its only output.
        trunk: writes ``hidden``; ``None`` where the input holds it already.
        loss_type: ``"mse"``, squared errors, or ``"mae"``, absolute ones.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: an option is none of those.

    Examples:
        >>> import torch
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> from torchrl_mouse.schema import from_mouse_records
        >>> heads = {"embedding_kwargs": {"max_num_actions": 3}, "sv_head_kwargs": {"scale": 0.0}}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, backbone_kwargs=None, **heads))
        >>> records = {"action": [[0, 2]], "reward": [[0.0, 1.0]], "done": [[0, 0]], "time": [[0, 1]]}
        >>> records["q_star"] = [[[3.0, 1.0, float("-inf")], [9.0, 9.0, 9.0]]]
        >>> loss = SupervisedValueLoss(model.head("sv"), trunk=model.trunk)
        >>> loss(from_mouse_records(TensorDict(records, [1, 2])))["loss_sv"].item()  # (9 + 1) / 2
        5.0
    """

    out_keys = ["loss_sv"]  # noqa: RUF012 - TorchRL's contract
    losses = SV_LOSSES

    def __init__(
        self,
        head: TensorDictModule,
        *,
        trunk: TensorDictModuleBase | None = None,
        loss_type: str = "mse",
        reduction: str = "mean",
    ) -> None:
        super().__init__(head, trunk=trunk, loss_type=loss_type, reduction=reduction)
