"""The arithmetic of losses on values: rewards, discounts, targets and costs."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
