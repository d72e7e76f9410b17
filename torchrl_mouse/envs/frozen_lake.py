"""FrozenLake with a fresh map per task: a Gymnasium environment as the base of a task."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from torchrl.envs import GymWrapper

from torchrl_mouse import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class FrozenLakeEnv(GymWrapper):
    """Gymnasium's FrozenLake-v1 on a random solvable map, another one per task.

    The map is not observed: ``observation_discrete`` int64 ``[]`` is the cell. Actions: 0 left, 1 down, 2 right, 3 up;
    reward 1 and the end on the goal, the end in a hole, truncation after Gymnasium's 100 steps.

    Args:
        size: the map's side, at least 2.
        is_slippery: moves go astray with Gymnasium's probability of 2/3.
        seed: of maps and slips; None takes fresh entropy. ``set_seed`` sets it later.
        teacher: adds ``q_star`` float32 ``[4]``, the optimal action values on the task's map, without the step limit.
        teacher_gamma: their discount, in (0, 1).
        **kwargs: of TorchRL's ``GymWrapper``, such as ``device``; ids are categorical unless
            ``categorical_action_encoding=False``.

    Raises:
        ValueError: ``size`` is below 2, or ``teacher_gamma`` out of range.

    Examples:
        >>> from torchrl_mouse.envs import TaskEnv
        >>> env = TaskEnv(FrozenLakeEnv(seed=0), episodes_per_task=3)
        >>> int((task := env.rollout(400))["is_init"].sum()), bool(task["next", "done"][-1])
        (1, True)
    """

    _env: gym.Env

    def __init__(
        self,
        size: int = 4,
        *,
        is_slippery: bool = False,
        seed: int | None = None,
        teacher: bool = False,
        teacher_gamma: float = 0.99,
        **kwargs: Any,
    ) -> None:
        if size < 2:
            raise ValueError(f"FrozenLakeEnv: size must be at least 2, got {size}. A map has a start and a goal.")
        if not 0 < teacher_gamma < 1:
            raise ValueError(f"FrozenLakeEnv: teacher_gamma must lie in (0, 1), got {teacher_gamma}.")
        self._size, self._is_slippery = size, is_slippery
        self._teacher_gamma = teacher_gamma if teacher else None
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
        spaces = {schema.OBSERVATION_DISCRETE: lake.observation_space}
        q_star = None
        if self._teacher_gamma is not None:
            q_star = optimal_action_values(lake.unwrapped.P, self._teacher_gamma)  # type: ignore[attr-defined]
            spaces[schema.Q_STAR] = gym.spaces.Box(0.0, 1.0, q_star.shape[1:])
        return gym.wrappers.TransformObservation(lake, partial(_frame, q_star=q_star), gym.spaces.Dict(spaces))

    def _set_seed(self, seed: int | None) -> None:
        self._tasks = np.random.default_rng(seed)
        self._env = self._draw_lake()


def _frame(cell: int, q_star: np.ndarray | None) -> dict[str, Any]:
    frame: dict[str, Any] = {str(schema.OBSERVATION_DISCRETE): cell}
    return frame if q_star is None else {**frame, str(schema.Q_STAR): q_star[cell]}


def optimal_action_values(transitions: Mapping[int, Mapping[int, Any]], gamma: float) -> np.ndarray:
    """Computes the optimal action values of a small known MDP by value iteration.

    Args:
        transitions: for each state and action a list of ``(probability, next state, reward, whether it ends)``, as
            Gymnasium's toy environments hold them in ``env.unwrapped.P``.
        gamma: discount, in (0, 1).

    Returns:
        float32 ``[states, actions]``, to 1e-6; zero in states where nothing can be won any more.

    Examples:
        >>> ahead = {0: {0: [(1.0, 1, 0.0, False)]}, 1: {0: [(0.5, 1, 0.0, False), (0.5, 0, 1.0, True)]}}
        >>> values = optimal_action_values(ahead, 0.5)  # 0.5 V(1), and V(1) = 0.5 + 0.25 V(1)
        >>> [round(float(value), 4) for value in values[:, 0]]
        [0.3333, 0.6667]
    """
    shape = (len(transitions), len(transitions[0]))
    reward, follows = np.zeros(shape), np.zeros((*shape, len(transitions)))
    for state, actions in transitions.items():
        for action, outcomes in actions.items():
            for probability, following, pay, ends in outcomes:
                reward[state, action] += probability * pay
                follows[state, action, following] += 0.0 if ends else probability
    change, value = np.inf, np.zeros(shape)
    while change > 1e-6 * (1 - gamma):  # what is left to change is at most that over (1 - gamma)
        before, value = value, reward + gamma * follows @ value.max(1)
        change = np.abs(value - before).max()
    return value.astype(np.float32)
