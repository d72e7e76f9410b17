"""What the model sees changes, what losses learn from does not unless asked; the same over a sequence; seeded."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_windows import (
    ENDS,
    FRAMES,
    TARGETS,
    A,
    N,
    assert_same,
    at_next,
    build,
    code,
    everything,
    fast,
    seeds,
    windows,
)

from torchrl_mouse import schema
from torchrl_mouse.data.token_augmentation import TokenAugmenter
from torchrl_mouse.data.token_augmentation_config import AugmentMaskProbConfig, AugmentScalarSpec, AugmentTokensConfig
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv

# What changes, and what does not


@pytest.mark.parametrize("options", [{}, {"enabled": False, **everything(action="both")}])
def test_with_nothing_to_change_the_input_itself_comes_back(options):
    steps = windows()
    augmenter = build(**options)
    assert augmenter(steps) is steps
    assert augmenter.in_keys == []
    assert augmenter.loss_keys == {}


@fast
@given(seeds)
def test_inputs_change_targets_do_not(seed):
    steps = windows(seed=seed)
    before = steps.clone()
    after = build(seed, **everything())(steps)
    assert_same(steps, before)  # the input is left as it was
    for key in TARGETS:
        assert torch.equal(after[key], before[key]), key
    for key in ENDS:
        assert torch.equal(after["episode_end", key], before["previous", key])
        assert torch.equal(after["next", "episode_end", key], before["next", "previous", key])


def test_each_input_changes():
    before = windows(batch=32)
    after = build(**everything())(before)
    for key in FRAMES:
        for place in (key, at_next(key)):
            assert not torch.equal(after[place], before[place]), place
            assert after[place].dtype == before[place].dtype
            assert after[place].shape == before[place].shape


@fast
@given(seeds, st.booleans())
def test_a_next_frame_stays_the_next_steps_own(seed, both):
    after = build(seed, **everything(action="both" if both else "input"))(windows(seed=seed))
    for key in [*FRAMES, *(("episode_end", end) for end in ENDS)]:
        assert torch.equal(after[at_next(key)][:, :-1], after[key][:, 1:]), key


# Permutations


@fast
@given(seeds, st.integers(1, A), st.sampled_from(["input", "target", "both", True]))
def test_actions_are_permuted_among_the_tasks_own_and_back(seed, valid, mode):
    before = windows(seed=seed, valid=valid)
    augmenter = build(seed, permute_action=mode)
    after = augmenter(before)
    new = augmenter.snapshot["permute_action"]
    assert torch.equal(new.sort(-1).values, torch.arange(A).expand_as(new))
    assert (new[:, :valid] < valid).all()
    assert torch.equal(new[:, valid:], torch.arange(valid, A).expand(3, -1))
    old = new.argsort(-1)
    first = (before["episode_step"] == 0).squeeze(-1), (before["next", "episode_step"] == 0).squeeze(-1)
    for place, never in zip((("previous", "action"), ("next", "previous", "action")), first, strict=True):
        if mode == "target":
            assert torch.equal(after[place], before[place])
            continue
        assert torch.equal(after[place][never], before[place][never])
        back = old.gather(1, after[place])
        assert torch.equal(back[~never], before[place][~never])
    if mode == "input":
        for key in ("action", "q_star", "action_mask"):
            assert torch.equal(after[key], before[key])
    else:
        assert torch.equal(old.gather(1, after["action"]), before["action"])
        for row in range(3):
            for action in range(A):
                assert torch.equal(after["q_star"][row, :, new[row, action]], before["q_star"][row, :, action])
        decisions = before["collector", "mask"]
        assert torch.equal(after["action_mask"], before["action_mask"])  # it allows the first ones, as before
        assert after["action_mask"].gather(-1, after["action"].unsqueeze(-1)).squeeze(-1)[decisions].all()


@pytest.mark.parametrize("gone", [["action_mask"], ["q_star"], ["action_mask", "q_star"]])
def test_the_tasks_actions_are_read_from_what_there_is(gone):
    before = windows(batch=200, valid=3).exclude(*gone)
    augmenter = build(permute_action="both")
    augmenter(before)
    new = augmenter.snapshot["permute_action"]
    ids = 3 if len(gone) == 1 else A
    assert len(new.unique(dim=0)) == {3: 6, A: len(new.unique(dim=0))}[ids]
    assert [len(column.unique()) for column in new.T] == [ids] * ids + [1] * (A - ids)


def test_each_permutation_is_equally_likely():
    before = windows(batch=3000, num=2, valid=3)
    augmenter = build(permute_action="input")
    augmenter(before)
    _, counts = augmenter.snapshot["permute_action"].unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 500).abs().max() < 110  # five standard deviations


def test_a_mask_that_differs_between_steps_moves_with_the_actions():
    before = windows(batch=50)
    before["action_mask"] = torch.rand(before["action_mask"].shape) < 0.5
    before["action_mask"][..., 4] = False
    augmenter = build(permute_action="both")
    after = augmenter(before)
    new = augmenter.snapshot["permute_action"]
    assert (new[:, 4] == 4).all()
    assert all(len(column.unique()) == 4 for column in new[:, :4].T)  # All that some step allows change places.
    legal = before["action_mask"].gather(-1, before["action"].unsqueeze(-1))
    assert torch.equal(after["action_mask"].gather(-1, after["action"].unsqueeze(-1)), legal)


@pytest.mark.parametrize("key", ["action_mask", "q_star"])
def test_an_action_allowed_at_any_step_changes_places(key):
    """A window's first step alone allows id 1, its last one id 3, those between id 0: the three change places."""
    before = windows(batch=200).exclude({"action_mask": "q_star", "q_star": "action_mask"}[key])
    allowed = torch.zeros((*before.shape, A), dtype=torch.bool)
    allowed[:, 1:-1, 0] = allowed[:, 0, 1] = allowed[:, -1, 3] = True
    before[key] = allowed if key == "action_mask" else torch.where(allowed, before[key], -torch.inf)
    augmenter = build(permute_action="input")
    augmenter(before)
    new = augmenter.snapshot["permute_action"]
    assert [column.unique().tolist() for column in new.T] == [[0, 1, 3], [0, 1, 3], [2], [0, 1, 3], [4]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_teacher_values_that_are_no_numbers_allow_nothing(value):
    before = windows(batch=200).exclude("action_mask")
    before["q_star"][..., 2] = value
    augmenter = build(permute_action="both")
    augmenter(before)
    new = augmenter.snapshot["permute_action"]
    assert (new[:, 2] == 2).all()
    assert [len(column.unique()) for column in new.T] == [4, 4, 1, 4, 4]


def test_where_the_teacher_is_silent_actions_stay():
    before = windows(batch=20).exclude("action_mask")
    before["q_star"][0] = -torch.inf
    augmenter = build(permute_action="both")
    after = augmenter(before)
    assert torch.equal(after["action"][0], before["action"][0])
    assert not torch.equal(after["action"], before["action"])


def test_a_teachers_values_under_next_move_too():
    steps = TaskEnv(DarkRoomEnv([3, 40], max_steps=5, teacher=True), episodes_per_task=3).rollout(9)
    after = build(permute_action="both")(steps)
    assert not torch.equal(after["q_star"], steps["q_star"])
    assert torch.equal(after["next", "q_star"][:, :-1], after["q_star"][:, 1:])
    best = steps["q_star"].gather(-1, steps["action"].reshape(2, 9, 1))
    assert torch.equal(after["q_star"].gather(-1, after["action"].reshape(2, 9, 1)), best)


@fast
@given(seeds, st.booleans())
def test_one_hot_is_ids(seed, trailing):
    before = windows(seed=seed).exclude("action_mask")
    expected = build(seed, permute_action="both", permute_obs_discrete=True)(before)
    places = [("action", A), *((p, n) for k, n in ((("previous", "action"), A), ("observation_discrete", N))
                               for p in (k, at_next(k)))]  # fmt: skip
    other = before.clone()
    for place, num in places:
        other[place] = other[place].unsqueeze(-1) if trailing else torch.nn.functional.one_hot(other[place], num)
    if not trailing:
        for at in ((), ("next",)):
            other[(*at, "previous", "action")][(other[(*at, "episode_step")] == 0).squeeze(-1)] = 0
    after = build(seed, permute_action="both", permute_obs_discrete=True)(other)
    for place, num in places:
        assert after[place].shape == other[place].shape
        assert torch.equal(schema.to_ids(after[place], num, 2, place), expected[place]), place


@fast
@given(seeds)
def test_discrete_observations_are_permuted_and_back(seed):
    before = windows(seed=seed)
    augmenter = build(seed, permute_obs_discrete=True)
    after = augmenter(before)
    new = augmenter.snapshot["permute_obs_discrete"]
    assert new.shape == (3, N)
    for place in ("observation_discrete", ("next", "observation_discrete")):
        assert torch.equal(new.argsort(-1).gather(1, after[place]), before[place])
    assert_same(after.exclude("observation_discrete", ("next", "observation_discrete")),
                before.exclude("observation_discrete", ("next", "observation_discrete")))  # fmt: skip


def test_ids_that_are_none_stay():
    steps = windows()
    steps["action"][:, -1] = 77  # where nothing is decided anything may stand
    steps["observation_discrete"][0, 0] = -1
    after = build(permute_action="target", permute_obs_discrete=True)(steps)
    assert (after["action"][:, -1] == 77).all()
    assert after["observation_discrete"][0, 0] == -1


@fast
@given(seeds)
def test_done_codes_are_permuted_and_back(seed):
    before = windows(seed=seed)
    augmenter = build(seed, permute_done=True)
    after = augmenter(before)
    old = augmenter.snapshot["permute_done"].argsort(-1)
    for at in ((), ("next",)):
        assert torch.equal(old.gather(1, code(after, at).squeeze(-1)), code(before, at).squeeze(-1))
        assert not (after[(*at, "previous", "terminated")] & after[(*at, "previous", "truncated")]).any()


def test_permutations_differ_between_windows():
    augmenter = build(permute_done=True, permute_obs_discrete=True, permute_action=True)
    augmenter(windows(batch=64))
    draw = augmenter.snapshot
    assert len(draw["permute_done"].unique(dim=0)) == 6
    assert len(draw["permute_obs_discrete"].unique(dim=0)) == 64
    assert len(draw["permute_action"].unique(dim=0)) > 30


# Factors and offsets


@fast
@given(seeds)
def test_scaled_then_shifted_with_one_draw_a_batch(seed):
    before = windows(seed=seed)
    options = {name: value for name, value in everything().items() if name.startswith(("scale", "shift"))}
    augmenter = build(seed, **options)
    after = augmenter(before)
    draw = augmenter.snapshot
    assert set(draw) == set(options)
    assert all(value.shape == () for value in draw.values())
    assert all(0.5 <= draw[name] <= 2 for name in draw if name.startswith("scale"))
    for at in ((), ("next",)):
        expected = before[(*at, "observation")] * draw["scale_obs"] + draw["shift_obs"]
        torch.testing.assert_close(after[(*at, "observation")], expected)
        image = before[(*at, "pixels")] * draw["scale_obs_image"] + draw["shift_obs_image"]
        assert torch.equal(after[(*at, "pixels")], image.round().clamp(0, 255).long())
        reward, first = before[(*at, "previous", "reward")], before[(*at, "episode_step")] == 0
        expected = torch.where(first, 0.0, reward * draw["scale_reward"] + draw["shift_reward"])
        torch.testing.assert_close(after[(*at, "previous", "reward")], expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_keep_their_type_and_range(dtype):
    before = windows().select("pixels")
    before["pixels"] = before["pixels"].reshape(3, 8, 2, 3, 1).to(dtype)
    after = build(scale_obs_image=AugmentScalarSpec(3.0), shift_obs_image=AugmentScalarSpec(-90.25))(before)
    expected = (before["pixels"].double() * 3 - 90.25).round().clamp(0, 255)
    assert after["pixels"].dtype == dtype
    assert torch.equal(after["pixels"].double(), expected)
    assert {0.0, 255.0} <= set(expected.flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_numbers_keep_their_type(dtype):
    before = windows()
    for key in ("observation", ("previous", "reward")):
        before[key] = before[key].to(dtype)
    after = build(**everything())(before)
    for key in ("observation", ("previous", "reward")):
        assert after[key].dtype == dtype


def test_draws_follow_the_distribution():
    options = {"scale_obs": AugmentScalarSpec(9.0, low=1.0, high=3.0), "shift_obs": AugmentScalarSpec(2.0, std=0.5)}
    augmenter, steps = build(**options), windows(batch=1, num=2).select("observation")
    draws = []
    for _ in range(400):
        augmenter(steps)
        draws.append(torch.stack([augmenter.snapshot["scale_obs"], augmenter.snapshot["shift_obs"]]))
    draws = torch.stack(draws)
    assert draws[:, 0].min() >= 1
    assert draws[:, 0].max() < 3
    torch.testing.assert_close(draws.mean(0), torch.tensor([2.0, 2.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.tensor([2 / 12**0.5, 0.5]), atol=0.08, rtol=0)


# Masks


def masked(after, before, key):
    """Which frames hold the neutral value; ``before`` never does."""
    one, other = (code(steps) if key == "done" else steps[key] for steps in (after, before))
    neutral = -1 if key == "episode_step" else 0
    assert not (other == neutral).all(-1).any()
    return (one == neutral).all(-1)


FIELDS = {
    "action": ("previous", "action"),
    "reward": ("previous", "reward"),
    "done": "done",
    "time": "episode_step",
    "obs_continuous": "observation",
    "obs_discrete": "observation_discrete",
    "obs_image": "pixels",
}


def never_neutral(batch, num):
    steps = windows(batch, num)
    for at in ((), ("next",)):
        for key in (("previous", "action"), "observation_discrete"):
            steps[(*at, *(key if isinstance(key, tuple) else (key,)))] = torch.ones(batch, num, 1, dtype=torch.int64)
        steps[(*at, "previous", "reward")] = torch.ones(batch, num, 1)
        steps[(*at, "previous", "truncated")] = torch.ones(batch, num, 1, dtype=torch.bool)
        steps[(*at, "pixels")] = steps[(*at, "pixels")].clamp(min=1)
    return steps


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_masks_hit_their_rate_and_nothing_else(field, probability):
    before = never_neutral(64, 64)
    after = build(mask_prob=AugmentMaskProbConfig(**{field: probability}))(before)
    hits = masked(after, before, FIELDS[field]).float()
    assert hits.mean().item() == pytest.approx(probability, abs=0.035)  # five standard deviations
    if probability == 0.25:  # Independent between neighbours, in time and in the batch.
        for neighbours in (hits[:, 1:] * hits[:, :-1], hits[1:] * hits[:-1]):
            assert neighbours.mean().item() == pytest.approx(probability**2, abs=0.025)
    for other, key in FIELDS.items():
        if other != field:
            assert not masked(after, before, key).any(), other


def test_masks_are_independent_between_fields_and_anew_at_each_call():
    before = never_neutral(64, 64)
    augmenter = build(mask_prob=AugmentMaskProbConfig(**dict.fromkeys(FIELDS, 0.5)))
    augmenter.update_augmentations(before)  # which masks do not belong to
    one, two = augmenter(before), augmenter(before)
    hits = torch.stack([masked(after, before, key).flatten() for after in (one, two) for key in FIELDS.values()])
    agreement = torch.corrcoef(hits.float()) - torch.eye(len(hits))
    assert agreement.abs().max() < 0.08


def test_unmasked_values_stay():
    before = never_neutral(8, 16)
    after = build(mask_prob=AugmentMaskProbConfig(**dict.fromkeys(FIELDS, 0.5)))(before)
    for key in [key for key in FIELDS.values() if key != "done"]:
        kept = ~masked(after, before, key)
        assert torch.equal(after[key][kept], before[key][kept])


def test_masks_come_first():
    before = never_neutral(4, 6)
    options = {
        "permute_action": "input",
        "permute_done": True,
        "permute_obs_discrete": True,
        "shift_reward": AugmentScalarSpec(2.0),
        "scale_obs": AugmentScalarSpec(3.0),
        "shift_obs": AugmentScalarSpec(4.0),
        "shift_obs_image": AugmentScalarSpec(7.0),
        "mask_prob": AugmentMaskProbConfig(**dict.fromkeys(FIELDS, 1.0)),
    }
    augmenter = build(**options)
    after = augmenter(before)
    draw = {name: value[:, :1] for name, value in augmenter.snapshot.items() if name.startswith("permute")}
    later = (before["episode_step"] > 0).squeeze(-1)
    assert torch.equal(after["previous", "action"].squeeze(-1), draw["permute_action"] * later)
    assert torch.equal(after["observation_discrete"].squeeze(-1), draw["permute_obs_discrete"].expand(4, 6))
    assert torch.equal(code(after).squeeze(-1), draw["permute_done"].expand(4, 6))
    assert torch.equal(after["previous", "reward"].squeeze(-1), 2.0 * later)
    assert (after["observation"] == 4).all()
    assert (after["pixels"] == 7).all()
    assert (after["episode_step"] == -1).all()


# Draws


@fast
@given(seeds)
def test_seeds_reproduce(seed):
    steps = windows(seed=seed)
    one, other = build(seed, **everything()), build(seed, **everything())
    first = one(steps)
    assert_same(first, other(steps))
    second = one(steps)
    assert not torch.equal(second["observation"], first["observation"])  # each call draws anew
    assert_same(second, other(steps))


def test_without_a_generator_torchs_seed_decides():
    augmenter = TokenAugmenter(AugmentTokensConfig(**everything()), A, N, torch.device("cpu"))
    torch.manual_seed(3)
    first = augmenter(windows())
    torch.manual_seed(3)
    assert_same(augmenter(windows()), first)


def test_a_saved_state_goes_on():
    one, other = build(1, **everything()), build(2, **everything())
    one(windows())
    other.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    assert_same(one(windows()), other(windows()))


def test_in_two_steps_several_calls_share_a_draw():
    options = everything(mask=0.0)
    augmenter, steps = build(**options), windows()
    augmenter.update_augmentations(steps)
    first = augmenter(steps)
    assert_same(augmenter(steps), first)
    assert torch.equal(augmenter(steps[:, :5])["observation"], first["observation"][:, :5])
    augmenter.update_augmentations(steps)
    assert not torch.equal(augmenter(steps)["observation"], first["observation"])
    augmenter.update_augmentations(None)
    assert not torch.equal(augmenter(steps)["observation"], augmenter(steps)["observation"])


def test_a_held_draw_is_for_its_batch():
    augmenter = build(permute_action="both")
    augmenter.update_augmentations(windows())
    with pytest.raises(ValueError, match="must have the 3 sequences that were drawn for, got 2"):
        augmenter(windows(batch=2))


def test_no_snapshot_before_a_draw():
    augmenter = build(permute_done=True)
    with pytest.raises(RuntimeError, match="snapshot must follow a draw, got none yet"):
        _ = augmenter.snapshot
