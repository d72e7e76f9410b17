"""Pure tensor mathematics: the arithmetic of losses, and vectors as action values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable


def masked_moments(values: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the mean and the unbiased standard deviation over the valid entries of the last dimension.

    Args:
        values: ``[*, T]``; invalid ones may be anything.
        valid: bool ``[*, T]``.

    Returns:
        The mean and the standard deviation, ``[*, 1]``: zero without a valid entry; and without two of them.

    Examples:
        >>> valid = torch.tensor([True, True, False])
        >>> mean, std = masked_moments(torch.tensor([1.0, 3.0, float("nan")]), valid)
        >>> round(mean.item(), 4), round(std.item(), 4)
        (2.0, 1.4142)
    """
    count = valid.sum(-1, keepdim=True)
    mean = torch.where(valid, values, 0.0).sum(-1, keepdim=True) / count.clamp_min(1)
    squares = torch.where(valid, values - mean, 0.0).square().sum(-1, keepdim=True)
    return mean, (squares / (count - 1).clamp_min(1)).sqrt()


def normalize_reward(
    reward: torch.Tensor,
    valid: torch.Tensor,
    *,
    normalize_reward_mean: bool = False,
    normalize_reward_std: bool = False,
    normalize_reward_eps: float = 1e-8,
    normalize_reward_std_target: float = 1.0,
) -> torch.Tensor:
    """Normalises the rewards of each sequence by their own mean and standard deviation.

    Args:
        reward: ``[*, T]``; invalid ones may be anything.
        valid: bool ``[*, T]``, the steps that count.
        normalize_reward_mean: subtract the sequence's mean.
        normalize_reward_std: divide by the sequence's unbiased standard deviation, after the mean was subtracted, and
            multiply by the target. A sequence with fewer than two valid steps has none and keeps its scale.
        normalize_reward_eps: added to the standard deviation; rewards that are all equal are divided by this alone.
        normalize_reward_std_target: what the standard deviation becomes.

    Returns:
        ``[*, T]``, zero where invalid.

    Examples:
        >>> reward, valid = torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([True, True, True, False])
        >>> normalize_reward(reward, valid, normalize_reward_mean=True, normalize_reward_std=True).tolist()
        [-1.0, 0.0, 1.0, 0.0]
    """
    mean, std = masked_moments(reward, valid)
    if normalize_reward_mean:
        reward = reward - mean
    if normalize_reward_std:
        factor = normalize_reward_std_target / (std + normalize_reward_eps)
        reward = reward * torch.where(valid.sum(-1, keepdim=True) > 1, factor, 1.0)
    return torch.where(valid, reward, 0.0)


def episode_discount(
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    *,
    gamma: float | torch.Tensor = 0.99,
    gamma_terminal: float = 0.0,
    gamma_truncated: float | None = None,
) -> torch.Tensor:
    """Computes what the next value counts for, by how the step ends; ``terminated`` wins where both are set.

    Args:
        terminated: bool ``[*]``, the step terminates an episode.
        truncated: bool ``[*]``, a step limit cuts the episode.
        gamma: discount of a step that ends nothing.
        gamma_terminal: discount over a termination.
        gamma_truncated: discount over a truncation; ``gamma`` by default.

    Returns:
        ``[*]``.

    Examples:
        >>> ends = torch.eye(3, dtype=torch.bool)
        >>> episode_discount(ends[0], ends[1], gamma=0.5, gamma_truncated=0.25).tolist()
        [0.0, 0.25, 0.5]
    """
    running = gamma if isinstance(gamma, torch.Tensor) else torch.tensor(gamma, device=terminated.device)
    discount = running if gamma_truncated is None else torch.where(truncated, gamma_truncated, running)
    return torch.where(terminated, gamma_terminal, discount)


def td_target(
    reward: torch.Tensor, next_value: torch.Tensor, discount: torch.Tensor, *, scale: float = 1.0, shift: float = 0.0
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


class DQNCosts(NamedTuple):
    """The taken action's value, its squared error, the penalty to be added, and the plain penalty; all ``[*]``."""

    chosen_action_value: torch.Tensor
    dqn: torch.Tensor
    cql: torch.Tensor
    cql_penalty: torch.Tensor


def dqn_costs(
    action_value: torch.Tensor,
    action: torch.Tensor,
    target: torch.Tensor,
    *,
    cql_weight: float = 0.0,
    cql_scale_q: bool = True,
    cql_scale_q_eps: float = 1.0,
    action_mask: torch.Tensor | None = None,
) -> DQNCosts:
    """Computes ``(Q(s, a) - y)^2`` and ``cql_weight * (|y| + cql_scale_q_eps) * (logsumexp_a Q(s, a) - Q(s, a))``.

    Args:
        action_value: ``[*, A]``.
        action: int64 ``[*]``, the action in the data.
        target: ``[*]``, the target ``y`` of :func:`td_target`, without gradient.
        cql_weight: weight of the conservative penalty.
        cql_scale_q: scale the penalty with ``|y| + cql_scale_q_eps`` (MOUSE), or leave it plain.
        cql_scale_q_eps: the penalty's factor where ``y`` is zero.
        action_mask: bool ``[*, A]``, true for the actions that are pushed down; one at least, and all by default.

    Examples:
        >>> costs = dqn_costs(torch.zeros(1, 4), torch.tensor([2]), torch.tensor([-3.0]), cql_weight=0.5)
        >>> costs.dqn.item(), round(costs.cql.item(), 4)  # 0.5 (3 + 1) log 4
        (9.0, 2.7726)
    """
    chosen = action_value.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    pushed = action_value if action_mask is None else action_value.masked_fill(~action_mask, -torch.inf)
    penalty = conservative_penalty(pushed, chosen)
    cql = cql_weight * penalty
    if cql_scale_q:
        cql = cql * (target.abs() + cql_scale_q_eps)
    return DQNCosts(chosen, (chosen - target).square(), cql, penalty)


def expectile_cost(error: torch.Tensor, expectile: float) -> torch.Tensor:
    """Computes ``|expectile - 1(error < 0)| * error^2``: the least-squares cost that weighs the two signs differently.

    What minimises its mean is the mean at 0.5, and near 1 the greatest value that occurs: a maximum over the actions in
    the data alone (Kostrikov et al. 2021, arXiv:2110.06169).

    Args:
        error: ``[*]``, what is to be reached, less the estimate.
        expectile: in (0, 1).

    Returns:
        ``[*]``.

    Examples:
        >>> expectile_cost(torch.tensor([2.0, -2.0]), 0.75).tolist()
        [3.0, 1.0]
    """
    return torch.where(error < 0, 1 - expectile, expectile) * error.square()


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
