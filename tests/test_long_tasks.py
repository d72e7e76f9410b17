"""A task of 10,000 steps runs in constant memory and constant work per step."""

from __future__ import annotations

import math

import pytest
import torch

from torchrl_mouse import schema

WINDOW, STEPS, ROWS = 256, 10_000, 2
TINY = {
    "embedding": {"include_action_token": False, "include_reward_token": False, "include_done_token": False},
    "backbone": {"num_layers": 1, "num_heads": 1},
}


def allocated(trunk) -> int:
    """Bytes of everything that the contexts hold on to."""
    cache = trunk._cache
    tensors = [cache.length, cache.version, *cache._key_values.pools, *cache._steps.values()]
    assert {name for name, value in vars(cache).items() if isinstance(value, torch.Tensor)} == {"length", "version"}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.timeout(180)
def test_a_task_of_10000_steps(make_trunk, random_steps, monkeypatch):
    """One row is 100 steps behind the other, so that their contexts are full at different steps."""
    trunk = make_trunk(**TINY, window=WINDOW)
    period = WINDOW // 2  # a full context goes on with its newest half
    pattern = random_steps(ROWS, period)
    pattern[schema.IS_INIT][:] = False
    trunk.append(random_steps(ROWS, 1))
    trunk.append(random_steps(1, 100).set(schema.IS_INIT, torch.zeros(1, 100, 1, dtype=torch.bool)))
    assert trunk._cache.length.tolist() == [101, 1]
    tokens = []
    forward = trunk.backbone.forward

    def count(features, *args, **kwargs):
        tokens[-1] += features.shape[0] * features.shape[1]
        return forward(features, *args, **kwargs)

    monkeypatch.setattr(trunk.backbone, "forward", count)
    sizes = set()
    for _ in range(math.ceil(STEPS / period)):
        tokens.append(0)
        for step in range(period):
            hidden = trunk(pattern[:, step].clone())[schema.HIDDEN]
        sizes.add(allocated(trunk))
        assert int(trunk._cache.length.max()) <= WINDOW
        assert torch.isfinite(hidden).all()
    per_step = trunk.embedder.tokens_per_step * ROWS
    assert len(sizes) == 1
    assert tokens[0] == period * per_step  # no context is full
    # every step once, and in each block each row's newest half once more
    assert set(tokens[1:]) == {2 * period * per_step}
    assert len(trunk._cache) == ROWS


def test_memory_is_that_of_the_window(make_trunk, random_steps):
    """Contexts of twice the window take twice the memory, whatever has been played."""
    sizes = []
    for window in (8, 16):
        trunk = make_trunk(window=window)
        trunk.append(random_steps(ROWS, 100))
        cache = trunk._cache
        sizes.append(allocated(trunk) - sum(pool.nbytes for pool in (cache.length, cache.version)))
    assert sizes[1] == 2 * sizes[0]
