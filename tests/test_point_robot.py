"""Point robot: dynamics, the benchmark's goals, and the published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchrl.envs import SerialEnv
from torchrl.envs.utils import check_env_specs

from torchrl_mouse.envs import (
    PointRobotEnv,
    TaskEnv,
    point_robot_goals,
    point_robot_oracle,
    sparse_point_robot_oracle,
)

TEST_GOALS = [
    *((0.448, 0.586), (-0.297, 0.819), (0.426, 0.794), (-0.160, -0.065), (0.808, 0.267)),
    *((0.066, -0.525), (0.893, 0.119), (0.515, -0.528), (-0.140, -0.212), (0.021, -0.749)),
]
SPARSE_TEST_DEGREES = [29.4, 73.5, 66.1, 95.5, 169.0, 91.8, 143.3, 146.9, 102.9, 84.5]


def play(env, actions):
    """Plays one action per step, or one per row and step, without resets; the stacked ``next`` frames."""
    frame, frames = env.reset(), []
    for action in actions:
        action = torch.as_tensor(action).expand(*env.batch_size, 2)
        frame = env.step(frame.set("action", action))["next"]
        frames.append(frame)
        frame = frame.exclude("reward")
    return torch.stack(frames, -1)


def walk(env, target):
    """Goes to ``target`` [*, 2] at full speed on each axis and stays; the stacked ``next`` frames of an episode."""
    frame, frames = env.reset(), []
    for _ in range(20):
        frame = env.step(frame.set("action", (target - frame["observation"]) * 10))["next"]
        frames.append(frame)
        frame = frame.exclude("reward")
    return torch.stack(frames, -1)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.squeeze(-1), torch.tensor(expected), atol=atol, rtol=0)


def test_hand_trace():
    env = PointRobotEnv([[0.3, 0.4], [-1.0, 0.0]], start="origin", max_steps=3)
    assert env.reset()["observation"].tolist() == [[0, 0], [0, 0]]
    frames = play(env, [[1.0, -0.5], [0.5, 7.0], [-9.0, 0.0]])
    path = [[0.1, -0.05], [0.15, 0.05], [0.05, 0.05]]
    close(frames["observation"], [path, path])
    close(
        frames["reward"],
        [[-math.hypot(0.3 - x, 0.4 - y) for x, y in path], [-math.hypot(-1 - x, y) for x, y in path]],
    )
    assert frames["truncated"].squeeze(-1).tolist() == [[False, False, True]] * 2
    assert torch.equal(frames["done"], frames["truncated"])
    assert not frames["terminated"].any()
    assert "sparse_reward" not in frames


def test_sparse_hand_trace():
    env = PointRobotEnv([[0.3, 0.0], [0.0, 0.1]], sparse=True)
    frame = env.reset()
    assert frame["observation"].tolist() == [[0, 0], [0, 0]]
    assert frame["sparse_reward"].tolist() == [[0], [0]]  # although the second starts inside the radius
    frames = play(env, [[0.9, 0.0], [0.2, 0.0], [1.0, 0.0], [0.9, 0.0]])
    close(frames["observation"][0, :, 0], [0.09, 0.11, 0.21, 0.30])
    close(frames["reward"][0], [-0.21, -0.19, -0.09, 0.0])
    close(frames["sparse_reward"][0], [0, 0.81, 0.91, 1.0])
    distance = [math.hypot(x, 0.1) for x in (0.09, 0.11, 0.21, 0.30)]
    close(frames["reward"][1], [-d for d in distance])
    close(frames["sparse_reward"][1], [1 - d if d <= 0.2 else 0.0 for d in distance])


def test_starts():
    goals = point_robot_goals(50)
    env = PointRobotEnv(goals, batch_size=2000, seed=0)
    first, second = env.reset()["observation"], env.reset()["observation"]
    assert (first != second).all()
    torch.testing.assert_close(first.amin(0), torch.tensor([-1.0, -1.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(first.amax(0), torch.tensor([1.0, 1.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(first.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    assert (PointRobotEnv(goals, start="origin").reset()["observation"] == 0).all()
    assert (PointRobotEnv(goals, sparse=True).reset()["observation"] == 0).all()
    assert (PointRobotEnv(goals, sparse=True, start="random").reset()["observation"] != 0).any()


def test_goals_are_the_benchmarks():
    goals = point_robot_goals(50)
    assert goals.dtype == torch.float32
    assert goals.shape == (50, 2)
    close(goals[40:].unsqueeze(-1), TEST_GOALS, atol=5.01e-4)
    assert torch.equal(point_robot_goals(130)[:50], goals)
    sparse = point_robot_goals(50, sparse=True)
    close(torch.rad2deg(torch.atan2(sparse[40:, 1], sparse[40:, 0])), SPARSE_TEST_DEGREES, atol=0.0501)
    torch.testing.assert_close(sparse.norm(dim=-1), torch.ones(50))
    angles = torch.atan2(sparse[:, 1], sparse[:, 0]).sort().values
    torch.testing.assert_close(angles, torch.linspace(0, math.pi, 50))
    assert point_robot_goals(1, sparse=True).shape == (1, 2)


def test_goals_neither_read_nor_move_numpys_global_generator():
    before = np.random.get_state()  # noqa: NPY002 - the global one is the point
    first = point_robot_goals(50, sparse=True)
    after = np.random.get_state()  # noqa: NPY002
    assert after[2] == before[2]
    assert (after[1] == before[1]).all()
    assert torch.equal(point_robot_goals(50, sparse=True), first)


@pytest.mark.parametrize("part", [slice(40, 50), slice(0, 40)])
def test_published_figures(part):
    goals = point_robot_goals(50)[part].repeat(10_000, 1)
    test = part.start == 40

    def returns(target):
        return walk(PointRobotEnv(goals, seed=0), target)["reward"].sum((-1, -2)).mean().item()

    assert returns(goals) == pytest.approx(-4.59 if test else -5.10, abs=0.03)
    if test:
        assert returns(torch.zeros(2)) == pytest.approx(-14.07, abs=0.03)
        assert returns(torch.tensor([0.25, 0.0])) == pytest.approx(-13.72, abs=0.03)
        assert returns(point_robot_goals(50)[40:].mean(0)) == pytest.approx(-13.74, abs=0.03)
        assert returns(point_robot_goals(50)[:40].mean(0)) == pytest.approx(-15.41, abs=0.03)
        still = play(PointRobotEnv(goals, seed=0), [[0.0, 0.0]] * 20)
        assert still["reward"].sum((-1, -2)).mean().item() == pytest.approx(-19.7, abs=0.2)
        env = PointRobotEnv(goals, seed=0)
        random = play(env, [env.action_spec.rand() for _ in range(20)])
        assert random["reward"].sum((-1, -2)).mean().item() == pytest.approx(-20.2, abs=0.2)


def test_published_figures_of_the_sparse_variant():
    goals = point_robot_goals(50, sparse=True)
    frames = walk(PointRobotEnv(goals, sparse=True), goals)
    paid = frames["sparse_reward"].squeeze(-1)
    returns = paid.sum(-1)
    assert returns.mean().item() == pytest.approx(13.31, abs=0.006)
    assert returns[40:].mean().item() == pytest.approx(13.07, abs=0.006)
    assert (returns[40:].min().item(), returns[40:].max().item()) == pytest.approx((12.70, 13.90), abs=0.006)
    assert set(((paid[40:] > 0).int().argmax(-1) + 1).tolist()) == {7, 8}
    fixed = torch.tensor([math.cos(math.radians(94)), math.sin(math.radians(94))])
    paid = walk(PointRobotEnv(goals[40:], sparse=True), fixed)["sparse_reward"]
    assert paid.sum((-1, -2)).mean().item() == pytest.approx(4.40, abs=0.02)


@pytest.mark.parametrize("degrees", [0, 180])
def test_rounding_at_the_radius_is_that_of_python_numbers(degrees):
    goal = [round(math.cos(math.radians(degrees))), 0.0]  # at 0.2 after 8 steps
    x, paid = 0.0, []
    for _ in range(10):
        x += 0.1 * goal[0]
        reward = -math.hypot(goal[0] - x, 0)
        paid.append(reward + 1 if reward >= -0.2 else 0)
    assert paid[7] == 0
    frames = play(PointRobotEnv([goal], sparse=True), [[goal[0], 0.0]] * 10)
    close(frames["sparse_reward"][0], paid)
    assert sparse_point_robot_oracle(torch.tensor(goal), max_steps=10).item() == pytest.approx(sum(paid), abs=1e-6)


def grid(num):
    """The centres of ``num`` by ``num`` equal cells of [-1, 1]^2."""
    line = (torch.arange(num) + 0.5) / num * 2 - 1
    return torch.cartesian_prod(line, line)


def test_oracles_are_walks_in_the_environment():
    goals = torch.cat([point_robot_goals(50, sparse=True), grid(9) * 3])  # some too far away, some within the radius
    env = PointRobotEnv(goals, sparse=True, start="random", seed=3)
    start = env.reset()["observation"]
    env.set_seed(3)
    rewards = walk(env, goals)["reward"].squeeze(-1)
    paid = walk(PointRobotEnv(goals, sparse=True), goals)["sparse_reward"].squeeze(-1)
    for steps in (1, 7, 20):
        oracle = point_robot_oracle(start, goals, max_steps=steps)
        torch.testing.assert_close(oracle, rewards[:, :steps].sum(-1), atol=5e-5, rtol=0)
        oracle = sparse_point_robot_oracle(goals, max_steps=steps)
        torch.testing.assert_close(oracle, paid[:, :steps].sum(-1), atol=5e-5, rtol=0)
    assert (oracle == 0).any()


@pytest.mark.parametrize("noise", [0.02, 0.3, 2.0])
def test_no_policy_beats_the_oracle(noise):
    goals = point_robot_goals(50, sparse=True).repeat(40, 1)
    env = PointRobotEnv(goals, sparse=True)
    frame, dense, sparse = env.reset(), torch.zeros(len(goals)), torch.zeros(len(goals))
    for _ in range(20):
        action = (goals - frame["observation"]) * 10
        frame = env.step(frame.set("action", action.clamp(-1, 1) + noise * torch.randn_like(action)))["next"]
        dense += frame["reward"].squeeze(-1)
        sparse += frame["sparse_reward"].squeeze(-1)
        frame = frame.exclude("reward")
    best, best_sparse = point_robot_oracle(torch.zeros(2), goals), sparse_point_robot_oracle(goals)
    assert (dense <= best + 1e-5).all()
    assert (sparse <= best_sparse + 1e-5).all()
    assert (dense < best).float().mean() > 0.9
    assert (sparse < best_sparse).float().mean() > 0.9


def test_oracles_published_figures():
    dense = point_robot_oracle(grid(60), point_robot_goals(50)[:, None])
    assert dense.shape == (50, 3600)
    assert dense[40:].mean().item() == pytest.approx(-4.59, abs=0.006)
    assert dense[40:].var(-1).sum().sqrt().item() / 10 == pytest.approx(1.18, abs=0.006)
    assert dense[:40].mean().item() == pytest.approx(-5.10, abs=0.03)
    assert point_robot_oracle(grid(25)[:, None], grid(25)).mean().item() == pytest.approx(-5.20, abs=0.03)
    sparse = sparse_point_robot_oracle(point_robot_goals(50, sparse=True))
    assert sparse.mean().item() == pytest.approx(13.31, abs=0.006)
    assert sparse[40:].mean().item() == pytest.approx(13.07, abs=0.006)
    assert (sparse[40:].min().item(), sparse[40:].max().item()) == pytest.approx((12.70, 13.90), abs=0.006)


@pytest.mark.parametrize(
    ("oracle", "match"),
    [
        (lambda: point_robot_oracle(torch.zeros(3), torch.zeros(2)), r"point_robot_oracle: start must .* got \[3\]"),
        (lambda: point_robot_oracle(torch.zeros(2), torch.tensor(0)), r"point_robot_oracle: goal must .* got \[\]"),
        (lambda: sparse_point_robot_oracle(torch.zeros(4, 1)), r"sparse_point_robot_oracle: goal must .* got \[4, 1\]"),
        (lambda: sparse_point_robot_oracle(torch.zeros(2), max_steps=0), r"max_steps must be at least 1, got 0"),
    ],
)
def test_oracles_errors(oracle, match):
    with pytest.raises(ValueError, match=match):
        oracle()


def test_fixed_rows_and_drawn_rows():
    goals = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    env = PointRobotEnv(goals)
    env.sample_task(torch.ones(3, dtype=torch.bool))
    assert torch.equal(env.goal, goals)
    env = PointRobotEnv(goals[:2], batch_size=200, seed=0)
    first = env.goal
    env.reset()
    assert torch.equal(env.goal, first)  # a reset draws no task
    mask = torch.arange(200) < 100
    env.sample_task(mask)
    assert torch.equal(env.goal[~mask], first[~mask])
    assert not torch.equal(env.goal[mask], first[mask])
    assert 60 < (env.goal == goals[0]).all(-1).sum() < 140
    env.set_seed(0)
    assert torch.equal(env.goal, first)


def test_seeds_repeat_tasks_and_starts():
    def trace(env, seed):
        env.set_seed(seed)
        torch.manual_seed(0)
        return env.rollout(45, break_when_any_done=False)

    def make(seed=None):
        return PointRobotEnv(point_robot_goals(50), batch_size=6, seed=seed)

    env = make()
    assert (trace(env, 1) == trace(env, 1)).all()
    assert (trace(env, 1) == trace(make(), 1)).all()
    assert not torch.equal(trace(env, 1)["observation"], trace(env, 2)["observation"])
    assert torch.equal(make(4).goal, make(4).goal)
    assert torch.equal(make(4).reset()["observation"], make(4).reset()["observation"])
    assert not torch.equal(make().reset()["observation"], make().reset()["observation"])


def test_starts_differ_from_random_actions_of_the_same_seed():
    env = PointRobotEnv([[0.0, 1.0]] * 500)
    env.set_seed(0)
    torch.manual_seed(0)
    frame = env.rand_action(env.reset())
    both = torch.stack([frame["observation"].flatten(), frame["action"].flatten()])
    assert both.corrcoef()[0, 1].abs() < 0.15


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3, (), (2, 2)])
def test_specs(sparse, batch_size):
    env = PointRobotEnv(point_robot_goals(2), batch_size=batch_size, sparse=sparse, max_steps=4)
    check_env_specs(env, break_when_any_done="both")
    assert env.action_spec.shape == (*env.batch_size, 2)
    assert env.action_spec.space.low.eq(-1).all()
    assert env.action_spec.space.high.eq(1).all()
    check_env_specs(TaskEnv(env, episodes_per_task=2), break_when_any_done="both")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_state_stays_float32(dtype):
    frames = play(PointRobotEnv([[0.0, 1.0]], start="origin"), [torch.ones(2, dtype=dtype)] * 2)
    assert frames["observation"].dtype == frames["reward"].dtype == torch.float32
    close(frames["observation"], [[[0.1, 0.1], [0.2, 0.2]]])


def test_masked_rows_do_not_move():
    env = PointRobotEnv([[0.0, 0.2], [0.0, 0.2]], sparse=True, max_steps=3)
    up = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    frame = env.step(env.reset().set("action", up))["next"].exclude("reward")
    close(frame["sparse_reward"], [0.9, 0.9])
    held = torch.tensor([[0.0, 1.0], [0.0, math.nan]])
    frame = env.step(frame.set("action", held).set("_step", torch.tensor([True, False])))["next"].exclude("reward")
    close(frame["observation"][:, 1], [0.2, 0.1])
    close(frame["sparse_reward"], [1.0, 0.9])
    frame = env.reset(frame.set("_reset", torch.tensor([[True], [False]])))
    close(frame["observation"][:, 1], [0.0, 0.1])
    close(frame["sparse_reward"], [0.0, 0.9])
    for step, ends in enumerate(([False, False], [False, True], [True, True]), 1):  # the held step did not count
        frame = env.step(frame.set("action", up))["next"].exclude("reward")
        close(frame["observation"][:, 1], [0.1 * step, 0.1 * step + 0.1])
        assert frame["truncated"].squeeze(-1).tolist() == ends


def test_frames_and_inference_mode_do_not_touch_the_state():
    env = PointRobotEnv([[0.0, 1.0]], start="origin")
    with torch.inference_mode():
        frame = env.reset()
    frame = env.step(frame.clone().set("action", torch.ones(1, 2)))["next"].exclude("reward")
    frame["observation"].fill_(7)
    frame["done"].fill_(True)
    assert not frame["truncated"].any()
    frame["done"].fill_(False)
    close(env.step(frame.set("action", torch.ones(1, 2)))["next", "observation"], [[0.2, 0.2]])


def make_task(goal=None, *, sparse=False, batch_size=(), seed=0):
    goals = point_robot_goals(50, sparse=sparse) if goal is None else [goal]
    base = PointRobotEnv(goals, batch_size=batch_size, sparse=sparse, max_steps=3, seed=seed)
    return TaskEnv(base, episodes_per_task=2)


def check_task_rows(steps):
    """Walks through rows [B, T]: dynamics inside episodes of 3 steps, and one goal per task of 7 steps."""
    reward = -(steps["next", "observation"] - steps["goal"]).norm(dim=-1, keepdim=True)
    ends = steps["previous", "truncated"]
    assert torch.equal(ends.squeeze(-1)[0], torch.arange(steps.shape[1]) % 7 == 3)
    torch.testing.assert_close(steps["next", "reward"], reward.masked_fill(ends, 0))
    moved = steps["next", "observation"] - steps["observation"]
    live = ~ends.squeeze(-1)
    torch.testing.assert_close(moved[live], 0.1 * steps["action"][live])
    assert (moved[~live] != 0).any()  # a new episode starts elsewhere
    inside = live & (torch.arange(steps.shape[1]) % 7 != 6)
    shown = steps["next", "previous", "action"]
    assert torch.equal(shown[inside], steps["action"][inside])
    assert (shown[~live] == 0).all()
    assert torch.equal(steps["is_init"].squeeze(-1)[0], torch.arange(steps.shape[1]) % 7 == 0)
    for row in steps:
        tasks = [row["goal"][first : first + 7].unique(dim=0) for first in range(0, len(row), 7)]
        assert all(len(task) == 1 for task in tasks)  # goals change between tasks only
        assert len(torch.cat(tasks).unique(dim=0)) > 1


def record(env, goal, num_steps=28):
    """Steps with each step's goal beside it, read from the base environments."""
    frame, frames = env.reset(), []
    for _ in range(num_steps):
        current = goal().clone()
        step, frame = env.step_and_maybe_reset(env.rand_action(frame))
        frames.append(step.clone().set("goal", current))
    return torch.stack(frames, -1)


def test_task_env_batched():
    env = make_task(batch_size=5)
    check_task_rows(record(env, lambda: env.base_env.goal))


def test_task_env_single():
    env = make_task()
    check_task_rows(record(env, lambda: env.base_env.goal).unsqueeze(0))


def test_task_env_in_workers():
    workers = [make_task(batch_size=(), seed=seed) for seed in range(3)]
    env = SerialEnv(3, [lambda worker=worker: worker for worker in workers])
    try:
        check_task_rows(record(env, lambda: torch.stack([worker.base_env.goal for worker in workers])))
    finally:
        env.close()


def test_task_env_rows_that_end_at_different_steps():
    env = make_task((0.0, 0.2), sparse=True, batch_size=2)
    up = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    frame = env.reset()
    frame = env.step(frame.set("action", up).set("_step", torch.tensor([True, False])))["next"].exclude("reward")
    seen = [frame["sparse_reward"].clone()]
    for _ in range(4):
        action = up.masked_fill(frame["previous", "truncated"], math.nan)  # what is ignored may be anything
        frame = env.step(frame.set("action", action))["next"].exclude("reward")
        seen.append(frame["sparse_reward"].clone())
    close(torch.stack(seen, 1)[0], [0.9, 1.0, 0.9, 0.0, 0.9])
    close(torch.stack(seen, 1)[1], [0.0, 0.9, 1.0, 0.9, 0.0])


def test_single_equals_batched_row():
    goals, actions = point_robot_goals(50, sparse=True)[:4], torch.rand(4, 25, 2) * 2 - 1

    def trace(env, played):
        frame, frames = env.reset(), []
        for t in range(played.shape[-2]):
            step, frame = env.step_and_maybe_reset(frame.set("action", played[..., t, :]))
            frames.append(step.exclude("stream", ("next", "stream")))
        return torch.stack(frames, -1)

    batched = trace(TaskEnv(PointRobotEnv(goals, sparse=True, max_steps=6), episodes_per_task=2), actions)
    for row, goal in enumerate(goals):
        base = PointRobotEnv(goal[None], batch_size=(), sparse=True, max_steps=6)
        assert (trace(TaskEnv(base, episodes_per_task=2), actions[row]) == batched[row]).all()


@pytest.mark.cuda
@pytest.mark.parametrize("moves", [True, False])
def test_cuda(moves):
    env = PointRobotEnv(
        point_robot_goals(50), batch_size=4, sparse=True, start="random", device=None if moves else "cuda"
    )
    env = TaskEnv(env.to("cuda"), episodes_per_task=2)
    check_env_specs(env)
    assert all(value.is_cuda for value in env.rollout(50, break_when_any_done=False).values(True, True))


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"goals": [0.5, 0.5]}, r"goals must have shape \[G, 2\] with G >= 1, got \[2\]"),
        ({"goals": [[0.5, 0.5, 0.5]]}, r"goals must have shape .* got \[1, 3\]"),
        ({"goals": []}, r"goals must have shape .* got \[0\]"),
        ({"goals": torch.zeros(0, 2)}, r"goals must have shape .* got \[0, 2\]"),
        ({"goals": [[0.0, math.nan]]}, r"goals must be finite, got \[\[0.0, nan\]\]"),
        ({"goals": [[0.0, 1.0]], "max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"goals": [[0.0, 1.0]], "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"goals": [[0.0, 1.0]], "batch_size": (2, -1)}, r"batch_size must be at least 1, got \(2, -1\)"),
        ({"goals": [[0.0, 1.0]], "start": "goal"}, "start must be 'random', 'origin' or None, got 'goal'"),
    ],
)
def test_errors(keywords, match):
    with pytest.raises(ValueError, match=rf"PointRobotEnv: {match}"):
        PointRobotEnv(**keywords)


@pytest.mark.parametrize("shape", [(3, 1), (3,), (3, 2, 2), (3, 3)])
def test_action_of_wrong_shape(shape):
    env = PointRobotEnv(point_robot_goals(3))
    frame = env.reset().set("action", torch.zeros(shape))
    with pytest.raises(ValueError, match=r"PointRobotEnv: action must have shape \[3, 2\], got \[3"):
        env.step(frame)


def test_action_that_is_nan():
    env = PointRobotEnv(point_robot_goals(2), start="origin")
    frame = env.reset()
    with pytest.raises(ValueError, match=r"PointRobotEnv: action must not be NaN, got .*nan"):
        env.step(frame.clone().set("action", torch.tensor([[0.0, 1.0], [0.0, math.nan]])))
    after = env.step(frame.set("action", torch.ones(2, 2)))["next"]  # the step that failed moved nothing
    close(after["observation"], [[0.1, 0.1], [0.1, 0.1]])


def test_goals_error():
    with pytest.raises(ValueError, match="point_robot_goals: num must be at least 1, got 0"):
        point_robot_goals(0)
