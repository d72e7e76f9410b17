"""Where contexts lie in a pool's memory: side by side, moved as they grow, read without a copy."""

from __future__ import annotations

import pytest
import torch

from torchrl_mouse import schema
from torchrl_mouse.modules import KeyValues, KVCache, decoding, kv_cache


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_once", [1, 5_000, 2**22], ids=["row by row", "two rows", "whole"])
def test_memory_is_laid_out_for_about_what_contexts_hold(at_once, monkeypatch):
    monkeypatch.setattr(kv_cache, "_MOVED_AT_ONCE", at_once)
    whole = KeyValues((torch.zeros(3, 2, 1000, 4),), (torch.zeros(3, 2, 1000, 4),))
    cache = KVCache(lambda slots: whole, window=1000, max_streams=3)
    rows = cache.locate([1, 2, 3], [True] * 3)
    expected = torch.randn(3, 2, 1000, 4)
    lengths = []
    for length in (1, 16, 17, 40, 128, 129, 600, 1000):
        key = cache.key_values(rows, length).key[0]
        assert key.is_contiguous()
        assert key.data_ptr() == whole.key[0].data_ptr()
        begin = ([0, 1, 16, 17, 40, 128, 129, 600])[len(lengths)]
        assert torch.equal(key[:, :, :begin], expected[:, :, :begin])
        assert key[:, :, begin:].abs().max() == 0  # nothing of another row's is left over
        key[:, :, begin:length] = expected[:, :, begin:length]
        lengths.append(key.shape[2])
    assert lengths == [16, 16, 32, 48, 128, 144, 640, 1000]
    some = cache.key_values(rows[:2], 20).key[0]  # the third row may need more
    assert some.shape[2] == 32
    assert torch.equal(some[:, :, :20], expected[:2, :, :20])
    assert torch.equal(cache.key_values(rows, 1000).key[0], expected)
    every = cache.key_values(rows, 20).key[0]  # all contexts have begun again
    assert every.is_contiguous()
    assert torch.equal(every, expected[:, :, :32])
    assert cache.key_values(rows, 33).key[0][:, :, 32:].abs().max() == 0


def test_rows_that_are_a_run_of_slots_are_not_copied(make_trunk, random_steps, full_pass, monkeypatch):
    trunk = make_trunk()
    steps = random_steps(5, 4)
    expected = full_pass(trunk, steps)
    trunk(steps[:, 0].clone())
    seen = []
    key_values = KVCache.key_values

    def watch(self, rows, length, **options):
        seen.append(key_values(self, rows, length, **options).rows is None)
        return key_values(self, rows, length, **options)

    monkeypatch.setattr(KVCache, "key_values", watch)
    for t, rows in enumerate(([4, 1, 0, 3, 2], [3, 1, 2], [4, 3]), start=1):
        at = torch.tensor([1, 1, 1, 1, 1]) if t == 1 else torch.tensor([t] * len(rows))
        at = torch.tensor([trunk._cache.length[row] for row in rows]) if t > 1 else at
        assert_equal(trunk(steps[rows, at].clone())[schema.HIDDEN], expected[rows, at])
    assert seen == [True] * 3
    rows, at = [0, 4], [2, 3]
    assert_equal(trunk(steps[rows, at].clone())[schema.HIDDEN], expected[rows, at])
    assert seen.pop() is False


def test_failed_layout_leaves_no_context(make_trunk, random_steps, monkeypatch, full_pass, step_by_step):
    trunk = make_trunk()
    steps = random_steps(2, 20)
    step_by_step(trunk, steps[:, :16])
    lay_out, calls = kv_cache._lay_out, []

    def fails(pool, length):
        calls.append(length)
        if len(calls) == 3:  # some layers have the new layout already
            raise MemoryError("out of memory")
        return lay_out(pool, length)

    monkeypatch.setattr(kv_cache, "_lay_out", fails)
    with pytest.raises(MemoryError, match="out of memory"):
        trunk(steps[:, 16].clone())
    with pytest.raises(RuntimeError, match=r"none for row 0 \(stream 1000\).*a call that failed"):
        trunk(steps[:, 16].clone())
    assert_equal(step_by_step(trunk, steps), full_pass(trunk, steps))


# Numbers that are not finite stay in their task


def spoil(steps, row, step):
    steps[schema.OBSERVATION][row, step] = torch.nan
    return steps


def test_a_restarted_row_sees_nothing_of_the_task_before(make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk()
    steps = spoil(random_steps(2, 12, [[6], []]), 0, 2)
    hidden = step_by_step(trunk, steps)
    assert hidden[0, 2:6].isnan().all()
    assert_equal(hidden[:1, 6:], full_pass(trunk, steps[:1, 6:]))
    assert_equal(hidden[1], full_pass(trunk, steps)[1])


@pytest.mark.parametrize("how", ["forgotten", "evicted"])
def test_a_slot_is_handed_over_empty(how, make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk(max_streams=1)
    step_by_step(trunk, spoil(random_steps(1, 6), 0, 3))
    if how == "forgotten":
        trunk.forget(torch.tensor([1000]))
    other = random_steps(1, 6, seed=1)
    other[schema.STREAM] += 1
    assert_equal(step_by_step(trunk, other), full_pass(trunk, other))


def test_a_rebuilt_context_sees_nothing_of_what_was_dropped(make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk(window=8)
    steps = spoil(random_steps(1, 20), 0, 1)
    hidden = step_by_step(trunk, steps)
    assert hidden[0, 1:8].isnan().all()
    assert hidden[0, 8:].isfinite().all()
    newest = steps[:, 4:12].clone()
    newest[schema.IS_INIT][:, 0] = True
    assert_equal(hidden[:, 8:12], full_pass(trunk, newest)[:, 4:])


def test_repaired_weights_repair_contexts(make_trunk, random_steps, full_pass, step_by_step):
    trunk = make_trunk()
    steps = random_steps(2, 8)
    before = step_by_step(trunk, steps[:, :4])
    good = {name: value.clone() for name, value in trunk.state_dict().items()}
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.fill_(torch.nan)
    trunk.mark_weight_update()
    assert trunk(steps[:, 4].clone())[schema.HIDDEN].isnan().all()
    trunk.load_state_dict(good)
    after = step_by_step(trunk, steps[:, 5:])
    assert_equal(torch.cat([before, after], 1), full_pass(trunk, steps)[:, [0, 1, 2, 3, 5, 6, 7]])


# Many tokens at once


@pytest.mark.parametrize("limit", [1, 2_000, 10_000], ids=["a token", "part of a row", "some rows"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4]], ids=["a run", "in no order"])
def test_masks_of_many_tokens_are_built_piece_by_piece(limit, order, make_trunk, random_steps, full_pass, monkeypatch):
    trunk = make_trunk(backbone={"num_heads": 4, "num_key_value_heads": 2})
    steps = random_steps(5, 20)
    expected = full_pass(trunk, steps)
    trunk.append(steps[:, :3].clone())
    monkeypatch.setattr(decoding, "_MASKED_AT_ONCE", limit)
    masks, decode = [], decoding.decode

    def watch(model, features, positions, cache):
        heads, length = cache.key[0].shape[1:3]
        masks.append(features.shape[0] * features.shape[1] * 4 // heads * length * 4)
        return decode(model, features, positions, cache)

    monkeypatch.setattr(decoding, "decode", watch)
    assert_equal(trunk.append(steps[order, 3:].clone())[schema.HIDDEN], expected[order, 3:])
    assert len(masks) > 1
    one_token = 2 * 64 * 4  # two heads share keys of 64 positions
    assert max(masks) <= max(limit, one_token)
