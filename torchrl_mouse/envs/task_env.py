"""An environment whose trajectory is a whole task of many episodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Unbounded
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, TransformedEnv

from torchrl_mouse import schema
from torchrl_mouse.envs.batch import done_spec
from torchrl_mouse.streams import draw_streams

if TYPE_CHECKING:
    from tensordict import TensorDictBase


_OURS = {"previous", schema.EPISODE_STEP, schema.IS_INIT, schema.STREAM}
_DONE = {"done", "terminated", "truncated"}


class _Progress(NamedTuple):
    """Where each row stands in its task; all ``[*, 1]``, replaced and never written in place (inference mode)."""

    pending: torch.Tensor  # bool: the last frame was terminal, a new episode is due
    episode_step: torch.Tensor  # int64: step inside the episode
    elapsed: torch.Tensor  # int64: episodes ended, or steps taken, in this task

    def where(self, mask: torch.Tensor, other: _Progress) -> _Progress:
        """Keeps the rows in ``mask`` and takes the rest from ``other``."""
        return _Progress(*(torch.where(mask, mine, theirs) for mine, theirs in zip(self, other, strict=True)))


class TaskEnv(EnvBase):
    """Turns an episodic environment into one whose TorchRL trajectory is a whole task.

    The base's episodes repeat with the same task until the task is over; the next TorchRL reset draws a new one. So
    ``is_init``, ``done`` and everything in TorchRL that reads them speak of tasks, and a context lives as long as one.

    Each frame holds the base's observation entries and

    - ``("previous", "action" / "reward" / "terminated" / "truncated")``: the transition that led to it, all zero at an
      episode's first frame; ``truncated`` is never set beside ``terminated``;
    - ``episode_step`` int64 ``[*, 1]``: steps taken in the episode;
    - ``is_init`` bool ``[*, 1]``: true at the task's first frame only;
    - ``stream`` int64 ``[*, 1]``: the row's identity, constant, unique per environment object (a copy gets its own).

    An episode's end is a frame (the *terminal frame*): the policy sees it, its action there is ignored with reward 0,
    and the next frame is the new episode's first. ``done``, ``terminated`` and ``truncated`` are the task's: it is over
    with the terminal frame of its last episode, ``terminated`` if that episode was, else ``truncated``.

    It goes *inside* each worker of a ``SerialEnv`` or ``ParallelEnv``. The base may be batched, its rows' episodes end
    at different steps. A base with ``sample_task(mask)`` (bool ``[*]``, the rows that need a new task) is asked for a
    task at each TorchRL reset; its ``reset`` must never draw one. Without that method the task never changes.

    Args:
        base_env: the episodic environment, with one ``action`` and one ``reward`` ``[*, 1]``. A batched base should
            honour a ``"_step"`` mask, or be harmless to step at an episode's end: those rows are reset right after.
        episodes_per_task: the task is over after that many episodes.
        steps_per_task: the task is over after that many calls of ``step``, the ignored ones counted. An episode that
            this cuts shows ``("previous", "truncated")`` in its last frame.

    Raises:
        TypeError: ``base_env`` is not an ``EnvBase``.
        ValueError: not exactly one limit, a limit below 1, or a base that cannot be wrapped; in ``step``, a reward is
            not finite (checked on the CPU alone).

    .. note:: A random policy's ``init_random_frames`` skips the policy, whose context then misses those frames.

    Examples:
        >>> from torchrl_mouse.envs import DarkRoomEnv
        >>> env = TaskEnv(DarkRoomEnv([0, 80], max_steps=3), episodes_per_task=2)
        >>> task = env.rollout(7)
        >>> task["episode_step"].squeeze(-1).tolist()
        [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2]]
        >>> task["previous", "truncated"].squeeze(-1)[0].tolist()
        [False, False, False, True, False, False, False]
        >>> task["next", "done"].squeeze(-1)[0].tolist()
        [False, False, False, False, False, False, True]
    """

    def __init__(
        self, base_env: EnvBase, *, episodes_per_task: int | None = None, steps_per_task: int | None = None
    ) -> None:
        _check_base(base_env)
        if (episodes_per_task is None) == (steps_per_task is None):
            raise ValueError(
                "TaskEnv: exactly one of episodes_per_task and steps_per_task must be given, got "
                f"episodes_per_task={episodes_per_task}, steps_per_task={steps_per_task}. A task needs one end."
            )
        name = "steps_per_task" if episodes_per_task is None else "episodes_per_task"
        limit = steps_per_task if episodes_per_task is None else episodes_per_task
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"TaskEnv: {name} must be an integer of at least 1, got {limit!r}. Raise it.")
        super().__init__(device=base_env.device, batch_size=base_env.batch_size)
        self.base_env = base_env
        self._limit, self._counts_episodes = limit, episodes_per_task is not None
        self._make_specs()
        self._base_in_keys = list(base_env.full_state_spec.keys(True, True))
        self._progress = self._fresh()
        self._stream = draw_streams(self.batch_size, self.device)

    def _make_specs(self) -> None:
        base, shape, device = self.base_env, (*self.batch_size, 1), self.device

        def flag() -> Categorical:
            return Categorical(2, shape=shape, dtype=torch.bool, device=device)

        action = base.action_spec
        frame = base.full_observation_spec.clone()
        for key, spec in (
            (schema.EPISODE_STEP, Unbounded(shape, dtype=torch.int64, device=device)),
            (schema.IS_INIT, flag()),
            (schema.STREAM, Unbounded(shape, dtype=torch.int64, device=device)),
            # an all-zero action lies outside a one-hot spec
            (schema.PREVIOUS_ACTION, Unbounded(action.shape, dtype=action.dtype, device=device)),
            (schema.PREVIOUS_REWARD, Unbounded(shape, device=device)),
            (schema.PREVIOUS_TERMINATED, flag()),
            (schema.PREVIOUS_TRUNCATED, flag()),
        ):
            frame[key] = spec
        self.observation_spec = frame
        self.full_action_spec = base.full_action_spec.clone()
        self.full_state_spec = base.full_state_spec.clone()
        self.full_reward_spec = base.full_reward_spec.clone()
        self.full_done_spec = done_spec(self.batch_size, device)

    def _fresh(self) -> _Progress:
        zero = torch.zeros(*self.batch_size, 1, dtype=torch.int64, device=self.device)
        return _Progress(torch.zeros_like(zero, dtype=torch.bool), zero, zero)

    def _frame(self, frame: TensorDictBase, is_init: torch.Tensor, previous: TensorDictBase) -> TensorDictBase:
        """Adds the task's entries. What lives on here is copied: a transform may write into a frame."""
        frame.set("previous", previous).set(schema.EPISODE_STEP, self._progress.episode_step.clone())
        frame.set(schema.IS_INIT, is_init).set(schema.STREAM, self._stream.clone())
        return frame

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        fresh = self._fresh()
        mask = torch.ones_like(fresh.pending) if mask is None else mask.reshape(fresh.pending.shape)
        if (sample_task := getattr(self.base_env, "sample_task", None)) is not None:
            sample_task(mask.squeeze(-1))
        # the done entries keep TorchRL from warning about the rows that are not reset
        frame = self.base_env.reset(self.base_env.full_done_spec.zero().set("_reset", mask.clone()), **kwargs)
        self._progress = fresh.where(mask, self._progress)
        frame = self._frame(frame, mask.clone(), self.observation_spec["previous"].zero())
        return frame.update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        old = self._progress
        live, resets = ~old.pending, old.pending
        if (step := tensordict.get("_step", None)) is not None:
            step = step.reshape(live.shape)
            live, resets = live & step, resets & step
        all_live = bool(live.all())

        action = tensordict.get(schema.ACTION)
        if all_live:
            action = action.clone()
        else:
            alive = live.reshape(self.batch_size + (1,) * (action.ndim - self.ndim))
            action = torch.where(alive, action, action.new_zeros(()))  # a plain 0 would make bool one-hot int64
        if all_live or bool(live.any()):
            inputs = tensordict.select(*self._base_in_keys).set(schema.ACTION, action)
            if not all_live:
                inputs.set("_step", live.squeeze(-1))
            frame = self.base_env.step(inputs).get("next")
            reward = frame.pop("reward")
        else:
            frame, reward = self.base_env.full_done_spec.zero(), self.base_env.reward_spec.zero()
        if not all_live:
            reward = torch.where(live, reward, 0)
            if bool(resets.any()):
                frame = self.base_env.reset(frame.set("_reset", resets), select_reset_only=True)
        schema.check_finite(reward, "reward", "TaskEnv", f"Fix {type(self.base_env).__name__}: contexts keep rewards.")

        terminated = frame.get("terminated") & live
        truncated = frame.get("done") & live & ~terminated
        elapsed = old.elapsed + (terminated | truncated if self._counts_episodes else 1)
        over = elapsed >= self._limit
        if not self._counts_episodes:
            truncated = truncated | (over & live & ~terminated)
        new = _Progress(terminated | truncated, torch.where(live, old.episode_step + 1, 0), elapsed)
        self._progress = new if step is None else new.where(step, old)

        previous = {
            "action": action,
            "reward": reward.to(torch.float32, copy=True),
            "terminated": terminated,
            "truncated": truncated,
        }
        previous = TensorDict(previous, self.batch_size, device=self.device)
        frame = self._frame(frame, torch.zeros_like(over), previous)
        frame.set("reward", reward).set("done", over)
        return frame.set("terminated", over & terminated).set("truncated", over & ~terminated)

    def _set_seed(self, seed: int | None) -> None:
        self.base_env.set_seed(seed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # two environments on one stream would write into one context
        self._stream = draw_streams(self.batch_size, self.device)

    def to(self, device: torch.device | str) -> TaskEnv:
        """Moves the environment, its base included."""
        super().to(device)
        self.base_env = self.base_env.to(device)
        self._progress = _Progress(*(entry.to(self.device) for entry in self._progress))
        self._stream = self._stream.to(self.device)
        return self

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes the base environment."""
        self.is_closed = True
        self.base_env.close(raise_if_closed=raise_if_closed)


def _check_base(base: EnvBase) -> None:
    if not isinstance(base, EnvBase):
        raise TypeError(
            f"TaskEnv: base_env must be a torchrl EnvBase, got {type(base).__name__}. Wrap it, as in GymWrapper(env)."
        )
    inner = base.base_env if isinstance(base, TransformedEnv) else base
    if isinstance(inner, SerialEnv | ParallelEnv):
        raise ValueError(
            f"TaskEnv: base_env must not be a batch of workers, got {type(inner).__name__}. "
            f"Put TaskEnv inside each worker: {type(inner).__name__}(n, lambda: TaskEnv(...))."
        )
    if getattr(inner, "_is_batched", False):  # a GymWrapper's; its rows cannot be stepped or reset alone
        raise ValueError(
            "TaskEnv: base_env must not be a Gymnasium vector environment, whose rows step together, got "
            f"{type(inner).__name__}. Make one environment per worker: SerialEnv(n, lambda: TaskEnv(GymEnv(...), ...))."
        )
    if not base.batch_locked and base.batch_size:
        raise ValueError(
            "TaskEnv: base_env must be batch-locked, since each row's progress is kept, got one with batch size "
            f"{tuple(base.batch_size)} and batch_locked=False. Build it without a batch size."
        )
    taken = _OURS.intersection(base.full_observation_spec.keys())
    if taken:
        raise ValueError(
            f"TaskEnv: base_env must not write TaskEnv's own entries, got {', '.join(sorted(map(str, taken)))}. "
            "Rename them, or drop the transform that writes them (InitTracker, StreamTracker)."
        )
    done, shape = set(base.done_keys), (*base.batch_size, 1)
    if base.action_keys != [schema.ACTION] or base.reward_keys != ["reward"] or not done <= _DONE:
        raise ValueError(
            "TaskEnv: base_env must have the entries 'action', 'reward' and 'done' at its root and no others of their "
            f"kind, got {base.action_keys}, {base.reward_keys} and {base.done_keys}. Rename or stack them."
        )
    if base.reward_spec.shape != shape or base.full_done_spec["done"].shape != shape:
        raise ValueError(
            f"TaskEnv: base_env's reward and done must have shape {shape}, got {tuple(base.reward_spec.shape)} and "
            f"{tuple(base.full_done_spec['done'].shape)}. Add the last dimension."
        )
