"""The step embedder: scale, absent times, and errors that name what is wrong."""

from __future__ import annotations

import pytest
import torch

from torchrl_mouse.modules import StepEmbedder, TokenType

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
        ({"include_action_token": True}, ValueError, "max_num_actions must be at least 1 for an included modality"),
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


@pytest.mark.parametrize("modality", ["action", "time", "continuous", "discrete", "image"])
def test_a_modality_with_a_size_can_be_left_out(modality):
    include = (
        f"include_obs_{modality}" if modality in ("continuous", "discrete", "image") else f"include_{modality}_token"
    )
    assert modality not in make("reward", modality, **{include: False}).modalities
    assert modality in make("reward", modality).modalities


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
