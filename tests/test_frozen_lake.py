"""FrozenLake: a Gymnasium environment as the base of a task."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torchrl.envs import ParallelEnv, SerialEnv
from torchrl.envs.utils import check_env_specs

from torchrl_mouse.envs import FrozenLakeEnv, TaskEnv, oracle_policy
from torchrl_mouse.envs.frozen_lake import optimal_action_values

torch.set_num_threads(1)


def lake_map(env):
    return b"".join(env.unwrapped.desc.flatten().tolist())


def make_env(seed, **limit):
    return TaskEnv(FrozenLakeEnv(seed=seed), **(limit or {"episodes_per_task": 2}))


def test_a_task_is_a_map():
    env = FrozenLakeEnv(seed=0)
    maps = []
    for _ in range(5):
        env.sample_task(torch.tensor(True))
        maps.append(lake_map(env))
        env.reset()
        env.sample_task(torch.tensor(False))
        assert lake_map(env) == maps[-1]
    assert len(set(maps)) == 5
    env.set_seed(0)
    again = FrozenLakeEnv(seed=0)
    assert lake_map(env) == lake_map(again)


def test_known_map():
    env = FrozenLakeEnv(seed=0)
    while b"H" not in lake_map(env)[1:2]:  # a hole right of the start
        env.sample_task(torch.tensor(True))
    frame = env.step(env.reset().set("action", torch.tensor(2)))["next"]
    assert frame["observation_discrete"].item() == 1
    assert frame["terminated"].item()
    assert frame["reward"].item() == 0


def test_specs_are_categorical():
    env = make_env(0)
    check_env_specs(env)
    assert env.action_spec.shape == ()
    assert env.observation_spec["observation_discrete"].n == 16
    env = TaskEnv(FrozenLakeEnv(5, is_slippery=True, categorical_action_encoding=False), steps_per_task=9)
    check_env_specs(env)
    assert env.action_spec.shape == (4,)
    assert env.observation_spec["observation_discrete"].shape == (25,)


def check_tasks(steps):
    """One row [T]: episodes start in the corner, tasks last two episodes, the reward is that of the goal."""
    terminal = (steps["previous", "terminated"] | steps["previous", "truncated"]).squeeze(-1)
    first = (steps["episode_step"] == 0).squeeze(-1)
    assert (steps["observation_discrete"][first] == 0).all()
    assert torch.equal(terminal[:-1] | steps["next", "done"][:-1].squeeze(-1), first[1:])
    ends = (steps["next", "previous", "terminated"] | steps["next", "previous", "truncated"]).squeeze(-1)
    done = steps["next", "done"].squeeze(-1)
    assert ends.cumsum(0)[done].tolist() == [2 * task for task in range(1, int(done.sum()) + 1)]
    assert (steps["next", "reward"] <= steps["next", "previous", "terminated"]).all()
    assert steps["next", "done"].any()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [None, SerialEnv, ParallelEnv])
def test_tasks(workers):
    env = make_env(0) if workers is None else workers(2, [partial(make_env, 0), partial(make_env, 1)])
    try:
        env.set_seed(3)
        torch.manual_seed(0)
        steps = env.rollout(80, break_when_any_done=False)
    finally:
        env.close()
    for row in steps.reshape(-1, 80):
        check_tasks(row)


def test_seed_repeats_the_rollout():
    def trace():
        env = make_env(None)
        env.set_seed(5)
        torch.manual_seed(0)
        return env.rollout(60, break_when_any_done=False).exclude("stream", ("next", "stream"))

    assert (trace() == trace()).all()


def test_error():
    with pytest.raises(ValueError, match="size must be at least 2, got 1"):
        FrozenLakeEnv(1)


@pytest.mark.parametrize("is_slippery", [False, True])
def test_teacher_values_satisfy_the_bellman_equation(is_slippery):
    env = FrozenLakeEnv(5, seed=1, is_slippery=is_slippery, teacher=True, teacher_gamma=0.9)
    check_env_specs(env)
    transitions = env.unwrapped.P
    q_star = torch.from_numpy(optimal_action_values(transitions, 0.9))
    for state, actions in transitions.items():
        for action, outcomes in actions.items():
            backup = sum(p * (r + (0.0 if end else 0.9 * q_star[to].max().item())) for p, to, r, end in outcomes)
            assert q_star[state, action].item() == pytest.approx(backup, abs=1e-5)
    frame = env.reset()
    assert torch.equal(frame["q_star"], q_star[0])
    following = env.step(frame.set("action", torch.tensor(1)))["next"]
    assert torch.equal(following["q_star"], q_star[following["observation_discrete"]])


def test_teacher_walks_the_shortest_way_on_every_map():
    env = TaskEnv(FrozenLakeEnv(seed=0, teacher=True, teacher_gamma=0.5), episodes_per_task=1)
    for _ in range(5):
        steps = env.rollout(99, oracle_policy())
        assert steps["next", "reward"][-1].item() == 1
        # A step closer to the goal doubles the value.
        assert len(steps) == 1 - math.log2(steps["q_star"][0].max().item())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_teacher_gamma_out_of_range(value):
    with pytest.raises(ValueError, match=rf"FrozenLakeEnv: teacher_gamma must lie in \(0, 1\), got {value}"):
        FrozenLakeEnv(teacher=True, teacher_gamma=value)
