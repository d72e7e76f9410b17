"""Pure tensor mathematics: contexts inside windows, targets and penalties of losses, vectors as action values."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def segment_positions(is_init: torch.Tensor) -> torch.Tensor:
    """Counts the steps since each context began.

    Args:
        is_init: bool ``[*, T]``, true at the first step of a task; index 0 always begins a context.

    Returns:
        int64 ``[*, T]``.

    Examples:
        >>> segment_positions(torch.tensor([False, False, True, False])).tolist()
        [0, 1, 0, 1]
    """
    index = torch.arange(is_init.shape[-1], device=is_init.device)
    return index - torch.where(is_init, index, 0).cummax(-1).values


def segment_mask(is_init: torch.Tensor) -> torch.Tensor:
    """Builds the attention mask that is causal and never looks into another task.

    Args:
        is_init: bool ``[*, T]``, true at the first step of a task; index 0 always begins a context.

    Returns:
        bool ``[*, T, T]``: entry ``[i, j]`` is true where step ``i`` may attend to step ``j``.

    Examples:
        >>> segment_mask(torch.tensor([True, False, True])).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    segment = is_init.cumsum(-1)
    segment = segment - segment[..., :1]
    return (segment.unsqueeze(-1) == segment.unsqueeze(-2)).tril()


def td_target(
    reward: torch.Tensor,
    next_value: torch.Tensor,
    discount: torch.Tensor,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
) -> torch.Tensor:
    """Computes the one-step target ``scale * r + shift + discount * V(s')``.

    Args:
        reward: ``[*]``.
        next_value: ``[*]``, the target network's value of the next state.
        discount: ``[*]``, what the next value counts for: zero where nothing follows. It selects rather than
            multiplies, so a non-finite value there does no harm.
        scale: factor of the reward.
        shift: added to the scaled reward.

    Returns:
        ``[*]``, without gradient.

    Examples:
        >>> td_target(torch.tensor([1.0, 1.0]), torch.tensor([2.0, float("nan")]), torch.tensor([0.5, 0.0])).tolist()
        [2.0, 1.0]
    """
    return (scale * reward + shift + torch.where(discount == 0, 0.0, discount * next_value)).detach()


def conservative_penalty(action_value: torch.Tensor, chosen_action_value: torch.Tensor) -> torch.Tensor:
    """Computes the CQL penalty ``logsumexp_a Q(s, a) - Q(s, a_data)``, never negative.

    It pushes down the values of actions that the data does not hold, so that acting greedily does not chase
    overestimates (Kumar et al. 2020, arXiv:2006.04779, CQL(H)).

    Args:
        action_value: ``[*, A]``.
        chosen_action_value: ``[*]``, the value of the action in the data.

    Returns:
        ``[*]``.

    Examples:
        >>> round(conservative_penalty(torch.zeros(4), torch.zeros(())).item(), 4)  # log 4
        1.3863
    """
    return action_value.logsumexp(-1) - chosen_action_value


def rope_rotate(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Rotates each pair ``(x[2i], x[2i + 1])`` by an angle.

    Args:
        x: ``[*, V]``, ``V`` even.
        theta: ``[*]``, radians, counter-clockwise; the same for all pairs of a vector.

    Returns:
        ``[*, V]``, of the same norm.

    Examples:
        >>> quarter = torch.tensor(torch.pi / 2)
        >>> (rope_rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]), quarter).round() + 0.0).tolist()
        [0.0, 1.0, -2.0, 0.0]
    """
    theta = theta.unsqueeze(-1)
    return x * theta.cos() + _rotate_quarter(x) * theta.sin()


def vec_dqn_scores(vectors: torch.Tensor, action_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Computes each action's score ``sum_i angle(u_i, u_a)`` from the directions ``u`` of the actions' vectors.

    ``angle(u, v) = atan2(rot90(u) . v, u . v)`` is the signed angle, in [-pi, pi], by which the pairs of ``u`` have to
    turn to point along ``v``. A vector's direction stands for a value, so what counts is how far an action is ahead of
    the others; a vector of zeros has no direction and is at angle 0, without gradient.

    Args:
        vectors: ``[*, A, V]``, ``V`` even.
        action_mask: bool ``[*, A]``, true for the actions that the task has; the others do not count in anybody's
            score. All count by default.

    Returns:
        ``[*, A]``, radians, in [-(A - 1) pi, (A - 1) pi]; without a mask they sum to zero.

    .. note::
        All pairs of actions are compared: memory grows with the square of ``A``.

    Examples:
        >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
        >>> (vec_dqn_scores(vectors) / torch.pi).tolist()
        [-1.0, 0.5, 0.5]
        >>> (vec_dqn_scores(vectors, torch.tensor([True, True, False])) / torch.pi).tolist()
        [-0.5, 0.5, 0.5]
    """
    unit = F.normalize(vectors, dim=-1)
    angle = torch.atan2(_rotate_quarter(unit) @ unit.mT, unit @ unit.mT)  # [*, A, A], from row to column
    if action_mask is not None:
        angle = angle.masked_fill(~action_mask.unsqueeze(-1), 0.0)
    return angle.sum(-2)


def _rotate_quarter(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


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
    taught = valid.any(-1)
    # A row without a teacher would be all -inf: its log-softmax and, worse, its gradient would be NaN.
    valid = valid | ~taught.unsqueeze(-1)
    log_probability = F.log_softmax(logits.masked_fill(~valid, float("-inf")), -1)
    log_probability = log_probability.masked_fill(~valid, 0.0)
    score = q_star.masked_fill(~q_star.isfinite(), float("-inf"))
    best = score == score.amax(-1, keepdim=True)
    label = (1 - label_smoothing) * _share(best) + label_smoothing * _share(valid)
    return torch.where(taught, -(label * log_probability).sum(-1), 0.0)


def _share(chosen: torch.Tensor) -> torch.Tensor:
    return chosen / chosen.sum(-1, keepdim=True)
