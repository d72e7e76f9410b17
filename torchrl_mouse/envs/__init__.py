"""Environments whose trajectory is a whole task of many episodes."""

from torchrl_mouse.envs.dark_room import DARK_ROOM, DarkRoomEnv, oracle_policy, split_goals
from torchrl_mouse.envs.frozen_lake import FrozenLakeEnv
from torchrl_mouse.envs.task_env import TaskEnv
from torchrl_mouse.envs.transforms import ClearContext, DecisionMask
from torchrl_mouse.streams import StreamTracker

__all__ = [
    "DARK_ROOM",
    "ClearContext",
    "DarkRoomEnv",
    "DecisionMask",
    "FrozenLakeEnv",
    "StreamTracker",
    "TaskEnv",
    "oracle_policy",
    "split_goals",
]
