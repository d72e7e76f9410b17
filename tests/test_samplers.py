"""Windows: where they start, what they hold, seeds, resuming, and the buffer around them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer
from torchrl.envs.transforms import Compose, RewardScaling, Transform

from torchrl_mouse.data import DatasetStore, TaskWriter, WindowSampler, replay_buffer


def make_store(lengths):
    """Tasks whose records are numbered through by their actions."""
    store, number = DatasetStore(max_action_dim=10**6), 0
    for task, length in enumerate(lengths):
        for step in range(length):
            record = {"action": number, "reward": float(number), "done": 0, "episode_step": step, "task": task}
            store.append(record)
            number += 1
    return store


def draw(store, window, size, seed=0, **kwargs):
    sampler = WindowSampler(window, **kwargs)
    sampler._rng = torch.Generator().manual_seed(seed)
    return sampler.sample(store, size)[0]


class TestWindows:
    def test_contents(self):
        rb = replay_buffer(make_store([4, 2]), window=3, batch_size=32, seed=0)
        seen = set()
        for steps in rb.sample():
            numbers = tuple(steps["previous", "action"].tolist())
            seen.add(numbers)
            if numbers == (0, 1, 2):
                assert steps["action"].tolist() == [1, 2, 3]
                assert steps["next", "reward"].squeeze(-1).tolist() == [1.0, 2.0, 3.0]
                assert steps["collector", "mask"].all()
                assert steps["is_init"].squeeze(-1).tolist() == [True, False, False]
                assert steps["next", "done"].squeeze(-1).tolist() == [False, False, True]
            elif numbers == (1, 2, 3):
                assert steps["action"].tolist() == [2, 3, 0]
                assert steps["collector", "mask"].tolist() == [True, True, False]
                assert not steps["is_init"].any()  # a window's edge is not a task's
            else:  # the short task, padded by its last record
                assert steps["action"].tolist() == [5, 0, 0]
                assert steps["collector", "mask"].tolist() == [True, False, False]
                assert steps["is_init"].squeeze(-1).tolist() == [True, False, False]
                assert steps["next", "truncated"].all()
        assert seen == {(0, 1, 2), (1, 2, 3), (4, 5, 5)}

    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=8),
        st.integers(2, 6),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.integers(0, 5),
    )
    @settings(max_examples=60, deadline=None)
    def test_never_across_tasks(self, lengths, window, start_share, seed):
        rows = draw(make_store(lengths), window, 64, seed, start_share=start_share)
        task_of = torch.tensor(np.repeat(np.arange(len(lengths)), lengths))
        last_of = torch.tensor(np.cumsum(lengths) - 1)
        assert rows.shape == (64, window)
        assert (task_of[rows] == task_of[rows[:, :1]]).all()
        steps = rows[:, 1:] - rows[:, :-1]
        assert ((steps == 1) | ((steps == 0) & (rows[:, 1:] == last_of[task_of[rows[:, 1:]]]))).all()
        padded = (steps == 0).any(-1)
        starts = last_of[task_of[rows[:, 0]]] - torch.tensor(lengths)[task_of[rows[:, 0]]] + 1
        assert (rows[padded, 0] == starts[padded]).all()  # only short tasks are padded, and from their start
        assert (torch.tensor(lengths)[task_of[rows[padded, 0]]] < window).all()

    def test_starts_are_uniform(self):
        lengths, window, size = [10, 3, 2, 5], 3, 40_000
        starts = draw(make_store(lengths), window, size)[:, 0]
        counts = torch.bincount(starts, minlength=20)
        valid = [*range(8), 10, 13, 15, 16, 17]
        assert set(counts.nonzero().squeeze(-1).tolist()) == set(valid)
        expected = size / len(valid)
        assert ((counts[valid] - expected).abs() < 5 * expected**0.5).all()

    def test_share_of_task_starts(self):
        store, size = make_store([50, 50]), 40_000
        at_start = lambda share: (draw(store, 3, size, start_share=share)[:, 0] % 50 == 0).float().mean().item()  # noqa: E731
        assert at_start(0.0) == pytest.approx(1 / 48, abs=0.005)
        assert at_start(0.25) == pytest.approx(0.25 + 0.75 / 48, abs=0.01)
        assert at_start(1.0) == 1.0
        first = draw(store, 3, size, start_share=1.0)[:, 0]
        assert (first == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)

    def test_live_view(self):
        store = make_store([3])
        rb = replay_buffer(store, window=2, batch_size=64, seed=0)
        assert rb.sample()["index"].max() == 2
        for step in range(4):
            store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": step, "task": 9})
        assert rb.sample()["index"].max() == 6
        store.clear()
        with pytest.raises(RuntimeError, match="a store with no rows cannot be sampled"):
            rb.sample()


class TestBuffer:
    def test_shapes_and_index(self):
        rb = replay_buffer(make_store([9, 9]), window=4, batch_size=5, seed=0)
        batch, info = rb.sample(return_info=True)
        assert batch.shape == batch["index"].shape == info["index"].shape == (5, 4)
        assert (batch["previous", "action"] == batch["index"]).all()
        assert rb[:].shape == (18,)
        assert rb[3]["action"] == 4
        assert "DatasetStore(steps=18, tasks=2)" in repr(rb)

    def test_seeds(self):
        batches = [
            [replay.sample()["index"] for _ in range(4)]
            for seed in (1, 1, 2)
            for replay in [replay_buffer(make_store([30]), window=4, batch_size=8, seed=seed)]
        ]
        assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
        assert not torch.equal(batches[0][0], batches[2][0])
        torch.manual_seed(5)
        first = replay_buffer(make_store([30]), window=4, batch_size=8).sample()["index"]
        torch.manual_seed(5)
        assert torch.equal(first, replay_buffer(make_store([30]), window=4, batch_size=8).sample()["index"])

    def test_prefetch_gives_the_same_batches(self):
        plain = replay_buffer(make_store([30]), window=4, batch_size=8, seed=1)
        ahead = replay_buffer(make_store([30]), window=4, batch_size=8, seed=1, prefetch=1)
        for _ in range(10):
            assert torch.equal(plain.sample()["index"], ahead.sample()["index"])

    def test_deep_prefetch_draws_the_same_set(self):
        plain = replay_buffer(make_store([30]), window=4, batch_size=8, seed=1)
        ahead = replay_buffer(make_store([30]), window=4, batch_size=8, seed=1, prefetch=3)
        expected = {tuple(plain.sample()["index"].flatten().tolist()) for _ in range(23)}
        got = {tuple(ahead.sample()["index"].flatten().tolist()) for _ in range(20)}
        assert len(got) == 20
        assert got <= expected

    @pytest.mark.parametrize("prefetch", [0, 1])
    def test_resume_is_exact(self, prefetch):
        def build(seed):
            return replay_buffer(
                make_store([30, 4]), window=4, batch_size=8, seed=seed, prefetch=prefetch, start_share=0.3
            )

        rb, other = build(1), build(2)
        for _ in range(3):
            rb.sample()
        other.sample()
        other.load_state_dict(rb.state_dict())
        for _ in range(4):
            a, b = rb.sample(), other.sample()
            assert torch.equal(a["index"], b["index"])
            assert (a == b).all()

    def test_sampler_state_alone(self):
        store = make_store([30])
        first, second = WindowSampler(3), WindowSampler(3)
        assert first.state_dict() == {}
        first._rng = torch.Generator().manual_seed(3)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.sample(store, 9)[0], second.sample(store, 9)[0])

    def test_transforms(self):
        class Mark(Transform):
            def forward(self, steps):
                assert steps.shape == (6, 3)
                return steps.set("mark", steps["collector", "mask"].clone())

        transform = Compose(RewardScaling(loc=1.0, scale=2.0, in_keys=[("next", "reward")]), Mark())
        rb = replay_buffer(make_store([4, 2]), window=3, batch_size=6, seed=0, transform=transform)
        batch = rb.sample()
        mask = batch["collector", "mask"]
        assert torch.equal(batch["mark"], mask)
        expected = batch["action"].unsqueeze(-1) * 2.0 + 1.0  # here an action's number is its reward
        assert torch.equal(batch["next", "reward"], expected)

    def test_pickle(self):
        import pickle

        rb = replay_buffer(make_store([30]), window=4, batch_size=8, seed=1)
        rb.sample()
        copy = pickle.loads(pickle.dumps(rb))
        assert torch.equal(rb.sample()["index"], copy.sample()["index"])

    def test_random_sampler_works_too(self):
        rb = TensorDictReplayBuffer(
            storage=make_store([5]), sampler=RandomSampler(), writer=TaskWriter(), collate_fn=lambda x: x, batch_size=7
        )
        assert rb.sample().shape == (7,)


class TestErrors:
    @pytest.mark.parametrize("window", [1, 0, -3])
    def test_window_too_short(self, window):
        with pytest.raises(ValueError, match=f"window must be at least 2 steps, got {window}"):
            WindowSampler(window)

    @pytest.mark.parametrize("window", [2.0, True, "3"])
    def test_window_type(self, window):
        with pytest.raises(TypeError, match="window must be an int"):
            WindowSampler(window)

    @pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
    def test_share(self, share):
        with pytest.raises(ValueError, match=r"start_share must lie in \[0, 1\]"):
            WindowSampler(3, start_share=share)

    def test_other_storage(self):
        with pytest.raises(TypeError, match="must be a DatasetStore, got LazyTensorStorage"):
            WindowSampler(3).sample(LazyTensorStorage(4), 2)

    def test_no_rows(self):
        with pytest.raises(RuntimeError, match="cannot be sampled, got 0 rows and 0 unfinished tasks"):
            WindowSampler(3).sample(DatasetStore(), 2)
