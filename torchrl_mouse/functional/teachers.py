"""How far a student is from a teacher's values per action."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable


class _Policy(NamedTuple):
    """Probabilities and their logarithms ``[*, A]``; both zero in the slots of actions that a task does not have."""

    probability: torch.Tensor
    log_probability: torch.Tensor


def _policy(log_probability: torch.Tensor, valid: torch.Tensor) -> _Policy:
    return _Policy(log_probability.exp().masked_fill(~valid, 0.0), log_probability.masked_fill(~valid, 0.0))


def _masked_log_softmax(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    # Not -inf: a row without any valid entry would be NaN, and so would its gradient.
    return F.log_softmax(logits.masked_fill(~valid, torch.finfo(logits.dtype).min), -1)


def _student(logits: torch.Tensor, q_star: torch.Tensor) -> _Policy:
    valid = q_star.isfinite()
    return _policy(_masked_log_softmax(logits, valid), valid)


def _teacher(q_star: torch.Tensor, temperature: float, label_smoothing: float) -> _Policy:
    valid = q_star.isfinite()
    log_probability = _masked_log_softmax(q_star.detach().masked_fill(~valid, 0.0) / temperature, valid)
    # In logarithms, as a sharp teacher's smallest probabilities are zero in floating point.
    kept = log_probability + math.log1p(-label_smoothing)
    return _policy(torch.logaddexp(kept, (label_smoothing * _share(valid)).to(kept.dtype).log()), valid)


def _share(chosen: torch.Tensor) -> torch.Tensor:
    """Returns equal parts for what is chosen; zero for each where nothing is."""
    return chosen / chosen.sum(-1, keepdim=True).clamp_min(1)


def _cross_entropy(of: _Policy, under: _Policy) -> torch.Tensor:
    return -(of.probability * under.log_probability).sum(-1)


def _kl(of: _Policy, under: _Policy) -> torch.Tensor:
    return (of.probability * (of.log_probability - under.log_probability)).sum(-1)


def _js(one: _Policy, other: _Policy) -> torch.Tensor:
    middle = torch.logaddexp(one.log_probability, other.log_probability) - math.log(2)
    mixture = _Policy((one.probability + other.probability) / 2, middle)
    return (_kl(one, mixture) + _kl(other, mixture)) / 2


def teacher_cross_entropy(logits: torch.Tensor, q_star: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Computes the cross-entropy of the student's logits with the teacher's best action.

    Action slots that a task does not have are marked by ``-inf`` in the teacher's values; they get no probability on
    either side, and a step without any finite value has no teacher and costs nothing.

    Args:
        logits: the student's ``[*, A]``.
        q_star: the teacher's action values ``[*, A]``; best actions that tie share the label evenly.
        label_smoothing: in [0, 1): this share of the label is spread evenly over the task's actions.

    Returns:
        ``[*]``, zero where no entry of ``q_star`` is finite.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0, 9.0]])
        >>> round(teacher_cross_entropy(logits, torch.tensor([[1.0, 0.0, float("-inf")]])).item(), 4)  # log 2
        0.6931
    """
    valid = q_star.isfinite()
    score = q_star.masked_fill(~valid, float("-inf"))
    best = valid & (score == score.amax(-1, keepdim=True))
    label = (1 - label_smoothing) * _share(best) + label_smoothing * _share(valid)
    return -(label * _student(logits, q_star).log_probability).sum(-1)


def _soft(cost: Callable[[_Policy, _Policy], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Turns a cost of the teacher's and the student's policies into one of their values and logits."""

    def loss(
        logits: torch.Tensor, q_star: torch.Tensor, *, temperature: float = 1.0, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        return cost(_teacher(q_star, temperature, label_smoothing), _student(logits, q_star))

    return loss


SP_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "ce": lambda logits, q_star, *, temperature=1.0, label_smoothing=0.0: teacher_cross_entropy(
        logits, q_star, label_smoothing
    ),
    "ce-soft-fwd": _soft(_cross_entropy),
    "ce-soft-bwd": _soft(lambda teacher, student: _cross_entropy(student, teacher)),
    "kl-fwd": _soft(_kl),
    "kl-bwd": _soft(lambda teacher, student: _kl(student, teacher)),
    "js": _soft(_js),
}
"""How far a student's policy ``Q = softmax(logits)`` is from a teacher's ``P = softmax(q_star / temperature)``.

Each is called as ``loss(logits, q_star, temperature=1.0, label_smoothing=0.0)`` on ``[*, A]`` and returns ``[*]``.
``P`` is smoothed to ``(1 - s) P + s / A``, with ``s`` the ``label_smoothing``, ``A`` the number of actions that the
task has. In every variant the slots where ``q_star`` is not finite get no probability on either side, and a step
without any finite value costs nothing.

- ``ce``: :func:`teacher_cross_entropy` with the best action, whatever the temperature.
- ``ce-soft-fwd``, ``ce-soft-bwd``: ``-sum P log Q`` and ``-sum Q log P``.
- ``kl-fwd``, ``kl-bwd``: ``KL(P || Q)`` and ``KL(Q || P)``.
- ``js``: the mean of ``KL(P || M)`` and ``KL(Q || M)``, ``M`` the mean of ``P`` and ``Q``.
"""


def _value_loss(cost: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def loss(values: torch.Tensor, q_star: torch.Tensor) -> torch.Tensor:
        valid = q_star.isfinite()
        # Padding is replaced before it is subtracted: its error would be infinite, and its gradient NaN.
        error = values - q_star.detach().masked_fill(~valid, 0.0)
        return (_share(valid) * cost(error)).sum(-1)

    return loss


SV_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": _value_loss(torch.square),
    "mae": _value_loss(torch.abs),
}
"""The mean squared or absolute error of a head's values with a teacher's.

Each is called as ``loss(values, q_star)`` on ``[*, A]`` and returns ``[*]``.
The mean is over the actions for which the teacher's value is finite; a step without any costs nothing.
"""
