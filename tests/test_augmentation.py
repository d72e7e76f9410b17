"""Random changes to windows: the same at every step of a window, different in every window, seeded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.envs import TransformedEnv

from torchrl_mouse import schema
from torchrl_mouse.data import DatasetStore, JitterObservation, RandomSymmetry, replay_buffer
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv, grid_symmetries


def windows(batch=4, steps=5, size=2):
    torch.manual_seed(1)
    frame = torch.randn(batch, steps + 1, size)
    following = {"observation": frame[:, 1:], "reward": torch.randn(batch, steps, 1)}
    td = {"observation": frame[:, :-1], "q_star": torch.randn(batch, steps, 3), "next": following}
    return TensorDict(td, [batch, steps])


@settings(max_examples=25, deadline=None, database=None)
@given(st.floats(0, 0.9), st.floats(0, 2), st.integers(0, 2**31))
def test_affine_and_the_same_at_every_step(scale, shift, seed):
    before = windows()
    torch.manual_seed(seed)
    after = JitterObservation(scale=scale, shift=shift)(before.clone())
    root, following = before["observation"], before["next", "observation"]
    # Two steps give the factor and the offset; all others have to agree.
    factor = (after["observation"][:, :1] - after["observation"][:, 1:2]) / (root[:, :1] - root[:, 1:2])
    offset = after["observation"][:, :1] - factor * root[:, :1]
    torch.testing.assert_close(after["observation"], factor * root + offset, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after["next", "observation"], factor * following + offset, atol=1e-4, rtol=1e-3)
    assert (factor - 1).abs().max() <= scale + 1e-3


def test_windows_and_dimensions_differ():
    after = JitterObservation(scale=0.5, shift=1.0)(TensorDict({"observation": torch.ones(64, 2, 2)}, [64, 2]))
    values = after["observation"][:, 0]
    assert len(values.flatten().unique()) == 128
    assert values.mean().item() == pytest.approx(1.0, abs=0.3)


def test_factors_and_offsets_have_the_sizes_asked_for():
    torch.manual_seed(0)
    ones = TensorDict({"observation": torch.ones(4000, 2, 1)}, [4000, 2])
    factor = JitterObservation(scale=0.4)(ones.clone())["observation"]
    assert 0.6 <= factor.min() < 0.61
    assert 1.39 < factor.max() <= 1.4
    offset = JitterObservation(shift=0.3)(ones.clone())["observation"] - 1
    assert offset.std().item() == pytest.approx(0.3, rel=0.05)


def test_targets_are_left_alone():
    before = windows()
    after = JitterObservation(scale=0.5, shift=1.0)(before.clone())
    assert not torch.equal(after["observation"], before["observation"])
    for key in ("q_star", ("next", "reward")):
        assert torch.equal(after[key], before[key])


def test_without_options_nothing_changes():
    before = windows()
    after = JitterObservation()(before.clone())
    assert torch.equal(after["observation"], before["observation"])


def test_on_a_replay_buffer_seeds_reproduce():
    store = DatasetStore(max_action_dim=3, max_obs_continuous_dim=1)
    for step in range(12):
        store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": step, "observation": [float(step)]})

    def sample():
        buffer = replay_buffer(store, window=4, batch_size=3, seed=0)
        buffer.append_transform(JitterObservation(shift=1.0))
        torch.manual_seed(5)
        return buffer.sample()

    batch = sample()
    assert batch.shape == (3, 4)
    assert torch.equal(batch["observation"], sample()["observation"])
    assert torch.equal(store[batch["index"]]["observation"], batch["index"].unsqueeze(-1).float())  # the store's own


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": 1.0}, r"scale must lie in \[0, 1\), got 1.0"), ({"shift": -1.0}, "shift must be at least 0, got -1.0")],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        JitterObservation(**options)


def test_an_environment_is_refused():
    env = TransformedEnv(DarkRoomEnv([0]), JitterObservation(scale=0.1))
    with pytest.raises(NotImplementedError, match="must be a transform of a replay buffer"):
        env.reset()


def test_missing_observation():
    with pytest.raises(KeyError, match="entry 'observation' must be present"):
        JitterObservation(scale=0.1)(TensorDict({"action": torch.zeros(2, 3)}, [2, 3]))


@pytest.mark.parametrize("index", range(8))
def test_a_turned_window_is_what_the_turned_task_gives(index):
    observation_maps, action_maps = grid_symmetries()
    symmetry = RandomSymmetry(observation_maps[[index]], action_maps[[index]])
    goals = torch.arange(81)
    cells = DarkRoomEnv(goals)._position  # (81, 2)
    turned_goals = ((cells @ observation_maps[index].T).unsqueeze(1) == cells).all(-1).long().argmax(-1)
    assert turned_goals.sort().values.tolist() == goals.tolist()

    def play(goals, actions):
        env = TaskEnv(DarkRoomEnv(goals, max_steps=6, teacher=True), episodes_per_task=20)
        policy = iter(actions.unbind(1))
        return env.rollout(actions.shape[1], lambda td: td.set("action", next(policy)))

    actions = torch.randint(5, (81, 30), generator=torch.Generator().manual_seed(index))
    expected = play(turned_goals, action_maps[index][actions])
    turned = symmetry(play(goals, actions).exclude("observation_discrete", ("next", "observation_discrete")))
    assert expected[schema.PREVIOUS_REWARD].sum() > 10
    keys = [schema.OBSERVATION, schema.ACTION, schema.PREVIOUS_ACTION, schema.PREVIOUS_REWARD, schema.Q_STAR]
    for key in [*keys, *(("next", *(key if isinstance(key, tuple) else (key,))) for key in keys if key != "action")]:
        torch.testing.assert_close(turned[key], expected[key], msg=str(key))


def test_the_eight_symmetries_are_distinct_and_each_is_drawn():
    observation_maps, action_maps = grid_symmetries()
    assert len(observation_maps.flatten(1).unique(dim=0)) == len(action_maps.unique(dim=0)) == 8
    steps = TensorDict({"action": torch.arange(5).expand(200, 1, 5).reshape(200, 5)}, [200, 5])
    drawn = RandomSymmetry(observation_maps, action_maps)(steps)["action"]
    assert len(drawn.unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("observation_maps", "action_maps", "match"),
    [
        (torch.ones(1, 2, 3), torch.arange(3)[None], r"observation_maps must be \[K, C, C\], K >= 1, got"),
        (torch.ones(2, 2, 2), torch.arange(3)[None], r"action_maps must be \[K, A\] with K=2, got \(1, 3\)"),
        (torch.ones(0, 2, 2), torch.zeros(0, 3, dtype=torch.int64), r"observation_maps must be \[K, C, C\], K >= 1"),
        (torch.ones(1, 2, 2), torch.tensor([[0.0, 1.0, 2.0]]), "permutation of 0 to 2"),
        (torch.ones(1, 2, 2), torch.tensor([[0, 0, 2]]), r"permutation of 0 to 2, got \[\[0, 0, 2\]\]"),
    ],
)
def test_symmetries_that_cannot_be(observation_maps, action_maps, match):
    with pytest.raises(ValueError, match=match):
        RandomSymmetry(observation_maps, action_maps)


def mirror():
    return RandomSymmetry(-torch.eye(2).unsqueeze(0), torch.tensor([[1, 0, 2]]))


def test_what_stands_in_for_the_first_frames_action_stays():
    steps = {"previous": {"action": torch.tensor([[0, 1, 0, 2]])}, "episode_step": torch.tensor([[[0], [1], [2], [0]]])}
    steps["action"] = torch.tensor([[1, 0, 2, 7]])  # 7: at a terminal frame anything may stand
    out = mirror()(TensorDict(steps, [1, 4]))
    assert out["previous", "action"].tolist() == [[0, 0, 1, 2]]
    assert out["action"].tolist() == [[0, 1, 2, 7]]


def test_the_action_mask_is_turned_with_the_actions():
    steps = {
        "action": torch.tensor([[0, 2]]),
        "action_mask": torch.tensor([[[True, False, False], [False, False, True]]]),
    }
    out = mirror()(TensorDict(steps, [1, 2]))
    assert out["action_mask"].tolist() == [[[False, True, False], [False, False, True]]]
    assert out["action_mask"].gather(-1, out["action"].unsqueeze(-1)).all()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"action": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"entry \('action',\)|'action' must hold ids \[B, T\]"),
        ({"observation": torch.zeros(1, 2, 4)}, r"must be \[B, T, 2\], got \(1, 2, 4\)"),
        ({"q_star": torch.zeros(1, 2, 7)}, r"must be \[B, T, 3\], got \(1, 2, 7\)"),
        ({"observation_discrete": torch.zeros(1, 2, dtype=torch.int64)}, "ids cannot be turned"),
    ],
)
def test_windows_that_cannot_be_turned(entries, match):
    with pytest.raises(ValueError, match=match):
        mirror()(TensorDict(entries, [1, 2]))


def test_symmetries_of_other_shapes_and_places():
    symmetry = RandomSymmetry(*grid_symmetries())
    with pytest.raises(ValueError, match=r"windows must be \[B, T\], got \(3,\)"):
        symmetry(TensorDict({"action": torch.zeros(3, dtype=torch.int64)}, [3]))
    with pytest.raises(NotImplementedError, match="RandomSymmetry: must be a transform of a replay buffer"):
        TransformedEnv(DarkRoomEnv([0]), symmetry).reset()
