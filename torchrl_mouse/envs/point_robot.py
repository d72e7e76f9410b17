"""Point robot: walk to a hidden goal in the plane, with dense or sparse rewards, batched in torch."""

from __future__ import annotations

from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_mouse import schema
from torchrl_mouse.envs.batch import done_spec, task_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

_STEP = 0.1  # how far an action of 1 moves along its axis
_RADIUS = 0.2  # of the goal, in the sparse variant


class PointRobotEnv(EnvBase):
    """A point in the plane and a goal that is not observed: the reward is minus the distance to it after the move.

    A task is a goal. One environment holds many rows, each with its own goal. PEARL's point-robot and, with ``sparse``,
    its sparse-point-robot (arXiv 1903.08254).

    A frame holds ``observation`` float32 ``[*, 2]``, the position. Actions: float ``[*, 2]`` in [-1, 1], clipped to it;
    the point moves by a tenth. Episodes never terminate. The plane has no border. Positions are kept in float64, as in
    PEARL's code: whether a goal that is a whole number of steps away is within the radius is up to rounding.

    The sparse variant adds ``sparse_reward`` float32 ``[*, 1]`` to the frame a move leads to: ``1 - d`` at a distance
    ``d`` of at most 0.2 from the goal, else 0; it is 0 at an episode's first frame. ``reward`` stays dense: PEARL
    trains actor and critic on it, but shows to the context, and reports, ``("next", "sparse_reward")``.

    Args:
        goals: positions ``[G, 2]`` to draw tasks from, as :func:`point_robot_goals` makes them.
        batch_size: number of rows; each :meth:`sample_task` draws their goals uniformly. None: one row per goal, and
            row ``i`` always has ``goals[i]``.
        max_steps: an episode is truncated after that many steps.
        sparse: the sparse variant.
        start: ``"random"`` draws each episode's start uniformly from [-1, 1]^2. None is the benchmark's choice,
            ``"origin"`` for the sparse variant and ``"random"`` for the other.
        seed: of the tasks and the starts; None takes fresh entropy. ``set_seed`` sets it later.
        device: where it runs.

    Raises:
        ValueError: an argument is out of range; in ``step``, the action's shape is wrong, or it holds NaN.

    Examples:
        >>> env = PointRobotEnv([[0.3, 0.4], [0.0, 0.2]], sparse=True)
        >>> frame = env.step(env.reset().set("action", torch.tensor([[1.0, 5.0], [0.0, 0.5]])))["next"]
        >>> [[round(x, 2) for x in row] for row in frame["observation"].tolist()]
        [[0.1, 0.1], [0.0, 0.05]]
        >>> [round(x, 2) for x in frame["reward"].flatten().tolist()]
        [-0.36, -0.15]
        >>> [round(x, 2) for x in frame["sparse_reward"].flatten().tolist()]
        [0.0, 0.85]
    """

    _goals: torch.Tensor
    _goal: torch.Tensor
    _position: torch.Tensor
    _steps: torch.Tensor

    def __init__(
        self,
        goals: Sequence[Sequence[float]] | torch.Tensor,
        *,
        batch_size: int | torch.Size | None = None,
        max_steps: int = 20,
        sparse: bool = False,
        start: Literal["random", "origin"] | None = None,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        goals = torch.as_tensor(goals, dtype=torch.float32, device=device)
        shape = list(goals.shape)
        for name, valid, rule, value in (
            ("goals", len(shape) == 2 and shape[0] and shape[1] == 2, "have shape [G, 2] with G >= 1", shape),
            ("goals", bool(goals.isfinite().all()), "be finite", goals.tolist()),
            ("max_steps", max_steps >= 1, "be at least 1", max_steps),
            ("start", start in (None, "random", "origin"), "be 'random', 'origin' or None", repr(start)),
        ):
            if not valid:
                raise ValueError(f"PointRobotEnv: {name} must {rule}, got {value}. Change it.")
        super().__init__(device=device, batch_size=task_rows("PointRobotEnv", batch_size, len(goals)))
        self._fixed, self._max_steps, self._sparse = batch_size is None, max_steps, sparse
        self._random_start = not sparse if start is None else start == "random"
        # buffers, so that `to` moves them
        position = torch.zeros(*self.batch_size, 2, dtype=torch.float64, device=self.device)
        steps = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        for key, tensor in {"_goals": goals, "_goal": position.float(), "_position": position, "_steps": steps}.items():
            self.register_buffer(key, tensor, persistent=False)
        self._make_specs()
        self._generator = torch.Generator()
        self._set_seed(seed)

    def _make_specs(self) -> None:
        rows, device = self.batch_size, self.device
        position = Unbounded((*rows, 2), device=device)
        self.observation_spec = Composite({schema.OBSERVATION: position}, shape=rows, device=device)
        if self._sparse:
            self.observation_spec["sparse_reward"] = Bounded(0, 1, (*rows, 1), dtype=torch.float32, device=device)
        self.action_spec = Bounded(-1, 1, (*rows, 2), dtype=torch.float32, device=device)
        self.reward_spec = Unbounded((*rows, 1), device=device)
        self.full_done_spec = done_spec(rows, device)

    @property
    def goal(self) -> torch.Tensor:
        """Each row's goal, float32 ``[*, 2]``."""
        return self._goal

    def sample_task(self, mask: torch.Tensor) -> None:
        """Draws a new goal for the rows in ``mask`` (bool ``[*]``); with fixed rows it changes nothing."""
        if not self._fixed:
            self._goal = torch.where(mask.unsqueeze(-1), self._draw_goals(), self._goal)

    def _draw_goals(self) -> torch.Tensor:
        index = torch.randint(len(self._goals), self.batch_size, generator=self._generator)
        return self._goals[index.to(self._goals.device)]

    def _frame(self, **rest: torch.Tensor) -> TensorDict:
        """The frame at the present positions, with ``reward``; built at once, which is much of a small step's time."""
        reward = -torch.linalg.vector_norm(self._position - self._goal, dim=-1, keepdim=True)  # (*, 1)
        frame = {schema.OBSERVATION: self._position.float(), "reward": reward.float(), **rest}
        if self._sparse:
            # a function of the state alone, so that a partial reset leaves the other rows' entry as it was
            pays = (reward >= -_RADIUS) & (self._steps > 0).unsqueeze(-1)
            frame["sparse_reward"] = torch.where(pays, reward + 1, 0).float()
        return TensorDict(frame, self.batch_size, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        start = torch.zeros_like(self._position)
        if self._random_start:
            start = (torch.rand(start.shape, dtype=start.dtype, generator=self._generator) * 2 - 1).to(start.device)
        steps = torch.zeros_like(self._steps)
        self._move(start, steps, None if tensordict is None else tensordict.get("_reset", None))
        return self._frame().exclude("reward")

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(schema.ACTION)
        if action.shape != self._position.shape:  # a wrong one would broadcast
            want, got = list(self._position.shape), list(action.shape)
            raise ValueError(f"PointRobotEnv: action must have shape {want}, got {got}. Fix the policy.")
        mask = tensordict.get("_step", None)
        if schema.can_look_at(action):
            read = action if mask is None else action[mask.reshape(self.batch_size)]  # held rows may be given anything
            if read.isnan().any():  # a position would never be found again
                raise ValueError(f"PointRobotEnv: action must not be NaN, got {action.tolist()}. Fix the policy.")
        moved = self._position + _STEP * action.to(self._position.dtype).clamp(-1, 1)
        self._move(moved, self._steps + 1, mask)
        truncated = (self._steps >= self._max_steps).unsqueeze(-1)
        return self._frame(terminated=torch.zeros_like(truncated), truncated=truncated, done=truncated.clone())

    def _move(self, position: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Replaces the state of the rows in ``mask``, of all without one."""
        if mask is not None:
            mask = mask.reshape(self.batch_size)
            position = torch.where(mask.unsqueeze(-1), position, self._position)
            steps = torch.where(mask, steps, self._steps)
        self._position, self._steps = position, steps

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            self._generator.seed()
        else:  # not the plain seed: callers give that to torch too, whose random actions would then equal the starts
            self._generator.manual_seed(seed ^ 0x9E3779B9)
        self._goal = self._goals if self._fixed else self._draw_goals()


def point_robot_goals(num: int, *, sparse: bool = False) -> torch.Tensor:
    """Makes the benchmark's goals, the same ones whatever a run's seed.

    Args:
        num: number of goals, at least 1. The benchmark has 50: the first 40 to train on, the last 10 to test on.
        sparse: ``num`` angles evenly spaced on the upper half of the unit circle, shuffled, so that each depends on
            ``num``. Otherwise uniform draws from [-1, 1]^2, where more goals keep the first ones.

    Returns:
        float32 ``[num, 2]``.

    Raises:
        ValueError: ``num`` is below 1.

    Examples:
        >>> train, test = point_robot_goals(50).split([40, 10])
        >>> [round(x, 3) for x in test[0].tolist()]
        [0.448, 0.586]
    """
    if num < 1:
        raise ValueError(f"point_robot_goals: num must be at least 1, got {num}. Raise it.")
    random = np.random.RandomState(1337)  # PEARL's own generator and seed
    if sparse:
        angles = np.linspace(0, np.pi, num)
        goals = np.stack([np.cos(angles), np.sin(angles)], 1)
        random.shuffle(goals)
    else:
        goals = random.uniform(-1, 1, (num, 2))
    return torch.from_numpy(goals).float()


def point_robot_oracle(start: torch.Tensor, goal: torch.Tensor, *, max_steps: int = 20) -> torch.Tensor:
    """Computes the return of an episode by a robot that knows the goal: ``-sum_t |max(|goal - start| - t / 10, 0)|``.

    The best there is: the axes move independently, so each is brought to the goal at full speed.

    Args:
        start: the episode's first position, ``[*, 2]``.
        goal: ``[*, 2]``; the two broadcast.
        max_steps: the episode's length, as the environment's.

    Returns:
        The sum of ``reward``, float32 ``[*]``.

    Raises:
        ValueError: a shape does not end in 2, or ``max_steps`` is below 1.

    Examples:
        >>> point_robot_oracle(torch.zeros(2), torch.tensor([[0.0, 0.3], [0.3, 0.4]])).tolist()
        [-0.3000..., -0.6841...]
    """
    distance = _distance_left("point_robot_oracle", start, goal, max_steps)
    return -distance.sum(-1).float()


def sparse_point_robot_oracle(goal: torch.Tensor, *, max_steps: int = 20) -> torch.Tensor:
    """Computes the sparse return of an episode from the origin by a robot that knows the goal.

    It walks as in :func:`point_robot_oracle`, and is paid ``1 - d`` after each step that ends at ``d <= 0.2``.

    Args:
        goal: ``[*, 2]``.
        max_steps: the episode's length, as the environment's.

    Returns:
        The sum of ``sparse_reward``, float32 ``[*]``.

    Raises:
        ValueError: the shape does not end in 2, or ``max_steps`` is below 1.

    Examples:
        >>> goals = point_robot_goals(50, sparse=True)
        >>> round(sparse_point_robot_oracle(goals[40:]).mean().item(), 2)
        13.07
    """
    distance = _distance_left("sparse_point_robot_oracle", torch.zeros_like(goal), goal, max_steps)
    return torch.where(distance <= _RADIUS, 1 - distance, 0).sum(-1).float()


def _distance_left(where: str, start: torch.Tensor, goal: torch.Tensor, max_steps: int) -> torch.Tensor:
    """The distances ``[*, T]`` to the goal after each step at full speed along each axis, float64."""
    for name, valid, rule, value in (
        ("goal", goal.shape[-1:] == (2,), "have shape [*, 2]", list(goal.shape)),
        ("start", start.shape[-1:] == (2,), "have shape [*, 2]", list(start.shape)),
        ("max_steps", max_steps >= 1, "be at least 1", max_steps),
    ):
        if not valid:
            raise ValueError(f"{where}: {name} must {rule}, got {value}. Change it.")
    # added up step by step, as the environment does: rounding decides on which side of the radius a step ends
    moved = torch.tensor(list(accumulate(repeat(_STEP, max_steps))), dtype=torch.float64, device=goal.device)
    left = ((goal.double() - start.double()).abs().unsqueeze(-2) - moved.unsqueeze(-1)).clamp(min=0)  # (*, T, 2)
    distance: torch.Tensor = torch.linalg.vector_norm(left, dim=-1)
    return distance
