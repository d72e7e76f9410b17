"""Vectors as action values: what counts is where they point."""

from __future__ import annotations

import torch
from torch.nn import functional as F


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


def greedy_vector(vectors: torch.Tensor, action_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the vector ``[*, V]`` of the action with the highest of :func:`vec_dqn_scores`.

    Args:
        vectors: ``[*, A, V]``, ``V`` even.
        action_mask: bool ``[*, A]``, true for the actions to choose from; all by default.

    Examples:
        >>> greedy_vector(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).tolist()
        [0.0, 3.0]
    """
    scores = vec_dqn_scores(vectors, action_mask)
    if action_mask is not None:
        scores = scores.masked_fill(~action_mask, -torch.inf)
    return _vector_of(vectors, scores.argmax(-1))


def _vector_of(vectors: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return vectors.take_along_dim(action[..., None, None], -2).squeeze(-2)


def vec_dqn_cost(
    vectors: torch.Tensor, action: torch.Tensor, next_vector: torch.Tensor, theta: torch.Tensor
) -> torch.Tensor:
    """Computes ``1 - cosine`` between the taken action's vector and the next one, turned by the reward.

    Turning by the reward is to vectors what adding it is to values: an action's vector should point as far ahead of the
    next one as its reward says.

    Args:
        vectors: ``[*, A, V]``, ``V`` even.
        action: int64 ``[*]``, the action in the data.
        next_vector: ``[*, V]``, the target's :func:`greedy_vector` of the next state; used without gradient.
        theta: ``[*]``, radians: ``reward_scale * r + reward_shift``.

    Returns:
        ``[*]`` in [0, 2]; 1 where a vector is zero and so has no direction.

    Examples:
        >>> vectors, following = torch.tensor([[9.0, 9.0], [0.0, 2.0]]), torch.tensor([3.0, 0.0])
        >>> round(vec_dqn_cost(vectors, torch.tensor(1), following, torch.tensor(torch.pi / 2)).item(), 4)
        0.0
    """
    turned = rope_rotate(next_vector, theta).detach()
    return 1 - F.cosine_similarity(_vector_of(vectors, action), turned, dim=-1)
