"""TaskEnv: a TorchRL trajectory is a whole task of many episodes."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase, GymEnv, InitTracker, ParallelEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import RandomPolicy, check_env_specs

from torchrl_mouse.envs import DarkRoomEnv, TaskEnv

torch.set_num_threads(1)


class CountEnv(EnvBase):
    """Row i's episodes take ``lengths[i]`` steps; those of even length terminate, the others are truncated."""

    def __init__(self, lengths, *, one_hot=False, honours_mask=True, draws=True):
        self.lengths = torch.as_tensor(lengths)
        super().__init__(batch_size=self.lengths.shape)
        rows, shape = self.batch_size, (*self.lengths.shape, 1)
        self.observation_spec = Composite(
            observation=Unbounded(shape), task=Unbounded(shape, dtype=torch.int64), shape=rows
        )
        self.action_spec = OneHot(3, shape=(*rows, 3)) if one_hot else Categorical(3, shape=rows)
        self.reward_spec = Unbounded(shape)
        flag = Categorical(2, shape=shape, dtype=torch.bool)
        self.full_done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=self.batch_size
        )
        self.honours_mask, self.one_hot = honours_mask, one_hot
        self.step_count = torch.zeros(shape)
        self.task = torch.zeros(shape, dtype=torch.int64)
        if draws:
            self.sample_task = self._sample_task

    def _sample_task(self, mask):
        assert mask.shape == self.batch_size
        self.task = self.task + mask.unsqueeze(-1)

    def _frame(self):
        return TensorDict({"observation": self.step_count, "task": self.task}, self.batch_size)

    def _reset(self, tensordict=None, **kwargs):
        mask = torch.ones_like(self.task, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict:
            mask = tensordict["_reset"].reshape(mask.shape)
        self.step_count = torch.where(mask, 0.0, self.step_count)
        return self._frame()

    def _step(self, tensordict):
        mask = tensordict.get("_step", None)
        if mask is not None and self.honours_mask:
            self.step_count = self.step_count + mask.unsqueeze(-1)
        else:
            self.step_count = self.step_count + 1
        action = tensordict["action"].int().argmax(-1) if self.one_hot else tensordict["action"]
        done = self.step_count >= self.lengths.unsqueeze(-1)
        even = (self.lengths % 2 == 0).unsqueeze(-1)
        ends = {"done": done, "terminated": done & even, "truncated": done & ~even}
        return self._frame().update({"reward": self.step_count + 10 * action.unsqueeze(-1), **ends})

    def _set_seed(self, seed):
        pass


def make_single(length, **limit):
    return TaskEnv(CountEnv(length), **limit)


def rollout(env, num_steps):
    return env.rollout(num_steps, break_when_any_done=False, auto_reset=True)


def check_row(steps, length, *, episodes_per_task=None, steps_per_task=None):
    """Walks through one row [T] and predicts every entry of every frame from the actions alone."""
    step = episode = taken = 0
    task = steps["task"][0].item()
    new_task, previous = True, (0, 0.0, False, False)
    for t in range(steps.shape[0]):
        now, following = steps[t], steps[t]["next"]
        assert now["is_init"].item() == new_task
        assert now["episode_step"].item() == step == now["observation"].item()
        assert now["task"].item() == task
        shown = tuple(now["previous", key].item() for key in ("action", "reward", "terminated", "truncated"))
        assert shown == previous
        assert not any(now[key].item() for key in ("done", "terminated", "truncated"))
        taken += 1
        if previous[2] or previous[3]:  # the terminal frame: the action is ignored
            step, previous = 0, (0, 0.0, False, False)
        else:
            step += 1
            action, ended = now["action"].item(), step == length
            previous = (action, float(step + 10 * action), ended and length % 2 == 0, ended and length % 2 == 1)
            episode += ended
        over = episode == episodes_per_task or taken == steps_per_task
        if over and taken == steps_per_task and step > 0 and not previous[2]:
            previous = (*previous[:3], True)
        assert following["reward"].item() == previous[1]
        shown = tuple(following["previous", key].item() for key in ("action", "reward", "terminated", "truncated"))
        assert shown == previous
        assert following["episode_step"].item() == step
        assert not following["is_init"].item()
        assert following["done"].item() == over
        assert following["terminated"].item() == (over and previous[2])
        assert following["truncated"].item() == (over and not previous[2])
        new_task = over
        if over:
            step = episode = taken = 0
            task, previous = task + 1, (0, 0.0, False, False)


def test_hand_trace():
    env = TaskEnv(CountEnv([2, 3]), episodes_per_task=2)
    steps = env.rollout(8, policy=lambda td: td.set("action", torch.ones(2, dtype=torch.int64)), auto_reset=True)
    assert steps.shape == (2, 5)  # row 0 is over: frames 0 1 2 | 0 1 (2)
    env = TaskEnv(CountEnv([2, 3]), episodes_per_task=2)
    steps = env.rollout(
        8, policy=lambda td: td.set("action", torch.ones(2, dtype=torch.int64)), break_when_any_done=False
    )

    def rows(*key):
        return steps[key].squeeze(-1).tolist()

    assert rows("episode_step") == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0]]
    assert rows("previous", "reward") == [[0, 11, 12, 0, 11, 0, 11, 12], [0, 11, 12, 13, 0, 11, 12, 0]]
    assert rows("next", "reward") == [[11, 12, 0, 11, 12, 11, 12, 0], [11, 12, 13, 0, 11, 12, 13, 11]]
    assert steps["previous", "action"].tolist() == [[0, 1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 0]]
    frames = torch.arange(8)
    assert torch.equal(steps["previous", "terminated"].squeeze(-1)[0], (frames == 2) | (frames == 7))
    assert not steps["previous", "terminated"][1].any()
    assert torch.equal(steps["previous", "truncated"].squeeze(-1)[1], frames == 3)
    assert torch.equal(steps["is_init"].squeeze(-1)[0], (frames == 0) | (frames == 5))
    assert torch.equal(steps["is_init"].squeeze(-1)[1], (frames == 0) | (frames == 7))
    assert torch.equal(steps["next", "terminated"].squeeze(-1)[0], frames == 4)
    assert torch.equal(steps["next", "truncated"].squeeze(-1)[1], frames == 6)
    assert not steps["next", "truncated"][0].any()
    assert rows("task") == [[1] * 5 + [2] * 3, [1] * 7 + [2]]
    # the task's last terminal frame is shown under next, although the carrier was reset in place
    assert steps["next", "previous", "terminated"][0, 4].item()
    assert steps["next", "previous", "action"][0, 4].item() == 1


LIMITS = [{"episodes_per_task": 1}, {"episodes_per_task": 3}, {"steps_per_task": 1}, {"steps_per_task": 7}]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("honours_mask", [True, False])
def test_batched_rows(limit, honours_mask):
    lengths = [1, 2, 3, 5]
    steps = rollout(TaskEnv(CountEnv(lengths, honours_mask=honours_mask), **limit), 40)
    for row, length in enumerate(lengths):
        check_row(steps[row], length, **limit)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_single(limit):
    for length in (1, 2, 5):
        check_row(rollout(make_single(length, **limit), 30), length, **limit)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [SerialEnv, ParallelEnv])
def test_workers(workers):
    lengths, limit = [2, 3], {"episodes_per_task": 2}
    env = workers(2, [partial(make_single, length, **limit) for length in lengths])
    try:
        steps = rollout(env, 20)
        assert len(steps["stream"].unique()) == 2
        assert (steps["stream"] == steps["stream"][:, :1]).all()
        for row, length in enumerate(lengths):
            check_row(steps[row], length, **limit)
    finally:
        env.close()


def test_batched_env_of_batched_envs():
    env = SerialEnv(2, lambda: TaskEnv(CountEnv([2, 3]), steps_per_task=6))
    steps = rollout(env, 15)
    for worker in range(2):
        for row, length in enumerate([2, 3]):
            check_row(steps[worker, row], length, steps_per_task=6)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    limit=st.one_of(
        st.builds(lambda n: {"episodes_per_task": n}, st.integers(1, 3)),
        st.builds(lambda n: {"steps_per_task": n}, st.integers(1, 9)),
    ),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_any_rollout(lengths, limit, seed):
    torch.manual_seed(seed)
    steps = rollout(TaskEnv(CountEnv(lengths), **limit), 25)
    for row, length in enumerate(lengths):
        check_row(steps[row], length, **limit)
    # what was earned is what is shown: every reward appears in exactly one frame
    following = steps["next"]
    assert torch.equal(following["reward"], following["previous", "reward"])
    terminal = (steps["previous", "terminated"] | steps["previous", "truncated"]).squeeze(-1)
    assert (following["episode_step"][terminal] == 0).all()
    # whole tasks hold whole numbers of episodes or steps
    for row in range(len(lengths)):
        done = following["done"][row].squeeze(-1).nonzero().squeeze(-1).tolist()
        ends = (following["previous", "terminated"] | following["previous", "truncated"])[row].squeeze(-1)
        for first, last in zip([-1, *done[:-1]], done, strict=False):
            if "episodes_per_task" in limit:
                assert ends[first + 1 : last + 1].sum() == limit["episodes_per_task"]
            else:
                assert last - first == limit["steps_per_task"]


def test_single_equals_batched_row():
    goals, actions = [40, 12, 44, 0], torch.randint(5, (4, 60))

    def trace(env, played):
        frame, frames = env.reset(), []
        for t in range(played.shape[-1]):
            step, frame = env.step_and_maybe_reset(frame.set("action", played[..., t]))
            frames.append(step.exclude("stream", ("next", "stream")))
        return torch.stack(frames, -1)

    batched = trace(TaskEnv(DarkRoomEnv(goals, max_steps=6, teacher=True), episodes_per_task=3), actions)
    for row, goal in enumerate(goals):
        base = DarkRoomEnv([goal], batch_size=(), max_steps=6, teacher=True)
        alone = trace(TaskEnv(base, episodes_per_task=3), actions[row])
        assert (alone == batched[row]).all()


@pytest.mark.parametrize(
    "make_base",
    [
        lambda: CountEnv([2, 3]),
        lambda: CountEnv(2),
        lambda: CountEnv([2, 3], one_hot=True),
        lambda: CountEnv([[2, 3], [1, 4]]),
        lambda: GymEnv("CartPole-v1"),
        lambda: TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=True), StepCounter(4)),
        lambda: GymEnv("Pendulum-v1"),
    ],
)
@pytest.mark.parametrize("limit", [{"episodes_per_task": 2}, {"steps_per_task": 5}], ids=str)
def test_specs(make_base, limit):
    env = TaskEnv(make_base(), **limit)
    check_env_specs(env, break_when_any_done="both")
    frame = env.rand_step(env.reset())
    assert frame["next", "episode_step"].eq(1).all()
    for key, dtype in (("stream", torch.int64), ("episode_step", torch.int64), ("is_init", torch.bool)):
        assert frame[key].dtype == dtype
        assert frame[key].shape == (*env.batch_size, 1)
    assert frame["next", "previous", "action"].dtype == env.action_spec.dtype
    assert frame["next", "previous", "action"].shape == env.action_spec.shape


def test_one_hot_action_is_zero_at_first_frames():
    steps = rollout(TaskEnv(CountEnv([1, 2], one_hot=True), episodes_per_task=2), 12)
    first = (steps["episode_step"] == 0).squeeze(-1)
    assert (steps["previous", "action"][first] == 0).all()
    assert (steps["previous", "action"][~first].sum(-1) == 1).all()


def test_ignored_action_may_be_anything():
    env = TaskEnv(DarkRoomEnv([0, 80], max_steps=1), episodes_per_task=2)
    frame = env.step(env.reset().set("action", torch.tensor([0, 0])))["next"]
    assert frame["previous", "truncated"].all()
    following = env.step(frame.set("action", torch.tensor([-100, 100])))["next"]
    assert (following["previous", "action"] == 0).all()


def test_partial_reset_leaves_other_rows_alone():
    env = TaskEnv(CountEnv([3, 3]), episodes_per_task=2)
    frame = env.reset()
    for _ in range(2):
        frame = env.step(env.rand_action(frame))["next"].exclude("reward")
    before = frame.clone()
    frame = env.reset(frame.set("_reset", torch.tensor([[True], [False]])))
    assert (frame[1] == before[1]).all()
    assert frame["is_init"].squeeze(-1).tolist() == [True, False]
    assert frame["episode_step"].squeeze(-1).tolist() == [0, 2]
    assert frame["task"].squeeze(-1).tolist() == [2, 1]
    following = env.step(env.rand_action(frame))["next"]
    assert following["episode_step"].squeeze(-1).tolist() == [1, 3]
    assert following["previous", "truncated"].squeeze(-1).tolist() == [False, True]


def test_held_rows_do_not_move():
    env = TaskEnv(CountEnv([2, 4]), episodes_per_task=3)
    steps = env.rollout(30, break_when_all_done=True, break_when_any_done=False)
    assert steps.shape == (2, 3 * 5 - 1)
    assert steps["next", "terminated"][1, -1].item()
    frame = env.reset()
    mask = torch.tensor([True, False])
    for _ in range(2):
        frame = env.step(env.rand_action(frame).set("_step", mask))["next"].exclude("reward")
    frame = env.step(env.rand_action(frame))["next"]
    assert frame["episode_step"].squeeze(-1).tolist() == [0, 1]


def test_collector():
    env = TaskEnv(CountEnv([2, 3]), episodes_per_task=2)
    collector = Collector(env, RandomPolicy(env.action_spec), frames_per_batch=10, total_frames=60)
    try:
        steps = torch.cat([batch.clone() for batch in collector], -1)
    finally:
        collector.shutdown()
    for row, length in enumerate([2, 3]):
        check_row(steps[row], length, episodes_per_task=2)


def test_inference_mode_and_back():
    env = TaskEnv(CountEnv([2, 3]), episodes_per_task=2)
    with torch.inference_mode():
        rollout(env, 4)
    check_row(rollout(env, 10)[0], 2, episodes_per_task=2)


def test_streams_are_unique_whatever_the_seed():
    def make():
        torch.manual_seed(0)
        env = TaskEnv(CountEnv([2, 3]), episodes_per_task=2)
        env.set_seed(0)
        return env

    env, other = make(), make()
    streams = [e.reset()["stream"] for e in (env, other, copy.deepcopy(env))]
    assert torch.cat(streams).unique().numel() == 6
    assert torch.equal(env.reset()["stream"], streams[0])


def test_seed_repeats_tasks_and_episodes():
    def trace(seed):
        env = TaskEnv(DarkRoomEnv(range(81), batch_size=8, teacher=True), episodes_per_task=1)
        env.set_seed(seed)
        torch.manual_seed(seed)
        return rollout(env, 50).exclude("stream", ("next", "stream"))

    assert (trace(0) == trace(0)).all()
    assert not torch.equal(trace(0)["q_star"], trace(1)["q_star"])


def test_task_is_kept_until_over_and_without_sample_task_for_ever():
    env = TaskEnv(DarkRoomEnv(range(81), batch_size=16, seed=1, max_steps=4, teacher=True), episodes_per_task=3)
    steps = rollout(env, 60)
    at_start = steps["q_star"][(steps["episode_step"] == 0).squeeze(-1)]
    assert len(at_start.unique(dim=0)) > 10
    changed = (steps["q_star"][:, 1:] != steps["q_star"][:, :-1]).any(-1)
    same_cell = steps["observation_discrete"][:, 1:] == steps["observation_discrete"][:, :-1]
    assert not (changed & same_cell & ~steps["is_init"][:, 1:].squeeze(-1)).any()
    steps = rollout(TaskEnv(CountEnv([2], draws=False), episodes_per_task=1), 6)
    assert (steps["task"] == 0).all()


@pytest.mark.cuda
@pytest.mark.parametrize("moves", [True, False])
def test_cuda(moves):
    device = "cpu" if moves else "cuda"
    env = TaskEnv(DarkRoomEnv([0, 80], batch_size=4, teacher=True, device=device), episodes_per_task=2)
    env = env.to("cuda")
    check_env_specs(env)
    assert all(value.is_cuda for value in rollout(env, 50).values(True, True))


def test_close_reaches_the_base():
    env = make_single(2, episodes_per_task=1)
    env.close()
    assert env.base_env.is_closed


class UnlockedEnv(CountEnv):
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls, *args, _batch_locked=False, **kwargs)


@pytest.mark.parametrize(
    ("make_base", "limit", "error", "match"),
    [
        (lambda: torch.nn.Identity(), {"episodes_per_task": 1}, TypeError, "must be a torchrl EnvBase, got Identity"),
        (lambda: CountEnv(2), {}, ValueError, "exactly one of .* must be given"),
        (lambda: CountEnv(2), {"episodes_per_task": 1, "steps_per_task": 1}, ValueError, "exactly one of .* got"),
        (lambda: CountEnv(2), {"episodes_per_task": 0}, ValueError, "episodes_per_task must be .* at least 1, got 0"),
        (lambda: CountEnv(2), {"steps_per_task": 1.5}, ValueError, "steps_per_task must be an integer .* got 1.5"),
        (
            lambda: TransformedEnv(CountEnv(2), InitTracker()),
            {"episodes_per_task": 1},
            ValueError,
            "must not write TaskEnv's own entries, got is_init",
        ),
        (lambda: make_single(2, steps_per_task=2), {"steps_per_task": 2}, ValueError, "got .*episode_step.*previous"),
        (lambda: SerialEnv(1, lambda: CountEnv(2)), {"steps_per_task": 2}, ValueError, "inside each worker"),
        (lambda: UnlockedEnv([2, 3]), {"steps_per_task": 2}, ValueError, "must be batch-locked"),
    ],
)
def test_errors(make_base, limit, error, match):
    base = make_base()
    with pytest.raises(error, match=match):
        TaskEnv(base, **limit)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number(value, monkeypatch):
    """Of a row that is at its episode's end, and gets no reward, it does not matter."""
    env = TaskEnv(CountEnv([2, 9], honours_mask=False), episodes_per_task=2)
    step, spoiled = CountEnv._step, [False, False]

    def spoil(self, tensordict):
        frame = step(self, tensordict)
        frame["reward"][torch.tensor(spoiled)] = value
        return frame

    monkeypatch.setattr(CountEnv, "_step", spoil)
    frame = env.reset()
    for _ in range(2):
        frame = env.rand_step(frame)["next"]
    spoiled[0] = True
    frame = env.rand_step(frame)["next"]
    spoiled[1] = True
    with pytest.raises(ValueError, match=rf"TaskEnv: entry 'reward' must be finite, got {value} at .* Fix CountEnv"):
        env.rand_step(frame)
