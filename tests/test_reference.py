"""Agreement with MOUSE: its checkpoints give its outputs, over windows and step by step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torchrl.data import Categorical
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.models import MouseModel, load_model

MODELS = Path(__file__).parent / "reference" / "models"
ROWS, STEPS = 2, 6
HEADS = {
    "none_sum": ["sp", "sv"],
    "llama_concat": ["vec_dqn", "dqn", "sp", "sv"],
    "qwen3_sum_gqa": ["dqn"],
}


class Case(NamedTuple):
    name: str
    model: MouseModel
    steps: TensorDict
    outputs: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=HEADS)
def case(request: pytest.FixtureRequest) -> Case:
    directory = MODELS / request.param
    records = TensorDict(load_file(directory / "inputs.safetensors"), [ROWS, STEPS])
    steps = schema.from_mouse_records(records)
    steps[schema.STREAM] = torch.arange(ROWS).view(ROWS, 1, 1).repeat(1, STEPS, 1)
    return Case(request.param, load_model(directory), steps, load_file(directory / "outputs.safetensors"))


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
    assert list(case.model.config.heads) == HEADS[case.name]
    for name in (schema.HIDDEN, *case.model.config.heads):
        assert_equal(out[name], case.outputs[name])
    for name in {"vec_dqn", "dqn"} & set(HEADS[case.name]):
        target = getattr(case.model, f"{name}_head").target
        assert_equal(target(out[schema.HIDDEN]), case.outputs[f"{name}_target"])


@pytest.mark.parametrize("mode", ["full", "cached"])
@pytest.mark.parametrize(("num_actions", "expected"), [(None, "greedy_action"), (3, "greedy_action_first3")])
def test_greedy_actions(case, num_actions, expected, mode):
    actor = case.model.actor(Categorical(num_actions or 5), num_actions=num_actions)
    if mode == "full":
        with set_recurrent_mode(True):
            action = actor(case.steps.clone())[schema.ACTION][:, -1]
    else:
        case.model.trunk.reset_cache()
        action = [actor(case.steps[:, t].clone())[schema.ACTION] for t in range(STEPS)][-1]
    assert action.tolist() == case.outputs[expected].tolist()


def test_saved_again_it_is_the_same(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    again = MouseModel.from_pretrained(tmp_path)
    assert again.config == case.model.config
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (MODELS / case.name, tmp_path))
    unused = set(theirs) - set(ours)
    assert unused <= {"embedder.type_embedder.embed.weight"}, "MOUSE keeps this one also where it is not read"
    assert not set(ours) - set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
