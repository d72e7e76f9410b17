"""Dark Room: find a hidden goal cell in a grid, batched in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_mouse import schema
from torchrl_mouse.envs.batch import done_spec, task_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOVES = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))  # stay, up, right, down, left as (row, column)

DARK_ROOM: dict[str, dict[str, Any]] = {
    "terminating": {},
    "staying": {"terminate_on_goal": False},
    "long": {"size": 10, "start": 0, "max_steps": 100, "terminate_on_goal": False},
}
"""The published variants, as keywords of :class:`DarkRoomEnv`: arXiv 2502.17666, 2210.14215 and 2306.14892."""


class DarkRoomEnv(EnvBase):
    """A grid with a goal that is not observed: +1 on the goal cell, 0 elsewhere.

    A task is a goal. An agent has to search for it in the first episodes and can walk straight to it in the later ones
    (arXiv 2210.14215). One environment holds many rows, each with its own goal.

    A frame holds ``observation`` float32 ``[*, 2]``, the (row, column) scaled to [-1, 1], and ``observation_discrete``
    int64 ``[*]``, the cell ``row * size + column``. Actions: 0 stay, 1 up, 2 right, 3 down, 4 left; walls stop.
    The reward counts the cell *after* the move, so a start on the goal pays once a step ends there.

    Args:
        goals: cell ids ``[G]`` to draw tasks from.
        batch_size: number of rows; each :meth:`sample_task` draws their goals uniformly. None: one row per goal, and
            row ``i`` always has ``goals[i]``.
        size: the grid's side, at least 2.
        start: the start cell; None is the centre.
        max_steps: an episode is truncated after that many steps.
        terminate_on_goal: the goal ends the episode; otherwise it pays at every step.
        teacher: adds ``q_star`` float32 ``[*, 5]``, the optimal action values without the step limit, discounted by
            ``teacher_gamma``: ``gamma**d`` (terminating) or ``gamma**d / (1 - gamma)``, where ``d`` is the Manhattan
            distance from the cell after the move to the goal.
        teacher_gamma: in (0, 1).
        seed: of the tasks; None takes fresh entropy. ``set_seed`` sets it later.
        device: where it runs.

    Raises:
        ValueError: an argument is out of range; in ``step``, an action is. On an accelerator actions are not looked at:
            reading them would make it wait.

    Examples:
        >>> env = DarkRoomEnv([40, 0], start=1, teacher=True)
        >>> env.reset()["observation_discrete"].tolist()
        [1, 1]
        >>> steps = env.rollout(3, policy=oracle_policy(), break_when_any_done=False)
        >>> steps["next", "observation_discrete"].tolist()
        [[2, 3, 4], [0, 0, 0]]
        >>> steps["next", "reward"].squeeze(-1).tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """

    _goals: torch.Tensor
    _goal: torch.Tensor
    _cell: torch.Tensor
    _steps: torch.Tensor
    _position: torch.Tensor
    _next_cell: torch.Tensor
    _q_star: torch.Tensor | None

    def __init__(
        self,
        goals: Sequence[int] | torch.Tensor,
        *,
        batch_size: int | torch.Size | None = None,
        size: int = 9,
        start: int | None = None,
        max_steps: int = 20,
        terminate_on_goal: bool = True,
        teacher: bool = False,
        teacher_gamma: float = 0.9,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        goals = torch.as_tensor(goals, device=device)
        cells = size * size
        start = (size // 2) * (size + 1) if start is None else start
        integers = not (goals.is_floating_point() or goals.dtype == torch.bool)
        if goals.ndim != 1 or not len(goals) or not integers or goals.min() < 0 or goals.max() >= cells:
            raise ValueError(
                f"DarkRoomEnv: goals must be integer cell ids [G] in [0, {cells}), got {goals.tolist()}. "
                "Drop the others."
            )
        goals = goals.long()
        for name, value, valid, rule in (
            ("size", size, size >= 2, "be at least 2"),
            ("start", start, 0 <= start < cells, f"lie in [0, {cells})"),
            ("max_steps", max_steps, max_steps >= 1, "be at least 1"),
            ("teacher_gamma", teacher_gamma, 0 < teacher_gamma < 1, "lie in (0, 1)"),
        ):
            if not valid:
                raise ValueError(f"DarkRoomEnv: {name} must {rule}, got {value}. Change it.")
        super().__init__(device=device, batch_size=task_rows("DarkRoomEnv", batch_size, len(goals)))
        self._fixed = batch_size is None
        self._start, self._max_steps, self._terminates = start, max_steps, terminate_on_goal
        # buffers, so that `to` moves them
        cell = torch.full(self.batch_size, start, device=self.device)
        state = {"_goals": goals, "_goal": cell, "_cell": cell, "_steps": torch.zeros_like(cell)}
        for key, tensor in (state | self._tables(size, teacher, teacher_gamma)).items():
            self.register_buffer(key, tensor, persistent=False)
        self._make_specs(cells, teacher)
        self._generator = torch.Generator()
        self._set_seed(seed)

    def _tables(self, size: int, teacher: bool, gamma: float) -> dict[str, torch.Tensor | None]:
        cells = torch.arange(size * size, device=self.device)
        position = torch.stack([cells // size, cells % size], -1)  # (cells, 2)
        moved = (position[:, None] + torch.tensor(_MOVES, device=self.device)).clamp(0, size - 1)  # (cells, 5, 2)
        q_star = None
        if teacher:
            distance = (position[:, None, None] - moved).abs().sum(-1)  # (goals, cells, 5)
            q_star = gamma**distance / (1 if self._terminates else 1 - gamma)
        next_cell = moved[..., 0] * size + moved[..., 1]
        return {"_position": position * (2 / (size - 1)) - 1, "_next_cell": next_cell, "_q_star": q_star}

    def _make_specs(self, cells: int, teacher: bool) -> None:
        rows, device = self.batch_size, self.device
        self.observation_spec = Composite(
            {
                schema.OBSERVATION: Bounded(-1, 1, shape=(*rows, 2), dtype=torch.float32, device=device),
                schema.OBSERVATION_DISCRETE: Categorical(cells, shape=rows, device=device),
            },
            shape=rows,
            device=device,
        )
        if teacher:
            self.observation_spec[schema.Q_STAR] = Unbounded((*rows, len(_MOVES)), device=device)
        self.action_spec = Categorical(len(_MOVES), shape=rows, device=device)
        self.reward_spec = Bounded(0, 1, shape=(*rows, 1), dtype=torch.float32, device=device)
        self.full_done_spec = done_spec(rows, device)

    @property
    def goal(self) -> torch.Tensor:
        """Each row's goal cell, int64 ``[*]``."""
        return self._goal

    def sample_task(self, mask: torch.Tensor) -> None:
        """Draws a new goal for the rows in ``mask``; with fixed rows it changes nothing.

        Args:
            mask: bool ``[*]``.

        Examples:
            >>> env = DarkRoomEnv([3, 7], batch_size=4, seed=0)
            >>> before = env.goal
            >>> env.sample_task(torch.tensor([True, True, False, False]))
            >>> bool((env.goal[2:] == before[2:]).all())
            True
        """
        if not self._fixed:
            self._goal = torch.where(mask, self._draw_goals(), self._goal)

    def _draw_goals(self) -> torch.Tensor:
        index = torch.randint(len(self._goals), self.batch_size, generator=self._generator)
        return self._goals[index.to(self._goals.device)]

    def _frame(self) -> TensorDict:
        frame = {schema.OBSERVATION: self._position[self._cell], schema.OBSERVATION_DISCRETE: self._cell.clone()}
        if self._q_star is not None:
            frame[schema.Q_STAR] = self._q_star[self._goal, self._cell]
        return TensorDict(frame, self.batch_size, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        mask = torch.ones_like(self._cell, dtype=torch.bool) if mask is None else mask.reshape(self.batch_size)
        self._cell = torch.where(mask, self._start, self._cell)
        self._steps = torch.where(mask, 0, self._steps)
        return self._frame()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(schema.ACTION)
        if action.device.type == "cpu" and action.numel():
            low, high = (int(bound) for bound in action.aminmax())
            if low < 0 or high >= len(_MOVES):
                got = low if low < 0 else high
                raise ValueError(f"DarkRoomEnv: action must lie in [0, {len(_MOVES)}), got {got}. Fix the policy.")
        cell, steps = self._next_cell[self._cell, action], self._steps + 1
        if (mask := tensordict.get("_step", None)) is not None:
            mask = mask.reshape(self.batch_size)
            cell, steps = torch.where(mask, cell, self._cell), torch.where(mask, steps, self._steps)
        self._cell, self._steps = cell, steps
        on_goal = (cell == self._goal).unsqueeze(-1)
        terminated = on_goal if self._terminates else torch.zeros_like(on_goal)
        truncated = (steps >= self._max_steps).unsqueeze(-1) & ~terminated
        frame = self._frame().set("reward", on_goal.to(torch.float32)).set("terminated", terminated.clone())
        return frame.set("truncated", truncated).set("done", terminated | truncated)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            self._generator.seed()
        else:  # not the plain seed: callers give that to torch too, whose random actions would then tell the goals
            self._generator.manual_seed(seed ^ 0x9E3779B9)
        self._goal = self._goals if self._fixed else self._draw_goals()


def split_goals(num_train: int, size: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits all cells into training and held-out goals by a random permutation.

    Args:
        num_train: number of training goals, in [1, size**2).
        size: the grid's side.
        seed: of the permutation.

    Returns:
        int64 ``[num_train]`` and ``[size**2 - num_train]`` cell ids.

    Raises:
        ValueError: ``num_train`` leaves one of the two empty.

    Examples:
        >>> train, held_out = split_goals(70)
        >>> len(train), len(held_out), torch.cat([train, held_out]).unique().numel()
        (70, 11, 81)
    """
    cells = size * size
    if not 1 <= num_train < cells:
        raise ValueError(
            f"split_goals: num_train must lie in [1, {cells}), got {num_train}. Hold out at least one goal."
        )
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(seed))
    return order[:num_train], order[num_train:]


def grid_symmetries() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the eight turns and mirrorings of the grid, which make a task with another goal of a task.

    They hold for a start in the centre of a grid with an odd side.

    Returns:
        Matrices float32 ``[8, 2, 2]`` on the observation, and int64 ``[8, 5]``, what each action becomes; as
        :class:`~torchrl_mouse.data.RandomSymmetry` takes them.

    Examples:
        >>> observation_maps, action_maps = grid_symmetries()
        >>> observation_maps[1].tolist(), action_maps[1].tolist()  # left and right change places
        ([[1.0, 0.0], [0.0, -1.0]], [0, 1, 4, 3, 2])
    """
    moves = torch.tensor(_MOVES, dtype=torch.float32)
    axes = torch.eye(2), torch.eye(2).flip(0)
    signs = torch.cartesian_prod(torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0]))
    maps = torch.stack([sign.diag() @ axis for axis in axes for sign in signs])  # (8, 2, 2)
    moved = moves @ maps.mT  # (8, 5, 2)
    return maps, (moved.unsqueeze(2) == moves).all(-1).long().argmax(-1)


def oracle_policy() -> TensorDictModule:
    """Returns the policy that takes the teacher's best action: it reads ``q_star`` and writes ``action``.

    Returns:
        A module for environments with ``teacher=True``; of equal values it takes the lowest action.

    Examples:
        >>> env = DarkRoomEnv([44], teacher=True)
        >>> oracle_policy()(env.reset())["action"].tolist()
        [2]
    """
    return TensorDictModule(_best_action, in_keys=[schema.Q_STAR], out_keys=[schema.ACTION])


def _best_action(q_star: torch.Tensor) -> torch.Tensor:
    return q_star.argmax(-1)
