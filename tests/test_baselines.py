"""The two baselines behind the transformer's interface: a GRU as memory, and no memory."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from conftest import EMBEDDING
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_terminal_reward import EMBEDDING as ARMS
from test_terminal_reward import EPISODES, FRAMES, collect, collect_random, dqn, make_env, right_choices
from test_trunk import EMBEDDINGS, MODES, ROWS, STEPS, boundaries, places, window
from torchrl.collectors import Collector
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils.utils import _compute_missing_env_transforms

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.evaluation import evaluate
from torchrl_mouse.models import MouseConfig, MouseModel, init_from_pretrained_backbone
from torchrl_mouse.modules import GRUBackbone, StepEmbedder, Trunk

GRU = {"kind": "gru", "num_layers": 2}
stepwise = MODES["sequential"]


def assert_equal(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def make_gru(embedding=None, num_layers=2, **options):
    """A trunk whose hidden states depend visibly on the whole context, which is far longer than its window."""
    backbone = GRUBackbone(16, num_layers=num_layers)
    for parameter in backbone.parameters():
        parameter.data.mul_(3)
    for layer in range(num_layers):  # An update gate that is nearer to 1 remembers longer.
        getattr(backbone.model, f"bias_ih_l{layer}").data[16:32] += 3.0
    embedder = StepEmbedder(16, **{**EMBEDDING, "std": 1.0, **(embedding or {})})
    return Trunk(embedder, backbone, **{"window": 2, **options})


def make_memoryless():
    return Trunk(StepEmbedder(16, **EMBEDDING, std=1.0), None, window=2)


# The GRU by itself


@pytest.mark.parametrize("num_layers", [1, 3])
def test_backbone_is_a_gru_that_begins_at_zero(num_layers):
    """Against the equations (arXiv:1406.1078), token by token; position 0 inside a row begins anew."""
    backbone = GRUBackbone(4, num_layers=num_layers).double()
    tokens = torch.randn(2, 6, 4, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0]])
    weights = dict(backbone.model.named_parameters())
    state = torch.zeros(num_layers, 2, 4, dtype=torch.float64)
    expected = []
    for t in range(6):
        state = state * (positions[:, t] != 0).unsqueeze(-1)
        out, states = tokens[:, t], []
        for layer, old in enumerate(state):
            drive = (out @ weights[f"weight_ih_l{layer}"].T + weights[f"bias_ih_l{layer}"]).chunk(3, -1)
            recur = (old @ weights[f"weight_hh_l{layer}"].T + weights[f"bias_hh_l{layer}"]).chunk(3, -1)
            reset, update = ((a + b).sigmoid() for a, b in zip(drive[:2], recur[:2], strict=True))
            out = (1 - update) * (drive[2] + reset * recur[2]).tanh() + update * old
            states.append(out)
        state = torch.stack(states)
        expected.append(out)
    expected = torch.stack(expected, 1)
    out, cache = backbone(tokens, positions)
    assert cache is None
    assert_equal(out, expected, 1e-12)
    assert_equal(backbone(tokens)[0][0], expected[0], 1e-12)  # without positions: from 0 on
    cache = backbone.new_kv_cache(2)
    for begin, end in ((0, 1), (1, 5), (5, 6)):  # a context begins in the middle of the second part
        out, returned = backbone(tokens[:, begin:end], positions[:, begin:end], kv_cache=cache)
        assert returned is cache
        assert_equal(out, expected[:, begin:end], 1e-12)
    assert_equal(cache.key[0][:, :, 0], state.transpose(0, 1), 1e-12)
    backbone.reset_kv_cache(cache, torch.tensor([True, False]))
    assert cache.key[0][0].abs().max() == 0
    assert cache.key[0][1].abs().max() > 0


def test_contract_of_a_backbone():
    backbone = GRUBackbone(16, num_layers=2)
    assert (backbone.kind, backbone.hidden_dim, backbone.num_layers) == ("gru", 16, 2)
    assert backbone.max_seq_len > 10**9
    cache = backbone.new_kv_cache(3, capacity=100, dtype=torch.float64)
    assert cache.key[0].shape == (3, 2, 1, 16)
    assert cache.key[0].dtype == torch.float64
    assert backbone.new_kv_cache(1, device=torch.device("meta")).key[0].is_meta
    with pytest.raises(ValueError, match=r"GRUBackbone: positions must be given with kv_cache, got None"):
        backbone(torch.zeros(3, 1, 16), kv_cache=cache)


# Both modes agree


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_three_ways_to_one_hidden_state(embedding, num_layers, random_steps, full_pass):
    """Windows of several tasks, step by step, and each task alone; none of it is limited by the trunk's window."""
    trunk = make_gru(EMBEDDINGS[embedding], num_layers, overflow="error")
    steps = random_steps(4, 40, [[5, 6], [], [2, 9], [39]])
    alone = full_pass(trunk, steps)
    assert_equal(window(trunk, steps), alone)
    assert_equal(stepwise(trunk, steps), alone)
    trunk.reset_cache()
    appended = trunk.append(steps[:, :30].clone())[schema.HIDDEN]  # several at once, tasks begin inside
    assert_equal(torch.cat([appended, stepwise(trunk, steps[:, 30:])], 1), alone)
    changed = steps.clone()
    changed[schema.OBSERVATION][1, 0] += 1.7
    assert (window(trunk, changed) - alone)[1, 10:].abs().max() > 1e-3, "the context must be long enough to matter"


def test_rows_in_any_order_and_subset(random_steps, full_pass):
    """Also of two environments that take turns, and where each row is at another step."""
    trunk = make_gru()
    steps = random_steps(5, 12, [[6], [], [3, 8], [10], []])
    other = random_steps(2, 40, [[7], []], seed=1)
    other[schema.STREAM] += 100
    expected, others = full_pass(trunk, steps), full_pass(trunk, other)
    generator = torch.Generator().manual_seed(1)
    at = torch.zeros(5, dtype=torch.int64)  # each row's next step
    turn = 0
    while (at < 12).any():
        rows = torch.randperm(5, generator=generator)
        rows = rows[at[rows] < 12]
        rows = rows[: int(torch.randint(1, len(rows) + 1, (), generator=generator))]
        assert_equal(trunk(steps[rows, at[rows]].clone())[schema.HIDDEN], expected[rows, at[rows]])
        at[rows] += 1
        if turn < 40:
            assert_equal(trunk(other[:, turn].clone())[schema.HIDDEN], others[:, turn])
        turn += 1
    assert turn > 12
    assert len(trunk._cache) == 7


def test_copied_contexts_go_on_apart(random_steps, full_pass):
    trunk = make_gru()
    steps = random_steps(2, 9)
    expected = full_pass(trunk, steps)
    stepwise(trunk, steps[:, :5])
    trunk.copy_context(torch.tensor([1000]), torch.tensor([77]))
    twin = steps[[0]].clone()
    twin[schema.STREAM] = torch.full_like(twin[schema.STREAM], 77)
    assert_equal(stepwise(trunk, twin[:, 5:]), expected[[0], 5:])
    assert_equal(stepwise(trunk, steps[:, 5:]), expected[:, 5:])


def test_row_without_context_is_an_error(random_steps):
    trunk = make_gru(max_streams=2)
    steps = random_steps(3, 2)
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 1000\).*reset the environment"):
        trunk(steps[:2, 1].clone())
    trunk(steps[:2, 0].clone())
    trunk(steps[[2], 0].clone())  # forgets row 0
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 1000\)"):
        trunk(steps[:2, 1].clone())
    trunk.forget(steps[schema.STREAM])
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 1002\)"):
        trunk(steps[[2], 1].clone())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype, random_steps):
    trunk = make_gru().to(dtype)
    steps = random_steps(ROWS, STEPS, [[5], [], [2]])
    full = window(trunk, steps)
    assert full.dtype == dtype
    assert_equal(stepwise(trunk, steps), full, 1e-10 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_autocast(embedding, random_steps):
    trunk = make_gru(EMBEDDINGS[embedding])
    steps = random_steps(ROWS, STEPS, [[5], [], [2]])
    expected = window(trunk, steps)
    with torch.autocast("cpu", torch.bfloat16):
        full, stepped = window(trunk, steps), stepwise(trunk, steps)
    for hidden in (full, stepped):
        assert (hidden.float() - expected).square().mean().sqrt() < 0.05
    assert_equal(stepped.float(), full.float(), 0.1)


def test_gradients_flow_through_windows_only(random_steps):
    trunk = make_gru()
    steps = random_steps(2, 5, [[2], []])
    with torch.enable_grad():
        assert not trunk(steps[:, 0].clone())[schema.HIDDEN].requires_grad
    with set_recurrent_mode(True):
        trunk(steps.clone())[schema.HIDDEN].square().sum().backward()
    assert [name for name, p in trunk.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_inference_mode_and_copies(random_steps, full_pass):
    trunk = make_gru()
    steps = random_steps(2, 6)
    expected = full_pass(trunk, steps)
    with torch.inference_mode():
        stepwise(trunk, steps[:, :3])
    twin = copy.deepcopy(trunk)
    assert_equal(trunk(steps[:, 3].clone())[schema.HIDDEN], expected[:, 3])  # outside of it
    buffer = io.BytesIO()
    torch.save(trunk, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        with pytest.raises(RuntimeError, match="none for row 0"):  # contexts stay with the original
            other(steps[:, 4].clone())
        assert_equal(stepwise(other, steps), expected)
    twin.backbone.model.weight_hh_l0.data.mul_(2)  # and weights are the copy's own
    assert_equal(window(trunk, steps), expected)
    assert (window(twin, steps) - expected).abs().max() > 1e-2


# Leakage

FRAME = (schema.OBSERVATION, schema.PREVIOUS_ACTION, schema.PREVIOUS_REWARD, schema.PREVIOUS_TERMINATED)


@pytest.fixture(scope="module")
def moved(random_steps):
    """By how much each step's output moves when one entry of one step changes, ``[ROWS, STEPS]``."""
    torch.manual_seed(0)
    trunks = {"gru": make_gru({"num_compute_tokens": 1}), "none": make_memoryless()}

    def run(backbone, mode, starts, place, key):
        steps = random_steps(ROWS, STEPS, [sorted(firsts) for firsts in starts])
        changed = steps.clone()
        value = changed[key][place]
        if value.dtype == torch.bool:
            changed[key][place] = ~value
        else:
            changed[key][place] = value + 1.7 if value.is_floating_point() else (value + 1) % 5
        before, after = (MODES[mode](trunks[backbone], each) for each in (steps, changed))
        return (after - before).abs().amax(-1)

    return run


@pytest.mark.parametrize("mode", MODES)
@given(starts=boundaries, place=places, key=st.sampled_from(FRAME))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_step_moves_only_the_rest_of_its_own_task(mode, starts, place, key, moved):
    row, t = place
    by = moved("gru", mode, starts, place, key)
    end = min((first for first in starts[row] if first > t), default=STEPS)
    allowed = torch.zeros(ROWS, STEPS, dtype=torch.bool)
    allowed[row, t:end] = True
    # rows of one batch share matrix products, whose rounding may differ with their values
    assert by[~allowed].max() <= 1e-6
    assert by[allowed].min() > 1e-7
    assert by[row, t] > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_leak_is_seen_when_tasks_are_not_separated(mode, moved):
    apart = moved("gru", mode, [{4}, set(), set()], (0, 2), schema.OBSERVATION)
    joined = moved("gru", mode, [set(), set(), set()], (0, 2), schema.OBSERVATION)
    assert apart[0, 4:].max() <= 1e-6
    assert joined[0, 4:].min() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@given(starts=boundaries, place=places, key=st.sampled_from(FRAME))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_without_memory_a_step_moves_nothing_but_itself(mode, starts, place, key, moved):
    by = moved("none", mode, starts, place, key)
    assert by[place] > 1e-3
    by[place] = 0
    assert by.max() <= 1e-6


def test_padding_at_the_end_changes_nothing(random_steps):
    trunk = make_gru()
    steps = random_steps(2, 10, [[3], []])
    padded = steps.clone()
    padded[:, 7:] = torch.zeros_like(padded[:, 7:])
    assert_equal(window(trunk, padded)[:, :7], window(trunk, steps)[:, :7])
    padded[schema.IS_INIT][:, 7:] = True  # whatever padding says
    assert_equal(window(trunk, padded)[:, :7], window(trunk, steps)[:, :7])


# Changed weights


def test_after_a_weight_update_a_state_is_kept(random_steps):
    trunk, steps = make_gru(), random_steps(2, 6, [[], [3]])
    assert trunk.on_weight_update == "keep"
    features = trunk.embedder(trunk.read(steps)).flatten(1, 2)
    backbone = trunk.backbone
    stepwise(trunk, steps[:, :3])
    _, cache = backbone(features[:, :3], torch.arange(3).expand(2, -1), kv_cache=backbone.new_kv_cache(2))
    for parameter in backbone.parameters():
        parameter.data.mul_(1.3)
    trunk.mark_weight_update()
    positions = torch.tensor([[3, 4, 5], [0, 1, 2]])
    stepped = stepwise(trunk, steps[:, 3:])
    assert_equal(stepped, backbone(features[:, 3:], positions, kv_cache=cache)[0])
    fresh = window(trunk, steps)
    assert_equal(stepped[1], fresh[1, 3:])  # the new task has seen new weights only
    assert (stepped[0] - fresh[0, 3:]).abs().max() > 1e-2


def test_rebuild_is_refused():
    with pytest.raises(ValueError, match=r"on_weight_update must be one of keep for a GRU, got 'rebuild'"):
        make_gru(on_weight_update="rebuild")
    assert make_gru(on_weight_update="keep").on_weight_update == "keep"
    assert make_memoryless().on_weight_update == "rebuild"


# Models


def make_model(**config):
    options = {"embedding_kwargs": {**EMBEDDING, "std": 1.0}, "backbone_kwargs": GRU, "dqn_head_kwargs": {}}
    return MouseModel(MouseConfig(**{"hidden_dim": 16, "window": 4, **options, **config}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_round_trip(dtype, tmp_path, random_steps):
    model = make_model(trunk_kwargs={"on_weight_update": "keep"}).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = MouseModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert isinstance(loaded.trunk.backbone, GRUBackbone)
    steps = random_steps(2, 9, [[3], []])
    assert torch.equal(window(loaded, steps), window(model, steps))
    assert_equal(stepwise(loaded, steps), window(model, steps), 1e-5 if dtype == torch.float32 else 0.1)
    assert "gru, 2 layers of width 16" in model.card("me/agent")
    values = json.loads((tmp_path / "config.json").read_text())
    del values["window"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert MouseModel.from_pretrained(tmp_path).config.window == MouseConfig.window
    values["backbone_kwargs"]["num_layers"] = 3
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # says no configuration
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"weights must fit the configuration, got missing backbone\.weight_ih_l2"):
        MouseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"backbone_kwargs": {**GRU, "num_heads": 2}}, TypeError, r"unknown option 'num_heads'.*are kind, num_layers"),
        ({"backbone_kwargs": {**GRU, "max_position_embeddings": 64}}, TypeError, "unknown option 'max_position_emb"),
        ({"backbone_kwargs": {"kind": "gru"}}, TypeError, "option 'num_layers' must be given, got only kind"),
        ({"backbone_kwargs": {**GRU, "num_layers": "2"}}, TypeError, "num_layers must be int, got '2'"),
        ({"backbone_kwargs": {**GRU, "num_layers": 0}}, ValueError, "num_layers must be at least 1, got 0"),
        ({"backbone_kwargs": {**GRU, "num_layers": 2**13}}, ValueError, "num_layers must be at most 4096, got 8192"),
        ({"backbone_kwargs": GRU, "hidden_dim": 2**20}, ValueError, r"at most 1e\+11 parameters, got 1.3e\+13 of"),
        ({"backbone_kwargs": {**GRU, "hidden_dim": 8}}, TypeError, "option 'hidden_dim' must be given beside"),
        ({"trunk_kwargs": {"on_weight_update": "rebuild"}}, ValueError, "one of keep for a GRU, got 'rebuild'"),
        (
            {"backbone_kwargs": {"kind": "lstm", "num_layers": 1, "num_heads": 1}},
            ValueError,
            "kind must be one of llama, qwen3, gru, got 'lstm'",
        ),
    ],
    ids=str,
)
def test_options_that_a_gru_does_not_have(options, error, match):
    with torch.device("meta"), pytest.raises(error, match=match):
        make_model(**options)


def test_backbone_of_another_kind_or_width():
    with pytest.raises(ValueError, match=r"GRUBackbone: kind must be 'gru', got 'llama'"):
        GRUBackbone(16, "llama", num_layers=1)
    with pytest.raises(ValueError, match=r"the embedder must have the backbone's hidden_dim=16, got 8"):
        Trunk(StepEmbedder(8), GRUBackbone(16, num_layers=1), window=4)


def test_a_language_model_has_no_gru(tmp_path):
    content = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**content, "intermediate_size": 32}))
    with pytest.raises(ValueError, match="kind must be the checkpoint's 'llama', got 'gru'"):
        init_from_pretrained_backbone(tmp_path, backbone_kwargs_overrides={"kind": "gru"})


# Acting and learning


@pytest.mark.parametrize("backbone", [GRU, None], ids=["gru", "none"])
def test_collector_actor_and_evaluation(backbone, full_pass):
    model = make_model(embedding_kwargs={"max_num_actions": 5, "max_num_obs_continuous": 2}, backbone_kwargs=backbone)
    env = TaskEnv(DarkRoomEnv(range(9), batch_size=3, size=3, max_steps=4, seed=0), episodes_per_task=3)
    actor = model.actor(env.action_spec_unbatched, temperature=1.0)
    assert _compute_missing_env_transforms(env, actor) == [], "no state may travel in the data"
    collector = Collector(env, actor, frames_per_batch=60, total_frames=120, auto_register_policy_transforms=True)
    steps = torch.cat([batch.clone() for batch in collector], -1)
    collector.shutdown()
    assert steps[schema.IS_INIT][:, 1:].any(), "tasks must begin inside"
    assert_equal(steps[schema.HIDDEN], full_pass(model.trunk, steps))
    model.trunk.reset_cache()
    env = TaskEnv(DarkRoomEnv([0, 4], size=3), episodes_per_task=20)
    with set_recurrent_mode(True):  # Where a training loop may well stand.
        returns = evaluate(model.actor(env.action_spec_unbatched), env, 20, progress_bar=False)
    assert returns.shape == (2, 20)
    assert returns.isfinite().all()
    assert model.trunk._cache is None if backbone is None else len(model.trunk._cache) == 0


def learn(backbone, updates):
    """Learns the two-armed task from the histories of a random policy, in context."""
    model = make_model(hidden_dim=32, embedding_kwargs={**ARMS, "std": 0.2}, backbone_kwargs=backbone)
    loss = dqn(model)
    tasks = torch.cat(collect_random(make_env(128, seed=1), tasks=8).split(FRAMES, -1))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        loss(tasks[torch.randint(len(tasks), (64,))])["loss_dqn"].backward()
        optimizer.step()
    model.trunk.mark_weight_update()
    return model


def values_where_episodes_begin(model):
    """Q-values ``[B, E, 2]`` at the first frames of episodes, which all look the same."""
    env = make_env(16, seed=3)
    steps = collect(env, model.actor(env.action_spec_unbatched))
    firsts = (steps[schema.OBSERVATION] == 0).squeeze(-1)
    frames = steps[firsts].select(*model.trunk.in_keys).exclude(schema.IS_INIT, schema.STREAM)
    assert (frames == frames[0]).all()
    return steps["dqn"][firsts].reshape(16, EPISODES, 2)


def test_gru_learns_to_remember():
    model = learn({"kind": "gru", "num_layers": 1}, 300)
    right = right_choices(make_env(128, seed=2), model)
    assert 0.3 < right[0] < 0.7, "nothing is known in the first episode"
    assert right[1:].min() > 0.95
    values = values_where_episodes_begin(model)
    assert (values[:, 1] - values[:, 0]).abs().max() > 1e-2


def test_without_memory_nothing_is_remembered(random_steps):
    model = learn(None, 300)
    right = right_choices(make_env(128, seed=2), model)
    assert right.min() > 0.3
    assert right.max() < 0.7
    values = values_where_episodes_begin(model)
    assert_equal(values, values[:1, :1].expand_as(values), 1e-6)
    trunk, steps = make_memoryless(), random_steps(2, 6)
    assert_equal(window(trunk, steps).reshape(12, 1, 16), window(trunk, steps.reshape(12, 1)))  # as it is trained
    trunk(steps[:, 3].clone())  # in the middle of a task: there is no context to miss
