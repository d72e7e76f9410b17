"""The trunk's two modes agree; nothing leaks between steps, tasks and rows; full contexts; changed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.modules import CausalBackbone, StepEmbedder, Trunk
from torchrl_mouse.modules.trunk import segment_mask, segment_positions

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, STEPS = 3, 8
FRAME = (
    schema.OBSERVATION,
    schema.OBSERVATION_DISCRETE,
    schema.PREVIOUS_ACTION,
    schema.PREVIOUS_REWARD,
    schema.PREVIOUS_TERMINATED,
    schema.EPISODE_STEP,
)
EMBEDDINGS = {
    "added": {},
    "concatenated": {"concat_modalities": True},
    "compute tokens": {"num_compute_tokens": 2, "token_data_len": 2},
}
BACKBONES = {
    "llama": {},
    "qwen3 grouped": {"kind": "qwen3", "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def window(trunk: Trunk, steps: TensorDict) -> torch.Tensor:
    """Hidden states of one recurrent pass over all tasks of all rows."""
    with set_recurrent_mode(True), torch.no_grad():
        return trunk(steps.clone())[schema.HIDDEN]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_three_ways_to_one_hidden_state(embedding, backbone, make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk(EMBEDDINGS[embedding], BACKBONES[backbone])
    steps = random_steps(4, 14, [[5, 6], [], [2, 9], [13]])
    alone = full_pass(trunk, steps)
    assert_equal(window(trunk, steps), alone)  # tasks inside a window, masked
    assert_equal(step_by_step(trunk, steps), alone)


def test_without_backbone_each_step_is_read_out_by_itself(random_steps, step_by_step):
    trunk = Trunk(StepEmbedder(16, max_num_actions=5), None, window=1)
    steps = random_steps(2, 6)
    hidden = window(trunk, steps)
    assert torch.equal(hidden, step_by_step(trunk, steps))
    assert torch.equal(hidden[:, 3], window(trunk, steps[:, 3:])[:, 0])
    trunk(steps[:, 3].clone())  # in the middle of a task: there is no context to miss


def test_index_zero_begins_a_context(make_trunk, random_steps):
    trunk = make_trunk()
    steps = random_steps(2, 8, [[4], []])
    cut = steps.clone()
    cut[schema.IS_INIT][:, 0] = False
    assert torch.equal(window(trunk, cut), window(trunk, steps))


def test_windows_of_any_batch_shape(make_trunk, random_steps):
    trunk = make_trunk()
    steps = random_steps(4, 6, [[3]])
    hidden = window(trunk, steps)
    assert torch.equal(window(trunk, steps.reshape(2, 2, 6)), hidden.reshape(2, 2, 6, -1))
    assert_equal(window(trunk, steps[1]), hidden[1])


def test_images(make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk({"max_num_obs_image": 48})
    steps = random_steps(2, 8, [[], [2]])
    steps[schema.PIXELS] = torch.randint(256, (2, 8, 4, 4, 3), dtype=torch.uint8)
    expected = full_pass(trunk, steps)
    assert_equal(step_by_step(trunk, steps[:, :5]), expected[:, :5])
    trunk.mark_weight_update()  # encodes the remembered images afresh
    assert_equal(step_by_step(trunk, steps[:, 5:]), expected[:, 5:])
    assert trunk._cache._steps["image"].dtype == torch.uint8
    inverted = steps.clone().set(schema.PIXELS, 255 - steps[schema.PIXELS])
    assert (full_pass(trunk, inverted) - expected).abs().max() > 1e-2


def test_environments_of_different_precision(make_trunk, random_steps, full_pass):
    """One writes float64 observations and rewards, the other float32, into one cache."""
    trunk = make_trunk(window=4)
    steps = random_steps(2, 4)
    expected = full_pass(trunk, steps)
    for t in range(4):
        for row, dtype in enumerate((torch.float32, torch.float64)):
            frame = steps[[row], t].clone()
            for key in (schema.OBSERVATION, schema.PREVIOUS_REWARD):
                frame[key] = frame[key].to(dtype)
            assert_equal(trunk(frame)[schema.HIDDEN], expected[[row], t])


def test_change_of_precision_drops_the_contexts(make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk()
    steps = random_steps(2, 5)
    step_by_step(trunk, steps[:, :3])
    trunk.to("cpu").float()  # changes nothing
    assert_equal(step_by_step(trunk, steps[:, 3:]), full_pass(trunk, steps)[:, 3:])
    trunk.double()
    with pytest.raises(RuntimeError, match="none for row 0"):
        trunk(steps[:, 3].clone())
    expected = full_pass(trunk, steps)
    torch.testing.assert_close(step_by_step(trunk, steps), expected, atol=1e-10, rtol=0)


def test_gradients_flow_through_windows_only(make_trunk, random_steps):
    trunk = make_trunk()
    steps = random_steps(2, 5, [[2], []])
    assert not trunk(steps[:, 0].clone())[schema.HIDDEN].requires_grad
    with set_recurrent_mode(True):
        trunk(steps.clone())[schema.HIDDEN].square().sum().backward()
    without = [name for name, p in trunk.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_nested_and_renamed_entries(make_trunk, random_steps):
    trunk = make_trunk()
    renamed = make_trunk(keys={"continuous": ("sensors", "position"), "done": ("last", "end"), "action": "last_action"})
    renamed.load_state_dict(trunk.state_dict())
    steps = random_steps(2, 5, [[3], []])
    other = steps.clone()
    other["sensors", "position"] = other.pop(schema.OBSERVATION)
    other["last_action"] = other.pop(schema.PREVIOUS_ACTION)
    for end in ("terminated", "truncated"):
        other["last", "end", end] = other.pop(("previous", end))
    assert ("sensors", "position") in renamed.in_keys
    assert ("last", "end", "terminated") in renamed.in_keys
    assert torch.equal(window(renamed, other), window(trunk, steps))


def test_dispatch(random_steps):
    trunk = Trunk(StepEmbedder(16, max_num_actions=5, include_done_token=False), None, window=4)
    steps = random_steps(2, 3)
    assert trunk.in_keys == [schema.PREVIOUS_ACTION, schema.PREVIOUS_REWARD, schema.IS_INIT, schema.STREAM]
    with set_recurrent_mode(True):
        hidden = trunk(
            previous_action=steps["previous", "action"],
            previous_reward=steps["previous", "reward"],
            is_init=steps["is_init"],
            stream=steps["stream"],
        )
    assert torch.equal(hidden, window(trunk, steps))


@pytest.fixture
def vector_steps(random_steps) -> Callable[..., TensorDict]:
    """Steps whose previous action is a vector of three numbers, zero where a task begins."""

    def draw(rows: int, num: int, starts: list[list[int]] | None = None) -> TensorDict:
        steps = random_steps(rows, num, starts)
        action = torch.randn(rows, num, 3, generator=torch.Generator().manual_seed(1))
        return steps.set(schema.PREVIOUS_ACTION, action.masked_fill(steps[schema.IS_INIT], 0))

    return draw


VECTOR_ACTION = {"max_num_actions": 0, "max_num_action_continuous": 3}


@pytest.mark.parametrize("encoder", ["fourier", "linear"])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_continuous_actions(embedding, encoder, make_trunk, vector_steps, full_pass, step_by_step):
    trunk = make_trunk({**EMBEDDINGS[embedding], **VECTOR_ACTION, "continuous_encoder": encoder})
    steps = vector_steps(3, 10, [[4], [], [2, 7]])
    alone = full_pass(trunk, steps)
    assert_equal(window(trunk, steps), alone)
    assert_equal(step_by_step(trunk, steps[:, :6]), alone[:, :6])
    trunk.mark_weight_update()  # encodes the remembered actions afresh
    assert_equal(step_by_step(trunk, steps[:, 6:]), alone[:, 6:])
    changed = steps.clone()
    changed[schema.PREVIOUS_ACTION][:, 0, 2] += 1.7
    assert (full_pass(trunk, changed) - alone)[:, :2].abs().amax(-1).min() > 1e-4


def test_continuous_actions_in_a_full_context(make_trunk, vector_steps):
    trunk, full = make_trunk(VECTOR_ACTION, window=4), make_trunk(VECTOR_ACTION)
    full.load_state_dict(trunk.state_dict())
    steps = vector_steps(1, 11)
    for t, (first, last) in enumerate(kept_steps([], 11, 4)):
        assert_equal(trunk(steps[:, t].clone())[schema.HIDDEN], window(full, steps[:, first:last])[:, -1])


def test_continuous_actions_are_read_in_the_weights_type(make_trunk, vector_steps):
    trunk = make_trunk(VECTOR_ACTION).double()
    steps = vector_steps(2, 3)
    action = trunk.read(steps)["action"]
    assert action.dtype == torch.float64
    assert torch.equal(action, steps[schema.PREVIOUS_ACTION].double())
    # one number per step, without a dimension of its own
    single = make_trunk({**VECTOR_ACTION, "max_num_action_continuous": 1})
    steps[schema.PREVIOUS_ACTION] = steps[schema.PREVIOUS_ACTION][..., 0]
    assert single.read(steps)["action"].shape == (2, 3, 1)


# Leakage


MODES = {
    "recurrent": window,
    "sequential": lambda trunk, steps: torch.stack(
        [trunk(steps[:, t].clone())[schema.HIDDEN] for t in range(steps.shape[1])], 1
    ),
}

places = st.tuples(st.integers(0, ROWS - 1), st.integers(0, STEPS - 1))
boundaries = st.lists(st.sets(st.integers(1, STEPS - 1), max_size=3), min_size=ROWS, max_size=ROWS)


@pytest.fixture(scope="module")
def changed_outputs(make_trunk, random_steps) -> Callable[..., torch.Tensor]:
    """Changes one entry of one step; returns by how much each step's output moves, ``[ROWS, STEPS]``."""

    torch.manual_seed(0)
    trunk = make_trunk({"num_compute_tokens": 1})

    def run(mode, starts, place, key) -> torch.Tensor:
        row, t = place
        steps = random_steps(ROWS, STEPS, [sorted(firsts) for firsts in starts])
        changed = steps.clone()
        value = changed[key][row, t]
        if value.dtype == torch.bool:
            changed[key][row, t] = ~value
        elif value.is_floating_point():
            changed[key][row, t] = value + 1.7
        else:
            changed[key][row, t] = (value + 1) % 5
        before, after = (MODES[mode](trunk, each) for each in (steps, changed))
        return (after - before).abs().amax(-1)

    return run


@pytest.mark.parametrize("mode", MODES)
@given(starts=boundaries, place=places, key=st.sampled_from(FRAME))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_step_moves_only_the_rest_of_its_own_task(mode, starts, place, key, changed_outputs):
    row, t = place
    moved = changed_outputs(mode, starts, place, key)
    end = min((first for first in starts[row] if first > t), default=STEPS)
    allowed = torch.zeros(ROWS, STEPS, dtype=torch.bool)
    allowed[row, t:end] = True
    # rows of one batch share matrix products, whose rounding may differ with their values
    assert moved[~allowed].max() <= (1e-6 if (~allowed).any() else 0)
    # the change is real: it shows at its own step, and at every later one of the task
    assert moved[allowed].min() > 1e-6
    assert moved[row, t] > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_leak_is_seen_when_tasks_are_not_separated(mode, changed_outputs):
    """Without the boundary the same change does move what comes after it: the property above can fail."""
    apart = changed_outputs(mode, [{4}, set(), set()], (0, 2), schema.OBSERVATION)
    joined = changed_outputs(mode, [set(), set(), set()], (0, 2), schema.OBSERVATION)
    assert apart[0, 4:].max() <= 1e-6
    assert joined[0, 4:].min() > 1e-4


def test_padding_at_the_end_changes_nothing(make_trunk, random_steps):
    trunk = make_trunk()
    steps = random_steps(2, 10, [[3], []])
    padded = steps.clone()
    padded[:, 7:] = torch.zeros_like(padded[:, 7:])
    assert_equal(window(trunk, padded)[:, :7], window(trunk, steps)[:, :7])


# Full contexts


def kept_steps(starts: list[int], num: int, size: int) -> list[tuple[int, int]]:
    """For each step the range ``[first, last)`` of steps that its context holds under ``overflow="rebuild"``."""
    ranges, first = [], 0
    for t in range(num):
        if t in starts:
            first = t
        elif t - first == size:
            first = t - size // 2
        ranges.append((first, t + 1))
    return ranges


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_full_context_goes_on_with_its_newest_half(embedding, size, make_trunk, random_steps):
    trunk = make_trunk(EMBEDDINGS[embedding], window=size)
    full = make_trunk(EMBEDDINGS[embedding])
    full.load_state_dict(trunk.state_dict())
    starts = [[], [3, 20], [13]]
    steps = random_steps(3, 26, starts)
    counts = count_rows(trunk)
    ranges = [kept_steps(firsts, 26, size) for firsts in starts]
    for t in range(26):
        counts.clear()
        hidden = trunk(steps[:, t].clone())[schema.HIDDEN]
        for row in range(3):
            first, last = ranges[row][t]
            kept = steps[[row], first:last].clone()
            assert_equal(hidden[row], window(full, kept)[0, -1])
        due = sum(t > 0 and ranges[row][t][0] not in (ranges[row][t - 1][0], t) for row in range(3))
        assert counts[-1] == 3
        assert sum(counts[:-1]) == due, "only the full rows may be encoded afresh"


def count_rows(trunk: Trunk) -> list[int]:
    """Records the number of rows of each call of the backbone."""
    counts: list[int] = []
    forward = trunk.backbone.forward

    def spy(features, *args, **kwargs):
        counts.append(len(features))
        return forward(features, *args, **kwargs)

    trunk.backbone.forward = spy
    return counts


def test_until_it_is_full_a_context_holds_the_whole_task(make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk(window=6)
    steps = random_steps(2, 18, [[6, 12], [4, 10, 14]])  # tasks of up to exactly the window
    assert_equal(step_by_step(trunk, steps), full_pass(trunk, steps))


def test_overflow_error_names_the_row(make_trunk, random_steps, step_by_step):
    trunk = make_trunk(window=4, overflow="error")
    steps = random_steps(3, 6, [[2], [], [3]])
    step_by_step(trunk, steps[:, :4])
    with pytest.raises(RuntimeError, match=r"window=4 steps, got one more for row 1 \(stream 1001\).*Raise window"):
        trunk(steps[:, 4].clone())


# Changed weights


def change_weights(trunk: Trunk) -> None:
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("size", [64, 6])
def test_marked_weight_update_rebuilds_with_the_new_weights(size, make_trunk, random_steps):
    trunk, full = make_trunk(window=size), make_trunk()
    starts = [[], [4], [9]]
    steps = random_steps(3, 16, starts)
    ranges = [kept_steps(firsts, 16, size) for firsts in starts]
    for t in range(16):
        if t in (5, 6, 12):
            change_weights(trunk)
            trunk.mark_weight_update()
        full.load_state_dict(trunk.state_dict())
        rows = [0, 1, 2] if t < 12 else [2, 0]  # row 1 sleeps through an update
        hidden = trunk(steps[rows, t].clone())[schema.HIDDEN]
        for index, row in enumerate(rows):
            first, last = ranges[row][t]
            assert_equal(hidden[index], window(full, steps[[row], first:last])[0, -1])
    # the row that slept is rebuilt when it wakes up
    first, _ = ranges[1][12]
    assert_equal(trunk(steps[[1], 12].clone())[schema.HIDDEN], window(full, steps[[1], first:13])[:, -1])


def outputs_after_change(make_trunk, steps, *, mark, **options) -> tuple[torch.Tensor, list[int]]:
    """Hidden states of two steps after a change of weights, and how many steps the backbone encoded for each."""
    torch.manual_seed(0)
    trunk = make_trunk(**options)
    for t in range(4):
        trunk(steps[:, t].clone())
    change_weights(trunk)
    if mark:
        trunk.mark_weight_update()
    encoded = [0, 0]
    forward = trunk.backbone.forward
    hidden = []
    for index in range(2):

        def spy(features, *args, index=index, **kwargs):
            encoded[index] += features.shape[1]
            return forward(features, *args, **kwargs)

        trunk.backbone.forward = spy
        hidden.append(trunk(steps[:, 4 + index].clone())[schema.HIDDEN])
    return torch.stack(hidden, 1), encoded


def test_keep_and_unmarked_updates_recompute_nothing(make_trunk, random_steps):
    steps = random_steps(3, 6)
    rebuilt, encoded = outputs_after_change(make_trunk, steps, mark=True)
    assert encoded == [4 + 1, 1]  # afresh once, then step by step
    kept, encoded = outputs_after_change(make_trunk, steps, mark=True, on_weight_update="keep")
    assert encoded == [1, 1]
    unmarked, encoded = outputs_after_change(make_trunk, steps, mark=False)
    assert encoded == [1, 1]
    assert torch.equal(kept, unmarked)
    assert (rebuilt - kept).abs().amax((0, 2)).min() > 1e-2


def test_weight_version_travels_with_the_weights(make_trunk, random_steps):
    """A worker's copy receives weights by name: the version among them makes it rebuild."""
    trainer, worker, full = make_trunk(), make_trunk(), make_trunk()
    steps = random_steps(2, 6)
    worker.load_state_dict(trainer.state_dict())
    for t in range(5):
        worker(steps[:, t].clone())
    change_weights(trainer)
    trainer.mark_weight_update()
    TensorDict.from_module(worker).data.update_(TensorDict.from_module(trainer).data)
    full.load_state_dict(trainer.state_dict())
    assert_equal(worker(steps[:, 5].clone())[schema.HIDDEN], window(full, steps)[:, 5])


@pytest.mark.parametrize("assign", [False, True])
def test_loading_leaves_the_checkpoint_as_it_was(assign, make_trunk, random_steps):
    checkpoint = make_trunk().state_dict()
    before = {name: value.clone() for name, value in checkpoint.items()}
    trunk = make_trunk()
    trunk(random_steps(2, 1)[:, 0])
    trunk.load_state_dict(checkpoint, assign=assign)
    trunk.mark_weight_update()
    assert all(torch.equal(checkpoint[name], value) for name, value in before.items())


# Errors


def test_unknown_options(make_trunk):
    with pytest.raises(ValueError, match=r"overflow must be one of rebuild, error, got 'wrap'"):
        make_trunk(overflow="wrap")
    with pytest.raises(ValueError, match=r"on_weight_update must be one of rebuild, keep, got 'drop'"):
        make_trunk(on_weight_update="drop")
    with pytest.raises(ValueError, match=r"window must be at least 1, got 0"):
        make_trunk(window=0)
    with pytest.raises(ValueError, match=r"max_streams must be at least 1, got 0"):
        make_trunk(max_streams=0)
    with pytest.raises(TypeError, match=r"max_streams must be an integer, got 2\.5"):
        make_trunk(max_streams=2.5)
    with pytest.raises(TypeError, match=r"window must be an integer, got True"):
        make_trunk(window=True)
    with pytest.raises(ValueError, match=r"keys must name modalities .*, got \['observation'\]"):
        make_trunk(keys={"observation": "state"})


def test_embedder_and_backbone_of_different_width():
    with pytest.raises(ValueError, match=r"the embedder must have the backbone's hidden_dim=16, got 8"):
        Trunk(StepEmbedder(8), CausalBackbone(16, num_layers=1, num_heads=2), window=4)


@pytest.mark.parametrize(
    ("key", "dtype", "kind"),
    [
        (schema.PREVIOUS_TERMINATED, torch.float32, "bool"),
        (schema.PREVIOUS_TRUNCATED, torch.int64, "bool"),
        (schema.IS_INIT, torch.uint8, "bool"),
        (schema.STREAM, torch.float64, "integer"),
    ],
    ids=str,
)
def test_entries_of_wrong_type(key, dtype, kind, make_trunk, random_steps):
    steps = random_steps(2, 3)
    steps[key] = steps[key].to(dtype)
    match = rf"entry .*{key if isinstance(key, str) else key[-1]}.* must be of {kind} type, got {dtype}"
    with pytest.raises(TypeError, match=match):
        make_trunk()(steps[:, 0].clone())
    if key != schema.STREAM:
        with set_recurrent_mode(True), pytest.raises(TypeError, match=match):
            make_trunk()(steps)


def test_window_longer_than_the_positions(make_trunk, random_steps):
    few = {"max_position_embeddings": 12}
    with pytest.raises(ValueError, match=r"max_position_embeddings=12 tokens, got 5 steps of 3"):
        make_trunk({"num_compute_tokens": 2}, few, window=5)
    trunk = make_trunk({"num_compute_tokens": 2}, few, window=4)
    with (
        set_recurrent_mode(True),
        pytest.raises(ValueError, match=r"max_position_embeddings=12 tokens, got 5 steps of 3"),
    ):
        trunk(random_steps(1, 5))


def test_window_needs_a_time_dimension(make_trunk, random_steps):
    with set_recurrent_mode(True), pytest.raises(ValueError, match=r"must be \[\*, T\] in recurrent mode"):
        make_trunk()(random_steps(1, 1)[0, 0])


@pytest.mark.parametrize("key", [*FRAME, schema.IS_INIT, schema.STREAM], ids=str)
def test_missing_entry(key, make_trunk, random_steps):
    steps = random_steps(2, 1)[:, 0]
    del steps[key]
    with pytest.raises(KeyError, match=rf"entry .*{key if isinstance(key, str) else key[-1]}.* must be present, got"):
        make_trunk()(steps)


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        (schema.PREVIOUS_ACTION, 5, ValueError, r"'action' must lie in \[0, 5\), got 5"),
        (schema.PREVIOUS_ACTION, -1, ValueError, r"'action' must lie in \[0, 5\), got -1"),
        (schema.OBSERVATION_DISCRETE, 9, ValueError, r"'discrete' must lie in \[0, 9\), got 9"),
        (schema.EPISODE_STEP, 16, ValueError, r"'time' must lie in \[0, 16\), got 16"),
        (schema.EPISODE_STEP, -2, ValueError, r"'time' must lie in \[0, 16\), got -2"),
        (schema.PREVIOUS_ACTION, 1.0, TypeError, r"\('previous', 'action'\) must hold integer ids, got torch.float32"),
        (schema.OBSERVATION_DISCRETE, True, TypeError, r"'observation_discrete' must hold integer ids, got torch.bool"),
        (schema.EPISODE_STEP, 1.0, TypeError, r"'episode_step' must hold integer ids, got torch.float32"),
    ],
)
def test_bad_ids(key, value, error, match, make_trunk, random_steps):
    steps = random_steps(2, 3)
    steps[key] = torch.full_like(steps[key], value, dtype=torch.tensor(value).dtype)
    with set_recurrent_mode(True), pytest.raises(error, match=match):
        make_trunk()(steps)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_one_hot_equals_categorical(dtype, make_trunk, random_steps, step_by_step):
    trunk = make_trunk()
    steps = random_steps(2, 5)
    one_hot = steps.clone()
    for key, num in ((schema.PREVIOUS_ACTION, 5), (schema.OBSERVATION_DISCRETE, 9)):
        one_hot[key] = torch.nn.functional.one_hot(steps[key], num).to(dtype)
    assert torch.equal(window(trunk, one_hot), window(trunk, steps))
    assert torch.equal(step_by_step(trunk, one_hot), step_by_step(trunk, steps))
    first = steps[:, :1].clone()
    first[schema.PREVIOUS_ACTION].zero_()
    one_hot = one_hot[:, :1].clone()
    one_hot[schema.PREVIOUS_ACTION].zero_()  # no previous action: reads as id 0
    assert torch.equal(window(trunk, one_hot), window(trunk, first))


def test_one_hot_of_another_size(make_trunk, random_steps):
    steps = random_steps(2, 3)
    steps[schema.PREVIOUS_ACTION] = torch.zeros(2, 3, 4)
    with (
        set_recurrent_mode(True),
        pytest.raises(ValueError, match=r"one-hot vectors \[\*, 5\], got trailing shape \(4,\)"),
    ):
        make_trunk()(steps)


# Contexts inside windows

flags = st.integers(1, 8).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=3)
)


def starts(row, step):
    """Index of the first step of the context that a step belongs to."""
    return max([0, *(index for index in range(step + 1) if row[index])])


@settings(max_examples=60, deadline=None, database=None)
@given(flags)
def test_segment_positions_count_from_the_last_start(rows):
    expected = [[step - starts(row, step) for step in range(len(row))] for row in rows]
    assert segment_positions(torch.tensor(rows)).tolist() == expected


@settings(max_examples=60, deadline=None, database=None)
@given(flags)
def test_segment_mask_is_causal_inside_the_context(rows):
    expected = [[[starts(row, i) <= j <= i for j in range(len(row))] for i in range(len(row))] for row in rows]
    assert segment_mask(torch.tensor(rows)).tolist() == expected
