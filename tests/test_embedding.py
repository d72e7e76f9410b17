"""The step embedder: scale, modalities left out, absent times, and errors that name what is wrong."""

from __future__ import annotations

import pytest
import torch

from torchrl_mouse.modules import StepEmbedder, TokenType
from torchrl_mouse.modules.embedding import FourierEmbedder, LinearEmbedder

MODALITIES = ("time", "action", "continuous", "discrete", "image", "reward", "done")
SIZES = {
    "time": {"max_num_time_steps": 200},
    "action": {"max_num_actions": 200},
    "continuous": {"max_num_obs_continuous": 30},
    "discrete": {"max_num_obs_discrete": 200},
    "image": {"max_num_obs_image": 100},
    "reward": {"include_reward_token": True},
    "done": {"include_done_token": True},
}
INCLUDE = {
    "time": "include_time_token",
    "action": "include_action_token",
    "continuous": "include_obs_continuous",
    "discrete": "include_obs_discrete",
    "image": "include_obs_image",
    "reward": "include_reward_token",
    "done": "include_done_token",
}


def make(*modalities: str, hidden_dim: int = 16, **options: object) -> StepEmbedder:
    sizes = {"include_reward_token": False, "include_done_token": False}
    for name in modalities:
        sizes |= SIZES[name]
    return StepEmbedder(hidden_dim, **sizes, **options)


def draw(num: int) -> dict[str, torch.Tensor]:
    return {
        "time": torch.randint(200, (num,)),
        "action": torch.randint(200, (num,)),
        "continuous": torch.randn(num, 30),
        "discrete": torch.randint(200, (num,)),
        "image": torch.randint(256, (num, 100)),
        "reward": torch.randn(num),
        "done": torch.randint(3, (num,)),
    }


@pytest.mark.parametrize("encoder", ["fourier", "linear"])
@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("modality", MODALITIES)
def test_initial_scale_is_the_same_for_all(modality, std, encoder):
    embedder = make(modality, hidden_dim=1000, std=std, continuous_encoder=encoder, include_type_token=False)
    # the smallest sample is that of "done": 3 vectors of 1000 numbers, standard error of the scale 1.3 %
    assert embedder(draw(400)).std().item() == pytest.approx(std, rel=0.08)


@pytest.mark.parametrize("encoder", ["fourier", "linear"])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_initial_scale_depends_on_no_size(size, encoder):
    sizes = {f"max_num_{name}": size for name in ("obs_continuous", "action_continuous", "obs_image", "obs_discrete")}
    embedder = StepEmbedder(
        4000,
        **sizes,
        include_reward_token=False,
        include_done_token=False,
        include_type_token=False,
        concat_modalities=True,
        continuous_encoder=encoder,
        std=0.5,
    )
    steps = {
        "action": torch.randn(1000, size),
        "continuous": torch.randn(1000, size),
        "image": torch.randint(256, (1000, size)),
        "discrete": torch.randint(size, (1000,)),
    }
    scales = embedder(steps).transpose(0, 1).flatten(1).std(1).tolist()
    assert scales == pytest.approx([0.5] * 4, rel=0.08)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_initial_scale_of_fourier_features_depends_on_no_scale_of_the_inputs(scale):
    embedder = StepEmbedder(
        4000,
        max_num_action_continuous=2,
        max_num_obs_continuous=3,
        include_done_token=False,
        include_type_token=False,
        concat_modalities=True,
        std=0.5,
    )
    steps = {"action": torch.randn(100, 2), "continuous": torch.randn(100, 3), "reward": torch.randn(100)}
    tokens = embedder({name: value * scale for name, value in steps.items()})
    assert tokens.transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx([0.5] * 3, rel=0.08)


@pytest.mark.parametrize(("encoder", "kind"), [("fourier", FourierEmbedder), ("linear", LinearEmbedder)])
def test_continuous_action(encoder, kind):
    embedder = make("reward", max_num_action_continuous=3, continuous_encoder=encoder, concat_modalities=True)
    assert isinstance(embedder.action_embedder, kind)
    assert embedder.token_types == [TokenType.ACTION, TokenType.REWARD]
    steps = {"action": torch.randn(4, 3), "reward": torch.randn(4)}
    expected = embedder.action_embedder(steps["action"]) + embedder.type_embedder.embed.weight[TokenType.ACTION]
    assert torch.equal(embedder(steps)[:, 0], expected)
    for index in range(3):  # each number counts
        changed = steps["action"].clone()
        changed[:, index] += 1
        assert (embedder({**steps, "action": changed}) - embedder(steps)).abs().amax(-1)[:, 0].min() > 1e-4
    with pytest.raises(ValueError, match=r"modality 'action' must be \[\*, 3\], got \(4, 2\)"):
        embedder({**steps, "action": torch.randn(4, 2)})


def test_type_and_compute_tokens_have_that_scale_too():
    embedder = make("reward", hidden_dim=4000, std=0.5, num_compute_tokens=1)
    assert embedder.type_embedder.embed.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert embedder(draw(1))[0, 1].std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("concat", [False, True])
def test_tokens_of_a_step(concat):
    embedder = make(*MODALITIES, concat_modalities=concat, token_data_len=2, num_compute_tokens=3)
    tokens = embedder({name: value.reshape(2, 5, *value.shape[1:]) for name, value in draw(10).items()})
    assert tokens.shape == (2, 5, embedder.tokens_per_step, 16)
    assert len(embedder.token_types) == embedder.tokens_per_step == (17 if concat else 5)
    assert embedder.token_types[-3:] == [TokenType.COMPUTE] * 3
    assert (tokens[..., -3:, :] == tokens[0, 0, -3:]).all()
    assert (tokens[:, 1:, 0] != tokens[:, :1, 0]).any()


def test_concatenated_tokens_add_up_to_the_added_ones():
    added = make(*MODALITIES, token_data_len=2)
    apart = make(*MODALITIES, token_data_len=2, concat_modalities=True)
    apart.load_state_dict(added.state_dict())
    steps = draw(6)
    torch.testing.assert_close(apart(steps).unflatten(1, (7, 2)).sum(1), added(steps))


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_modality_moves_its_own_tokens_only(modality):
    embedder = make(*MODALITIES, concat_modalities=True)
    steps, other = draw(8), draw(8)
    moved = (embedder({**steps, modality: other[modality]}) - embedder(steps)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [name == modality for name in MODALITIES]


def test_absent_time_is_a_zero_vector():
    embedder = make("time", "action", concat_modalities=True, include_type_token=False)
    tokens = embedder({"time": torch.tensor([-1, 0]), "action": torch.tensor([0, 0])})
    assert tokens[0, 0].abs().max() == 0
    assert tokens[1, 0].abs().min() > 0
    tokens[0].sum().backward()
    assert embedder.time_embedder.embed.weight.grad.abs().max() == 0  # it teaches no id anything


def test_fourier_features_tell_close_numbers_apart():
    near, far = torch.tensor([0.0, 0.02]), torch.tensor([0.0, 50.0])
    fourier = make("reward", hidden_dim=256, fourier_in_min=1e-2, fourier_in_max=1e2, std=1.0)
    for pair in (near, far):
        first, second = fourier({"reward": pair})
        assert (first - second).norm() > 0.1 * first.norm()


@pytest.mark.parametrize("modality", ["action", "discrete", "time", "done"])
@pytest.mark.parametrize("side", ["past the end", "negative"])
def test_ids_out_of_range(modality, side):
    num = 3 if modality == "done" else 200
    bad = num if side == "past the end" else -2
    embedder = make(*MODALITIES)
    with pytest.raises(ValueError, match=rf"'{modality}' must lie in \[0, {num}\), got {bad}\. Raise the model's size"):
        embedder({**draw(3), modality: torch.tensor([0, bad, 1])})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number(value):
    """A context would keep it for the rest of the task."""
    steps = {**draw(3), "reward": torch.tensor([0.0, value, 1.0])}
    with pytest.raises(ValueError, match=rf"StepEmbedder: entry 'reward' must be finite, got {value} at \(1,\)\. Fix"):
        make(*MODALITIES)(steps)


def test_largest_ids_are_allowed():
    last = {"action": 199, "discrete": 199, "time": 199, "done": 2}
    steps = {**draw(1), **{name: torch.tensor([value]) for name, value in last.items()}}
    assert make(*MODALITIES)(steps).isfinite().all()


@pytest.mark.parametrize("modality", MODALITIES)
def test_missing_modality(modality):
    steps = draw(2)
    del steps[modality]
    with pytest.raises(KeyError, match=rf"modality '{modality}' must be given, got only [a-z, ]+"):
        make(*MODALITIES)(steps)
    others = [name for name in MODALITIES if name != modality]
    assert make(*others)(steps).shape == (2, 1, 16)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"continuous_encoder": "mlp"}, ValueError, "continuous_encoder must be 'fourier' or 'linear', got 'mlp'"),
        ({"fourier_in_min": 0.0}, ValueError, "0 < fourier_in_min <= fourier_in_max must hold, got 0.0 and"),
        ({"fourier_in_min": 2.0, "fourier_in_max": 1.0}, ValueError, "must hold, got 2.0 and 1.0"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim must be at least 1, got 0"),
        ({"token_data_len": 0}, ValueError, "token_data_len must be at least 1, got 0"),
        ({"num_compute_tokens": -1}, ValueError, "num_compute_tokens must be at least 0, got -1"),
        ({"max_num_actions": -1}, ValueError, "max_num_actions must be at least 0, got -1"),
        ({"max_num_obs_continuous": -2}, ValueError, "max_num_obs_continuous must be at least 0, got -2"),
        ({"max_num_obs_discrete": -1}, ValueError, "max_num_obs_discrete must be at least 0, got -1"),
        ({"max_num_obs_image": -1}, ValueError, "max_num_obs_image must be at least 0, got -1"),
        ({"max_num_time_steps": -1}, ValueError, "max_num_time_steps must be at least 0, got -1"),
        ({"max_num_actions": "5"}, TypeError, "max_num_actions must be an integer, got '5'"),
        ({"hidden_dim": 16.0}, TypeError, r"hidden_dim must be an integer, got 16\.0"),
        ({"max_num_action_continuous": -1}, ValueError, "max_num_action_continuous must be at least 0, got -1"),
        (
            {"max_num_actions": 3, "max_num_action_continuous": 2},
            ValueError,
            "at most one of max_num_actions and max_num_action_continuous must be given, got 3 and 2",
        ),
        (
            {"include_action_token": True},
            ValueError,
            "max_num_actions or max_num_action_continuous must be at least 1 for an included modality",
        ),
        ({"include_time_token": True}, ValueError, "max_num_time_steps must be at least 1 for an included modality"),
        ({"include_obs_image": True}, ValueError, "max_num_obs_image must be at least 1 for an included modality"),
        (
            {"include_reward_token": False, "include_done_token": False},
            ValueError,
            "at least one modality must be included, got none",
        ),
        ({"max_num_action": 5}, TypeError, "unexpected keyword argument 'max_num_action'"),
    ],
    ids=str,
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        StepEmbedder(**{"hidden_dim": 16, **options})


@pytest.mark.parametrize("continuous_action", [False, True])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_a_modality_can_be_left_out(modality, concat, continuous_action):
    sizes = {name: size for options in SIZES.values() for name, size in options.items()}
    steps, other = draw(8), draw(8)
    if continuous_action:
        sizes["max_num_actions"], sizes["max_num_action_continuous"] = 0, 3
        steps["action"], other["action"] = torch.randn(8, 3), torch.randn(8, 3)
    whole = StepEmbedder(16, **sizes, concat_modalities=concat)
    without = StepEmbedder(16, **{**sizes, INCLUDE[modality]: False}, concat_modalities=concat)
    assert list(without.modalities) == [name for name in MODALITIES if name != modality]
    gone = set(whole.state_dict()) - set(without.state_dict())
    attribute = next(name for name, module in whole.named_children() if module is whole.modalities[modality])
    assert gone == {f"{attribute}.{name}" for name in whole.modalities[modality].state_dict()} != set()
    assert set(without.state_dict()) < set(whole.state_dict())

    changed = {**steps, modality: other[modality]}
    assert not torch.equal(whole(changed), whole(steps))
    assert torch.equal(without(changed), without(steps))
    del changed[modality]
    assert torch.equal(without(changed), without(steps))
    # what is left is what it was
    without.load_state_dict({name: value for name, value in whole.state_dict().items() if name not in gone})
    if concat:
        kept = [index for index, name in enumerate(MODALITIES) if name != modality]
        assert torch.equal(without(steps), whole(steps)[:, kept])


def test_type_tokens_can_be_left_out():
    typed, plain = (
        make(*MODALITIES, concat_modalities=True),
        make(*MODALITIES, concat_modalities=True, include_type_token=False),
    )
    assert set(typed.state_dict()) - set(plain.state_dict()) == {"type_embedder.embed.weight"}
    plain.load_state_dict(typed.state_dict(), strict=False)
    kinds = typed.type_embedder.embed.weight[typed.token_types]
    steps = draw(5)
    torch.testing.assert_close(typed(steps), plain(steps) + kinds)


@pytest.mark.parametrize(("modality", "right"), [("continuous", 30), ("image", 100)])
@pytest.mark.parametrize("encoder", ["fourier", "linear"])
def test_vector_of_another_size(encoder, modality, right):
    embedder = make(modality, continuous_encoder=encoder)
    for size in (1, right - 1, right + 1):
        with pytest.raises(ValueError, match=rf"modality '{modality}' must be \[\*, {right}\], got \(2, {size}\)"):
            embedder({modality: torch.zeros(2, size)})


@pytest.mark.parametrize("encoder", ["fourier", "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_numbers_of_any_type(dtype, encoder):
    embedder = make("continuous", "reward", "image", continuous_encoder=encoder)
    steps = {name: (value * 10).abs().clamp(max=255).long() for name, value in draw(4).items()}
    converted = embedder({name: value.to(dtype) for name, value in steps.items()})
    assert converted.dtype == torch.float32
    assert torch.equal(converted, embedder({name: value.float() for name, value in steps.items()}))
