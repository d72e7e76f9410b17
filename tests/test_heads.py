"""Heads against MOUSE's own weights and outputs, and what they refuse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchrl_mouse.modules import DQNHead, GaussianHead, SwiGLUHead, VecDQNHead, VectorHead

REFERENCE = Path(__file__).parent / "reference" / "models" / "llama_concat"
SIZES = {"hidden_dim": 8, "num_layers": 2}
HEADS = {
    "dqn": lambda: DQNHead(16, 5, **SIZES),
    "vec_dqn": lambda: VecDQNHead(16, 5, vec_dim=2, **SIZES),
    "sp": lambda: SwiGLUHead(16, 5, **SIZES),
    "sv": lambda: SwiGLUHead(16, 5, **SIZES),
}


@pytest.mark.parametrize("name", HEADS)
def test_weights_and_outputs_are_mouses(name):
    head, outputs = HEADS[name](), load_file(REFERENCE / "outputs.safetensors")
    weights = load_file(REFERENCE / "model.safetensors")
    prefix = f"{name}_head."
    head.load_state_dict({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    torch.testing.assert_close(head(outputs["hidden"]), outputs[name], atol=1e-5, rtol=0)
    if f"{name}_target" in outputs:
        assert not torch.allclose(outputs[f"{name}_target"], outputs[name], atol=1e-3)
        torch.testing.assert_close(head.target(outputs["hidden"]), outputs[f"{name}_target"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dqn", "vec_dqn"])
def test_only_the_online_network_learns(name):
    head, hidden = HEADS[name](), torch.randn(3, 16)
    before = head(hidden)
    torch.testing.assert_close(head.target(hidden), before)
    assert not any(parameter.requires_grad for parameter in head.target.parameters())
    assert all(parameter.requires_grad for parameter in head.online.parameters())
    with torch.no_grad():
        head.online.layers[-1].weight.add_(1.0)
    torch.testing.assert_close(head.target(hidden), before)
    assert not torch.allclose(head(hidden), before)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_shapes(shape):
    hidden = torch.randn(*shape, 16)
    assert VecDQNHead(16, 5, vec_dim=4)(hidden).shape == (*shape, 5, 4)
    assert VectorHead(16, 5, vec_dim=4)(hidden).shape == (*shape, 5, 4)
    assert GaussianHead(16, 3)(hidden).shape == (*shape, 6)
    assert DQNHead(16, 5)(hidden).shape == (*shape, 5)


@pytest.mark.parametrize("head_class", [VectorHead, VecDQNHead])
def test_bias_scale_fills_the_last_bias(head_class):
    for scale in (1.0, 0.1):  # Whatever the scale of the weights.
        head = head_class(16, 5, vec_dim=4, bias_scale=0.25, scale=scale)
        for network in [head] if head_class is VectorHead else [head.online, head.target]:
            assert (network.layers[-1].bias == 0.25).all()
            assert (network.layers[0].linear.bias != 0.25).all()
    assert not (VectorHead(16, 5, vec_dim=4).layers[-1].bias == 0.25).any()
    assert (VectorHead(16, 5, vec_dim=4, bias_scale=0.0).layers[-1].bias == 0).all()


def test_options_reach_the_network():
    for head in (VecDQNHead(16, 5, vec_dim=2, num_layers=3, use_norm=False).online, GaussianHead(16, 3, num_layers=3)):
        assert len(head.layers) == 3
    assert VecDQNHead(16, 5, vec_dim=2, use_norm=False).online.norm is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'hiden_dim'"):
        VecDQNHead(16, 5, vec_dim=2, hiden_dim=8)


@pytest.mark.parametrize("head_class", [VectorHead, VecDQNHead])
@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((5, 3), ValueError, r"VectorHead: vec_dim must be even, got 3\."),
        ((5, 1), ValueError, r"VectorHead: vec_dim must be at least 2, got 1\."),
        ((5, 0), ValueError, r"VectorHead: vec_dim must be at least 2, got 0\."),
        ((5, 2.0), TypeError, r"VectorHead: vec_dim must be an integer, got 2\.0\."),
        ((0, 2), ValueError, r"VectorHead: num_actions must be at least 1, got 0\."),
    ],
)
def test_bad_sizes_of_vectors(head_class, sizes, error, message):
    with pytest.raises(error, match=message):
        head_class(16, sizes[0], vec_dim=sizes[1])


def test_bad_sizes_of_other_heads():
    with pytest.raises(ValueError, match=r"GaussianHead: action_dim must be at least 1, got 0\."):
        GaussianHead(16, 0)
    with pytest.raises(ValueError, match=r"SwiGLUHead: out_dim must be at least 1, got 0\."):
        DQNHead(16, 0)


def test_action_values_of_a_discount_lie_side_by_side():
    head = DQNHead(16, 5, num_discounts=3, num_layers=1, use_norm=False)
    hidden = torch.randn(2, 16)
    last = head.online.layers[-1]
    for discount in range(3):
        rows = slice(5 * discount, 5 * discount + 5)
        expected = hidden @ last.weight[rows].T + last.bias[rows]
        assert torch.allclose(head(hidden)[:, discount], expected, atol=1e-6)
