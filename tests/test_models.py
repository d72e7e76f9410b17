"""The model: building, running, and its files."""

import dataclasses
import json
import math
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torchrl.data import Categorical, OneHot
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import SoftUpdate
from transformers import LlamaConfig, LlamaForCausalLM

from torchrl_mouse import checkpoints, schema
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.functional import vec_dqn_scores
from torchrl_mouse.models import MouseConfig, MouseModel, init_from_pretrained_backbone
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.schema import from_mouse_records

EMBEDDING = {"max_num_actions": 3, "max_num_obs_continuous": 2}
TINY = {
    "hidden_dim": 16,
    "window": 8,
    "embedding_kwargs": EMBEDDING,
    "backbone_kwargs": {"kind": "llama", "num_layers": 1, "num_heads": 2, "expand": 1},
    "dqn_head_kwargs": {"hidden_dim": 8},
    "sp_head_kwargs": {"num_layers": 1},
}
FILES = ["config.json", "model.safetensors"]
BACKBONES = {"llama": TINY["backbone_kwargs"], "qwen3": {**TINY["backbone_kwargs"], "kind": "qwen3"}, "none": None}
EVERY_HEAD = {f"{name}_head_kwargs": {"hidden_dim": 8} for name in ("dqn", "sp", "sv")} | {
    "vec_dqn_head_kwargs": {"hidden_dim": 8, "vec_dim": 2}
}


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    model = MouseModel(MouseConfig(**{**TINY, **options}))
    if "dqn" in model.config.heads:  # A target that lags behind.
        for parameter in model.dqn_head.target.parameters():
            parameter.data.normal_()
    return model


def make_steps(batch=2, num=5):
    generator = torch.Generator().manual_seed(3)
    records = {
        "action": torch.randint(3, (batch, num), generator=generator),
        "reward": torch.randn(batch, num, generator=generator),
        "done": torch.randint(3, (batch, num), generator=generator),
        "time": torch.arange(num).repeat(batch, 1),
        "obs_continuous": torch.randn(batch, num, 2, generator=generator),
    }
    steps = from_mouse_records(TensorDict(records, [batch, num]))
    steps[schema.STREAM] = torch.arange(batch).reshape(batch, 1, 1).repeat(1, num, 1)
    return steps


def run(model, steps):
    with set_recurrent_mode(True), torch.no_grad():
        return model(steps.clone())


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert set(ours) == set(theirs)
    return all(torch.equal(ours[name], theirs[name]) for name in ours if name != "trunk.weight_version")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_forward_writes_hidden_and_every_head(backbone):
    model = make_model(backbone_kwargs=BACKBONES[backbone], **EVERY_HEAD)
    out = run(model, make_steps())
    assert model.out_keys == ["hidden", "vec_dqn", "dqn", "sp", "sv"]
    assert out["hidden"].shape == (2, 5, 16)
    assert out["dqn"].shape == out["sp"].shape == out["sv"].shape == (2, 5, 3)
    assert out["vec_dqn"].shape == (2, 5, 3, 2)
    assert torch.equal(out["dqn"], model.dqn_head.online(out["hidden"]))
    assert torch.equal(out["vec_dqn"], model.vec_dqn_head.online(out["hidden"]))
    assert torch.equal(out["sp"], model.sp_head(out["hidden"]))


def test_forward_step_by_step_agrees():
    model, steps = make_model(), make_steps()
    window = run(model, steps)
    for step in range(steps.shape[1]):
        out = model(steps[:, step].clone())
        for key in model.out_keys:
            assert torch.allclose(out[key], window[key][:, step], atol=1e-5), (key, step)


def test_in_keys_are_what_the_trunk_reads():
    model, steps = make_model(), make_steps()
    with set_recurrent_mode(True):
        assert "dqn" in model(steps.select(*model.in_keys))


def test_head_is_a_module_on_hidden():
    model = make_model()
    hidden = torch.randn(4, 16)
    out = model.head("dqn")(TensorDict({"hidden": hidden}, [4]))
    assert torch.equal(out["dqn"], model.dqn_head.online(hidden))
    owned = {id(parameter) for parameter in model.dqn_head.online.parameters()}
    assert {id(parameter) for parameter in model.head("dqn").parameters()} == owned


def test_missing_head():
    with pytest.raises(KeyError, match=r"head must be one of the model's \(sp\), got 'dqn'"):
        make_model(dqn_head_kwargs=None).head("dqn")
    bare = make_model(dqn_head_kwargs=None, sp_head_kwargs=None)
    assert bare.out_keys == ["hidden"]
    with pytest.raises(KeyError, match=r"head must be one of the model's \(none\), got ''"):
        bare.actor(Categorical(3))


@pytest.mark.parametrize(
    ("options", "head", "expected"),
    [
        ({}, None, "dqn"),
        ({"action_head": "sp"}, None, "sp"),
        ({}, "sp", "sp"),
        ({"dqn_head_kwargs": None}, None, "sp"),
        ({"dqn_head_kwargs": {"num_layers": 0}}, None, "sp"),
        ({**EVERY_HEAD, "sp_head_kwargs": None, "dqn_head_kwargs": None, "vec_dqn_head_kwargs": None}, None, "sv"),
    ],
)
@pytest.mark.parametrize("spec", [Categorical, OneHot])
def test_actor_takes_the_best_action_of_its_head(options, head, expected, spec):
    model = make_model(**options)
    steps = make_steps()[:, 0]
    out = model.actor(spec(3), head=head)(steps.clone())
    assert expected in out
    assert torch.equal(schema.to_ids(out["action"], 3, 1, "action"), out[expected].argmax(-1))


def test_the_vector_head_comes_first():
    model = make_model(**EVERY_HEAD)
    steps = make_steps()[:, 0]
    out = model.actor(Categorical(3))(steps.clone())
    assert torch.equal(out["action"], vec_dqn_scores(out["vec_dqn"]).argmax(-1))


def test_actor_of_fewer_or_masked_actions():
    model = make_model()
    steps = make_steps(batch=64)[:, 0]
    values = model(steps.clone())["dqn"]
    first = model.actor(Categorical(2), num_actions=2)(steps.clone())["action"]
    assert torch.equal(first, values[:, :2].argmax(-1))
    steps[schema.ACTION_MASK] = torch.tensor([True, False, True]).expand(64, 3)
    masked = model.actor(Categorical(3), action_mask_key=schema.ACTION_MASK)(steps.clone())["action"]
    assert torch.equal(masked, values[:, ::2].argmax(-1) * 2)


def test_actor_of_another_action_space():
    with pytest.raises(ValueError, match="must have the head's 3 actions, got 4"):
        make_model().actor(Categorical(4))


# Configuration


def test_config_round_trips_through_json():
    config = MouseConfig(**{**TINY, "action_head": "sp", "backbone_kwargs": BACKBONES["qwen3"]})
    assert MouseConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"num_layers": 1, "num_heads": 2}, "llama"),
        ({"num_layers": 1, "num_heads": 2, "head_dim": 8}, "qwen3"),
        ({"num_layers": 1, "num_heads": 2, "head_dim": None}, "llama"),
        ({"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}, "qwen3"),
        ({"kind": "llama", "num_layers": 1, "num_heads": 2, "head_dim": 8}, "llama"),
        ({}, None),
        (None, None),
    ],
)
def test_kind_of_backbone_where_the_configuration_does_not_say(kwargs, kind):
    config = MouseConfig(**{**TINY, "backbone_kwargs": kwargs})
    assert (config.backbone_kwargs or {}).get("kind") == kind
    backbone = MouseModel(config).trunk.backbone
    assert (None if backbone is None else backbone.kind) == kind


def test_options_without_effect_are_dropped_with_a_warning():
    with pytest.warns(UserWarning, match="embedding_kwargs holds 'obs_continuous_encoder', which has no effect"):
        config = MouseConfig(embedding_kwargs={**EMBEDDING, "obs_continuous_encoder": "fourier"})
    assert config.embedding_kwargs == EMBEDDING


def test_config_defaults_do_not_share_state():
    assert MouseConfig().backbone_kwargs is not MouseConfig().backbone_kwargs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_kwargs": {"max_num_obs_continuous": 2}}, "must hold max_num_actions >= 1 for the dqn head, got 0"),
        ({"embedding_kwargs": {"max_num_actions": 0}}, "must hold max_num_actions >= 1 for the dqn head, got 0"),
        ({"gaussian_head_kwargs": {}}, "must hold max_num_action_continuous >= 1 for the gaussian head, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 2**30}, "window must be at most 1048576, got 1073741824"),
        ({"hidden_dim": -16}, "hidden_dim must be at least 1, got -16"),
        ({"action_head": "vec_dqn"}, r"one of the model's heads \(dqn, sp\), got 'vec_dqn'"),
        ({"action_head": "sp", "sp_head_kwargs": None}, r"one of the model's heads \(dqn\), got 'sp'"),
    ],
)
def test_config_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MouseConfig(**{**TINY, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": "16"}, "hidden_dim must be int, got '16'"),
        ({"hidden_dim": True}, "hidden_dim must be int, got True"),
        ({"window": 8.0}, r"window must be int, got 8\.0"),
        ({"embedding_kwargs": None}, "embedding_kwargs must be dict, got None"),
        ({"embedding_kwargs": {"max_num_actions": "3"}}, "embedding_kwargs: max_num_actions must be int, got '3'"),
        ({"embedding_kwargs": {"std": "big"}}, "embedding_kwargs: std must be float, got 'big'"),
        ({"embedding_kwargs": {"include_action_token": 1}}, "include_action_token must be bool or None, got 1"),
        ({"dqn_head_kwargs": [8]}, r"dqn_head_kwargs must be dict or None, got \[8\]"),
        ({"dqn_head_kwargs": {"hidden_dim": 8.5}}, r"dqn_head_kwargs: hidden_dim must be int, got 8\.5"),
        ({"vec_dqn_head_kwargs": {"vec_dim": "2"}}, "vec_dqn_head_kwargs: vec_dim must be int, got '2'"),
        (
            {"backbone_kwargs": {"num_layers": "1", "num_heads": 2}},
            r"num_layers must be int.*, got '1'",
        ),
        ({"action_head": 3}, "action_head must be str or None, got 3"),
    ],
)
def test_config_of_wrong_types(options, message):
    with pytest.raises(TypeError, match=message):
        MouseConfig(**{**TINY, **options})


@pytest.mark.parametrize("name", ["hiden_dim", "vec_dqn_head", "__class__"])
def test_config_unknown_option(name):
    with pytest.raises(ValueError, match=f"unknown option '{name}'. The options are hidden_dim, window"):
        MouseConfig.from_dict({"hidden_dim": 16, name: 1})


@pytest.mark.parametrize("name", ["hidden_dim", "embedding_kwargs", "backbone_kwargs"])
def test_config_without_a_required_option(name):
    with pytest.raises(ValueError, match=f"must hold hidden_dim, embedding_kwargs, backbone_kwargs; got no '{name}'"):
        MouseConfig.from_dict({option: value for option, value in TINY.items() if option != name})


@pytest.mark.parametrize("part", ["embedding_kwargs", "dqn_head_kwargs", "sp_head_kwargs", "trunk_kwargs"])
def test_unknown_option_of_a_part(part):
    options = {**TINY, part: {**TINY.get(part, {}), "no_such_option": 1}}
    with pytest.raises(TypeError, match=f"{part}: unknown option 'no_such_option'. The options are "):
        MouseConfig(**options)


def test_unknown_option_and_family_of_the_backbone():
    for options, error, match in (
        ({"no_such_option": 1}, TypeError, "unknown option 'no_such_option'"),
        ({"kind": "gpt2"}, ValueError, "backbone_kwargs: kind must be one of llama, qwen3, gru, got 'gpt2'"),
    ):
        with pytest.raises(error, match=match):
            make_model(backbone_kwargs={**TINY["backbone_kwargs"], **options})


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_files_round_trip_exactly(tmp_path, backbone, dtype):
    model = make_model(backbone_kwargs=BACKBONES[backbone], action_head="sp", **EVERY_HEAD).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = MouseModel.from_pretrained(str(tmp_path / "new" / "folder"))
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == FILES
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    assert not torch.equal(
        loaded.dqn_head.target.layers[0].linear.weight, loaded.dqn_head.online.layers[0].linear.weight
    )
    steps = make_steps()
    assert (run(loaded, steps).select(*model.out_keys) == run(model, steps).select(*model.out_keys)).all()
    requires = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == requires


def test_weights_have_mouses_names(tmp_path):
    make_model().save_pretrained(tmp_path)
    layer = "backbone.layers.0."
    expected = {"backbone.embed_tokens.weight", "sp_head.norm.weight"}
    expected |= {f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention")}
    expected |= {f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"}
    expected |= {f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    expected |= {f"embedder.{name}_embedder.embed.weight" for name in ("action", "done", "type")}
    for name in ("obs_continuous", "reward"):
        expected |= {f"embedder.{name}_embedder.rff.{part}" for part in ("freqs", "phases", "weight")}
    for network in ("online", "target"):
        head = f"dqn_head.{network}"
        expected |= {f"{head}.norm.weight", f"{head}.layers.0.linear.weight", f"{head}.layers.0.linear.bias"}
        expected |= {f"{head}.layers.1.weight", f"{head}.layers.1.bias"}
    expected |= {"sp_head.layers.0.weight", "sp_head.layers.0.bias"}
    assert set(load_file(tmp_path / "model.safetensors")) == expected


def test_a_second_model_replaces_the_first(tmp_path):
    make_model(seed=0).save_pretrained(tmp_path)
    second = make_model(seed=1, hidden_dim=8, dqn_head_kwargs=None)
    second.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    loaded = MouseModel.from_pretrained(tmp_path)
    assert loaded.config == second.config
    assert same_weights(loaded, second)


def test_saving_over_a_loaded_model(tmp_path):
    make_model(seed=0).save_pretrained(tmp_path)
    loaded, second = MouseModel.from_pretrained(tmp_path), make_model(seed=1)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    second.save_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


class DiskFullError(Exception):
    pass


def fails(at_call, real):
    calls = []

    def replacement(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call:
            raise DiskFullError("no space left")
        return real(*args, **kwargs)

    return replacement


@pytest.mark.parametrize(
    ("owner", "name", "at_call"),
    [(checkpoints, "save_file", 1), (Path, "write_text", 1), (os, "replace", 1), (os, "replace", 2)],
    ids=["weights", "config", "first move", "second move"],
)
def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch, owner, name, at_call):
    old = make_model(seed=0)
    old.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails(at_call, getattr(owner, name)))
        with pytest.raises(DiskFullError, match="no space left"):
            make_model(seed=1, hidden_dim=8).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    loaded = MouseModel.from_pretrained(tmp_path)
    assert loaded.config == old.config
    assert same_weights(loaded, old)


def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails(2, os.replace))
        with pytest.raises(DiskFullError, match="no space left"):
            make_model().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("missing", FILES)
def test_missing_file(tmp_path, missing):
    make_model().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"must hold config.json and model.safetensors, got no {missing}"):
        MouseModel.from_pretrained(tmp_path)


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be in a folder or a Hub repository .* got '.*nowhere'"):
        MouseModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"got no config\.json \(empty\)"):
        MouseModel.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"got no model\.safetensors \(config\.json, pytorch_model\.bin\).*run code"
    ):
        MouseModel.from_pretrained(tmp_path)


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_pickle_under_the_name_of_the_weights_is_not_run(tmp_path):
    make_model().save_pretrained(tmp_path)
    trace = tmp_path / "trace"
    torch.save({"weight": Trap(trace)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the files in .* must be readable, got"):
        MouseModel.from_pretrained(tmp_path)
    assert not trace.exists()
    torch.load((tmp_path / "model.safetensors").rename(tmp_path / "model.pt"), weights_only=False)
    assert trace.exists()  # the trap works


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_dim": 2**24},
        {"embedding_kwargs": {**EMBEDDING, "max_num_actions": 2**60}},
        {"embedding_kwargs": {**EMBEDDING, "max_num_time_steps": 2**40}},
        {"embedding_kwargs": {**EMBEDDING, "token_data_len": 2**62}},
        {"backbone_kwargs": {**TINY["backbone_kwargs"], "num_layers": 10**9}},
        {"backbone_kwargs": {"num_hidden_layers": 10**6, "num_attention_heads": 2}},
        {"backbone_kwargs": {**TINY["backbone_kwargs"], "intermediate_size": 10**12}},
        {"dqn_head_kwargs": {"hidden_dim": 8, "num_layers": 10**9}},
        {"sp_head_kwargs": {"num_layers": 2, "hidden_dim": 10**15}},
    ],
    ids=str,
)
def test_absurd_sizes_take_no_memory(tmp_path, change):
    make_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: None)  # weights that do not name their configuration, as MOUSE's
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, limits[1]))
    try:
        with pytest.raises(ValueError, match="must "):
            MouseModel.from_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_configuration_that_is_too_long(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(" " * 2**20 + "{}")
    with pytest.raises(ValueError, match="must have at most 1048576 bytes, got 1048578"):
        MouseModel.from_pretrained(tmp_path)


def test_a_configuration_that_is_too_deep(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(ValueError, match=r"the files in .* must be readable, got"):
        MouseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.9])
def test_truncated_weights(tmp_path, keep):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"the files in .* must be readable, got"):
        MouseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b'{"hidden_dim": 16'])
def test_unreadable_config(tmp_path, content):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"the files in .* must be readable, got"):
        MouseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", '["hidden_dim"]', "3", "null", '"hidden_dim"'])
def test_config_that_is_no_object(tmp_path, content):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    rewrite(tmp_path, lambda weights: None)  # weights that do not name their configuration
    with pytest.raises(TypeError, match="MouseConfig: the configuration must be a JSON object, got"):
        MouseModel.from_pretrained(tmp_path)


def rewrite(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def test_weights_of_other_shapes(tmp_path):
    make_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"sp_head.layers.0.bias": torch.zeros(4)}))
    with pytest.raises(ValueError, match=r"got sp_head.layers.0.bias has shape \(4,\) instead of \(3,\)\."):
        MouseModel.from_pretrained(tmp_path)


def test_weights_of_another_configuration(tmp_path):
    make_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_dim": 8}))
    rewrite(tmp_path, lambda weights: None)  # weights that do not name their configuration, as MOUSE's
    with pytest.raises(ValueError, match=r"weights must fit the configuration, got .* and [0-9]+ more"):
        MouseModel.from_pretrained(tmp_path)


def test_a_save_that_was_killed_between_its_two_files_is_refused(tmp_path):
    shapes_alike = {**TINY["backbone_kwargs"], "rms_norm_eps": 1e-3}
    for name, options in (("old", {}), ("new", {"backbone_kwargs": shapes_alike})):
        make_model(seed=0, **options).save_pretrained(tmp_path / name)
    os.replace(tmp_path / "new" / "config.json", tmp_path / "old" / "config.json")
    with pytest.raises(ValueError, match=r"config\.json in .* must be the one that model\.safetensors was saved with"):
        MouseModel.from_pretrained(tmp_path / "old")
    rewrite(tmp_path / "old", lambda weights: None)  # without that knowledge it loads
    assert MouseModel.from_pretrained(tmp_path / "old").config.backbone_kwargs == shapes_alike


def test_how_to_act_can_be_changed_in_the_file(tmp_path):
    make_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "window": 4, "action_head": "sp"}))
    assert MouseModel.from_pretrained(tmp_path).config == make_model(window=4, action_head="sp").config


def test_a_configuration_in_another_layout_is_the_same(tmp_path):
    make_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(values.items()))))
    assert MouseModel.from_pretrained(tmp_path).config == make_model().config


def test_weights_too_few_and_too_many(tmp_path):
    make_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update(extra=weights.pop("sp_head.layers.0.bias")))
    with pytest.raises(ValueError, match=r"got missing sp_head.layers.0.bias; unexpected extra\."):
        MouseModel.from_pretrained(tmp_path)


def test_loading_counts_as_a_weight_update(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert MouseModel.from_pretrained(tmp_path).trunk.weight_version > model.trunk.weight_version


def test_target_of_a_loss_is_saved(tmp_path):
    model = MouseModel(MouseConfig(hidden_dim=16, embedding_kwargs={"max_num_actions": 3}, dqn_head_kwargs={}))
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk)
    updater = SoftUpdate(loss, tau=0.5)
    target = {name: weight.clone() for name, weight in model.dqn_head.target.state_dict().items()}
    with torch.no_grad():
        for weight in model.dqn_head.online.parameters():
            weight.add_(1.0)
    updater.step()
    model.set_target("dqn", loss.target_head_params)
    model.save_pretrained(tmp_path)
    loaded = MouseModel.from_pretrained(tmp_path).dqn_head
    for name, weight in loaded.target.state_dict().items():
        torch.testing.assert_close(weight, target[name] + 0.5)
        torch.testing.assert_close(loaded.online.state_dict()[name], target[name] + 1.0)


def test_set_target_of_a_head_without_one():
    model = MouseModel(MouseConfig(hidden_dim=16, embedding_kwargs={"max_num_actions": 3}, sp_head_kwargs={}))
    with pytest.raises(KeyError, match="head must be one with a target, got 'sp'"):
        model.set_target("sp", model.head("sp"))


def test_set_target_refuses_a_loss_without_its_own():
    model = MouseModel(MouseConfig(hidden_dim=16, embedding_kwargs={"max_num_actions": 3}, dqn_head_kwargs={}))
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, delay_value=False)
    with pytest.raises(ValueError, match=r"must be a loss's own target.*Build the loss with delay_value=True"):
        model.set_target("dqn", loss.target_head_params)


def test_set_target_refuses_a_loss_on_another_head():
    model = make_model(dqn_head_kwargs={"hidden_dim": 8, "num_layers": 3})
    before = {name: weight.clone() for name, weight in model.dqn_head.target.state_dict().items()}
    for layers in (2, 4):
        other = make_model(dqn_head_kwargs={"hidden_dim": 8, "num_layers": layers})
        loss = MouseDQNLoss(other.head("dqn"), trunk=other.trunk)
        SoftUpdate(loss, tau=0.5)
        with pytest.raises(ValueError, match="target of a loss on this model's 'dqn' head, got weights of other names"):
            model.set_target("dqn", loss.target_head_params)
    assert all(torch.equal(weight, before[name]) for name, weight in model.dqn_head.target.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float64])
def test_weights_of_another_type(tmp_path, dtype):
    make_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"sp_head.layers.0.bias": torch.zeros(3, dtype=dtype)}))
    with pytest.raises(ValueError, match=r"got numbers of type .*torch.float32.* instead of one floating type"):
        MouseModel.from_pretrained(tmp_path)


def test_a_file_without_a_window_gets_one_that_fits(tmp_path):
    backbone = {**TINY["backbone_kwargs"], "max_position_embeddings": 50}
    embedding = {**EMBEDDING, "concat_modalities": True}  # four tokens a step
    model = make_model(embedding_kwargs=embedding, backbone_kwargs=backbone)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: None)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["window"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert MouseModel.from_pretrained(tmp_path).config.window == 12
    for kind in ("gpt2", ["llama"]):
        values["backbone_kwargs"]["kind"] = kind
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match="backbone_kwargs: kind must be one of llama, qwen3, gru, got"):
            MouseModel.from_pretrained(tmp_path)
    values["backbone_kwargs"]["kind"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert MouseModel.from_pretrained(tmp_path).config == dataclasses.replace(model.config, window=12)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"backbone_kwargs": {"kind": ["llama"], "num_layers": 1, "num_heads": 2}}, ValueError, "kind must be one of"),
        ({"vec_dqn_head_kwargs": {}}, TypeError, "vec_dqn_head_kwargs: option 'vec_dim' must be given, got only none"),
        ({"trunk_kwargs": {"window": 3}}, TypeError, "option 'window' must be given beside trunk_kwargs"),
        (
            {"backbone_kwargs": {"hidden_dim": 16}},
            TypeError,
            "option 'hidden_dim' must be given beside backbone_kwargs",
        ),
        ({"embedding_kwargs": {**EMBEDDING, "std": math.nan}}, ValueError, r"std must lie within \+-1e\+30, got nan"),
        ({"sp_head_kwargs": {"scale": math.inf}}, ValueError, r"scale must lie within \+-1e\+30, got inf"),
        ({"sp_head_kwargs": {"num_layers": False}}, TypeError, "num_layers must be int, got False"),
        ({"sp_head_kwargs": {"num_layers": 0, "junk": 1}}, TypeError, "unknown option 'junk'"),
        ({"trunk_kwargs": {"keys": {"reward": []}}}, ValueError, r"a tuple of names, for 'reward', got \(\)"),
        ({"trunk_kwargs": {"keys": {"reward": ["a", 1]}}}, ValueError, "a tuple of names, for 'reward', got"),
        (
            {"backbone_kwargs": {**TINY["backbone_kwargs"], "rms_norm_eps": -1.0}},
            ValueError,
            "rms_norm_eps must be pos",
        ),
        ({"backbone_kwargs": {**TINY["backbone_kwargs"], "attention_dropout": 2.0}}, ValueError, r"lie in \[0, 1\)"),
    ],
    ids=str,
)
def test_rubbish_is_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        make_model(**options)


@pytest.mark.parametrize("sequence", [list, tuple])
def test_options_of_the_trunk(tmp_path, sequence):
    options = {
        "keys": {"continuous": sequence(("sensors", "position"))},
        "overflow": "error",
        "on_weight_update": "keep",
        "max_streams": 3,
    }
    model = make_model(trunk_kwargs=options)
    model.save_pretrained(tmp_path)
    loaded = MouseModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    trunk = loaded.trunk
    assert (trunk.overflow, trunk.on_weight_update, trunk.max_streams) == ("error", "keep", 3)
    assert ("sensors", "position") in loaded.in_keys
    steps = make_steps()
    expected = run(model, steps.clone().set(("sensors", "position"), steps[schema.OBSERVATION]))["hidden"]
    steps["sensors", "position"] = steps.pop(schema.OBSERVATION)
    assert torch.equal(run(loaded, steps)["hidden"], expected)


def test_bad_options_of_the_trunk():
    with pytest.raises(TypeError, match="trunk_kwargs must be dict, got None"):
        MouseConfig(**TINY, trunk_kwargs=None)
    with pytest.raises(TypeError, match=r"trunk_kwargs: keys must be Mapping or None, got \['action'\]"):
        MouseConfig(**TINY, trunk_kwargs={"keys": ["action"]})
    with pytest.raises(TypeError, match="trunk_kwargs: unknown option 'overflw'"):
        make_model(trunk_kwargs={"overflw": "error"})


# Other people's decoder layers, and an environment's sizes


@pytest.fixture
def language_model(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = LlamaConfig(vocab_size=10, num_key_value_heads=2, rope_parameters=rope, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "language model", max_shard_size="5KB")
    assert len(list((tmp_path / "language model").glob("*.safetensors"))) > 2
    return model, tmp_path / "language model"


@pytest.mark.parametrize("num_layers", [None, 2])
@pytest.mark.parametrize("load_weights", [True, False])
def test_a_model_around_a_language_models_layers(language_model, num_layers, load_weights):
    theirs, folder = language_model
    overrides = {} if num_layers is None else {"num_layers": num_layers}
    model = init_from_pretrained_backbone(
        folder,
        backbone_kwargs_overrides=overrides,
        embedding_kwargs=EMBEDDING,
        sp_head_kwargs={"hidden_dim": 8},
        load_weights=load_weights,
    )
    backbone = model.trunk.backbone
    assert (backbone.num_layers, model.config.hidden_dim) == (num_layers or 3, 16)
    assert backbone.model.config.rope_parameters["rope_theta"] == 500.0
    for ours, layer in zip(backbone.model.layers, theirs.model.layers, strict=False):
        assert torch.equal(ours.mlp.up_proj.weight, layer.mlp.up_proj.weight) == load_weights
    assert run(model, make_steps())["sp"].shape == (2, 5, 3)


def test_what_is_the_checkpoints_cannot_be_given(language_model):
    with pytest.raises(TypeError, match="hidden_dim must be the checkpoint's, got it as an option"):
        init_from_pretrained_backbone(language_model[1], hidden_dim=32)


def test_sizes_of_an_environment():
    env = TaskEnv(DarkRoomEnv(range(9), batch_size=2, size=3, seed=0), episodes_per_task=2)
    model = MouseModel.from_specs(env, hidden_dim=16, dqn_head_kwargs={}, embedding_kwargs={"max_num_time_steps": 21})
    kwargs = model.config.embedding_kwargs
    assert (kwargs["max_num_actions"], kwargs["max_num_obs_continuous"], kwargs["max_num_obs_discrete"]) == (5, 2, 9)
    steps = env.rollout(30, model.actor(env.action_spec_unbatched), break_when_any_done=False)
    assert steps["dqn"].shape == (2, 30, 5)
    with pytest.raises(TypeError, match="keys must be given as keys=, got them in trunk_kwargs"):
        MouseModel.from_specs(env, trunk_kwargs={"keys": {}})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_training_forward_compiles_as_one_graph(backend):
    model, steps = make_model(**EVERY_HEAD), make_steps()
    keys = ["vec_dqn", "dqn", "sp", "sv"]

    def forward(steps):
        with torch.enable_grad():
            out = model(steps)
        return [out[key] for key in keys]

    with set_recurrent_mode(True):
        expected = forward(steps.clone())
        out = torch.compile(forward, backend=backend, fullgraph=True)(steps.clone())
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()
