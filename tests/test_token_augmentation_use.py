"""Token augmentation in a buffer, with models and losses, on other devices; its configuration and its errors."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from token_windows import FRAMES, A, N, assert_same, build, code, everything, windows
from torchrl.envs import TransformedEnv

from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.data.token_augmentation import TokenAugmenter
from torchrl_mouse.data.token_augmentation_config import AugmentMaskProbConfig, AugmentScalarSpec, AugmentTokensConfig
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.objectives import CombinedLoss, MouseDQNLoss, SupervisedPolicyLoss

# In a buffer, with a model and losses


def make_store(tasks=3):
    store = DatasetStore(max_action_dim=A, max_obs_continuous_dim=2, max_obs_discrete_dim=N)
    generator = torch.Generator().manual_seed(4)

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    for task in range(tasks):
        for step in range(20):
            time = step % 5
            record = {
                "task": task,
                "action": draw(3) if time else 0,  # of the model's five
                "reward": float(draw(5) + 1) if time else 0.0,
                "done": (time == 4) * (1 + task % 2),
                "episode_step": time,
                "observation": [float(draw(7)), 1.0],
                "observation_discrete": draw(N),
                "metadata_q_star": torch.randn(3, generator=generator).tolist(),
            }
            store.append(record)
    return store


def without_images(**options):
    options = {name: value for name, value in everything(**options).items() if not name.endswith("obs_image")}
    return {**options, "mask_prob": AugmentMaskProbConfig(**{**vars(options["mask_prob"]), "obs_image": 0.0})}


def make_loss(model, augmenter=None):
    model = copy.deepcopy(model)
    losses = {"dqn": MouseDQNLoss(model.head("dqn"), delay_value=False), "sp": SupervisedPolicyLoss(model.head("sp"))}
    for loss in losses.values() if augmenter is not None else ():
        loss.set_keys(**augmenter.loss_keys)
    return CombinedLoss(model.trunk, losses)


@pytest.mark.parametrize("prefetch", [None, 2])
def test_a_buffer_a_model_and_losses(make_model, prefetch):
    augmenter = build(**without_images(action="both"))
    loss = make_loss(make_model(sp_head_kwargs={"hidden_dim": 8}), augmenter)
    store = make_store().select([*loss.in_keys, *augmenter.in_keys])
    buffer = replay_buffer(store, window=8, batch_size=16, seed=0, transform=augmenter, prefetch=prefetch)
    plain = replay_buffer(store, window=8, batch_size=16, seed=0)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    for _ in range(3):
        batch = buffer.sample()
        assert batch.shape == (16, 8)
        if prefetch is None:
            before = plain.sample()
            assert torch.equal(batch["index"], before["index"])  # the windows are drawn as before
            assert torch.equal(batch["next", "reward"], before["next", "reward"])
            assert not torch.equal(batch["action"], before["action"])
            assert batch["action"].max() < 3  # The tasks have three actions.
            assert torch.equal(batch["q_star"].isfinite(), before["q_star"].isfinite())
            taken = batch["q_star"].gather(-1, batch["action"].unsqueeze(-1))
            assert torch.equal(taken, before["q_star"].gather(-1, before["action"].unsqueeze(-1)))
        values = loss(batch)
        total = values["loss_dqn"] + values["loss_sp"]
        optimizer.zero_grad()
        total.backward()
        assert total.isfinite()
        assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)
        assert loss.trunk_params["embedder", "reward_embedder", "rff", "weight"].grad.abs().sum() > 0
        optimizer.step()


@pytest.mark.parametrize("option", sorted(set(without_images()) - {"mask_prob"}))
def test_a_store_may_be_limited_to_what_is_read(option):
    def sample(keys):
        buffer = replay_buffer(make_store().select(keys), window=6, batch_size=4, seed=0)
        buffer.append_transform(build(**{option: without_images(action="both")[option]}))
        return buffer.sample()

    some, everything_there = sample(build(**{option: without_images(action="both")[option]}).in_keys), sample(None)
    assert len(list(some.keys(True, True))) < len(list(everything_there.keys(True, True)))
    assert_same(some, everything_there.select(*some.keys(True, True)))


def test_two_samples_draw_anew_and_a_saved_buffer_goes_on(tmp_path):
    def make(seed):
        return replay_buffer(make_store(), window=6, batch_size=4, seed=seed, transform=build(seed, **without_images()))

    one, other = make(1), make(2)
    one.sample()
    first = one.transform[0].snapshot["permute_obs_discrete"]
    one.sample()
    assert not torch.equal(one.transform[0].snapshot["permute_obs_discrete"], first)
    one.dumps(tmp_path)
    expected = one.sample()
    other.loads(tmp_path)
    assert_same(other.sample(), expected)


@pytest.mark.parametrize(("permute", "mask"), [(True, 0.0), (False, 0.5), (True, 0.5)])
def test_where_losses_see_the_ends_does_not_change(make_model, permute, mask):
    """Ends as the model sees them change; which steps cost what stays, once the losses are pointed at the true ones."""
    augmenter = build(permute_done=permute, mask_prob=AugmentMaskProbConfig(done=mask))
    kwargs = {"include_done_token": False, "max_num_actions": A, "max_num_obs_continuous": 2}
    blind = make_model(embedding_kwargs=kwargs, sp_head_kwargs={"hidden_dim": 8})  # to ends, so that it sees no change
    before = windows(batch=16).exclude("action_mask")
    after = augmenter(before)
    assert not torch.equal(code(after), code(before))
    expected = make_loss(blind)(before)
    torch.testing.assert_close(make_loss(blind, augmenter)(after), expected)
    forgotten = make_loss(blind)(after)
    assert not torch.equal(forgotten["loss_dqn"], expected["loss_dqn"])
    assert not torch.equal(forgotten["loss_sp"], expected["loss_sp"])
    seeing = make_model(sp_head_kwargs={"hidden_dim": 8})
    for name in ("loss_dqn", "loss_sp"):
        assert not torch.equal(make_loss(seeing, augmenter)(after)[name], make_loss(seeing)(before)[name])


def test_without_a_change_of_ends_losses_keep_their_keys(make_model):
    augmenter = build(permute_action="both", mask_prob=AugmentMaskProbConfig(reward=0.5))
    assert augmenter.loss_keys == {}
    loss = make_loss(make_model(sp_head_kwargs={"hidden_dim": 8}), augmenter)
    assert loss.losses["dqn"].tensor_keys.terminated == ("previous", "terminated")
    assert "episode_end" not in augmenter(windows()).keys()  # noqa: SIM118 - a TensorDict


def test_renamed_actions_cost_a_renamed_model_the_same(make_model):
    """With both sides permuted, a window is one of the same task: a model with permuted weights does not notice."""
    model = make_model(sp_head_kwargs={"hidden_dim": 8})
    before = windows(batch=1).exclude("action_mask")
    # An episode's first frame shows action 0, whatever that means: with a table of its own it would not be renamed.
    for at in ((), ("next",)):
        before[(*at, "episode_step")] += 1
    augmenter = build(permute_action="both")
    after = augmenter(before)
    old = augmenter.snapshot["permute_action"][0].argsort()
    assert not torch.equal(old, torch.arange(A))
    renamed = copy.deepcopy(model)
    with torch.no_grad():
        table = renamed.trunk.embedder.action_embedder.embed.weight
        table.copy_(table[old])
        for name, parameter in renamed.named_parameters():
            if "head" in name and parameter.shape[0] == A:
                parameter.copy_(parameter[old])
    torch.testing.assert_close(make_loss(renamed)(after), make_loss(model)(before))
    assert not torch.allclose(make_loss(model)(after)["loss_dqn"], make_loss(model)(before)["loss_dqn"])


def test_collected_windows_of_another_storage():
    steps = TaskEnv(DarkRoomEnv([3, 40], max_steps=5), episodes_per_task=3).rollout(9)
    after = build(num_actions=5, permute_action="both", mask_prob=AugmentMaskProbConfig(time=1.0))(steps)
    assert (after["episode_step"] == -1).all()
    assert torch.equal(after["next", "previous", "action"][:, :-1], after["previous", "action"][:, 1:])


# Errors


def test_permuting_tokens_has_no_effect_and_says_so():
    with pytest.warns(UserWarning, match="permute_tokens has no effect, as in MOUSE"):
        config = AugmentTokensConfig(permute_tokens=True)
    steps = windows()
    assert TokenAugmenter(config, A, N, "cpu")(steps) is steps


@pytest.mark.parametrize("options", [{}, everything(action="both"), {"permute_action": True, "enabled": False}])
def test_configurations_round_trip(options):
    config = AugmentTokensConfig(**options)
    assert AugmentTokensConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert AugmentTokensConfig.from_dict({}) == AugmentTokensConfig()


def test_true_is_both():
    assert AugmentTokensConfig(permute_action=True) == AugmentTokensConfig(permute_action="both")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mean": "1"}, TypeError, "mean must be a number, got '1'"),
        ({"mean": None}, TypeError, "mean must be a number, got None"),
        ({"mean": 1.0, "std": True}, TypeError, "std must be a number, got True"),
        ({"mean": float("nan")}, ValueError, "mean must be finite, got nan"),
        ({"mean": 1.0, "low": 0.0, "high": float("inf")}, ValueError, "high must be finite, got inf"),
        ({"mean": 1.0, "std": -1.0}, ValueError, "std must be at least 0, got -1.0"),
        ({"mean": 1.0, "low": 0.0}, ValueError, "low and high must be given together, got low=0.0 and high=None"),
        ({"mean": 1.0, "high": 0.0}, ValueError, "low and high must be given together, got low=None and high=0.0"),
        ({"mean": 1.0, "low": 2.0, "high": 1.0}, ValueError, "high must be at least low=2.0, got 1.0. Swap them"),
    ],
)
def test_scalars_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        AugmentScalarSpec(**options)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (1.5, ValueError, r"reward must lie in \[0, 1\], got 1.5"),
        (-0.1, ValueError, r"reward must lie in \[0, 1\], got -0.1"),
        (True, TypeError, "reward must be a number, got True"),
    ],
)
def test_probabilities_that_cannot_be(value, error, match):
    with pytest.raises(error, match=match):
        AugmentMaskProbConfig(reward=value)


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"permute_action": "inputs"}, ValueError, "must be False, True, 'input', 'target' or 'both', got 'inputs'"),
        ({"permute_action": 1}, ValueError, "permute_action must be False, True, .* got 1"),
        ({"permute_action": None}, ValueError, "permute_action must be False, True, .* got None"),
        ({"permute_done": "yes"}, TypeError, "permute_done must be true or false, got 'yes'"),
        ({"enabled": 1}, TypeError, "enabled must be true or false, got 1"),
        ({"scale_obs": 2.0}, TypeError, "scale_obs must be AugmentScalarSpec, got 2.0"),
        ({"mask_prob": 0.5}, TypeError, "mask_prob must be AugmentMaskProbConfig, got 0.5"),
        ({"mask_probs": {}}, TypeError, "AugmentTokensConfig: unknown option 'mask_probs'. The options are enabled, "),
        ({"mask_prob": {"obs": 0.5}}, TypeError, "AugmentMaskProbConfig: unknown option 'obs'. The options are action"),
        ({"scale_obs": {"std": 0.5}}, TypeError, "AugmentScalarSpec: option 'mean' must be given, got only std"),
        ([], TypeError, "AugmentTokensConfig: the options must be a dictionary, got list"),
    ],
)
def test_configurations_that_cannot_be(values, error, match):
    with pytest.raises(error, match=match):
        AugmentTokensConfig.from_dict(values)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (({"permute_done": True}, A, N, "cpu"), TypeError, "augment must be an AugmentTokensConfig, got dict"),
        ((AugmentTokensConfig(), 2.0, N, "cpu"), TypeError, "max_num_actions must be an integer, got 2.0"),
        ((AugmentTokensConfig(), A, -1, "cpu"), ValueError, "max_num_obs_discrete must be at least 0, got -1"),
        (
            (AugmentTokensConfig(permute_action="input"), 0, N, "cpu"),
            ValueError,
            "max_num_actions must be at least 1 for permute_action, got 0",
        ),
        (
            (AugmentTokensConfig(permute_obs_discrete=True), A, 0, "cpu"),
            ValueError,
            "max_num_obs_discrete must be at least 1 for permute_obs_discrete, got 0",
        ),
        (
            (AugmentTokensConfig(), A, N, "meta", torch.Generator()),
            ValueError,
            "generator must be on the device meta, got one on cpu",
        ),
    ],
)
def test_augmenters_that_cannot_be(arguments, error, match):
    with pytest.raises(error, match=match):
        TokenAugmenter(*arguments)


@pytest.mark.parametrize("key", FRAMES)
def test_what_is_to_be_changed_must_be_there(key):
    with pytest.raises(KeyError, match=r"must be present, got only"):
        build(**everything())(windows().exclude(key))
    after = build(**everything())(windows().exclude("next"))
    assert "next" not in after.keys()  # noqa: SIM118 - a TensorDict


def test_what_goes_with_an_action_under_next_must_be_there():
    with pytest.raises(KeyError, match=r"entry \('next', 'episode_step'\) must be present"):
        build(permute_action="input")(windows().exclude(("next", "episode_step")))


def test_targets_to_be_changed_must_be_there():
    steps = windows().exclude("action", "q_star", "action_mask")
    with pytest.raises(KeyError, match="entry 'action' must be present"):
        build(permute_action="target")(steps)


@pytest.mark.parametrize(
    ("change", "options", "error", "match"),
    [
        (("q_star", torch.zeros(3, 8, 7)), {"permute_action": "target"}, ValueError,
         r"entry 'q_star' must be \[B, T, 5\], got \(3, 8, 7\)"),
        (("action_mask", torch.ones(3, 8, 7) > 0), {"permute_action": "input"}, ValueError,
         r"entry 'action_mask' must be \[B, T, 5\], got \(3, 8, 7\)"),
        (("action_mask", torch.ones(3, 8, A)), {"permute_action": "input"}, TypeError,
         "entry 'action_mask' must be of bool type"),
        (("action", torch.zeros(3, 8)), {"permute_action": "target"}, TypeError, "'action' must hold integer ids"),
        (("action", torch.zeros(3, 8, 4)), {"permute_action": "target"}, ValueError, r"'action' must hold ids"),
        (("observation", torch.zeros(3, 8, 2).int()), {"shift_obs": AugmentScalarSpec(1.0)}, TypeError,
         "entry 'observation' must be of float type, got torch.int32"),
    ],
)  # fmt: skip
def test_windows_that_do_not_fit(change, options, error, match):
    with pytest.raises(error, match=match):
        build(**options)(windows().set(*change))


def test_other_shapes_and_places():
    with pytest.raises(ValueError, match=r"steps must be \[B, T\], got \(8,\)"):
        build(permute_done=True)(windows()[0])
    with pytest.raises(ValueError, match=r"steps must be \[B, T\], got \(8,\)"):
        build(permute_done=True).update_augmentations(windows()[0])
    with pytest.raises(NotImplementedError, match="TokenAugmenter: must be a transform of a replay buffer"):
        TransformedEnv(DarkRoomEnv([0]), build(permute_done=True)).reset()


@pytest.mark.parametrize("action", ["input", "both"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_drawn_goes_where_the_windows_are(device, action):
    before = windows().exclude("q_star", "action_mask").to("meta")
    after = TokenAugmenter(AugmentTokensConfig(**everything(action=action)), A, N, device)(before)
    assert {value.device.type for value in after.values(True, True)} == {"meta"}


@pytest.mark.cuda
def test_windows_may_be_on_another_device():
    before = windows()
    expected = build(**everything(action="both"))(before)
    assert_same(build(**everything(action="both"))(before.to("cuda")).cpu(), expected)
    generator = torch.Generator("cuda").manual_seed(0)
    after = TokenAugmenter(AugmentTokensConfig(**everything(action="both")), A, N, "cuda", generator)(before.to("cuda"))
    assert after["action"].is_cuda
    assert torch.equal(after["next", "observation"][:, :-1], after["observation"][:, 1:])
    there = TokenAugmenter(AugmentTokensConfig(**everything(action="both")), A, N, "cuda", generator)(before)
    assert {value.device.type for value in there.values(True, True)} == {"cpu"}
