"""Dark Room: dynamics, teacher, and the published figures."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from torchrl_mouse.envs import DARK_ROOM, DarkRoomEnv, oracle_policy, split_goals

torch.set_num_threads(1)

STAY, UP, RIGHT, DOWN, LEFT = range(5)


def play(env, actions):
    """Plays one action per step in all rows, without resets; the stacked ``next`` frames."""
    frame, frames = env.reset(), []
    for action in actions:
        frame = env.step(frame.set("action", torch.full(env.batch_size, action)))["next"]
        frames.append(frame)
        frame = frame.exclude("reward")
    return torch.stack(frames, -1)


def test_moves_and_walls():
    env = DarkRoomEnv([8], size=3, start=4, max_steps=50)
    assert play(env, [STAY, UP, UP, LEFT, LEFT, DOWN, RIGHT])["observation_discrete"].tolist() == [
        [4, 1, 1, 0, 0, 3, 4]
    ]
    frames = play(env, [RIGHT, DOWN])
    assert frames["observation"].tolist() == [[[0, 1], [1, 1]]]
    assert frames["reward"].squeeze(-1).tolist() == [[0, 1]]
    assert frames["terminated"].squeeze(-1).tolist() == [[False, True]]
    assert not frames["truncated"].any()


def test_step_limit_truncates_unless_the_goal_is_reached_then():
    frames = play(DarkRoomEnv([0, 6], size=3, max_steps=2), [DOWN, LEFT])
    assert frames["terminated"].squeeze(-1).tolist() == [[False, False], [False, True]]
    assert frames["truncated"].squeeze(-1).tolist() == [[False, True], [False, False]]
    assert torch.equal(frames["done"], frames["terminated"] | frames["truncated"])


def test_start_on_the_goal_pays_only_when_a_step_ends_there():
    assert play(DarkRoomEnv([4], size=3), [STAY])["reward"].item() == 1
    assert play(DarkRoomEnv([4], size=3), [UP, DOWN])["reward"].flatten().tolist() == [0, 1]


def test_staying_pays_at_every_step():
    frames = play(DarkRoomEnv([40], **DARK_ROOM["staying"]), [STAY] * 20)
    assert frames["reward"].sum() == 20
    assert not frames["terminated"].any()
    assert frames["truncated"].squeeze(-1).nonzero().tolist() == [[0, 19]]


def test_fixed_rows_and_drawn_rows():
    env = DarkRoomEnv([3, 5, 7])
    env.sample_task(torch.ones(3, dtype=torch.bool))
    assert env.goal.tolist() == [3, 5, 7]
    env = DarkRoomEnv([3, 5], batch_size=200, seed=0)
    first = env.goal
    env.reset()
    assert torch.equal(env.goal, first)  # a reset draws no task
    mask = torch.arange(200) < 100
    env.sample_task(mask)
    assert torch.equal(env.goal[~mask], first[~mask])
    assert not torch.equal(env.goal[mask], first[mask])
    assert 60 < (env.goal == 3).sum() < 140
    env.set_seed(0)
    assert torch.equal(env.goal, first)


@pytest.mark.parametrize("variant", DARK_ROOM)
@pytest.mark.parametrize("batch_size", [None, 3, (), (2, 2)])
def test_specs(variant, batch_size):
    env = DarkRoomEnv([0, 1], batch_size=batch_size, teacher=True, **DARK_ROOM[variant])
    check_env_specs(env, break_when_any_done="both")


@pytest.mark.parametrize("terminates", [True, False])
def test_teacher_is_value_iteration(terminates):
    size, gamma = 4, 0.8
    # the model, read off by playing every action from every cell
    next_cell = torch.zeros(16, 5, dtype=torch.int64)
    for cell in range(16):
        other = DarkRoomEnv([(cell + 8) % 16], size=size, start=cell)
        for action in range(5):
            next_cell[cell, action] = play(other, [action])["observation_discrete"].item()
    for goal in range(16):
        value = torch.zeros(16)
        for _ in range(200):
            on_goal = next_cell == goal
            following = torch.where(on_goal, 0, value[next_cell]) if terminates else value[next_cell]
            q = on_goal + gamma * following
            value = q.amax(-1)
        for cell in range(16):
            started = DarkRoomEnv(
                [goal], size=size, start=cell, terminate_on_goal=terminates, teacher=True, teacher_gamma=gamma
            )
            torch.testing.assert_close(started.reset()["q_star"][0], q[cell])


def returns(env, policy, max_steps):
    frame, total = env.reset(), torch.zeros(env.batch_size)
    live = torch.ones(env.batch_size, dtype=torch.bool)
    for _ in range(max_steps):
        frame = env.step(policy(frame))["next"]
        total += frame.pop("reward").squeeze(-1) * live
        live &= ~frame["done"].squeeze(-1)
    assert not live.any()
    return total.mean().item()


@pytest.mark.parametrize(
    ("variant", "oracle", "chance", "tolerance"),
    [("terminating", 1.0, 0.128, 0.02), ("staying", 16.56, 0.246, 0.05), ("long", 92.0, 1.03, 0.2)],
)
def test_published_figures(variant, oracle, chance, tolerance):
    torch.manual_seed(0)
    keywords = DARK_ROOM[variant]
    size, max_steps = keywords.get("size", 9), keywords.get("max_steps", 20)
    goals = torch.arange(size * size).repeat(40)  # every goal equally often: no sampling error in the oracle
    env = DarkRoomEnv(goals, teacher=True, **keywords)
    assert returns(env, oracle_policy(), max_steps) == pytest.approx(oracle, abs=0.03)
    assert returns(env, env.rand_action, max_steps) == pytest.approx(chance, abs=tolerance)


def test_random_actions_of_the_same_seed_do_not_tell_the_goals():
    torch.manual_seed(0)
    env = DarkRoomEnv(range(80), batch_size=1000, seed=0)
    env.reset()
    same = (env.rand_action()["action"] == env.goal % 5).float().mean().item()
    assert same == pytest.approx(1 / 5, abs=0.08)


def test_split_goals():
    train, held_out = split_goals(70)
    assert torch.cat([train, held_out]).sort().values.tolist() == list(range(81))
    assert torch.equal(train, split_goals(70)[0])
    assert not torch.equal(train, split_goals(70, seed=1)[0])
    assert [len(part) for part in split_goals(80, size=10)] == [80, 20]


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"goals": [81]}, r"goals must be integer cell ids \[G\] in \[0, 81\), got \[81\]"),
        ({"goals": []}, "goals must be integer cell ids"),
        ({"goals": [3.5]}, r"goals must be integer cell ids .* got \[3.5\]"),
        ({"goals": [True]}, r"goals must be integer cell ids .* got \[True\]"),
        ({"goals": [0], "size": 1}, "size must be at least 2, got 1"),
        ({"goals": [0], "start": 81}, "start must lie in .* got 81"),
        ({"goals": [0], "max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"goals": [0], "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"goals": [0], "batch_size": (2, -1)}, r"batch_size must be at least 1, got \(2, -1\)"),
        ({"goals": [0], "teacher_gamma": 1.0}, "teacher_gamma must lie in .* got 1.0"),
    ],
)
def test_errors(keywords, match):
    with pytest.raises(ValueError, match=match):
        DarkRoomEnv(**keywords)


@pytest.mark.parametrize("action", [-1, 5, 7])
def test_action_out_of_range(action):
    env = DarkRoomEnv([0, 1])
    frame = env.reset().set("action", torch.tensor([0, action]))
    with pytest.raises(ValueError, match=rf"DarkRoomEnv: action must lie in \[0, 5\), got {action}\."):
        env.step(frame)


def test_split_goals_error():
    with pytest.raises(ValueError, match=r"num_train must lie in .* got 81"):
        split_goals(81)
