"""FrozenLake: a Gymnasium environment as the base of a task."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrl.envs import ParallelEnv, SerialEnv
from torchrl.envs.utils import check_env_specs

from torchrl_mouse.envs import FrozenLakeEnv, TaskEnv

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
