"""Losses; they build no network."""

from torchrl_mouse.objectives.common import CombinedLoss, InContextLoss
from torchrl_mouse.objectives.dqn import MouseDQNLoss
from torchrl_mouse.objectives.iql import MouseIQLLoss
from torchrl_mouse.objectives.pearl import PEARLLoss
from torchrl_mouse.objectives.supervised import SupervisedPolicyLoss, SupervisedValueLoss
from torchrl_mouse.objectives.vec_dqn import VecDQNLoss

__all__ = [
    "CombinedLoss",
    "InContextLoss",
    "MouseDQNLoss",
    "MouseIQLLoss",
    "PEARLLoss",
    "SupervisedPolicyLoss",
    "SupervisedValueLoss",
    "VecDQNLoss",
]
