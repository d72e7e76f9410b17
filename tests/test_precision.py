"""Precision, autocast and compilation: every type of number in both modes, no waiting for a device, no graph breaks."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import EMBEDDING
from tensordict import TensorDict
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import SoftUpdate

from torchrl_mouse import schema
from torchrl_mouse.objectives import MouseDQNLoss

ROWS, STEPS = 3, 12
STARTS = [[0], [0, 5], [0, 7]]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 0.1}
SIZES = {"num_layers": 2, "num_heads": 2}
BACKBONES = {
    "llama": {},
    "qwen3": {"kind": "qwen3", "head_dim": 8, "num_key_value_heads": 1},
}
EMBEDDINGS = {
    "sum": {},
    "concat": {"concat_modalities": True, "include_type_token": True, "num_compute_tokens": 1},
    "linear": {"continuous_encoder": "linear"},
}

dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
backbones = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
embeddings = pytest.mark.parametrize("embedding", EMBEDDINGS.values(), ids=EMBEDDINGS)


def bfloat16_autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled)


def window(model, steps):
    with set_recurrent_mode(True):
        return model(steps.clone())


def relative_error(actual, expected):
    """How far apart values are, in standard deviations of the expected ones."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.var()).sqrt().item()


def transitions(random_steps):
    steps = random_steps(ROWS, STEPS, STARTS)
    following = TensorDict({"reward": torch.randn(ROWS, STEPS, 1)}, [ROWS, STEPS])
    for end in ("done", "terminated", "truncated", ("previous", "terminated"), ("previous", "truncated")):
        following[end] = torch.zeros(ROWS, STEPS, 1, dtype=torch.bool)
    following["done"][1, 4] = following["done"][2, 6] = True
    return steps.update({"action": torch.randint(5, (ROWS, STEPS)), "next": following})


def dqn_loss(model):
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, cql_weight=0.5)
    SoftUpdate(loss, tau=0.1)
    return loss


@embeddings
@backbones
@dtypes
def test_modes_agree(dtype, backbone, embedding, make_trunk, random_steps, step_by_step):
    trunk = make_trunk(embedding, backbone).to(dtype)
    steps = random_steps(ROWS, STEPS, STARTS)
    full = window(trunk, steps)["hidden"]
    stepped = step_by_step(trunk, steps)
    assert full.dtype == stepped.dtype == dtype
    assert full.isfinite().all()
    torch.testing.assert_close(stepped, full, atol=TOLERANCES[dtype], rtol=0)


@dtypes
def test_outputs_of_a_model_have_its_type(dtype, make_model, random_steps):
    model = make_model(sp_head_kwargs={"hidden_dim": 8}).to(dtype)
    steps = random_steps(ROWS, STEPS)
    for out in (window(model, steps), model(steps[:, 0].clone())):
        assert {out[key].dtype for key in ("hidden", "dqn", "sp")} == {dtype}
        assert {out[key].dtype for key in (schema.OBSERVATION, schema.PREVIOUS_REWARD)} == {torch.float32}


@pytest.mark.parametrize("scale", [1.0, 30.0])
@backbones
def test_bfloat16_is_near_float32(scale, backbone, make_trunk, random_steps, step_by_step):
    """Also with observations far from zero, whose Fourier features turn many times."""
    half = make_trunk({"fourier_in_min": 0.1}, backbone).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    steps = random_steps(ROWS, STEPS, STARTS)
    for key in (schema.OBSERVATION, schema.PREVIOUS_REWARD):
        steps[key] = (scale * steps[key]).bfloat16().float()
    expected = window(exact, steps)["hidden"]
    assert relative_error(window(half, steps)["hidden"], expected) < 0.02
    assert relative_error(step_by_step(half, steps), expected) < 0.02


@embeddings
@backbones
def test_autocast(backbone, embedding, make_trunk, random_steps, step_by_step):
    trunk = make_trunk(embedding, backbone)
    steps = random_steps(ROWS, STEPS, STARTS)
    expected = window(trunk, steps)["hidden"]
    with bfloat16_autocast():
        full = window(trunk, steps)["hidden"]
        stepped = step_by_step(trunk, steps)
    assert (full != expected).any(), "autocast must have an effect"
    for hidden in (full, stepped):
        assert relative_error(hidden, expected) < 0.02
    torch.testing.assert_close(stepped, full, atol=0.1, rtol=0)
    wanted = torch.randn_like(expected)
    gradients = []
    for enabled in (False, True):
        trunk.zero_grad()
        with bfloat16_autocast(enabled):
            loss = (window(trunk, steps)["hidden"].float() - wanted).square().mean()
        loss.backward()
        gradients.append({name: weight.grad for name, weight in trunk.named_parameters() if weight.requires_grad})
    for name, gradient in gradients[1].items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
    together = [torch.cat([gradient.flatten() for gradient in each.values()]) for each in gradients]
    assert relative_error(together[1], together[0]) < 0.1


def test_a_context_goes_on_in_and_out_of_autocast(make_trunk, random_steps):
    """A policy that is evaluated in autocast shares its contexts with one that is not."""
    trunk = make_trunk()
    steps = random_steps(ROWS, STEPS)
    stepped = []
    for t in range(STEPS):
        with bfloat16_autocast(t % 2 == 0):
            stepped.append(trunk(steps[:, t].clone())["hidden"])
    assert relative_error(torch.stack(stepped, 1), window(trunk, steps)["hidden"]) < 0.02


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@dtypes
def test_losses(dtype, autocast, make_model, random_steps):
    steps = transitions(random_steps)
    model = make_model()
    expected = dqn_loss(copy.deepcopy(model))(steps)
    loss = dqn_loss(model.to(dtype))
    with bfloat16_autocast(autocast):
        out = loss(steps)
    for key, value in out.items():
        torch.testing.assert_close(value.float(), expected[key], atol=0.02, rtol=0.1)
        assert value.isfinite(), key
    (out["loss_dqn"] + out["loss_cql"]).backward()
    for name, weight in loss.named_parameters():
        if weight.requires_grad:
            assert weight.grad.dtype == weight.dtype == dtype, name
            assert weight.grad.isfinite().all(), name
    assert steps["td_error"].isfinite().all()


@embeddings
@backbones
def test_recurrent_mode_never_looks_at_values(backbone, embedding, make_trunk, random_steps):
    """On the meta device there are none: what would make an accelerator wait is an error there."""
    trunk = make_trunk(embedding, backbone).to("meta")
    hidden = window(trunk, random_steps(ROWS, STEPS, STARTS).to("meta"))["hidden"]
    assert hidden.shape == (ROWS, STEPS, 16)
    hidden.sum().backward()
    assert trunk.backbone.model.layers[0].mlp.up_proj.weight.grad.shape == (64 if not backbone else 48, 16)


def test_losses_never_look_at_values(make_model, random_steps):
    model = make_model().to("meta")
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, cql_weight=0.5, gamma_terminal=0.5, delay_value=False)
    out = loss(transitions(random_steps).to("meta"))
    (out["loss_dqn"] + out["loss_cql"]).backward()
    assert {value.device.type for value in out.values()} == {"meta"}


def test_stepping_looks_at_values(make_trunk, random_steps):
    """The control of the two above: the version of the weights and the addresses of contexts are read."""
    with pytest.raises(RuntimeError, match="meta tensor"):
        make_trunk().to("meta")(random_steps(ROWS, 1)[:, 0].to("meta"))


def gradients_of(forward, model, *inputs):
    model.zero_grad()
    out = forward(*inputs)
    out.square().mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return out.detach(), gradients


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("embedding", [EMBEDDINGS["sum"], EMBEDDINGS["concat"]], ids=["sum", "concat"])
@backbones
def test_training_forward_compiles_to_one_graph(backbone, embedding, compiler, make_model, random_steps):
    options = {"embedding_kwargs": {**EMBEDDING, "std": 1.0, **embedding}, "backbone_kwargs": {**SIZES, **backbone}}
    model = make_model(**options)
    steps = random_steps(ROWS, STEPS, STARTS)

    head = model.head("dqn")

    def forward(steps):
        return head(model.trunk(steps))["dqn"]

    torch.compiler.reset()
    with set_recurrent_mode(True):
        compiled = torch.compile(forward, backend=compiler, fullgraph=True)
        actual, gradients = gradients_of(compiled, model, steps)
        expected, expected_gradients = gradients_of(forward, model, steps)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-5, msg=name)
