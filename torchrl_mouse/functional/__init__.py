"""Pure tensor mathematics: the arithmetic of losses, vectors as action values, teachers, and beliefs."""

from torchrl_mouse.functional.gaussians import gaussian_product, standard_normal_kl
from torchrl_mouse.functional.teachers import SP_LOSSES, SV_LOSSES, teacher_cross_entropy
from torchrl_mouse.functional.values import (
    DQNCosts,
    conservative_penalty,
    dqn_costs,
    episode_discount,
    expectile_cost,
    masked_moments,
    normalize_reward,
    td_target,
)
from torchrl_mouse.functional.vectors import greedy_vector, rope_rotate, vec_dqn_cost, vec_dqn_scores

__all__ = [
    "SP_LOSSES",
    "SV_LOSSES",
    "DQNCosts",
    "conservative_penalty",
    "dqn_costs",
    "episode_discount",
    "expectile_cost",
    "gaussian_product",
    "greedy_vector",
    "masked_moments",
    "normalize_reward",
    "rope_rotate",
    "standard_normal_kl",
    "td_target",
    "teacher_cross_entropy",
    "vec_dqn_cost",
    "vec_dqn_scores",
]
