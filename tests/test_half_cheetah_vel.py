"""Half-cheetah at a hidden velocity: the simulator's own numbers, the benchmark's targets, and rows that stay apart."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torchrl.envs import ParallelEnv, SerialEnv
from torchrl.envs.utils import check_env_specs

from torchrl_mouse.envs import HalfCheetahVelEnv, TaskEnv, half_cheetah_vel, half_cheetah_velocities

TEST_VELOCITIES = [0.556, 2.872, 1.276, 1.512, 1.531, 0.047, 2.195, 2.980, 0.489, 0.380]


def play(env, actions, frame=None):
    """Plays ``actions`` [T, *, 6] without resets; the stacked ``next`` frames [*, T]."""
    frame = env.reset() if frame is None else frame
    frames = []
    for action in actions:
        frame = env.step(frame.set("action", action))["next"]
        frames.append(frame)
        frame = frame.exclude("reward")
    return torch.stack(frames, -1)


def starts(seed, rows):
    """A fresh environment's first positions and velocities [rows, 9], from its seed."""
    random = np.random.default_rng(seed)
    return random.uniform(-0.1, 0.1, (rows, 9)), 0.1 * random.standard_normal((rows, 9))


@pytest.fixture
def mujoco(tmp_path, monkeypatch):
    """MuJoCo, in a folder of its own: reading the file as it is writes a log there."""
    monkeypatch.chdir(tmp_path)
    return pytest.importorskip("mujoco")


@pytest.fixture
def gym_cheetah(mujoco, monkeypatch):
    """Gymnasium's own environment. It imports a package to draw with, which it does not need here."""
    monkeypatch.setitem(sys.modules, "imageio", ModuleType("imageio"))
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

    env = HalfCheetahEnv()
    yield env
    env.close()


def test_equals_gymnasiums_cheetah(gym_cheetah):
    targets = torch.tensor([0.0, 1.0, 2.5])
    actions = torch.rand(40, 3, 6) * 3 - 1.5  # also outside of the box
    env = HalfCheetahVelEnv(targets, seed=3)
    first = env.reset()
    frames = play(env, actions, first.clone())
    travelled = []
    for row, (position, velocity) in enumerate(zip(*starts(3, 3), strict=True)):
        gym_cheetah.reset(seed=0)
        gym_cheetah.set_state(position, velocity)
        torso = gym_cheetah.data.body("torso").xpos

        def as_row(observation, torso=torso):
            return torch.from_numpy(np.concatenate([observation, torso]).astype(np.float32))

        assert torch.equal(first["observation"][row], as_row(gym_cheetah._get_obs()))
        for step, action in enumerate(actions[:, row].clamp(-1, 1).double().numpy()):
            observation, _, _, _, info = gym_cheetah.step(action)
            assert torch.equal(frames["observation"][row, step], as_row(observation))
            reward = -abs(info["x_velocity"] - targets[row].item()) - 0.05 * (action**2).sum()
            assert frames["reward"][row, step].item() == pytest.approx(reward, abs=1e-6)
        travelled.append(abs(gym_cheetah.data.qpos[0] - position[0]))
    assert min(travelled) > 0.1  # the rewards were not all of a standing cheetah


def test_equals_single_simulator_steps(mujoco):
    import importlib.resources

    path = importlib.resources.files("gymnasium") / "envs/mujoco/assets/half_cheetah.xml"
    model = mujoco.MjModel.from_xml_path(str(path))
    data = mujoco.MjData(model)
    assert sum(model.body_mass) == pytest.approx(14)
    assert model.opt.timestep == 0.01
    [data.qpos[:]], [data.qvel[:]] = starts(5, 1)
    mujoco.mj_forward(model, data)
    env = HalfCheetahVelEnv([1.5], seed=5)
    actions = torch.rand(30, 1, 6) * 2 - 1
    first = env.reset()
    assert first["observation"][0, 17:].tolist() == np.float32([data.qpos[0], 0, 0.7 + data.qpos[1]]).tolist()
    frames = play(env, actions, first)
    for step, action in enumerate(actions[:, 0].double().numpy()):
        data.ctrl[:] = action
        before = data.qpos[0]
        for _ in range(4):
            mujoco.mj_step(model, data)
        late = [data.qpos[0], 0, 0.7 + data.qpos[1]]  # the torso's place is that of the last simulator step's beginning
        mujoco.mj_step(model, data)
        expected = torch.tensor(np.concatenate([data.qpos[1:], data.qvel, late]), dtype=torch.float32)
        torch.testing.assert_close(frames["observation"][0, step], expected, atol=1e-6, rtol=0)
        reward = -abs((data.qpos[0] - before) / 0.05 - 1.5) - 0.05 * (action**2).sum()
        assert frames["reward"][0, step].item() == pytest.approx(reward, abs=1e-6)


def test_rewards_by_hand(monkeypatch):
    monkeypatch.setattr(half_cheetah_vel, "_NOISE", 0)  # both rows do the same
    env = HalfCheetahVelEnv([100.0, -100.0])
    first = env.reset()["observation"]
    assert torch.equal(first, torch.tensor([[0.0] * 17 + [0, 0, 0.7]] * 2))  # rest, 0.7 m above the ground
    action = torch.tensor([2.0, -0.5, 0.0, 0.0, 0.0, 1.0]).expand(30, 2, 6)
    frames = play(env, action)
    fast, back = frames["reward"].squeeze(-1)
    # -(100 - v) - c - (100 + v) - c, where c = 0.05 * (1 + 0.25 + 1)
    torch.testing.assert_close(fast + back, torch.full((30,), -200.225), atol=1e-4, rtol=0)
    forward = (fast - back) / 2
    assert forward.abs().max() > 0.2
    # x lags by 0.01 s of a speed below 5 m/s
    torch.testing.assert_close(frames["observation"][0, :, 17], 0.05 * forward.cumsum(0), atol=0.05, rtol=0)


def test_published_figures():
    velocities = half_cheetah_velocities(40)[30:].repeat(10)

    def returns(policy):
        env = HalfCheetahVelEnv(velocities, seed=0)
        steps = env.rollout(200, policy)
        assert steps.shape == (100, 200)
        return steps["next", "reward"].sum((-1, -2)).mean().item()

    assert returns(lambda td: td.set("action", torch.zeros(100, 6))) == pytest.approx(-276.9, abs=0.4)
    assert returns(None) == pytest.approx(-326.7, abs=10)


def test_velocities_are_the_benchmarks():
    before = np.random.get_state()  # noqa: NPY002 - the global one is the point
    velocities = half_cheetah_velocities(40)
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert np.random.get_state()[2] == before[2]  # noqa: NPY002
    assert velocities.dtype == torch.float32
    assert velocities.shape == (40,)
    torch.testing.assert_close(velocities[30:], torch.tensor(TEST_VELOCITIES), atol=5.01e-4, rtol=0)
    assert torch.equal(half_cheetah_velocities(130)[:40], velocities)


def test_starts():
    env = HalfCheetahVelEnv([1.0], batch_size=1000, seed=0)
    first, second = env.reset()["observation"], env.reset()["observation"]
    assert (first[:, :17] != second[:, :17]).all()
    assert first[:, :8].abs().max() <= 0.1
    assert first[:, :8].abs().amax(0).min() > 0.099
    torch.testing.assert_close(first[:, 8:17].std(0), torch.full((9,), 0.1), atol=0.006, rtol=0)
    torch.testing.assert_close(first[:, :17].mean(0), torch.zeros(17), atol=0.01, rtol=0)
    assert first[:, 17].abs().max() <= 0.1
    assert (first[:, 18] == 0).all()
    torch.testing.assert_close(first[:, 19], 0.7 + first[:, 0])


def test_episodes_end_by_truncation_only():
    frames = play(HalfCheetahVelEnv([1.0, 2.0], max_steps=3), torch.zeros(3, 2, 6))
    assert frames["truncated"].squeeze(-1).tolist() == [[False, False, True]] * 2
    assert torch.equal(frames["done"], frames["truncated"])
    assert not frames["terminated"].any()
    frame = HalfCheetahVelEnv([1.0]).rand_step()["next"]
    frame["done"].fill_(True)
    assert not frame["truncated"].any()
    assert HalfCheetahVelEnv([1.0]).rollout(300).shape == (1, 200)


def test_fixed_rows_and_drawn_rows():
    velocities = torch.tensor([0.0, 1.0, 2.0])
    env = HalfCheetahVelEnv(velocities)
    env.sample_task(torch.ones(3, dtype=torch.bool))
    assert torch.equal(env.velocity, velocities)
    env = HalfCheetahVelEnv(velocities[:2], batch_size=200, seed=0)
    first = env.velocity
    env.reset()
    assert torch.equal(env.velocity, first)  # a reset draws no task
    mask = torch.arange(200) < 100
    env.sample_task(mask)
    assert torch.equal(env.velocity[~mask], first[~mask])
    assert not torch.equal(env.velocity[mask], first[mask])
    assert 60 < (env.velocity == 0).sum() < 140
    env.set_seed(0)
    assert torch.equal(env.velocity, first)


def test_a_drawn_task_sets_the_reward():
    env = HalfCheetahVelEnv([-50.0, 50.0], batch_size=8, seed=0)
    for _ in range(3):
        env.sample_task(torch.ones(8, dtype=torch.bool))
        forward = env.rand_step(env.reset())["next", "reward"].squeeze(-1) + env.velocity.abs()
        assert env.velocity.unique().numel() == 2
        assert forward.abs().max() < 10


def test_seeds_repeat_tasks_and_starts():
    def trace(env, seed):
        env.set_seed(seed)
        torch.manual_seed(0)
        return env.rollout(7, break_when_any_done=False)

    def make(seed=None):
        return HalfCheetahVelEnv(half_cheetah_velocities(40), batch_size=3, max_steps=3, seed=seed)

    env = make()
    assert (trace(env, 1) == trace(env, 1)).all()
    assert (trace(env, 1) == trace(make(), 1)).all()
    assert not torch.equal(trace(env, 1)["observation"], trace(env, 2)["observation"])
    assert torch.equal(make(4).velocity, make(4).velocity)
    assert torch.equal(make(4).reset()["observation"], make(4).reset()["observation"])
    assert not torch.equal(make().reset()["observation"], make().reset()["observation"])


@pytest.mark.parametrize("batch_size", [None, 3, (), (2, 2)])
def test_specs(batch_size):
    env = HalfCheetahVelEnv([0.5, 1.5], batch_size=batch_size, max_steps=4)
    check_env_specs(env, break_when_any_done="both")
    assert env.observation_spec["observation"].shape == (*env.batch_size, 20)
    assert env.action_spec.shape == (*env.batch_size, 6)
    assert env.action_spec.space.low.eq(-1).all()
    assert env.action_spec.space.high.eq(1).all()
    check_env_specs(TaskEnv(env, episodes_per_task=2), break_when_any_done="both")


def test_rows_do_not_see_each_other():
    actions = torch.rand(20, 2, 2, 6) * 2 - 1
    make = partial(HalfCheetahVelEnv, [0.5, 1.5], batch_size=(2, 2), seed=0)
    whole = play(make(), actions)
    others = torch.rand_like(actions) * 2 - 1
    others[:, 1, 0] = actions[:, 1, 0]
    mixed = play(make(), others)
    assert (mixed[1, 0] == whole[1, 0]).all()
    moved = (mixed["observation"] != whole["observation"]).flatten(2).any(-1)
    assert moved.tolist() == [[True, True], [False, True]]


def test_masked_steps_and_partial_resets_leave_the_other_rows_alone():
    actions = torch.rand(8, 2, 6) * 2 - 1
    make = partial(HalfCheetahVelEnv, [0.5, 1.5], seed=0, max_steps=5)
    free = play(make(), actions)
    env = make()
    frame = play(env, actions[:2])[:, -1].exclude("reward")
    # row 1 is held: whatever its action
    held = actions[2].clone()
    held[1] = math.nan
    step = env.step(frame.clone().set("action", held).set("_step", torch.tensor([True, False])))["next"]
    assert torch.equal(step["observation"][0], free["observation"][0, 2])
    assert torch.equal(step["reward"][0], free["reward"][0, 2])
    assert torch.equal(step["observation"][1], free["observation"][1, 1])
    assert step["reward"].isfinite().all()
    # row 0 is reset: it starts anew, and row 1 goes on as if nothing had been
    frame = env.reset(step.exclude("reward").set("_reset", torch.tensor([[True], [False]])))
    assert frame["observation"][0, :8].abs().max() <= 0.1
    assert torch.equal(frame["observation"][1], free["observation"][1, 1])
    rest = play(env, actions[2:7], frame)
    assert torch.equal(rest["observation"][1], free["observation"][1, 2:7])
    assert torch.equal(rest["reward"][1], free["reward"][1, 2:7])
    ends = rest["truncated"].squeeze(-1)
    assert ends[0].tolist() == [False] * 4 + [True]
    assert ends[1].tolist() == [False, False, True, True, True]  # the held step did not count


def test_a_reset_leaves_nothing_behind():
    env, fresh = (HalfCheetahVelEnv([1.0], seed=seed) for seed in (0, 1))
    play(env, torch.rand(50, 1, 6) * 2 - 1)
    env.set_seed(1)
    actions = torch.rand(10, 1, 6) * 2 - 1
    assert (play(env, actions) == play(fresh, actions)).all()


def test_frames_and_inference_mode_do_not_touch_the_state():
    env, other = (HalfCheetahVelEnv([1.0, 2.0], seed=0) for _ in range(2))
    actions = torch.rand(3, 2, 6)
    with torch.inference_mode():
        frame = env.reset()
    for action, expected in zip(actions, play(other, actions).unbind(-1), strict=True):
        frame = env.step(frame.clone().set("action", action))["next"].exclude("reward")
        assert torch.equal(frame["observation"], expected["observation"])
        assert not frame["truncated"].any()
        for entry in frame.values():
            entry.fill_(True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_frames_stay_float32(dtype):
    action = torch.tensor([1, -1, 0, 0, 1, 0]).expand(2, 1, 6)
    frames = play(HalfCheetahVelEnv([1.0], seed=0), action.to(dtype))
    assert frames["observation"].dtype == frames["reward"].dtype == torch.float32
    assert (frames == play(HalfCheetahVelEnv([1.0], seed=0), action.float())).all()


def test_actions_with_gradients():
    action = torch.zeros(1, 1, 6, requires_grad=True)
    assert not play(HalfCheetahVelEnv([1.0]), action)["reward"].requires_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_alone(duplicate):
    before, after = (torch.rand(6, 2, 6) * 2 - 1 for _ in range(2))
    env = HalfCheetahVelEnv([0.5, 1.5], batch_size=2, seed=0, max_steps=9)
    frame = play(env, before)[:, -1].exclude("reward")
    other = duplicate(env)
    play(other, torch.rand(3, 2, 6), frame.clone())  # must not move the first
    other = duplicate(env)
    # a copy's held rows show what they showed, the torso's lag included
    held = frame.clone().set("action", after[0]).set("_step", torch.tensor([True, False]))
    assert torch.equal(duplicate(env).step(held)["next", "observation"][1], frame["observation"][1])
    expected, actual = play(env, after, frame.clone()), play(other, after, frame.clone())
    assert (actual == expected).all()
    assert torch.equal(other.reset()["observation"], env.reset()["observation"])  # the generator came along
    everyone = torch.ones(2, dtype=torch.bool)
    env.sample_task(everyone)
    other.sample_task(everyone)
    assert torch.equal(other.velocity, env.velocity)


def test_task_env():
    env = TaskEnv(HalfCheetahVelEnv([0.5, 1.5, 2.5], batch_size=4, max_steps=3, seed=0), episodes_per_task=3)
    frame, frames, velocities = env.reset(), [], []
    for _ in range(44):
        velocities.append(env.base_env.velocity.clone())
        step, frame = env.step_and_maybe_reset(env.rand_action(frame))
        frames.append(step)
    steps, velocities = torch.stack(frames, -1), torch.stack(velocities, -1)  # (4, 44)
    time = torch.arange(44) % 11  # a task: three episodes of three steps, and the two terminal frames between them
    assert torch.equal(steps["is_init"].squeeze(-1), (time == 0).expand(4, 44))
    assert torch.equal(steps["next", "done"].squeeze(-1), (time == 10).expand(4, 44))
    ends = steps["previous", "truncated"].squeeze(-1)
    assert torch.equal(ends, ((time == 3) | (time == 7)).expand(4, 44))
    tasks = velocities.unflatten(-1, (4, 11))
    assert (tasks == tasks[..., :1]).all()
    assert (tasks[:, 1:, 0] != tasks[:, :-1, 0]).any()
    first = steps["observation"][steps["episode_step"].squeeze(-1) == 0]
    assert len(first) == 4 * 12
    assert first[:, :8].abs().max() <= 0.1  # each episode starts anew
    assert len(first.unique(dim=0)) == len(first)
    assert (steps["next", "reward"].squeeze(-1)[ends] == 0).all()
    assert (steps["next", "reward"].squeeze(-1)[~ends] < 0).all()


def make_worker(seed):
    return TaskEnv(
        HalfCheetahVelEnv(half_cheetah_velocities(40), batch_size=(), max_steps=3, seed=seed), episodes_per_task=2
    )


def test_workers():
    def trace(batch):
        env = batch(2, [partial(make_worker, seed) for seed in (0, 1)])
        try:
            env.set_seed(0)
            torch.manual_seed(0)
            return env.rollout(12, break_when_any_done=False).exclude("stream", ("next", "stream"))
        finally:
            env.close(raise_if_closed=False)

    serial = trace(SerialEnv)
    assert (trace(ParallelEnv) == serial).all()
    assert not torch.equal(serial["observation"][0], serial["observation"][1])


@pytest.mark.cuda
@pytest.mark.parametrize("moves", [True, False])
def test_cuda(moves):
    env = HalfCheetahVelEnv([0.5, 1.5], batch_size=4, max_steps=5, device=None if moves else "cuda")
    env = TaskEnv(env.to("cuda"), episodes_per_task=2)
    check_env_specs(env)
    assert all(value.is_cuda for value in env.rollout(20, break_when_any_done=False).values(True, True))


def test_says_nothing_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    HalfCheetahVelEnv([1.0]).rollout(3)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_without_mujoco(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    match = r'^HalfCheetahVelEnv: the package mujoco must be installed, .* Run pip install "torchrl-mouse\[mujoco\]"\.$'
    with pytest.raises(ImportError, match=match):
        HalfCheetahVelEnv([1.0])


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"velocities": 0.5}, r"velocities must have shape \[V\] with V >= 1, got \[\]"),
        ({"velocities": []}, r"velocities must have shape .* got \[0\]"),
        ({"velocities": [[0.5]]}, r"velocities must have shape .* got \[1, 1\]"),
        ({"velocities": [0.5, math.nan]}, r"velocities must be finite, got \[0.5, nan\]"),
        ({"velocities": [0.5], "max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"velocities": [0.5], "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"velocities": [0.5], "batch_size": (2, -1)}, r"batch_size must be at least 1, got \(2, -1\)"),
    ],
)
def test_errors(keywords, match):
    with pytest.raises(ValueError, match=rf"HalfCheetahVelEnv: {match}"):
        HalfCheetahVelEnv(**keywords)


@pytest.mark.parametrize("shape", [(3, 1), (3,), (3, 6, 6), (3, 5)])
def test_action_of_wrong_shape(shape):
    env = HalfCheetahVelEnv([0.0, 1.0, 2.0])
    frame = env.reset().set("action", torch.zeros(shape))
    with pytest.raises(ValueError, match=r"HalfCheetahVelEnv: action must have shape \[3, 6\], got \[3"):
        env.step(frame)


def test_action_that_is_nan():
    env = HalfCheetahVelEnv([0.0, 1.0], seed=0)
    frame = env.reset()
    wrong = torch.zeros(2, 6)
    wrong[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"HalfCheetahVelEnv: action must not be NaN, got .*nan"):
        env.step(frame.clone().set("action", wrong))
    other = HalfCheetahVelEnv([0.0, 1.0], seed=0)  # nothing has moved
    assert (play(env, torch.ones(2, 2, 6), frame) == play(other, torch.ones(2, 2, 6))).all()


def test_velocities_error():
    with pytest.raises(ValueError, match="half_cheetah_velocities: num must be at least 1, got 0"):
        half_cheetah_velocities(0)
