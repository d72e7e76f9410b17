"""FrozenLake with a fresh map per task: a Gymnasium environment as the base of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from torchrl.envs import GymWrapper

from torchrl_mouse import schema

if TYPE_CHECKING:
    import torch


class FrozenLakeEnv(GymWrapper):
    """Gymnasium's FrozenLake-v1 on a random solvable map, another one per task.

    The map is not observed: ``observation_discrete`` int64 ``[]`` is the cell. Actions: 0 left, 1 down, 2 right, 3 up;
    reward 1 and the end on the goal, the end in a hole, truncation after Gymnasium's 100 steps.

    Args:
        size: the map's side, at least 2.
        is_slippery: moves go astray with Gymnasium's probability of 2/3.
        seed: of maps and slips; None takes fresh entropy. ``set_seed`` sets it later.
        **kwargs: of TorchRL's ``GymWrapper``, such as ``device``; ids are categorical unless
            ``categorical_action_encoding=False``.

    Raises:
        ValueError: ``size`` is below 2.

    Examples:
        >>> from torchrl_mouse.envs import TaskEnv
        >>> env = TaskEnv(FrozenLakeEnv(seed=0), episodes_per_task=3)
        >>> int((task := env.rollout(400))["is_init"].sum()), bool(task["next", "done"][-1])
        (1, True)
    """

    _env: gym.Env

    def __init__(self, size: int = 4, *, is_slippery: bool = False, seed: int | None = None, **kwargs: Any) -> None:
        if size < 2:
            raise ValueError(f"FrozenLakeEnv: size must be at least 2, got {size}. A map has a start and a goal.")
        self._size, self._is_slippery = size, is_slippery
        self._tasks = np.random.default_rng(seed)
        super().__init__(self._draw_lake(), **{"categorical_action_encoding": True, **kwargs})

    def sample_task(self, mask: torch.Tensor) -> None:
        """Draws a new map; the next reset starts on it.

        Args:
            mask: bool ``[]``, whether to.
        """
        if bool(mask):
            self._env.close()
            self._env = self._draw_lake()

    def _draw_lake(self) -> gym.Env:
        map_seed, slip_seed = (int(seed) for seed in self._tasks.integers(2**31, size=2))
        lake = gym.make(
            "FrozenLake-v1", desc=generate_random_map(self._size, seed=map_seed), is_slippery=self._is_slippery
        )
        lake.reset(seed=slip_seed)
        # TorchRL names a lone observation "observation", which is the continuous one here
        space = gym.spaces.Dict({schema.OBSERVATION_DISCRETE: lake.observation_space})
        return gym.wrappers.TransformObservation(lake, _name_cell, space)

    def _set_seed(self, seed: int | None) -> None:
        self._tasks = np.random.default_rng(seed)
        self._env = self._draw_lake()


def _name_cell(cell: int) -> dict[str, int]:
    return {str(schema.OBSERVATION_DISCRETE): cell}
