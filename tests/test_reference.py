"""Agreement with MOUSE: its weights and inputs give its outputs, over windows and step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torchrl.data import Categorical
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.models import MouseConfig, MouseModel

MODELS = Path(__file__).parent / "reference" / "models"
ROWS, STEPS = 2, 6


class Case(NamedTuple):
    model: MouseModel
    steps: TensorDict
    outputs: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["none_sum", "llama_concat", "qwen3_sum_gqa"])
def case(request: pytest.FixtureRequest) -> Case:
    """A model of MOUSE's, without the heads that are not built here (vectors of values, state values)."""
    directory = MODELS / request.param
    config = json.loads((directory / "config.json").read_text())
    backbone = config["backbone_kwargs"]
    heads = {f"{name}_head_kwargs": config[f"{name}_head_kwargs"] for name in ("dqn", "sp")}
    model = MouseModel(
        MouseConfig(
            hidden_dim=config["hidden_dim"],
            window=32,
            embedding_kwargs=config["embedding_kwargs"],
            backbone=None if not backbone else "qwen3" if "head_dim" in backbone else "llama",
            backbone_kwargs=backbone,
            **{name: kwargs for name, kwargs in heads.items() if kwargs["num_layers"] > 0},
        )
    )
    weights = load_file(directory / "model.safetensors")
    skipped = ["vec_dqn_head.", "sv_head."]
    if not config["embedding_kwargs"]["include_type_token"]:
        skipped.append("embedder.type_embedder.")  # MOUSE stores the table also where it is not used
    model._load({name: weight for name, weight in weights.items() if not name.startswith(tuple(skipped))})
    records = TensorDict(load_file(directory / "inputs.safetensors"), [ROWS, STEPS])
    steps = schema.from_mouse_records(records)
    steps[schema.STREAM] = torch.arange(ROWS).view(ROWS, 1, 1).repeat(1, STEPS, 1)
    return Case(model, steps, load_file(directory / "outputs.safetensors"))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_tokens(case):
    embedder = case.model.trunk.embedder
    assert_equal(embedder(case.model.trunk.read(case.steps)).flatten(1, 2), case.outputs["embeds"])
    assert embedder.token_types * STEPS == case.outputs["token_types"][0].tolist()


@pytest.mark.parametrize("mode", ["full", "cached"])
def test_hidden_and_heads(case, mode):
    if mode == "full":
        with set_recurrent_mode(True):
            out = case.model(case.steps.clone())
    else:
        out = torch.stack([case.model(case.steps[:, t].clone()) for t in range(STEPS)], 1)
    assert case.model.config.heads
    for name in (schema.HIDDEN, *case.model.config.heads):
        assert_equal(out[name], case.outputs[name])
    if "dqn" in case.model.config.heads:
        assert_equal(case.model.dqn_head.target(out[schema.HIDDEN]), case.outputs["dqn_target"])


def test_greedy_actions(case):
    if "vec_dqn" in case.outputs:
        pytest.skip("MOUSE acts with its vector head here, which this model does not have")
    actor = case.model.actor(Categorical(5))
    actions = [actor(case.steps[:, t].clone())[schema.ACTION] for t in range(STEPS)]
    assert actions[-1].tolist() == case.outputs["greedy_action"].tolist()
