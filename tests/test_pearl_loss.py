"""PEARL's loss against a plain loop over networks, its gradients, and what it refuses."""

import copy
import math
import re

import pytest
import torch
from plain_pearl import (
    KL_WEIGHT,
    LEARNING_RATE,
    REWARD_SCALE,
    TAU,
    PlainPEARL,
    make_batch,
    make_loss,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch.distributions import Normal
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import SoftUpdate

from torchrl_mouse.modules import (
    CONTEXT_ENCODERS,
    ContextPosterior,
    latent_actor,
    latent_qvalue,
    latent_value,
    make_context_encoder,
)
from torchrl_mouse.objectives import PEARLLoss

LOSSES = ("loss_kl", "loss_qvalue", "loss_value", "loss_actor")
PARTS = {
    "loss_kl": {"posterior"},
    "loss_qvalue": {"posterior", "qvalue"},
    "loss_value": {"value"},
    "loss_actor": {"actor"},
}


def small_loss(**options):
    loss = make_loss(width=24)
    for name, value in options.items():
        setattr(loss, name, value)
    return loss


def small_batch(**options):
    return make_batch(**{"tasks": 3, "rows": 8, "context": 6, **options})


def learned_by(loss, value):
    """Returns which networks get a gradient of a loss that is not zero."""
    loss.zero_grad()
    value.backward(retain_graph=True)
    return {
        name.split("_network")[0].split(".")[0]
        for name, parameter in loss.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }


@pytest.mark.parametrize(("observation_dim", "action_dim", "context"), [(2, 2, 64), (20, 6, 100)])
def test_three_steps_equal_those_of_the_plain_loop(observation_dim, action_dim, context):
    loss = make_loss(observation_dim, action_dim, width=64)
    batch = make_batch(observation_dim, action_dim, rows=32, context=context)
    reference = PlainPEARL(loss)
    optimizer, updater = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE), SoftUpdate(loss, tau=TAU)
    for seed in range(3):
        torch.manual_seed(seed)
        ours = loss.critic_loss(batch)
        optimizer.zero_grad()
        (ours["loss_kl"] + ours["loss_qvalue"]).backward()
        optimizer.step()
        ours.update(loss.actor_loss(batch))
        optimizer.zero_grad()
        (ours["loss_value"] + ours["loss_actor"]).backward()
        optimizer.step()
        updater.step()
        torch.manual_seed(seed)
        for name, value in reference.step(batch).items():
            torch.testing.assert_close(
                ours[name].detach(), value.detach(), rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
    with loss.target_value_network_params.to_module(loss.value_network):
        for slow, expected in zip(loss.value_network.parameters(), reference.target.parameters(), strict=True):
            torch.testing.assert_close(slow.data, expected.data, rtol=1e-5, atol=1e-7)


def test_kl_of_the_untrained_encoder_is_the_published_codes():
    # The variance of a product of N factors of softplus(0) is 0.693 / N.
    loss, batch = make_loss(), make_batch(context=64)
    losses = loss.critic_loss(batch).detach()
    assert float(losses["kl"]) * 16 == pytest.approx(141.4, abs=0.3)
    assert float(losses["loss_kl"]) == pytest.approx(0.1 * 141.4, abs=0.03)


def test_each_loss_trains_its_own_networks_alone():
    loss, batch = small_loss(), small_batch()
    losses = loss(batch)
    for name in LOSSES:
        assert learned_by(loss, losses[name]) == PARTS[name], name


def test_one_pass_over_all_has_the_gradients_of_the_two():
    loss, batch = small_loss(), small_batch()

    def gradients():
        return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    losses = loss(batch)
    loss.zero_grad()
    sum(losses[name] for name in LOSSES).backward()
    together = gradients()
    torch.manual_seed(0)
    loss.zero_grad()
    (lambda a: (a["loss_kl"] + a["loss_qvalue"]).backward())(loss.critic_loss(batch))
    (lambda a: (a["loss_value"] + a["loss_actor"]).backward())(loss.actor_loss(batch))
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, together[name])


def test_forward_leaves_its_input_alone():
    batch = small_batch()
    before = batch.clone()
    small_loss()(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert (batch == before).all()


def test_target_by_hand():
    """With a critic of zeros the error is the target, whose latent value is a constant."""
    loss, batch = small_loss(), small_batch()
    loss.qvalue_network_params.data.zero_()
    loss.target_value_network_params.data.zero_()
    bias = [key for key in loss.target_value_network_params.keys(True, True) if "bias" in key][-1]
    loss.target_value_network_params.data.get(bias).fill_(7.0)
    reward, end = batch["next", "reward"], batch["next", "terminated"]
    target = REWARD_SCALE * reward + 0.99 * (~end) * 7.0
    expected = 2 * target.square().mean()  # both critics
    torch.testing.assert_close(loss.critic_loss(batch)["loss_qvalue"].detach(), expected)


def test_actors_density_is_the_squashed_gaussians():
    loss, batch = small_loss(), small_batch()
    loss.critic_loss(batch)
    torch.manual_seed(3)
    entropy = loss.actor_loss(batch)["entropy"]
    frames = TensorDict({"observation": batch["observation"]}, [3, 8])
    frames["latent"] = batch["latent"].unsqueeze(1).expand(3, 8, 5)
    with loss.actor_network_params.to_module(loss.actor_network):
        distribution = loss.actor_network.get_dist(frames.flatten())
    torch.manual_seed(3)
    before = distribution.loc + distribution.scale * torch.randn(24, 2)
    torch.testing.assert_close(entropy, -distribution.log_prob(before.tanh()).mean().detach(), rtol=1e-4, atol=1e-4)


def test_saturated_actions_keep_finite_losses_and_gradients():
    loss, batch = small_loss(), small_batch()
    with torch.no_grad():
        for key, value in loss.actor_network_params.items(True, True):
            if "bias" in key:
                value.fill_(30.0)
    losses = loss(batch)
    sum(losses[name] for name in LOSSES).backward()
    assert all(losses[name].isfinite() for name in LOSSES)
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)


def test_only_the_value_has_a_target():
    loss = small_loss()
    delayed = {name.split("_network")[0] for name, _ in loss.named_buffers() if name.startswith("target_")}
    assert delayed == {"target_value"}
    updater, before = SoftUpdate(loss, tau=0.25), loss.target_value_network_params.clone()
    for value in loss.value_network_params.data.values(True, True):
        value.add_(1.0)
    updater.step()
    for key, value in loss.target_value_network_params.items(True, True):
        torch.testing.assert_close(value, before[key] + 0.25)


def test_order_of_the_context_does_not_matter():
    loss, batch = small_loss(), small_batch()
    shuffled = batch.clone()
    shuffled["context"] = shuffled["context"][:, torch.randperm(6)]
    results = []
    for one in (batch, shuffled):
        torch.manual_seed(0)
        results.append(loss.critic_loss(one)["loss_qvalue"].detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("encoder", CONTEXT_ENCODERS)
def test_every_encoder_learns_from_the_critic(encoder):
    loss, batch = make_loss(width=16, encoder=encoder), small_batch()
    for _ in range(2):  # the second call finds what a recurrent one has kept
        losses = loss(batch)
    assert learned_by(loss, losses["loss_qvalue"]) == {"posterior", "qvalue"}


@pytest.mark.parametrize("encoder", CONTEXT_ENCODERS)
def test_products_in_bfloat16_change_little(encoder):
    """Values stay in float32: that far from zero, bfloat16 has whole numbers only."""
    loss, batch = make_loss(width=64, encoder=encoder), small_batch()
    for part in (loss.value_network_params, loss.target_value_network_params, loss.qvalue_network_params):
        part["module", "head", "bias"].data.fill_(300.0)
    results, gradients = [], []
    for enabled in (False, True):
        loss.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = loss(batch.clone())
        sum(losses[name] for name in LOSSES).backward()
        assert {value.dtype for value in losses.values()} == {torch.float32}
        results.append(torch.stack([losses[name].detach() for name in LOSSES]))
        gradients.append(torch.cat([weight.grad.flatten() for weight in loss.parameters() if weight.grad is not None]))
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=1e-2, atol=0)
    assert torch.cosine_similarity(*gradients, 0) > 0.999


def test_nothing_seen_is_the_prior():
    loss, batch = small_loss(), small_batch(context=0)
    losses = loss(batch)
    assert float(losses["loss_kl"]) == 0.0
    torch.manual_seed(0)
    loss.critic_loss(batch)
    torch.manual_seed(0)
    torch.testing.assert_close(batch["latent"], torch.randn(3, 5))


def test_weights_round_trip(tmp_path):
    loss, batch = small_loss(), small_batch()
    torch.save(loss.state_dict(), tmp_path / "weights.pt")
    other = make_loss(width=24, seed=9)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    results = []
    for one in (loss, other, copy.deepcopy(loss)):
        torch.manual_seed(0)
        results.append(one(batch))
    for name in LOSSES:
        assert float(results[0][name].detach()) == float(results[1][name].detach()) == float(results[2][name].detach())


def test_other_entries_can_be_named():
    loss, batch = small_loss(), small_batch()
    torch.manual_seed(0)
    expected = loss(batch)["loss_qvalue"].detach()
    renamed = batch.clone()
    renamed.rename_key_("action", ("taken", "action"))
    renamed.rename_key_(("next", "reward"), ("next", "scores", "dense"))
    loss.set_keys(action=("taken", "action"), reward=("scores", "dense"))
    # Networks name their own entries: here that of the action.
    assert ("taken", "action") in loss.in_keys
    assert ("next", "scores", "dense") in loss.in_keys
    with pytest.raises(KeyError, match="action"):
        loss(renamed)
    loss.set_keys(action="action")
    renamed.rename_key_(("taken", "action"), "action")
    torch.manual_seed(0)
    torch.testing.assert_close(loss(renamed)["loss_qvalue"].detach(), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number(value):
    batch = small_batch()
    batch["next", "reward"][2, 5] = value
    with pytest.raises(ValueError, match=r"\('next', 'reward'\).* must be finite, got (nan|inf) at \(2, 5, 0\)"):
        small_loss()(batch)


@pytest.mark.parametrize("encoder", ["mlp", "bayesian"])
def test_a_context_that_is_no_number(encoder):
    batch = small_batch()
    batch["context", "reward"][1, 3] = math.nan
    with pytest.raises(ValueError, match=r"'posterior_loc' must be finite, got nan at \(1, 0\)"):
        make_loss(width=16, encoder=encoder)(batch)


@pytest.mark.parametrize("key", ["reward", "terminated"])
def test_scalars_without_their_dimension(key):
    batch = small_batch()
    batch["next", key] = batch["next", key].squeeze(-1)
    with pytest.raises(ValueError, match=rf"\('next', '{key}'\) must have shape \[3, 8, 1\], got \[3, 8\]"):
        small_loss()(batch)


@pytest.mark.parametrize("tasks", [1, 2, 6])
def test_a_context_of_other_tasks(tasks):
    """Of a divisor of their number, latents would go to other tasks' rows."""
    batch = TensorDict(small_batch(), [])
    batch["context"] = make_batch(tasks=tasks, context=6)["context"]
    with pytest.raises(ValueError, match=f"'posterior_loc' must be of 3 tasks, as 'observation' is, got {tasks}"):
        small_loss()(batch)


@pytest.mark.parametrize("rows", [8, 5])
def test_entries_by_keyword(rows):
    """As many transitions as the context has, or fewer: the tasks are all that they share."""
    loss, batch = small_loss(), small_batch(context=8, rows=rows)
    torch.manual_seed(0)
    expected = loss(batch)
    torch.manual_seed(0)
    entries = {"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in loss.in_keys}
    torch.testing.assert_close(loss(**entries)[loss.out_keys.index("loss_qvalue")], expected["loss_qvalue"])


@pytest.mark.parametrize("missing", ["observation", "action", ("next", "terminated"), ("context", "reward")])
def test_missing_entries(missing):
    with pytest.raises(KeyError, match=str(missing[-1] if isinstance(missing, tuple) else missing)):
        small_loss()(small_batch().exclude(missing))


@pytest.mark.parametrize("key", ["action", ("next", "observation")])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_fewer_rows_in_one_entry(key, rows):
    batch = small_batch()
    batch[key] = batch[key][:, :rows]
    name = re.escape(repr(key))
    with pytest.raises(ValueError, match=rf"entry {name} must have shape \[3, 8, 2\], got \[3, {rows}, 2\]"):
        small_loss()(batch)


@pytest.mark.parametrize(("tasks", "rows"), [(0, 8), (3, 0)])
def test_nothing_to_learn_from(tasks, rows):
    with pytest.raises(ValueError, match=rf"must have shape \[tasks, rows, \*\] with at .* got \[{tasks}, {rows}, 2\]"):
        small_loss()(small_batch(tasks=tasks, rows=rows))


def test_actor_loss_needs_the_critics_latents():
    with pytest.raises(KeyError, match="latent"):
        small_loss().actor_loss(small_batch())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"reward_scale": 0.0}, "reward_scale must be positive and finite, got 0.0"),
        ({"kl_weight": -1.0}, "kl_weight must be finite and not negative, got -1.0"),
        ({"regularization": math.nan}, "regularization must be finite and not negative, got nan"),
    ],
)
def test_options_out_of_range(options, match):
    encoder = make_context_encoder("linear", hidden_sizes=[], input_size=5, output_size=6)
    critics = [latent_qvalue(2, 2, 3, hidden_sizes=[4]) for _ in range(2)]
    with pytest.raises(ValueError, match=match):
        PEARLLoss(ContextPosterior(encoder), latent_actor(2, 2, 3), critics, latent_value(2, 3), **options)


def test_options_are_pearls_by_default():
    encoder = make_context_encoder("linear", hidden_sizes=[], input_size=5, output_size=6)
    critics = [latent_qvalue(2, 2, 3, hidden_sizes=[4]) for _ in range(2)]
    loss = PEARLLoss(ContextPosterior(encoder), latent_actor(2, 2, 3), critics, latent_value(2, 3))
    assert (loss.gamma, loss.reward_scale, loss.kl_weight, loss.regularization) == (0.99, 1.0, 0.1, 1e-3)


def test_one_critic_is_too_few():
    encoder = make_context_encoder("linear", hidden_sizes=[], input_size=5, output_size=6)
    with pytest.raises(ValueError, match="qvalue_networks must be at least two, got 1"):
        PEARLLoss(ContextPosterior(encoder), latent_actor(2, 2, 3), [latent_qvalue(2, 2, 3)], latent_value(2, 3))


@pytest.mark.parametrize(
    ("kind", "bounds", "got"),
    [
        (TanhNormal, {"high": 2.0}, r"one inside \[-1, 2.0\]"),
        (TanhNormal, {"low": torch.tensor([-1.0, 0.0])}, r"one inside \[\[-1.0, 0.0\], 1\]"),
        (Normal, {}, "<class 'torch.distributions.normal.Normal'>"),
    ],
)
def test_an_actor_with_other_bounds(kind, bounds, got):
    """Critics would learn of actions that it never takes."""
    encoder = make_context_encoder("linear", hidden_sizes=[], input_size=5, output_size=6)
    actor = latent_actor(2, 2, 3, hidden_sizes=[4])
    options = {"distribution_class": kind, "distribution_kwargs": bounds}
    actor = ProbabilisticActor(actor[0], in_keys=["loc", "scale"], **options)
    critics = [latent_qvalue(2, 2, 3, hidden_sizes=[4]) for _ in range(2)]
    with pytest.raises(ValueError, match=rf"draw from a TanhNormal inside \[-1, 1\], got {got}"):
        PEARLLoss(ContextPosterior(encoder), actor, critics, latent_value(2, 3))


def test_networks_for_another_latent():
    loss, batch = make_loss(), make_batch()
    encoder = make_context_encoder("mlp", hidden_sizes=[4], input_size=5, output_size=2 * 7)
    loss.posterior = ContextPosterior(encoder)
    with pytest.raises(ValueError, match=r"LatentMLP: inputs must have 7 numbers together, got 2 \+ 7"):
        loss(batch)


@pytest.mark.parametrize("wrap", [lambda posterior: posterior, TensorDictSequential])
def test_what_a_recurrent_encoder_keeps_is_forgotten(wrap):
    loss, batch = make_loss(encoder="recurrent", width=8), small_batch()
    loss.posterior = wrap(loss.posterior)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        loss.critic_loss(batch)
        drawn.append(batch.pop("latent"))
    assert torch.equal(*drawn)


def test_what_is_inside_an_encoder_may_have_its_own_reset():
    class Memory(torch.nn.Linear):
        def reset(self):
            raise AssertionError("not of contexts")

    loss = small_loss()
    encoder = loss.posterior.encoder
    encoder.last_fc = Memory(encoder.last_fc.in_features, encoder.last_fc.out_features)
    loss.critic_loss(small_batch())


def test_any_module_can_infer_the_belief():
    """The loss needs no context of a certain form."""

    def belief(hint):
        return hint, torch.full_like(hint, 0.5)

    posterior = TensorDictModule(belief, ["hint"], ["posterior_loc", "posterior_scale"])
    critics = [latent_qvalue(2, 2, 3, hidden_sizes=[4]) for _ in range(2)]
    loss = PEARLLoss(posterior, latent_actor(2, 2, 3), critics, latent_value(2, 3), kl_weight=KL_WEIGHT)
    SoftUpdate(loss, tau=TAU)
    hint = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    batch = small_batch().exclude("context").set("hint", hint)
    closed = torch.distributions.kl_divergence(Normal(hint, 0.5), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(loss(batch)["loss_kl"], KL_WEIGHT * closed)
