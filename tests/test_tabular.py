"""TabularQLearner: a table per row, learnt while acting."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector

from torchrl_mouse.envs import DarkRoomEnv, TaskEnv, split_goals
from torchrl_mouse.modules.tabular import TabularQLearner

torch.set_num_threads(1)


def test_tables_equal_scalar_q_learning():
    goals, episodes, rate, gamma = [0, 4, 8], 6, 0.5, 0.9
    env = TaskEnv(DarkRoomEnv(goals, size=3, max_steps=5), episodes_per_task=episodes)
    learner = TabularQLearner(9, 5, episodes, rate=rate, gamma=gamma)
    torch.manual_seed(0)
    frame, tables = env.reset(), torch.zeros(3, 9, 5)
    for _ in range(120):
        step, following = env.step_and_maybe_reset(learner(frame))
        torch.testing.assert_close(learner.table, tables)  # a frame late: the last transition is in `following`
        for row in range(3):
            if step["next", "done"][row]:
                tables[row] = 0
            elif step["next", "episode_step"][row] > 0:
                cell, after = step["observation_discrete"][row], step["next", "observation_discrete"][row]
                live = not step["next", "previous", "terminated"][row]
                target = step["next", "reward"][row, 0] + gamma * live * tables[row, after].max()
                old = tables[row, cell, step["action"][row]]
                tables[row, cell, step["action"][row]] = old + rate * (target - old)
        frame = following
    assert (tables > 0).any()


def frame(state, *, is_init=False, episode_step=1, terminated=False, reward=0.0, action=0):
    def column(value, dtype):
        return torch.tensor([[value]], dtype=dtype)

    return TensorDict(
        {
            "observation_discrete": torch.tensor([state]),
            "previous": {
                "action": torch.tensor([action]),
                "reward": column(reward, torch.float32),
                "terminated": column(terminated, torch.bool),
                "truncated": column(False, torch.bool),
            },
            "episode_step": column(episode_step, torch.int64),
            "is_init": column(is_init, torch.bool),
        },
        [1],
    )


def test_epsilon_falls_from_one_to_zero_and_a_new_task_starts_anew():
    learner = TabularQLearner(2, 5, num_episodes=4)

    def share_of_best(draws=400):
        return sum(learner(frame(0, episode_step=0))["action"].item() == 3 for _ in range(draws)) / draws

    torch.manual_seed(0)
    learner(frame(0, is_init=True, episode_step=0))
    learner.table[0, 0, 3] = 1.0
    for episode in range(5):
        chance = max(0, 1 - episode / 4)
        assert share_of_best() == pytest.approx(1 - chance + chance / 5, abs=0.07)
        learner(frame(1, episode_step=0, terminated=True))
    learner(frame(0, is_init=True, episode_step=0))
    assert (learner.table == 0).all()
    assert share_of_best() == pytest.approx(0.2, abs=0.07)


def test_ties_are_broken_at_random():
    learner = TabularQLearner(1, 5, num_episodes=1)
    learner(frame(0, is_init=True, episode_step=0))
    learner(frame(0, terminated=True))  # epsilon is zero from here on
    assert {learner(frame(0, episode_step=0))["action"].item() for _ in range(100)} == {0, 1, 2, 3, 4}


def test_learns_outside_of_inference_mode_too():
    learner = TabularQLearner(3, 5, num_episodes=2)
    with torch.inference_mode():
        learner(frame(0, is_init=True, episode_step=0))
    learner(frame(1, action=2, reward=1.0))
    assert learner.table[0, 0, 2].item() == pytest.approx(0.9933)


def test_histories_of_all_goals_in_one_batch():
    """The published histories: 200 episodes, mean length 10.9, mean return .66 (arXiv 2502.17666)."""
    torch.manual_seed(0)
    episodes = 200
    env = TaskEnv(DarkRoomEnv(split_goals(70)[0], teacher=True), episodes_per_task=episodes)
    learner = TabularQLearner(81, 5, episodes)
    collector = Collector(env, learner, frames_per_batch=70 * 500, total_frames=70 * 4000)
    try:
        steps = torch.cat([batch.select("previous", "is_init", "episode_step", "next") for batch in collector], 1)
    finally:
        collector.shutdown()
    first_task = steps["is_init"].squeeze(-1).cumsum(-1) == 1
    ends = (steps["next", "previous", "terminated"] | steps["next", "previous", "truncated"]).squeeze(-1) & first_task
    length = steps["next", "episode_step"].squeeze(-1)[ends].float()
    reward = steps["next", "reward"].squeeze(-1)[ends]
    assert ends.sum() == pytest.approx(70 * episodes, rel=0.005)
    assert length.mean().item() == pytest.approx(10.9, abs=0.6)
    assert reward.mean().item() == pytest.approx(0.66, abs=0.04)
    number = ends.cumsum(-1)[ends]
    assert reward[number > 180].mean() > 0.9
    assert reward[number <= 10].mean() < 0.3


def test_rows_may_change_only_between_tasks():
    learner = TabularQLearner(3, 5, num_episodes=2)
    with pytest.raises(RuntimeError, match="number of rows must not change inside a task, got 1 after 0"):
        learner(frame(0))
    learner(frame(0, is_init=True, episode_step=0))
    both = torch.cat([frame(0), frame(1)])
    with pytest.raises(RuntimeError, match="got 2 after 1"):
        learner(both)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must lie in .* got 0.0"),
        ({"gamma": 1.5}, "gamma must lie in .* got 1.5"),
    ],
)
def test_errors(keywords, match):
    with pytest.raises(ValueError, match=match):
        TabularQLearner(**{"num_states": 3, "num_actions": 5, "num_episodes": 2, **keywords})
