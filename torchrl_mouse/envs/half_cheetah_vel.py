"""Half-cheetah: run at a hidden velocity, simulated by MuJoCo, with many rows in one environment."""

from __future__ import annotations

import importlib.resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_mouse import schema
from torchrl_mouse.envs.batch import done_spec, task_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FRAME_SKIP = 5  # simulator steps of 0.01 s in one step of the environment
_CONTROL_COST = 0.05
_NOISE = 0.1  # of a start's positions (uniform, half the width) and velocities (normal, standard deviation)


class HalfCheetahVelEnv(EnvBase):
    """MuJoCo's half-cheetah and a target velocity that is not observed: the reward is minus the distance to it.

    A task is a velocity. One environment holds many rows, each with its own. PEARL's cheetah-vel (arXiv 1903.08254):
    ``reward = -|forward velocity - target| - 0.05 * sum(action**2)``, where the forward velocity is the mean over the
    step's 0.05 s. Episodes never terminate. Each starts near rest, with noise of scale 0.1 on all coordinates.

    A frame holds ``observation`` float32 ``[*, 20]``: 8 positions (without the forward one: height, pitch, six
    joints), their 9 velocities (forward first), and the torso's place (x, y, z) in the world, in metres, which lags the
    others by 0.01 s after a step. So x, the way run so far, is the one number that grows without bound. Actions: float
    ``[*, 6]`` torques in [-1, 1], clipped to it.

    Needs MuJoCo (``pip install "torchrl-mouse[mujoco]"``); nothing is drawn. The physics runs on the CPU in float64.

    Args:
        velocities: targets ``[V]`` in m/s to draw tasks from, as :func:`half_cheetah_velocities` makes them.
        batch_size: number of rows; each :meth:`sample_task` draws their velocities uniformly. None: one row per
            velocity, and row ``i`` always has ``velocities[i]``.
        max_steps: an episode is truncated after that many steps.
        seed: of the tasks and the starts; None takes fresh entropy. ``set_seed`` sets it later.
        device: where the tensors are.

    Raises:
        ImportError: MuJoCo is not installed.
        ValueError: an argument is out of range; in ``step``, the action's shape is wrong, or it holds NaN.

    .. note:: A step costs what MuJoCo costs, about 30 microseconds a row, one row after the other: to use more cores,
        spread the rows over the workers of a ``ParallelEnv``.

    Examples:
        >>> env = HalfCheetahVelEnv([0.5, 2.5], max_steps=3, seed=0)
        >>> steps = env.rollout(3)
        >>> steps["observation"].shape
        torch.Size([2, 3, 20])
        >>> forward = (steps["next", "observation"][..., 17] - steps["observation"][..., 17]) / 0.05
        >>> bool((forward.abs() < 3).all()), steps["next", "truncated"][0].flatten().tolist()
        (True, [False, False, True])
    """

    _velocities: torch.Tensor
    _velocity: torch.Tensor

    def __init__(
        self,
        velocities: Sequence[float] | torch.Tensor,
        *,
        batch_size: int | torch.Size | None = None,
        max_steps: int = 200,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        velocities = torch.as_tensor(velocities, dtype=torch.float32, device=device)
        shape = list(velocities.shape)
        for name, valid, rule, value in (
            ("velocities", len(shape) == 1 and shape[0], "have shape [V] with V >= 1", shape),
            ("velocities", bool(velocities.isfinite().all()), "be finite", velocities.tolist()),
            ("max_steps", max_steps >= 1, "be at least 1", max_steps),
        ):
            if not valid:
                raise ValueError(f"HalfCheetahVelEnv: {name} must {rule}, got {value}. Change it.")
        super().__init__(device=device, batch_size=task_rows("HalfCheetahVelEnv", batch_size, len(velocities)))
        self._fixed, self._max_steps = batch_size is None, max_steps
        # buffers, so that `to` moves them
        velocity = torch.zeros(self.batch_size, device=self.device)
        for key, tensor in {"_velocities": velocities, "_velocity": velocity}.items():
            self.register_buffer(key, tensor, persistent=False)
        self._make_specs()
        self._cheetahs = _Cheetahs(self.batch_size.numel())
        self._steps = np.zeros(self.batch_size.numel(), dtype=np.int64)
        self._set_seed(seed)

    def _make_specs(self) -> None:
        rows, device = self.batch_size, self.device
        observation = Unbounded((*rows, 20), device=device)
        self.observation_spec = Composite({schema.OBSERVATION: observation}, shape=rows, device=device)
        self.action_spec = Bounded(-1, 1, (*rows, 6), dtype=torch.float32, device=device)
        self.reward_spec = Unbounded((*rows, 1), device=device)
        self.full_done_spec = done_spec(rows, device)

    @property
    def velocity(self) -> torch.Tensor:
        """Each row's target in m/s, float32 ``[*]``."""
        return self._velocity

    def sample_task(self, mask: torch.Tensor) -> None:
        """Draws a new target for the rows in ``mask`` (bool ``[*]``); with fixed rows it changes nothing."""
        if not self._fixed:
            self._velocity = torch.where(mask, self._draw_velocities(), self._velocity)

    def _draw_velocities(self) -> torch.Tensor:
        index = self._random.integers(len(self._velocities), size=tuple(self.batch_size))
        return self._velocities[torch.as_tensor(index, device=self._velocities.device)]

    def _tensor(self, rows: np.ndarray) -> torch.Tensor:
        """Copies ``[rows, n]`` into a tensor ``[*, n]`` of the environment, numbers as float32."""
        tensor = torch.from_numpy(rows).reshape(*self.batch_size, -1)
        return tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def _frame(self, **rest: torch.Tensor) -> TensorDict:
        frame = {schema.OBSERVATION: self._tensor(self._cheetahs.state[:, 1:]), **rest}
        return TensorDict(frame, self.batch_size, self.device)

    def _mask(self, tensordict: TensorDictBase | None, key: str) -> np.ndarray:
        mask = None if tensordict is None else tensordict.get(key, None)
        return np.ones_like(self._steps, dtype=bool) if mask is None else mask.reshape(-1).numpy(force=True)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = self._mask(tensordict, "_reset")
        position = self._random.uniform(-_NOISE, _NOISE, (len(mask), 9))
        velocity = _NOISE * self._random.standard_normal((len(mask), 9))
        self._cheetahs.reset(np.flatnonzero(mask), position, velocity)
        self._steps = np.where(mask, 0, self._steps)
        return self._frame()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(schema.ACTION)
        if (got := list(action.shape)) != (want := [*self.batch_size, 6]):  # a wrong one might be read across rows
            raise ValueError(f"HalfCheetahVelEnv: action must have shape {want}, got {got}. Fix the policy.")
        mask = self._mask(tensordict, "_step")
        control = action.reshape(-1, 6).numpy(force=True).astype(np.float64).clip(-1, 1)
        control = np.where(mask[:, None], control, 0)  # held rows may be given anything
        if np.isnan(control).any():  # MuJoCo would step without torque, and write to a log file
            raise ValueError(f"HalfCheetahVelEnv: action must not be NaN, got {action.tolist()}. Fix the policy.")
        start = self._cheetahs.state[:, 0].copy()
        self._cheetahs.step(np.flatnonzero(mask), control)
        self._steps = self._steps + mask
        forward = (self._cheetahs.state[:, 0] - start) / self._cheetahs.seconds
        reward = -np.abs(forward - self._velocity.reshape(-1).numpy(force=True)) - _CONTROL_COST * (control**2).sum(1)
        truncated = self._tensor(self._steps >= self._max_steps)
        flags = {"terminated": torch.zeros_like(truncated), "truncated": truncated, "done": truncated.clone()}
        return self._frame(reward=self._tensor(reward), **flags)

    def _set_seed(self, seed: int | None) -> None:
        self._random = np.random.default_rng(seed)
        self._velocity = self._velocities if self._fixed else self._draw_velocities()


class _Cheetahs:
    """One simulated half-cheetah per row.

    ``state`` float64 ``[rows, 21]``: 9 positions, their velocities, the torso's place; ``seconds``: of a step.
    """

    def __init__(self, rows: int) -> None:
        self._build(rows)

    def _build(self, rows: int) -> None:
        try:
            import mujoco
        except ImportError as error:
            raise ImportError(
                f'HalfCheetahVelEnv: the package mujoco must be installed, got "{error}". '
                'Run pip install "torchrl-mouse[mujoco]".'
            ) from error
        self._mujoco = mujoco
        path = importlib.resources.files("gymnasium") / "envs" / "mujoco" / "assets" / "half_cheetah.xml"
        spec = mujoco.MjSpec.from_string(path.read_text())
        # MuJoCo deprecates this attribute of the file, with a line on stderr and a log file in the current folder
        mass, spec.compiler.settotalmass = spec.compiler.settotalmass, -1
        self._model = spec.compile()
        mujoco.mj_setTotalmass(self._model, mass)
        mujoco.mj_setConst(self._model, mujoco.MjData(self._model))
        self.seconds = _FRAME_SKIP * self._model.opt.timestep
        self._data = [mujoco.MjData(self._model) for _ in range(rows)]
        # views of MuJoCo's own memory: asking it for them at each step would cost more than all the rest here
        self._controls = [data.ctrl for data in self._data]
        self._torsos = [data.body("torso").xpos for data in self._data]
        pairs = zip(self._data, self._torsos, strict=True)
        self._views = [view for data, torso in pairs for view in (data.qpos, data.qvel, torso)]
        self.state = np.empty((rows, 21))

    def _read(self) -> None:
        np.concatenate(self._views, out=self.state.reshape(-1))

    def reset(self, rows: Iterable[int], position: np.ndarray, velocity: np.ndarray) -> None:
        """Puts ``rows`` at ``position`` from the model's own, with ``velocity``, each ``[all rows, 9]``."""
        for row in rows:
            data = self._data[row]
            self._mujoco.mj_resetData(self._model, data)
            data.qpos[:] = self._model.qpos0 + position[row]
            data.qvel[:] = velocity[row]
            self._mujoco.mj_forward(self._model, data)
        self._read()

    def step(self, rows: Iterable[int], control: np.ndarray) -> None:
        """Moves ``rows`` under ``control`` ``[all rows, 6]``."""
        model, data, controls, step = self._model, self._data, self._controls, self._mujoco.mj_step
        for row in rows:
            controls[row][:] = control[row]
            step(model, data[row], _FRAME_SKIP)
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        # MuJoCo's own copies each bring a model along, and views would be of the original
        what = self._mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty((len(self._data), self._mujoco.mj_stateSize(self._model, what)))
        for data, row in zip(self._data, physics, strict=True):
            self._mujoco.mj_getState(self._model, data, row, what)
        return {"physics": physics, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(len(state["physics"]))
        what = self._mujoco.mjtState.mjSTATE_INTEGRATION
        torsos = state["state"][:, 18:]  # the next simulator step computes them from the rest, a partial reset does not
        for data, row, torso, place in zip(self._data, state["physics"], self._torsos, torsos, strict=True):
            self._mujoco.mj_setState(self._model, data, row, what)
            torso[:] = place
        self._read()


def half_cheetah_velocities(num: int) -> torch.Tensor:
    """Makes the benchmark's target velocities in m/s, uniform draws from [0, 3], the same whatever a run's seed.

    Args:
        num: number of targets, at least 1; more keep the first ones. The benchmark has 40: the first 30 to train on,
            the last 10 to test on.

    Returns:
        float32 ``[num]``.

    Raises:
        ValueError: ``num`` is below 1.

    Examples:
        >>> train, test = half_cheetah_velocities(40).split([30, 10])
        >>> [round(x, 3) for x in test[:3].tolist()]
        [0.556, 2.872, 1.276]
    """
    if num < 1:
        raise ValueError(f"half_cheetah_velocities: num must be at least 1, got {num}. Raise it.")
    return torch.from_numpy(np.random.RandomState(1337).uniform(0, 3, num)).float()  # PEARL's own generator and seed
