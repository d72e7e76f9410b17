"""Environments whose trajectory is a whole task of many episodes."""

from torchrl_mouse.envs.dark_room import DARK_ROOM, DarkRoomEnv, grid_symmetries, oracle_policy, split_goals
from torchrl_mouse.envs.frozen_lake import FrozenLakeEnv
from torchrl_mouse.envs.half_cheetah_vel import HalfCheetahVelEnv, half_cheetah_velocities
from torchrl_mouse.envs.point_robot import (
    PointRobotEnv,
    point_robot_goals,
    point_robot_oracle,
    sparse_point_robot_oracle,
)
from torchrl_mouse.envs.task_env import TaskEnv
from torchrl_mouse.envs.transforms import ClearContext, DecisionMask
from torchrl_mouse.streams import StreamTracker

__all__ = [
    "DARK_ROOM",
    "ClearContext",
    "DarkRoomEnv",
    "DecisionMask",
    "FrozenLakeEnv",
    "HalfCheetahVelEnv",
    "PointRobotEnv",
    "StreamTracker",
    "TaskEnv",
    "grid_symmetries",
    "half_cheetah_velocities",
    "oracle_policy",
    "point_robot_goals",
    "point_robot_oracle",
    "sparse_point_robot_oracle",
    "split_goals",
]
