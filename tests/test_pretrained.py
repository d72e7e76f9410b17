"""Backbones from language models: parity with `transformers`, what is downloaded, checkpoints that are refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from hub import Commit, Repo, hub_fixture  # noqa: F401
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from torchrl_mouse.modules import CausalBackbone, backbone_kwargs_from_pretrained, load_pretrained_layers

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama without head": ("LlamaModel", "LlamaConfig", {}),
    "llama all heads": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 0.1}),
    "llama scaled": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama biases": ("LlamaForCausalLM", "LlamaConfig", {**BIASES, "hidden_act": "gelu"}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 without head": ("Qwen3Model", "Qwen3Config", {"head_dim": 8}),
    "qwen3 scaled": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8, "rope_parameters": LLAMA3}),
}
SHARDS = {"one file": {}, "shards": {"max_shard_size": "8KB"}}
BOTH = (
    backbone_kwargs_from_pretrained,
    lambda source, **options: load_pretrained_layers(backbone(), source, **options),
)


def language_model(name="llama", **options):
    *classes, own = MODELS[name]
    model_class, config_class = (getattr(transformers, each) for each in classes)
    config = config_class(**{**SIZES, **json.loads(json.dumps(own)), **options}, attn_implementation="sdpa")
    model = model_class(config)
    for parameter in model.parameters():  # the scale of trained weights: attention and biases matter
        parameter.data = torch.randn_like(parameter) * (0.12 if parameter.ndim == 2 else 1.0)
    return model.eval()


def backbone(hidden_dim=16, **options):
    """A backbone of the sizes of `language_model("llama")`."""
    sizes = {"num_layers": 3, "num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    return CausalBackbone(hidden_dim, **{**sizes, **options})


def stack_of(model, num_layers=3):
    """The decoder layers alone, run by `transformers`."""
    stack = getattr(model, "model", model)
    stack.norm = torch.nn.Identity()
    stack.layers = stack.layers[:num_layers]
    stack.config.num_hidden_layers = num_layers
    return lambda tokens: stack(inputs_embeds=tokens).last_hidden_state


def edit_json(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def edit_weights(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


@pytest.fixture
def folder(tmp_path):
    language_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    language_model().save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def shard_of(folder, name):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


@pytest.mark.parametrize("num_layers", [3, 2])
@pytest.mark.parametrize("sharding", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name, sharding, num_layers, tmp_path):
    model = language_model(name)
    model.save_pretrained(tmp_path, **sharding)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == bool(sharding)
    overrides = {} if num_layers == 3 else {"num_layers": num_layers}
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(tmp_path, **overrides)
    assert json.loads(json.dumps(kwargs)) == kwargs
    ours = CausalBackbone(hidden_dim, **kwargs)
    load_pretrained_layers(ours, tmp_path)
    tokens = torch.randn(2, 40, 16)
    expected = stack_of(model, num_layers)(tokens)
    torch.testing.assert_close(ours(tokens)[0], expected, atol=1e-5, rtol=0)


def test_what_is_read(tmp_path):
    language_model("llama scaled", rms_norm_eps=0.25).save_pretrained(tmp_path)
    assert backbone_kwargs_from_pretrained(tmp_path) == (
        {
            "kind": "llama",
            "num_layers": 3,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "rms_norm_eps": 0.25,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": LLAMA3,
        },
        16,
    )


def test_configurations_of_older_versions(folder):
    """Base and scaling beside each other, the scaling's kind as ``type``; defaults were left out."""
    scaling = {"type": "linear", "factor": 4.0}
    changes = {"rope_theta": 250.0, "rope_scaling": scaling, "rope_parameters": ..., "head_dim": ..., "mlp_bias": ...}
    edit_json(folder / "config.json", **changes, num_key_value_heads=None)
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(folder)
    assert kwargs["rope_parameters"] == {"type": "linear", "rope_type": "linear", "factor": 4.0, "rope_theta": 250.0}
    assert not {"head_dim", "num_key_value_heads", "rope_theta"} & set(kwargs)
    ours = CausalBackbone(hidden_dim, **kwargs)
    assert (ours.kind, ours.head_dim, ours.model.config.num_key_value_heads) == ("llama", 4, 4)
    expected = transformers.LlamaConfig.from_pretrained(folder)
    assert ours.model.config.rope_parameters == expected.rope_parameters
    assert ours.model.config.rms_norm_eps == expected.rms_norm_eps


def test_original_length_survives_another_maximum(tmp_path):
    """Scaled positions depend on the length that the model was trained with, not on ours."""
    rope = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    language_model("llama scaled").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", rope_parameters=rope)
    kwargs, _ = backbone_kwargs_from_pretrained(tmp_path, max_position_embeddings=1000)
    assert kwargs["max_position_embeddings"] == 1000
    assert kwargs["rope_parameters"]["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"num_hidden_layers": 2}, {"num_layers": 2}),
        ({"num_attention_heads": 2, "head_dim": 8}, {"num_heads": 2, "head_dim": 8}),
        ({"expand": 2}, {"intermediate_size": 32}),
        ({"intermediate_size": 8}, {"intermediate_size": 8}),
        ({"rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0}),
    ],
    ids=str,
)
def test_overrides(overrides, expected, folder):
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(folder, **overrides)
    ours = CausalBackbone(hidden_dim, **kwargs)
    config = ours.model.config
    built = {
        "num_layers": ours.num_layers,
        "num_heads": ours.num_heads,
        "head_dim": ours.head_dim,
        "intermediate_size": config.intermediate_size,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    unchanged = {"num_layers": 3, "num_heads": 4, "head_dim": 4, "intermediate_size": 24, "rope_theta": 10000.0}
    assert built == {**unchanged, **expected}


def test_sliding_windows_are_refused_unless_overridden(tmp_path):
    model = language_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model.save_pretrained(tmp_path)
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_sliding_window must be false, got True"):
        CausalBackbone(hidden_dim, **kwargs)
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(tmp_path, use_sliding_window=False)
    ours = CausalBackbone(hidden_dim, **kwargs)
    load_pretrained_layers(ours, tmp_path)
    tokens = torch.randn(2, 12, 16)
    expected = stack_of(model)(tokens)
    torch.testing.assert_close(ours(tokens[:, :8])[0], expected[:, :8], atol=1e-5, rtol=0)  # within the window
    assert (ours(tokens)[0] - expected)[:, 9:].abs().max() > 1e-3


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_the_type_of_the_backbone(stored, dtype, tmp_path):
    model = language_model().to(stored)
    model.save_pretrained(tmp_path)
    ours = backbone().to(dtype)
    load_pretrained_layers(ours, tmp_path)
    for name, weight in ours.model.layers.named_parameters():
        assert weight.dtype == dtype
        assert weight.requires_grad
        assert torch.equal(weight, model.model.layers.get_parameter(name).to(dtype))


@pytest.mark.parametrize("family", ["GPT2", "Mistral"])
@pytest.mark.parametrize("function", BOTH, ids=["kwargs", "layers"])
def test_other_families(function, family, tmp_path):
    getattr(transformers, f"{family}Config")().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type must be one of llama, qwen3, got '{family.lower()}'"):
        function(tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{", ValueError, "config.json of .* must be JSON"),
        ("\xff", ValueError, "config.json of .* must be JSON"),
        ("[" * 100_000, ValueError, "config.json of .* must be JSON"),
        ("[]", ValueError, "config.json must be a JSON object, got list"),
        ('{"model_type": ["llama"]}', ValueError, r"model_type must be one of llama, qwen3, got \['llama'\]"),
        ("{}", ValueError, "model_type must be one of llama, qwen3, got None"),
        ('{"model_type": "llama", "hidden_size": "16"}', TypeError, "hidden_size must be an integer, got '16'"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', ValueError, "num_hidden_layers must be at least 1, got 0"),
        ('{"model_type": "qwen3", "num_attention_heads": 2.0}', TypeError, "num_attention_heads must be an integer"),
        ('{"model_type": "llama", "rope_scaling": 5}', TypeError, "kwargs_from_pretrained: options must make a config"),
        (" " * (2**24 + 1), ValueError, "config.json must have at most 16777216 bytes, got 16777217"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else value.__name__,
)
def test_bad_configurations(text, error, match, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(error, match=match):
        backbone_kwargs_from_pretrained(tmp_path)


def test_a_number_of_layers_from_a_stranger_costs_nothing(tmp_path):
    """The configuration class of Qwen3 makes a list of them."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": 1000000000000}')
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_layers must be at most 4096"):
        CausalBackbone(hidden_dim, **kwargs)


@pytest.mark.parametrize("source", ["gpt2", "no/such/folder", "./nothing", "../nothing", "owner/"])
@pytest.mark.parametrize("function", BOTH, ids=["kwargs", "layers"])
def test_neither_folder_nor_repository(function, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"a folder or a Hub repository 'owner/name', got '{source}'"):
        function(source)
    (tmp_path / "config.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"must hold config.json, got config.txt"):
        function(tmp_path)


def refused(ours, source, error, match):
    """Checks that a checkpoint is refused, and that no weight has changed."""
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    with pytest.raises(error, match=match):
        load_pretrained_layers(ours, source)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_layers": 4}, "at most the checkpoint's num_layers=3, got 4"),
        ({"kind": "qwen3"}, "the checkpoint's kind='llama', got 'qwen3'"),
        ({"num_heads": 2, "head_dim": 8}, "the checkpoint's kind='llama', got 'qwen3'"),
        ({"num_heads": 2, "head_dim": 8, "kind": "llama"}, "the checkpoint's num_heads=4, got 2"),
        ({"head_dim": 8, "kind": "llama"}, "the checkpoint's head_dim=4, got 8"),
        ({"num_key_value_heads": 4}, r"layers.0.self_attn.k_proj.weight has shape \(8, 16\) instead of \(16, 16\)"),
        ({"intermediate_size": 32}, r"up_proj.weight has shape \(24, 16\) instead of \(32, 16\).* and 6 more"),
        ({"hidden_dim": 32, "head_dim": 4, "kind": "llama"}, r"layernorm.weight has shape \(16,\) instead of \(32,\)"),
        ({"attention_bias": True}, "missing layers.0.self_attn.q_proj.bias; .* and 9 more"),
    ],
    ids=str,
)
def test_backbones_of_other_make(options, match, folder):
    refused(backbone(**options), folder, ValueError, match)


def test_weights_that_the_backbone_has_no_place_for(tmp_path):
    language_model("llama biases").save_pretrained(tmp_path)
    refused(backbone(attention_bias=True), tmp_path, ValueError, "unexpected layers.0.mlp.down_proj.bias; .* 6 more")


def test_frequencies_in_old_files_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder / "model.safetensors", lambda weights: weights.update({name: torch.ones(2)}))
    load_pretrained_layers(backbone(), folder)


LAST = "model.layers.2.mlp.down_proj.weight"


def test_missing_weights(folder):
    edit_weights(folder / "model.safetensors", lambda weights: weights.pop(LAST))
    refused(backbone(), folder, ValueError, "got missing layers.2.mlp.down_proj.weight")
    load_pretrained_layers(backbone(num_layers=2), folder)  # which need not be there


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(kind, folder):
    def quantise(weights):
        weights[LAST] = weights[LAST].to(kind)

    edit_weights(folder / "model.safetensors", quantise)
    refused(backbone(), folder, ValueError, "layers.2.mlp.down_proj.weight is of type (I8|F8_E4M3), none of F64, F32")


@pytest.mark.parametrize("source", ["folder", "sharded"])
def test_truncated_weights(source, request):
    source = request.getfixturevalue(source)
    file = source / ("model.safetensors" if source.name == "model" else shard_of(source, LAST))
    file.write_bytes(file.read_bytes()[:-4])
    refused(backbone(), source, ValueError, f"{file.name} must be a whole safetensors file, got: .*incomplete")


def test_missing_shard(sharded):
    name = shard_of(sharded, LAST)
    (sharded / name).unlink()
    refused(backbone(), sharded, FileNotFoundError, f"must hold {name}, got config.json")
    load_pretrained_layers(backbone(num_layers=1), sharded)  # which it does not hold


def test_shard_without_what_the_index_says(sharded):
    name = shard_of(sharded, LAST)
    edit_weights(sharded / name, lambda weights: weights.pop(LAST))
    refused(backbone(), sharded, ValueError, f"no {LAST} in {name}")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/x.safetensors", "..", "sub/x.safetensors", "a\\b.safetensors", "x.bin", "x", 5],
)
def test_shards_outside_of_the_folder(name, sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    if isinstance(name, str) and not name.startswith("/etc"):  # were it followed, it would be found
        (sharded / "sub").mkdir()
        shutil.copy(sharded / weight_map[LAST], sharded / name if name != ".." else sharded.parent / "x.safetensors")
    edit_json(index, weight_map={**weight_map, LAST: name})
    refused(backbone(), sharded, ValueError, re.escape(f"plain .safetensors files of its own folder, got {name!r}"))


@pytest.mark.parametrize("weight_map", [..., None, ["model.safetensors"]])
def test_index_without_a_map(weight_map, sharded):
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    refused(backbone(), sharded, ValueError, r"index.json must hold a weight_map, got (NoneType|list)")


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("pytorch_model.bin", ValueError, "got pickled ones only, which can run code .*convert them: AutoModel"),
        ("consolidated.00.pth", ValueError, "got pickled ones only, which can run code .*convert them: AutoModel"),
        ("notes.txt", FileNotFoundError, "must have model.safetensors or .*index.json, got config.json, .* notes.txt"),
    ],
)
def test_no_weights_that_may_be_read(name, error, match, folder):
    (folder / "model.safetensors").rename(folder / name)
    refused(backbone(), folder, error, match)


def publish(hub, folder, **branches):
    """Puts a folder on the Hub; other branches are of other folders."""

    def commit(source):
        return [Commit("Upload", {file.name: file.read_bytes() for file in source.iterdir()})]

    versions = {"main": folder, **branches}
    hub.repos["model", "user/model"] = Repo(False, {branch: commit(source) for branch, source in versions.items()})
    return "user/model"


def downloaded(hub):
    return {request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET"}


def test_only_the_shards_that_hold_needed_layers_are_downloaded(hub, sharded):
    repo = publish(hub, sharded)
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(repo, num_layers=1)
    assert downloaded(hub) == {"config.json"}
    ours = CausalBackbone(hidden_dim, **kwargs)
    load_pretrained_layers(ours, repo)
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weight_map.items() if ".layers.0." in name}
    assert needed < set(weight_map.values())
    assert downloaded(hub) == {"config.json", "model.safetensors.index.json", *needed}
    # A push between two downloads must not mix two models: after the first, a branch is no longer asked for.
    commit = hub.commits(repo)[0].oid
    assert all(f"/{commit}/" in str(request) for request in hub.requests if ".safetensors" in str(request))
    local = CausalBackbone(hidden_dim, **kwargs)
    load_pretrained_layers(local, sharded)
    tokens = torch.randn(1, 5, 16)
    assert torch.equal(ours(tokens)[0], local(tokens)[0])


def test_revisions(hub, folder, tmp_path):
    other = tmp_path / "other"
    model = language_model(num_hidden_layers=2)
    model.save_pretrained(other)
    repo = publish(hub, folder, v2=other)
    assert backbone_kwargs_from_pretrained(repo)[0]["num_layers"] == 3
    assert backbone_kwargs_from_pretrained(repo, revision="v2")[0]["num_layers"] == 2
    ours = backbone(num_layers=2)
    load_pretrained_layers(ours, repo, revision="v2")
    assert torch.equal(ours.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(RevisionNotFoundError, match="404"):
        backbone_kwargs_from_pretrained(repo, revision="v3")


@pytest.mark.parametrize("function", BOTH, ids=["kwargs", "layers"])
def test_private_repositories(function, hub, folder):
    repo = publish(hub, folder)
    hub.repos["model", repo].private = True
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        function(repo, token=False)
    function(repo, token=hub.token)


@pytest.mark.parametrize("function", BOTH, ids=["kwargs", "layers"])
def test_what_was_downloaded_is_enough_without_network(function, hub, sharded):
    repo = publish(hub, sharded)
    function(repo)
    hub.fail_on = ""  # every request
    function(repo)


def test_forced_download(hub, folder):
    repo = publish(hub, folder)
    for force, times in ((False, 1), (False, 1), (True, 2)):
        backbone_kwargs_from_pretrained(repo, force_download=force)
        assert len([request for request in hub.requests if request.method == "GET"]) == times


def test_repositories_without_what_is_needed(hub, folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    repo = publish(hub, folder)
    refused(backbone(), repo, ValueError, "got pickled ones only")
    assert "pytorch_model.bin" not in downloaded(hub)
    (folder / "config.json").unlink()
    repo = publish(hub, folder)
    with pytest.raises(EntryNotFoundError, match="404"):
        backbone_kwargs_from_pretrained(repo)
