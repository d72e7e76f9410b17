"""The backbone: parity with `transformers`, cached decoding, TorchRL's contract, gradients."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from torchrl_mouse.modules import CausalBackbone, KeyValues
from torchrl_mouse.modules import backbone as backbone_module
from torchrl_mouse.modules.backbone import FAMILIES

KINDS = {
    "llama": ("llama", {"num_heads": 4}),
    "llama grouped": ("llama", {"num_heads": 4, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_heads": 4, "head_dim": 8}),
    "qwen3 grouped": ("qwen3", {"num_heads": 4, "num_key_value_heads": 1, "head_dim": 8}),
}

OPTIONAL_SIZES = ["num_key_value_heads", "head_dim", "max_position_embeddings", "expand", "intermediate_size"]


def make(kind: str, dtype: torch.dtype = torch.float32, **options: object) -> CausalBackbone:
    name, heads = KINDS[kind]
    backbone = CausalBackbone(16, name, **{"num_layers": 2, "max_position_embeddings": 40, **heads, **options})
    for parameter in backbone.parameters():  # the scale of trained weights: attention matters
        parameter.data.mul_(6 if parameter.ndim == 2 else 1 + torch.rand(()))
    return backbone.to(dtype)


def assert_equal(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def reference(kind: str, backbone: CausalBackbone, **options: object) -> torch.nn.Module:
    """The `transformers` model with the same weights, configured by hand."""
    dtype = next(backbone.parameters()).dtype
    name, heads = KINDS[kind]
    config_class, model_class, epsilon, expand = {
        "llama": (LlamaConfig, LlamaModel, 1e-5, 4),
        "qwen3": (Qwen3Config, Qwen3Model, 1e-6, 3),
    }[name]
    config = config_class(
        vocab_size=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=heads.get("num_key_value_heads", 4),
        head_dim=heads.get("head_dim", 4),
        intermediate_size=expand * 16,
        max_position_embeddings=40,
        rms_norm_eps=epsilon,
        attn_implementation="eager" if dtype == torch.float32 else "sdpa",  # eager attention rounds to float32
        pad_token_id=None,
        **options,
    )
    model = model_class(config)
    model.norm = torch.nn.Identity()
    model.load_state_dict(backbone.model.state_dict())
    return model.to(dtype).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"attention_bias": True}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ids=["default", "bias", "rope"],
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_transformers(kind, dtype, atol, options):
    backbone = make(kind, dtype, **options)
    tokens = torch.randn(3, 20, 16, dtype=dtype)
    expected = reference(kind, backbone, **options)(inputs_embeds=tokens, use_cache=False).last_hidden_state
    for positions in (None, torch.arange(20).expand(3, -1)):
        out, cache = backbone(tokens, positions)
        assert cache is None
        assert_equal(out, expected, atol)


def test_rope_parameters_change_the_output():
    """Else the parity above would hold for an option that is dropped on both sides."""
    plain, other = make("llama"), make("llama", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    other.load_state_dict(plain.state_dict())
    tokens = torch.randn(1, 10, 16)
    assert (plain(tokens)[0] - other(tokens)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("per_step", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_full(kind, per_step, dtype, atol):
    backbone = make(kind, dtype)
    tokens = torch.randn(3, 12, 16, dtype=dtype)
    full, _ = backbone(tokens)
    cache = backbone.new_kv_cache(3)
    for begin in range(0, 12, per_step):
        positions = torch.arange(begin, begin + per_step).expand(3, -1)
        out, returned = backbone(tokens[:, begin : begin + per_step], positions, kv_cache=cache)
        assert returned is cache
        assert_equal(out, full[:, begin : begin + per_step], atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_of_another_precision(kind, dtype, atol):
    backbone = make(kind)
    tokens = torch.randn(3, 12, 16)
    full, _ = backbone(tokens)
    cache = backbone.new_kv_cache(3, dtype=dtype)
    steps = [backbone(tokens[:, [t]], torch.full((3, 1), t), kv_cache=cache)[0] for t in range(12)]
    assert {pool.dtype for pool in cache.pools} == {dtype}
    assert_equal(torch.cat(steps, 1), full, atol)


ROPES = {
    "base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 20,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}},
    "old base": {"rope_theta": 500.0},
    "old scaling": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
}


@pytest.mark.parametrize("kind", ["llama grouped", "qwen3 grouped"])
@pytest.mark.parametrize("options", ROPES.values(), ids=ROPES)
def test_scaled_positions(options, kind):
    backbone = make(kind, **copy.deepcopy(options))
    tokens = torch.randn(2, 12, 16)
    full, _ = backbone(tokens)
    expected = reference(kind, backbone, **copy.deepcopy(options))(inputs_embeds=tokens).last_hidden_state
    assert_equal(full, expected)
    plain = make(kind)
    plain.load_state_dict(backbone.state_dict())
    assert (plain(tokens)[0] - full).abs().max() > 1e-2, "the option must matter"
    cache = backbone.new_kv_cache(2)
    for t in range(12):
        out, _ = backbone(tokens[:, t : t + 1], torch.full((2, 1), t), kv_cache=cache)
        assert_equal(out[:, 0], full[:, t])


def test_options_are_not_written_to():
    options = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    given = dict(options)
    CausalBackbone(16, num_layers=1, num_heads=2, rope_parameters=given)
    assert given == options


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_lengths_and_slots_of_their_own(kind):
    backbone = make(kind)
    tokens = torch.randn(3, 12, 16)
    full, _ = backbone(tokens)
    pool = backbone.new_kv_cache(5, capacity=12)
    slots = torch.tensor([4, 0, 2])
    lengths = torch.tensor([0, 3, 7])
    for row in (1, 2):
        num = int(lengths[row])
        backbone(tokens[[row], :num], torch.arange(num)[None], kv_cache=pool._replace(rows=slots[[row]]))
    for _ in range(5):
        out, _ = backbone(
            tokens[torch.arange(3), lengths].unsqueeze(1), lengths.unsqueeze(1), kv_cache=pool._replace(rows=slots)
        )
        assert_equal(out[:, 0], full[torch.arange(3), lengths])
        lengths = lengths + 1
    assert all(part[[1, 3]].abs().max() == 0 for part in pool.pools)  # slots of others


@pytest.mark.parametrize("kind", KINDS)
def test_stale_entries_beyond_a_row_are_invisible(kind):
    backbone = make(kind)
    tokens = torch.randn(2, 6, 16)
    clean, dirty = backbone.new_kv_cache(2), backbone.new_kv_cache(2)
    for key, value in zip(dirty.key, dirty.value, strict=True):
        key.fill_(7.0)
        value.fill_(-7.0)
    for t in range(6):
        out = [backbone(tokens[:, t : t + 1], torch.full((2, 1), t), kv_cache=cache)[0] for cache in (clean, dirty)]
        assert torch.equal(*out)


@pytest.mark.parametrize("kind", KINDS)
def test_contract_of_torchrl_backbones(kind):
    backbone = make(kind)
    heads = KINDS[kind][1]
    assert list(inspect.signature(backbone.forward).parameters) == ["features", "positions", "mask", "kv_cache"]
    shape = (backbone.num_layers, backbone.num_heads, backbone.head_dim, backbone.max_seq_len)
    assert shape == (2, 4, heads.get("head_dim", 4), 40)
    cache = backbone.new_kv_cache(3, device=torch.device("cpu"), dtype=torch.float64)
    assert len(cache.key) == len(cache.value) == 2
    assert {pool.shape for pool in cache.pools} == {(3, heads.get("num_key_value_heads", 4), 40, shape[2])}
    assert len({pool.untyped_storage().data_ptr() for pool in cache.pools}) == 4
    assert cache.key[0].dtype == torch.float64
    assert backbone.new_kv_cache(1).value[0].dtype == torch.float32
    cache = backbone.new_kv_cache(3)
    backbone(torch.randn(3, 2, 16), torch.arange(2).expand(3, -1), kv_cache=cache)
    assert all((pool.abs().amax((1, 2, 3)) > 0).all() for pool in cache.pools)
    cleared = backbone.reset_kv_cache(cache, torch.tensor([True, False, True]))
    assert isinstance(cleared, KeyValues)
    for pool in cleared.pools:
        assert (pool.abs().amax((1, 2, 3)) > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], ids=["restart", "go on"])
@pytest.mark.parametrize("kind", KINDS)
def test_mask_selects_what_is_seen(kind, positions):
    """Rotary positions are relative, so it is the mask alone that separates the tokens."""
    backbone = make(kind)
    tokens = torch.randn(2, 7, 16)
    mask = torch.zeros(2, 7, 7, dtype=torch.bool)
    mask[:, :3, :3] = mask[:, 3:, 3:] = True
    positions = torch.tensor(positions).expand(2, -1)
    out, _ = backbone(tokens, positions, mask.tril())
    assert_equal(out, torch.cat([backbone(tokens[:, :3])[0], backbone(tokens[:, 3:])[0]], 1))
    everything = torch.ones_like(mask).tril()
    seen = backbone(tokens, positions, everything)[0]
    assert (out - seen)[:, 3:].abs().max() > 1e-2
    assert torch.equal(backbone(tokens, positions)[0], seen)  # positions that restart hide nothing


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_windows_and_not_through_the_cache(kind):
    backbone = make(kind)
    tokens = torch.randn(2, 5, 16, requires_grad=True)
    backbone(tokens)[0][:, -1].square().sum().backward()
    assert (tokens.grad.abs().amax(-1) > 0).all()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in backbone.named_parameters()} - trained == {"model.embed_tokens.weight"}
    cache = backbone.new_kv_cache(2)
    out, _ = backbone(tokens, torch.arange(5).expand(2, -1), kv_cache=cache)
    assert not out.requires_grad
    assert not any(pool.requires_grad for pool in cache.pools)


def test_a_cache_has_a_slot_for_each_row():
    backbone = make("llama")
    cache = backbone.new_kv_cache(3)
    for call in (backbone, backbone.step):
        with pytest.raises(ValueError, match=r"a slot for each row of features, got 3 for 2\. Give the slots"):
            call(torch.randn(2, 1, 16), torch.zeros(2, 1).long(), kv_cache=cache)
    assert not any(pool.any() for pool in cache.pools)


PASSED_BY = ["model", "model.norm", "model.rotary_emb", "model.layers.1", "model.layers.0.self_attn"]


@pytest.mark.parametrize("name", PASSED_BY)
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_would_act_in_training_only_are_refused(name, hook):
    backbone = make("llama")
    cache = backbone.new_kv_cache(2)
    some = torch.randn(2, 1, 16), torch.zeros(2, 1).long()
    backbone(*some, kv_cache=cache)
    handle = getattr(backbone.get_submodule(name), hook)(lambda *_: None)
    for call in (backbone, backbone.step):
        with pytest.raises(RuntimeError, match=f"{name} must have no forward hooks .*lambda.* Hook projections"):
            call(*some, kv_cache=cache)
    handle.remove()
    backbone(*some, kv_cache=cache)


class Wrapper(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class OtherLayer(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


@pytest.mark.parametrize("name", PASSED_BY)
def test_a_forward_that_was_put_in_is_refused(name):
    backbone = make("llama")
    cache = backbone.new_kv_cache(2)
    some = torch.randn(2, 1, 16), torch.zeros(2, 1).long()
    part = backbone.get_submodule(name)
    forward = part.forward
    part.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    for call in (backbone, backbone.step):
        with pytest.raises(TypeError, match=f"{name} must have the forward of transformers .* Change projections"):
            call(*some, kv_cache=cache)
    part.forward = forward
    backbone(*some, kv_cache=cache)


@pytest.mark.parametrize("kind", [Wrapper, lambda layer: OtherLayer(make("llama").model.config, 1)])
def test_other_layers_are_refused(kind):
    backbone = make("llama")
    backbone.model.layers[1] = layer = kind(backbone.model.layers[1])
    backbone(torch.randn(2, 3, 16))
    cache = make("llama").new_kv_cache(2)
    with pytest.raises(TypeError, match=rf"model.layers.1 must have the forward .* got one of {type(layer).__name__}"):
        backbone(torch.randn(2, 1, 16), torch.zeros(2, 1).long(), kv_cache=cache)


def test_hidden_states_may_have_been_looked_at():
    backbone = make("llama")
    features, cache = torch.randn(2, 1, 16), backbone.new_kv_cache(2)
    seen = backbone.model(inputs_embeds=features, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(seen.hidden_states) == 3
    assert any(module._forward_hooks for module in backbone.modules())
    cached, _ = backbone(features, torch.zeros(2, 1).long(), kv_cache=cache)
    torch.testing.assert_close(cached, backbone(features)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "input_layernorm", "mlp"])
def test_hooks_of_projections_norms_and_mlp_act_in_both_ways(name):
    backbone = make("llama")
    part = backbone.get_submodule(f"model.layers.0.{name}")
    features = torch.randn(2, 3, 16)
    positions = torch.arange(3).repeat(2, 1)
    plain, _ = backbone(features)
    part.register_forward_hook(lambda _, __, out: 2 * out)
    hooked, _ = backbone(features)
    assert (hooked - plain).abs().max() > 1e-3
    cached, _ = backbone(features, positions, kv_cache=backbone.new_kv_cache(2))
    torch.testing.assert_close(cached, hooked, atol=1e-5, rtol=0)


def test_positions_are_needed_with_a_cache():
    backbone = make("llama")
    with pytest.raises(ValueError, match="positions must be given with kv_cache, got None"):
        backbone(torch.randn(1, 1, 16), kv_cache=backbone.new_kv_cache(1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "gpt2"}, "kind must be one of llama, qwen3, got 'gpt2'"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide hidden_dim=16, got 3"),
        ({"num_heads": 16}, "head_dim must be even, got 1"),
        ({"kind": "qwen3", "head_dim": 3}, "head_dim must be even, got 3"),
        (
            {"kind": "llama", "hidden_dim": 18, "num_heads": 4, "head_dim": 8},
            "num_heads must divide hidden_dim=18, got 4",
        ),
        ({"num_hidden_layers": 2}, "num_layers and num_hidden_layers must be the same, got 1 and 2"),
        ({"num_attention_heads": 4}, "num_heads and num_attention_heads must be the same, got 2 and 4"),
        ({"kind": "qwen3", "use_sliding_window": True}, "use_sliding_window must be false, got True"),
        ({"hidden_act": "swash"}, "hidden_act must be an activation of transformers, got 'swash'"),
        ({"hidden_act": []}, r"hidden_act must be an activation of transformers, got \[\]"),
        ({"initializer_range": 3.0}, "options must make a configuration.* smaller or equal to 1.0, got 3.0"),
        ({"num_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads must divide num_heads=4, got 3"),
        *[({name: 0}, f"{name} must be at least 1, got 0") for name in OPTIONAL_SIZES],
        *[({name: -2}, f"{name} must be at least 1, got -2") for name in OPTIONAL_SIZES],
    ],
    ids=str,
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        CausalBackbone(**{"hidden_dim": 16, "num_layers": 1, "num_heads": 2, **options})


ABSURD = [
    *[({name: 2**24 + 2}, f"{name} must be at most [0-9]+, got 16777218") for name in OPTIONAL_SIZES],
    ({"hidden_dim": 2**24 + 2}, "hidden_dim must be at most 16777216, got 16777218"),
    ({"num_heads": 2**24 + 2}, "num_heads must be at most 16777216, got 16777218"),
    ({"num_layers": 4097}, "num_layers must be at most 4096, got 4097"),
    ({"num_layers": None, "num_hidden_layers": 10**9}, "num_layers must be at most 4096, got 1000000000"),
    ({"expand": 2**21}, r"expand \* hidden_dim must be at most 16777216, got 33554432"),
    ({"hidden_dim": 2**20}, r"at most 1e\+11 parameters, got 1.8e\+13 of hidden_dim=1048576, num_layers=1"),
    ({"hidden_dim": 2**14, "num_layers": 4096}, r"parameters, got 1.8e\+13 of .*num_layers=4096"),
    ({"hidden_dim": 2**14, "intermediate_size": 2**24}, r"parameters, got 8.3e\+11 of .*intermediate_size=16777216"),
    ({"hidden_dim": 2**14, "head_dim": 2, "num_heads": 2**22, "kind": "qwen3"}, r"got 5.5e\+11 of .*num_heads=4194304"),
]


@pytest.mark.parametrize(("options", "match"), ABSURD, ids=str)
def test_absurd_sizes_are_refused_before_memory_is_taken(options, match, monkeypatch):
    def build(*_, **__):
        pytest.fail("nothing may be built")

    monkeypatch.setattr(backbone_module, "_make_config", build)
    for family in ("llama", "qwen3"):
        monkeypatch.setitem(FAMILIES, family, FAMILIES[family]._replace(model=build))
    with pytest.raises(ValueError, match=match):
        CausalBackbone(**{"hidden_dim": 16, "num_layers": 1, "num_heads": 2, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_estimated_number_of_parameters(kind, monkeypatch):
    """The limit counts the matrices of all layers."""
    backbone = make(kind)
    counted = sum(weight.numel() for weight in backbone.model.layers.parameters() if weight.ndim == 2)
    monkeypatch.setattr(backbone_module, "MAX_PARAMETERS", counted)
    make(kind)
    monkeypatch.setattr(backbone_module, "MAX_PARAMETERS", counted - 1)
    with pytest.raises(ValueError, match="sizes must make at most"):
        make(kind)


BAD_POSITIONS = {
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, ValueError, "rope_type must be one of default, .*'dynamic'"),
    "longrope": (
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
        ValueError,
        "rope_type must be one of default, linear, llama3, yarn, got 'longrope'",
    ),
    "unknown": ({"rope_type": "spiral"}, ValueError, "rope_type must be one of .* got 'spiral'"),
    "no word": ({"rope_type": ["linear"]}, ValueError, r"rope_type must be one of .* got \['linear'\]"),
    "no factor": ({"rope_type": "linear"}, ValueError, "options must make a configuration .*Missing required keys"),
    "no object": (5, TypeError, "options must make a configuration of transformers"),
    "base of text": ({"rope_theta": "big"}, TypeError, "options must make a configuration of transformers"),
    "base zero": ({"rope_theta": 0.0}, ValueError, "rope_parameters must give finite, positive frequencies"),
    "base infinite": ({"rope_theta": math.inf}, ValueError, "rope_parameters must give finite, positive frequencies"),
    "negative factor": (
        {"rope_type": "linear", "factor": -1.0},
        ValueError,
        "rope_parameters must give finite, positive frequencies",
    ),
    "division by zero": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
        ValueError,
        "options must make a configuration of transformers, got: division by zero",
    ),
    "attention of text": (
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"},
        TypeError,
        "options must make a configuration of transformers",
    ),
    "part of a head": (
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        ValueError,
        "rope_parameters must give finite, positive frequencies for the whole head",
    ),
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("rope", "error", "match"), BAD_POSITIONS.values(), ids=BAD_POSITIONS)
def test_bad_positions(rope, error, match, kind):
    with pytest.raises(error, match=match):
        CausalBackbone(16, kind, num_layers=1, num_heads=2, head_dim=8, rope_parameters=rope)


def test_a_shape_without_memory():
    with torch.device("meta"):
        backbone = make("llama", **copy.deepcopy(ROPES["llama3"]))
    assert backbone.model.layers[0].mlp.up_proj.weight.device.type == "meta"


def test_positions_per_kind_of_layer():
    with pytest.raises(ValueError, match=r"rope_type must be one of .* got None"):
        CausalBackbone(16, "qwen3", num_layers=1, num_heads=2, rope_parameters={"full_attention": {"factor": 2.0}})


def test_positions_are_said_in_one_way():
    with pytest.raises(ValueError, match="rope_parameters must hold all about positions, got rope_theta besides"):
        CausalBackbone(16, num_layers=1, num_heads=2, rope_theta=5.0, rope_parameters={"rope_theta": 6.0})


def test_options_of_wrong_type():
    with pytest.raises(TypeError, match="'attention_bias' expected bool, got str"):
        CausalBackbone(16, num_layers=1, num_heads=2, attention_bias="yes")


def test_missing_sizes():
    with pytest.raises(TypeError, match="num_layers or num_hidden_layers must be given, got neither"):
        CausalBackbone(16, num_heads=2)
    with pytest.raises(TypeError, match="num_heads or num_attention_heads must be given, got neither"):
        CausalBackbone(16, num_layers=2)


@pytest.mark.parametrize(("options", "kind"), [({}, "llama"), ({"head_dim": 8}, "qwen3")])
def test_kind_by_default(options, kind):
    backbone = CausalBackbone(16, num_hidden_layers=1, num_attention_heads=2, use_sliding_window=False, **options)
    assert (backbone.kind, backbone.num_layers, backbone.num_heads) == (kind, 1, 2)
    named = CausalBackbone(16, num_layers=1, num_hidden_layers=1, num_heads=2, kind="llama", **options)
    assert (named.kind, named.head_dim) == ("llama", 8)


@pytest.mark.parametrize("value", ["2", True, 2.0])
@pytest.mark.parametrize("name", ["hidden_dim", "num_layers", "num_heads", *OPTIONAL_SIZES])
def test_sizes_of_wrong_type(name, value):
    with pytest.raises(TypeError, match=f"CausalBackbone: {name} must be an integer, got {value!r}"):
        CausalBackbone(**{"hidden_dim": 16, "num_layers": 1, "num_heads": 2, name: value})


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("num_layer", "num_layers"), ("dropuot", "attention_dropout"), ("rope_parameter", "rope_parameters")],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_unknown_options(kind, option, nearest):
    with pytest.raises(TypeError, match=f"unknown option '{option}'. The nearest are .*{nearest}"):
        CausalBackbone(16, kind, num_layers=1, num_heads=2, **{option: 0.5})


def test_a_typo_in_a_needed_option_is_named():
    with pytest.raises(TypeError, match=r"unknown option 'num_layer'\. The nearest are num_layers"):
        CausalBackbone(16, num_layer=1, num_heads=2)


@pytest.mark.parametrize("option", ["hidden_size", "vocab_size", "use_cache", "return_dict", "layer_types"])
def test_options_that_are_not_the_users(option):
    with pytest.raises(TypeError, match=f"unknown option '{option}'"):
        CausalBackbone(16, num_layers=1, num_heads=2, **{option: 1})


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_options_of_the_configuration(kind):
    backbone = CausalBackbone(16, kind, num_layers=1, num_heads=2, initializer_range=0.5, attention_dropout=0.25)
    assert backbone.model.config.initializer_range == 0.5
    assert backbone.model.layers[0].self_attn.attention_dropout == 0.25
    assert 0.4 < backbone.model.layers[0].mlp.up_proj.weight.std() < 0.6
