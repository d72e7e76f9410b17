"""The compiled step: equal to the eager one at every step, and compiled a few times at most."""

from __future__ import annotations

import copy
import pickle
from functools import partial

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
    compiled, counter.calls = torch.compile(decoding.decode, backend=counter), 0

    def count(*args):
        counter.calls += 1
        return compiled(*args)

    monkeypatch.setattr(decoding, "_compiled", lambda: count)
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
    assert counter.frame_count <= 4  # one row, or several; from the first slot on, or not; in no order: none


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
    assert counter.calls == 20  # also after contexts have become shorter


def test_rows_that_are_not_all(counter, make_trunk, random_steps, step_by_step, full_pass):
    """Shorter contexts than others have, rows behind the first slot, rows whose neighbours were forgotten."""
    trunk = make_trunk(compile=True)
    steps = random_steps(4, 40)
    step_by_step(trunk, steps)
    assert counter.calls == 40
    new = random_steps(4, 6, seed=1)
    for some in (slice(0, 2), slice(2, 4)):
        assert_equal(step_by_step(trunk, new[some]), full_pass(trunk, new[some]))
    assert counter.calls == 40 + 12
    trunk.forget(torch.tensor([1000, 1001]))
    again = random_steps(4, 6, seed=2)[2:]
    assert_equal(step_by_step(trunk, again), full_pass(trunk, again))
    assert counter.calls == 40 + 12 + 6
    assert counter.frame_count <= 2  # from the first slot on, or from a later one


def test_hooks_that_come_later_are_not_passed_by(counter, make_trunk, random_steps, full_pass):
    trunk = make_trunk(compile=True)
    steps = random_steps(2, 6)
    before = full_pass(trunk, steps)
    assert_equal(trunk(steps[:, 0].clone())[schema.HIDDEN], before[:, 0])
    handle = trunk.backbone.model.layers[1].mlp.register_forward_hook(lambda _, __, out: 2 * out)
    after = full_pass(trunk, steps)
    assert (after - before).abs().max() > 1e-2
    for t in (0, 1):
        assert_equal(trunk(steps[:, t].clone())[schema.HIDDEN], after[:, t])
    assert counter.calls == 1
    handle.remove()
    assert_equal(trunk(steps[:, 0].clone())[schema.HIDDEN], before[:, 0])
    assert counter.calls == 2


def test_many_models_are_compiled(counter, make_trunk, random_steps, full_pass, monkeypatch):
    """Each has programs of its own; torch's limit of eight is for one function."""
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    decoding._compiled.cache_clear()
    steps = random_steps(2, 1)
    for num_layers in range(1, 11):
        trunk = make_trunk(backbone={"num_layers": num_layers}, compile=True)
        assert_equal(trunk(steps[:, 0].clone())[schema.HIDDEN], full_pass(trunk, steps)[:, 0])
    assert counter.frame_count == 10
    decoding._compiled.cache_clear()


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
