"""The compiled step: equal to the eager one at every step, and compiled a few times at most."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules import GRUBackbone, StepEmbedder, Trunk, decoding

BACKBONES = {
    "llama": {"num_heads": 2},
    "llama grouped": {"num_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_heads": 2, "head_dim": 8},
}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture
def counter(monkeypatch):
    """Compiles with a backend that is quick, and counts; `aot_eager` has the same graphs and writes as the default."""
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(decoding.decode, backend=counter)
    monkeypatch.setattr(decoding, "_compiled", lambda: compiled)
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize("compute_tokens", [0, 2])
@pytest.mark.parametrize("kind", BACKBONES)
def test_compiled_is_eager_at_every_step(
    kind, compute_tokens, counter, make_trunk, random_steps, full_pass, step_by_step
):
    """Three tokens a step go past several lengths of the laid-out contexts."""
    options = {"embedding": {"num_compute_tokens": compute_tokens}, "backbone": BACKBONES[kind]}
    trunk = make_trunk(**options, compile=True)
    steps = random_steps(3, 40, [[], [7], [20, 31]])
    compiled = step_by_step(trunk, steps)
    assert counter.frame_count == 1  # longer contexts are none of the compiler's business
    trunk.compiled = False
    trunk.reset_cache()
    assert_equal(compiled, step_by_step(trunk, steps))
    assert_equal(compiled, full_pass(trunk, steps))
    assert counter.frame_count == 1


def test_rows_come_and_go(counter, make_trunk, random_steps, full_pass):
    trunk = make_trunk(compile=True)
    steps = random_steps(5, 24, [[6], [], [3, 8], [10], []])
    expected = full_pass(trunk, steps)
    generator = torch.Generator().manual_seed(1)
    at, sizes = torch.zeros(5, dtype=torch.int64), set()
    while (at < 24).any():
        rows = torch.randperm(5, generator=generator)
        rows = rows[at[rows] < 24]
        rows = rows[: int(torch.randint(1, len(rows) + 1, (), generator=generator))]
        sizes.add(len(rows))
        assert_equal(trunk(steps[rows, at[rows]].clone())[schema.HIDDEN], expected[rows, at[rows]])
        at[rows] += 1
    assert sizes == {1, 2, 3, 4, 5}
    assert counter.frame_count == 2  # one row, or several; what is in no order is not compiled


def test_full_contexts_and_new_weights_are_rebuilt(counter, make_trunk, random_steps, step_by_step):
    steps = random_steps(2, 20, [[], [5]])
    trunk = make_trunk(window=8, compile=True)
    eager = copy.deepcopy(trunk)
    eager.compiled = False

    def play(trunk):
        first = step_by_step(trunk, steps[:, :10])
        for parameter in trunk.parameters():
            parameter.data.mul_(1.1)
        trunk.mark_weight_update()
        return torch.cat([first, step_by_step(trunk, steps[:, 10:].clone())], 1)

    steps[schema.IS_INIT][:, 10:] = False
    assert_equal(play(trunk), play(eager))
    assert counter.frame_count == 1


def test_several_steps_at_once_are_not_compiled(counter, make_trunk, random_steps, full_pass):
    trunk = make_trunk(compile=True)
    steps = random_steps(2, 6)
    assert_equal(trunk.append(steps)[schema.HIDDEN], full_pass(trunk, steps))
    with set_recurrent_mode(True):
        trunk(steps)
    assert counter.frame_count == 0


def test_copies_and_inference_mode(counter, make_trunk, random_steps, full_pass):
    trunk = make_trunk(compile=True)
    steps = random_steps(2, 6)
    expected = full_pass(trunk, steps)
    for t in range(3):
        assert_equal(trunk(steps[:, t].clone())[schema.HIDDEN], expected[:, t])
    with torch.inference_mode():
        assert_equal(trunk(steps[:, 3].clone())[schema.HIDDEN], expected[:, 3])
    assert_equal(trunk(steps[:, 4].clone())[schema.HIDDEN], expected[:, 4])
    before = counter.frame_count
    for other in (copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
        assert other.compiled
        assert_equal(other(steps[:, 0].clone())[schema.HIDDEN], expected[:, 0])
    assert counter.frame_count == before  # the same architecture
    assert not trunk(steps[:, 5].clone())[schema.HIDDEN].requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own, on first import
def test_a_step_compiled_as_users_have_it(make_trunk, random_steps, full_pass):
    torch.compiler.reset()
    trunk = make_trunk(backbone={"num_layers": 1}, compile=True)
    steps = random_steps(2, 20)
    expected = full_pass(trunk, steps)
    for t in range(20):
        assert_equal(trunk(steps[:, t].clone())[schema.HIDDEN], expected[:, t])


@pytest.mark.parametrize(("backbone", "which"), [(None, "no backbone"), (GRUBackbone(16, num_layers=1), "a GRU")])
def test_only_a_transformer_is_compiled(backbone, which):
    with pytest.raises(ValueError, match=f"compile must be false with {which}, got True"):
        Trunk(StepEmbedder(16), backbone, window=4, compile=True)


def test_a_models_option(counter, make_model):
    model = make_model(trunk_kwargs={"compile": True})
    assert model.trunk.compiled
    assert not make_model().trunk.compiled
    with pytest.raises(TypeError, match="trunk_kwargs: compile must be bool, got 'yes'"):
        MouseModel(MouseConfig(trunk_kwargs={"compile": "yes"}))
