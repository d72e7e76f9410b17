"""Addresses, eviction, and the life of a context."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.modules import KeyValues, KVCache


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def empty_pool(slots):
    return KeyValues(*((torch.zeros(slots, 1, 4, 2),) for _ in "kv"))


def make_cache(max_streams=4):
    return KVCache(empty_pool, window=4, max_streams=max_streams)


def test_interleaved_rollouts_do_not_disturb_each_other(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    first, second = random_steps(2, 12, [[5], [7, 9]]), random_steps(3, 12, [[], [4], [11]], seed=1)
    second[schema.STREAM] += 100
    expected = full_pass(trunk, first), full_pass(trunk, second)
    for t in range(12):
        assert_equal(trunk(first[:, t].clone())[schema.HIDDEN], expected[0][:, t])
        assert_equal(trunk(second[:, t].clone())[schema.HIDDEN], expected[1][:, t])


def test_rows_in_any_order_and_subset(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    steps = random_steps(5, 12, [[6], [], [3, 8], [10], []])
    expected = full_pass(trunk, steps)
    generator = torch.Generator().manual_seed(1)
    at = torch.zeros(5, dtype=torch.int64)  # each row's next step
    sizes = set()
    while (at < 12).any():
        rows = torch.randperm(5, generator=generator)
        rows = rows[at[rows] < 12]
        rows = rows[: int(torch.randint(1, len(rows) + 1, (), generator=generator))]
        sizes.add(len(rows))
        assert_equal(trunk(steps[rows, at[rows]].clone())[schema.HIDDEN], expected[rows, at[rows]])
        at[rows] += 1
    assert len(sizes) > 2
    assert len(trunk._cache) == 5


def test_batch_of_any_shape(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    steps = random_steps(6, 5, [[3]])
    expected = full_pass(trunk, steps)
    for t in range(5):
        assert_equal(trunk(steps[:, t].reshape(2, 3).clone())[schema.HIDDEN], expected[:, t].reshape(2, 3, -1))
    assert_equal(trunk(steps[0, 0].clone())[schema.HIDDEN], expected[0, 0])  # no batch dimension; a new task


def test_row_without_context_is_an_error_that_names_it(make_trunk, random_steps):
    trunk = make_trunk()
    steps = random_steps(3, 2)
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 1000\).*reset the environment"):
        trunk(steps[:, 1].clone())
    trunk(steps[:2, 0].clone())
    with pytest.raises(RuntimeError, match=r"none for row 2 \(stream 1002\)"):
        trunk(steps[:, 1].clone())
    trunk.reset_cache()
    with pytest.raises(RuntimeError, match=r"none for row 1 \(stream 1000\)"):
        trunk(steps[[2, 0], [0, 1]].clone())


def test_refused_batch_changes_no_context(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    steps = random_steps(3, 4)
    expected = full_pass(trunk, steps)
    trunk(steps[:2, 0].clone())
    for refused, match in (
        (steps[:, 1], "none for row 2"),
        (steps[[0, 1, 0], 1], "got 1000 more than once"),
        (steps[:2, 1].clone().set(schema.PREVIOUS_ACTION, torch.tensor([0, 9])), r"\[0, 5\), got 9"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match):
            trunk(refused.clone())
    for t in range(1, 4):
        assert_equal(trunk(steps[:2, t].clone())[schema.HIDDEN], expected[:2, t])


def test_duplicate_streams(make_trunk, random_steps):
    steps = random_steps(3, 1)
    with pytest.raises(ValueError, match=r"stream must be unique in a batch, got 1002 more than once"):
        make_trunk()(steps[[0, 2, 2], 0].clone())


def test_more_rows_than_streams(make_trunk, random_steps):
    with pytest.raises(ValueError, match=r"at most max_streams=2 rows, got 3"):
        make_trunk(max_streams=2)(random_steps(3, 1)[:, 0])


def test_least_recently_used_context_is_forgotten(make_trunk, random_steps, full_pass):
    trunk = make_trunk(max_streams=3)
    steps = random_steps(5, 4)
    expected = full_pass(trunk, steps)
    trunk(steps[:3, 0].clone())
    trunk(steps[[0, 2], 1].clone())
    assert_equal(trunk(steps[[3], 0].clone())[schema.HIDDEN], expected[[3], 0])  # takes the slot of row 1
    assert_equal(trunk(steps[[0, 3, 2], [2, 1, 2]].clone())[schema.HIDDEN], expected[[0, 3, 2], [2, 1, 2]])
    with pytest.raises(RuntimeError, match=r"row 1 \(stream 1001\).*more streams than max_streams=3"):
        trunk(steps[[0, 1], [3, 1]].clone())
    assert_equal(trunk(steps[[0, 2], 3].clone())[schema.HIDDEN], expected[[0, 2], 3])
    assert_equal(trunk(steps[[1, 4], 0].clone())[schema.HIDDEN], expected[[1, 4], 0])  # rows 3 and 0 go
    assert len(trunk._cache) == 3
    with pytest.raises(RuntimeError, match=r"row 0 \(stream 1003\)"):
        trunk(steps[[3], 2].clone())


def test_row_of_the_batch_is_never_evicted_for_another():
    cache = make_cache(max_streams=3)
    before = dict(zip((1, 2, 3), cache.locate([1, 2, 3], [True] * 3).tolist(), strict=True))
    cache.length += 1
    after = dict(zip((9, 1, 8), cache.locate([9, 1, 8], [True, False, True]).tolist(), strict=True))
    assert after[1] == before[1]
    assert sorted(after.values()) == [0, 1, 2]


def test_locate_restarts_only_the_rows_that_start():
    cache = make_cache()
    rows = cache.locate([5, 6], [True, True])
    for _ in range(2):
        cache.remember(rows, {"time": torch.zeros(2, 1)}, torch.ones(2, dtype=torch.int64))
    assert cache.length[rows].tolist() == [2, 2]
    assert cache.length[cache.locate([5, 6], [False, True])].tolist() == [2, 0]


def test_slots_are_added_as_streams_appear():
    made = []

    def count(slots):
        made.append(slots)
        return empty_pool(slots)

    cache = KVCache(count, window=4, max_streams=5)
    cache.locate([1, 2], [True, True])
    cache.locate([2], [True])
    cache.locate([3, 4, 5], [True] * 3)
    cache.locate([6], [True])
    assert made == [2, 5]  # the whole pool anew
    assert len(cache) == 5


def test_forgotten_streams_make_room_before_the_pool_grows():
    made = []

    def count(slots):
        made.append(slots)
        return empty_pool(slots)

    cache = KVCache(count, window=4, max_streams=5)
    slots = dict(zip((1, 2, 3), cache.locate([1, 2, 3], [True] * 3).tolist(), strict=True))
    cache.forget([1, 3, 99])
    assert len(cache) == 1
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 3\)"):
        cache.locate([3], [False])
    assert sorted(cache.locate([4, 5], [True, True]).tolist()) == sorted([slots[1], slots[3]])
    assert made == [3]
    cache.locate([6], [True])
    assert made == [3, 4]


def test_forgetting_disturbs_no_other_context(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    trunk.forget(torch.tensor([7]))  # nothing there yet
    steps = random_steps(4, 4)
    expected = full_pass(trunk, steps)
    trunk(steps[:3, 0].clone())
    trunk.forget(torch.tensor([[1000], [1002], [77]]))
    assert len(trunk._cache) == 1
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 1000\)"):
        trunk(steps[:3, 1].clone())
    for t in range(3):  # rows 3 and 0 take the freed slots
        rows, at = torch.tensor([1, 3, 0]), torch.tensor([1 + t, t, t])
        assert_equal(trunk(steps[rows, at].clone())[schema.HIDDEN], expected[rows, at])
    assert len(trunk._cache.length) == 3


def test_row_whose_first_call_failed_has_no_context(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    steps = random_steps(3, 3)
    trunk(steps[[0], 0].clone())
    forward = trunk.backbone.forward

    def fails(*_, **__):
        raise MemoryError("out of memory")

    trunk.backbone.forward = fails
    with pytest.raises(MemoryError, match="out of memory"):
        trunk(steps[1:, 0].clone())
    trunk.backbone.forward = forward
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 1001\).*a call that failed"):
        trunk(steps[1:, 1].clone())  # the same rows as before
    with pytest.raises(RuntimeError, match=r"none for row 1 \(stream 1002\)"):
        trunk(steps[[0, 2], 1].clone())
    expected = full_pass(trunk, steps)
    assert_equal(trunk(steps[[0], 1].clone())[schema.HIDDEN], expected[[0], 1])
    for t in range(2):
        assert_equal(trunk(steps[1:, t].clone())[schema.HIDDEN], expected[1:, t])


def test_max_streams_can_be_raised(make_trunk, random_steps, full_pass):
    trunk = make_trunk(max_streams=2)
    steps = random_steps(3, 2)
    expected = full_pass(trunk, steps)
    trunk(steps[:2, 0].clone())
    with pytest.raises(ValueError, match=r"at most max_streams=2 rows, got 3\. Raise max_streams"):
        trunk(steps[:, 0].clone())
    trunk.max_streams = 3
    assert_equal(trunk(steps[:, 0].clone())[schema.HIDDEN], expected[:, 0])
    assert_equal(trunk(steps[:, 1].clone())[schema.HIDDEN], expected[:, 1])


def test_recall_returns_the_newest_steps_oldest_first():
    cache = make_cache()
    rows = cache.locate([7, 8], [True, True])
    for t in range(3):
        real = torch.tensor([1, int(t < 2)])
        cache.remember(rows, {"time": torch.tensor([[t], [10 + t]])}, real)
    recalled = cache.recall(rows, torch.tensor([3, 1]))["time"]
    assert recalled.tolist() == [[0, 1, 2], [11, 11, 11]]


def test_reset_cache_forgets_everything(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    steps = random_steps(2, 3)
    trunk(steps[:, 0].clone())
    trunk.reset_cache()
    with pytest.raises(RuntimeError, match="none for row 0"):
        trunk(steps[:, 1].clone())
    expected = full_pass(trunk, steps)
    for t in range(3):
        assert_equal(trunk(steps[:, t].clone())[schema.HIDDEN], expected[:, t])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda trunk: pickle.loads(pickle.dumps(trunk))], ids=["deepcopy", "pickle"]
)
def test_copy_has_no_contexts_and_works(copied, make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk()
    steps = random_steps(2, 6)
    expected = full_pass(trunk, steps)
    step_by_step(trunk, steps[:, :3])
    other = copied(trunk)
    with pytest.raises(RuntimeError, match=r"none for row 0.*a copy of the module"):
        other(steps[:, 3].clone())
    assert_equal(step_by_step(other, steps), expected)  # the copy writes into a cache of its own
    assert_equal(step_by_step(trunk, steps[:, 3:]), expected[:, 3:])


def test_pickle_does_not_grow_with_the_cache(make_trunk, random_steps, step_by_step):
    trunk = make_trunk()
    before = len(pickle.dumps(trunk))
    step_by_step(trunk, random_steps(4, 3))
    assert abs(len(pickle.dumps(trunk)) - before) < 100


@pytest.mark.parametrize("grow", [False, True], ids=["same rows", "more rows"])
def test_inference_mode_in_one_call_and_no_grad_in_the_next(grow, make_trunk, random_steps, full_pass):
    trunk = make_trunk(window=4)  # full after four steps: rebuilding runs in both modes, too
    steps = random_steps(3, 12, [[3, 6, 9]] * 3)
    expected = full_pass(trunk, steps)
    for t in range(12):
        rows = slice(0, 3 if t >= 6 or not grow else 2)
        with torch.inference_mode() if t % 2 == 0 else torch.no_grad():
            hidden = trunk(steps[rows, t].clone())[schema.HIDDEN]
        assert_equal(hidden.clone(), expected[rows, t])
    assert_equal(trunk(steps[:, 0].clone())[schema.HIDDEN], expected[:, 0])  # and with gradients switched on


def test_full_contexts_survive_a_change_of_mode(make_trunk, random_steps):
    steps = random_steps(2, 12)
    trunk, other = make_trunk(window=4), make_trunk(window=4)
    other.load_state_dict(trunk.state_dict())
    for t in range(12):
        with torch.inference_mode() if t % 2 else torch.no_grad():
            mixed = trunk(steps[:, t].clone())[schema.HIDDEN].clone()
        assert_equal(mixed, other(steps[:, t].clone())[schema.HIDDEN])


def test_a_copied_context_goes_on_by_itself(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    one = random_steps(2, 12, [[], []])
    other = one.clone()
    other[schema.STREAM] += 100
    other[:, 5:] = random_steps(2, 12, [[], []], seed=1)[:, 5:].set(schema.STREAM, other[:, 5:][schema.STREAM])
    expected = full_pass(trunk, one), full_pass(trunk, other)
    assert not torch.allclose(expected[0][:, 5], expected[1][:, 5], atol=1e-3)
    for t in range(5):
        trunk(one[:, t].clone())
    trunk.copy_context(one[:, 0][schema.STREAM], other[:, 0][schema.STREAM])
    for t in range(5, 12):
        assert_equal(trunk(one[:, t].clone())[schema.HIDDEN], expected[0][:, t])
        assert_equal(trunk(other[:, t].clone())[schema.HIDDEN], expected[1][:, t])


@pytest.mark.parametrize("pieces", [[20], [1, 7, 12], [5, 5, 1, 1, 8], [19, 1]])
def test_appended_steps_equal_single_ones(pieces, make_trunk, random_steps, step_by_step):
    # contexts of 6 steps overflow, and tasks end inside the pieces, in each row elsewhere
    steps = random_steps(3, 20, [[4, 17], [], [9]])
    trunk, reference = make_trunk(window=6), make_trunk(window=6)
    trunk.load_state_dict(reference.state_dict())
    expected = step_by_step(reference, steps)
    hidden = [trunk.append(piece.clone())[schema.HIDDEN] for piece in steps.split(pieces, 1)]
    assert_equal(torch.cat(hidden, 1), expected)
    assert torch.equal(trunk._cache.length, reference._cache.length)


def test_an_agent_goes_on_after_a_history_that_it_did_not_play(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    steps = random_steps(4, 12, [[5]])
    expected = full_pass(trunk, steps)
    appended = trunk.append(steps[:, :8].reshape(2, 2, 8).clone())
    assert_equal(appended[schema.HIDDEN], expected[:, :8].reshape(2, 2, 8, -1))
    for t in range(8, 12):
        assert_equal(trunk(steps[:, t].clone())[schema.HIDDEN], expected[:, t])


def test_appending_takes_as_few_passes_as_it_can(make_trunk, random_steps, monkeypatch):
    trunk = make_trunk()
    calls = []
    forward = trunk.backbone.forward
    monkeypatch.setattr(trunk.backbone, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    trunk.append(random_steps(3, 20))
    assert len(calls) == 1
    trunk.append(random_steps(3, 20, [[4], [9], [9]]))
    assert len(calls) == 4


def test_refused_steps_leave_no_half_context(make_trunk, random_steps):
    steps = random_steps(2, 12)
    trunk = make_trunk(window=8)
    trunk.append(steps[:, :5].clone())
    bad = steps[:, 5:].clone()
    bad[schema.PREVIOUS_ACTION][1, 6] = 9
    with pytest.raises(ValueError, match=r"\[0, 5\), got 9"):
        trunk.append(bad)
    assert trunk._cache.length[:2].tolist() == [5, 5]  # nothing was begun
    trunk = make_trunk(window=8, overflow="error")
    trunk.append(steps[:, :5].clone())
    with pytest.raises(RuntimeError, match="must hold at most window=8 steps"):
        trunk.append(steps[:, 5:].clone())
    with pytest.raises(RuntimeError, match="none for row 0"):
        trunk(steps[:, 8].clone())


def test_a_refused_step_of_a_new_stream_takes_nobodys_place(make_trunk, random_steps):
    trunk = make_trunk(max_streams=2)
    steps = random_steps(3, 2)
    trunk(steps[:2, 0].clone())
    bad = steps[2:, 0].clone().set(schema.PREVIOUS_ACTION, torch.tensor([9]))
    with pytest.raises(ValueError, match=r"\[0, 5\), got 9"):
        trunk(bad)
    trunk(steps[:2, 1].clone())


def test_no_steps_at_all(make_trunk, random_steps):
    steps = random_steps(2, 3)
    with pytest.raises(ValueError, match=r"at least one step, got a batch of shape \(0,\)"):
        make_trunk()(steps[:0, 0])
    with pytest.raises(ValueError, match=r"at least one step, got a batch of shape \(2, 0\)"):
        make_trunk().append(steps[:, :0])
    with set_recurrent_mode(True), pytest.raises(ValueError, match=r"at least one step, got a batch of shape \(0, 3\)"):
        make_trunk()(steps[:0])


def test_copies_are_all_made_or_none(make_trunk, random_steps, full_pass):
    trunk = make_trunk()
    steps = random_steps(2, 3)
    expected = full_pass(trunk, steps)
    trunk.append(steps[:, :2].clone())
    with pytest.raises(KeyError, match="none for stream 99"):
        trunk.copy_context(torch.tensor([1000, 99]), torch.tensor([1001, 3]))
    assert_equal(trunk(steps[:, 2].clone())[schema.HIDDEN], expected[:, 2])


def test_appended_steps_are_of_one_stream_a_row(make_trunk, random_steps):
    steps = random_steps(2, 5)
    with pytest.raises(ValueError, match=r"steps must be \[\*, T\] to be appended"):
        make_trunk().append(steps[0, 0])
    steps[schema.STREAM][1, 3] = 7
    with pytest.raises(ValueError, match="stream must be the same at all steps of a row, got 1001 and 7 in row 1"):
        make_trunk().append(steps)


def test_copies_that_cannot_be_made(make_trunk, random_steps):
    trunk = make_trunk()
    with pytest.raises(KeyError, match="sources must have contexts, got none at all"):
        trunk.copy_context(torch.tensor([1]), torch.tensor([2]))
    trunk(random_steps(1, 1, [[]])[:, 0])
    with pytest.raises(KeyError, match="the source must have a context, got none for stream -5"):
        trunk.copy_context(torch.tensor([-5]), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"must have one shape, got \(1,\) and \(2,\)"):
        trunk.copy_context(torch.tensor([1]), torch.tensor([1, 2]))
    cache = make_cache(max_streams=1)
    cache.locate([11], [True])
    with pytest.raises(ValueError, match="sources and targets must be at most max_streams=1 streams, got 2"):
        cache.copy([11], [12])


def test_copies_evict_no_source_and_may_swap():
    cache = make_cache(max_streams=4)
    cache.locate([2, 1, 3, 4], [True] * 4)
    cache.length[:] = torch.tensor([20, 10, 30, 40])
    cache.copy([1, 2], [11, 12])  # 2 was used least recently
    assert cache.length[cache.locate([1, 2, 11, 12], [False] * 4)].tolist() == [10, 20, 10, 20]
    cache.copy([1, 2], [2, 1])
    assert cache.length[cache.locate([1, 2], [False] * 2)].tolist() == [20, 10]
