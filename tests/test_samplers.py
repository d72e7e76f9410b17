"""Windows: where they start, what they hold, seeds, resuming, and the buffer around them."""

import contextlib
import pickle
import re
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, RandomSampler, ReplayBufferEnsemble, TensorDictReplayBuffer
from torchrl.envs.transforms import Compose, RewardScaling, Transform

from torchrl_mouse.data import DatasetStore, TaskWriter, WindowSampler, replay_buffer
from torchrl_mouse.objectives import MouseDQNLoss


def make_store(lengths):
    """Tasks whose records are numbered through by their actions."""
    store = DatasetStore(max_action_dim=10**6)
    for task, length in enumerate(lengths):
        add_task(store, length, task)
    return store


def add_task(store, length, task, **columns):
    for step in range(length):
        number = len(store)
        record = {"action": number, "reward": float(number), "done": 0, "episode_step": step, "task": task}
        store.append({**record, **columns})


def make_dataset(length, **columns):
    """One task, for a store that loads it."""
    rows = {"action": [0] * length, "reward": [0.0] * length, "done": [0] * length, "episode_step": [*range(length)]}
    return datasets.Dataset.from_dict({**rows, **columns})


def chi_square(counts):
    """Pearson's statistic of equally likely classes, in standard deviations from its mean."""
    expected = counts.double().mean()
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / (2 * degrees) ** 0.5


def pairs(rows):
    """The records from which a step to the next one lies in some window, with repeats, in order."""
    inside = rows[:, 1:] == rows[:, :-1] + 1
    return rows[:, :-1][inside].sort().values.tolist()


def transitions(lengths):
    """The records that have a successor in their task."""
    ends = set(np.cumsum(lengths) - 1)
    return [row for row in range(sum(lengths)) if row not in ends]


EPOCHS = ["sequential", "batch"]
SAMPLINGS = ["random", "last", *EPOCHS]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


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
        starts = draw(make_store([10, 3, 2, 5]), 3, 40_000)[:, 0]
        counts = torch.bincount(starts, minlength=20)
        valid = [*range(8), 10, 13, 15, 16, 17]
        assert set(counts.nonzero().squeeze(-1).tolist()) == set(valid)
        assert chi_square(counts[valid]) < 4

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


class TestLast:
    def test_newest_windows(self):
        sampler, store = WindowSampler(3, sampling="last"), make_store([9, 2, 5])
        assert sampler.sample(store, 2)[0].tolist() == [[12, 13, 14], [13, 14, 15]]
        newest = [[6, 7, 8], [9, 10, 10], [11, 12, 13], [12, 13, 14], [13, 14, 15]]
        assert sampler.sample(store, 5)[0].tolist() == newest
        assert sampler.sample(store, 99)[0].shape == (7 + 1 + 3, 3)

    def test_follows_the_live_end(self):
        store = make_store([4])
        rb = replay_buffer(store, window=3, batch_size=1, sampling="last")
        assert rb.sample()["index"].tolist() == [[1, 2, 3]]
        store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 4, "task": 0})
        assert rb.sample()["index"].tolist() == [[2, 3, 4]]
        add_task(store, 2, task=1)
        assert rb.sample()["index"].tolist() == [[5, 6, 6]]


class TestEpochs:
    def test_order(self):
        rb = replay_buffer(make_store([7, 2, 1, 6]), window=3, batch_size=4, sampling="sequential")
        tiles = [[0, 1, 2], [2, 3, 4], [4, 5, 6], [7, 8, 8], [9, 9, 9], [10, 11, 12], [12, 13, 14], [14, 15, 15]]
        assert [batch["index"].tolist() for batch in rb] == [tiles[:4], tiles[4:]]
        assert [rb.sample()["index"].tolist() for _ in range(3)] == [tiles[:4], tiles[4:], tiles[:4]]

    @pytest.mark.parametrize("sampling", EPOCHS)
    @given(LENGTHS, st.integers(2, 6), st.integers(1, 9))
    @settings(max_examples=60, deadline=None)
    def test_every_transition_once(self, sampling, lengths, window, batch_size):
        rb = replay_buffer(make_store(lengths), window=window, batch_size=batch_size, sampling=sampling, seed=0)
        ordered = None
        for _ in range(2):
            batches = [batch["index"] for batch in rb]
            rows = torch.cat(batches)
            assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
            assert 0 < len(batches[-1]) <= batch_size
            assert pairs(rows) == transitions(lengths)
            assert rows.unique().tolist() == list(range(sum(lengths)))
            task_of = torch.tensor(np.repeat(np.arange(len(lengths)), lengths))
            last_of = torch.tensor(np.cumsum(lengths) - 1)[task_of[rows]]
            assert (task_of[rows] == task_of[rows[:, :1]]).all()
            assert torch.equal(rows, torch.minimum(rows[:, :1] + torch.arange(window), last_of))  # right end only
            ordered = sorted(rows.tolist()) if ordered is None else ordered
            assert sorted(rows.tolist()) == ordered
            assert sampling == "batch" or rows.tolist() == ordered

    @pytest.mark.parametrize("sampling", EPOCHS)
    def test_a_loss_learns_from_every_transition_once(self, sampling):
        lengths = [11, 2, 1, 6, 3]
        store = DatasetStore(max_action_dim=2)
        for task, length in enumerate(lengths):
            add_task(store, length, task, action=1, reward=1.0)
        head = TensorDictModule(torch.nn.Linear(1, 2), ["hidden"], ["action_value"])
        torch.nn.init.zeros_(head.module.weight)
        torch.nn.init.zeros_(head.module.bias)
        loss = MouseDQNLoss(head, delay_value=False, reduction="sum")  # a transition costs (0 - 1) squared
        total, decisions = 0.0, []
        for batch in replay_buffer(store, window=4, batch_size=3, sampling=sampling, seed=0):
            total += loss(batch.set("hidden", torch.zeros(*batch.shape, 1)))["loss_dqn"].item()
            assert not batch["collector", "mask"][:, -1].any()
            decisions += batch["index"][batch["collector", "mask"]].tolist()
        assert total == len(transitions(lengths))
        assert sorted(decisions) == transitions(lengths)

    def test_shuffled_anew_and_uniformly(self):
        rb = replay_buffer(make_store([9, 5, 7]), window=3, batch_size=9, sampling="batch", seed=0)
        windows = sorted(next(iter(rb))["index"][:, 0].tolist())
        assert windows == [0, 2, 4, 6, 9, 11, 14, 16, 18]
        number = {start: place for place, start in enumerate(windows)}
        orders = [[number[start] for start in rb.sample()["index"][:, 0].tolist()] for _ in range(2000)]
        assert len({tuple(order) for order in orders}) > 1950
        for place in range(9):  # every window is equally likely at every place, and after every other
            assert chi_square(torch.bincount(torch.tensor(orders)[:, place], minlength=9)) < 4
        following = torch.tensor([order[order.index(0) + 1] for order in orders if order[-1] != 0])
        assert chi_square(torch.bincount(following, minlength=9)[1:]) < 4

    @pytest.mark.parametrize("sampling", EPOCHS)
    def test_tasks_that_arrive_join_the_next_epoch(self, sampling):
        store = make_store([7, 4])
        rb = replay_buffer(store, window=3, batch_size=2, sampling=sampling, seed=3)
        epoch = iter(rb)
        rows = [next(epoch)["index"]]
        add_task(store, 6, task=9)
        rows += [batch["index"] for batch in epoch]
        assert pairs(torch.cat(rows)) == transitions([7, 4])
        assert pairs(torch.cat([batch["index"] for batch in rb])) == transitions([7, 4, 6])

    @pytest.mark.parametrize("sampling", EPOCHS)
    def test_a_task_that_grows_is_not_padded_by_its_old_end(self, sampling):
        store = make_store([5, 4])
        rb = replay_buffer(store, window=4, batch_size=1, sampling=sampling, seed=1)
        epoch = iter(rb)
        batches = [next(epoch)]
        add_task(store, 5, task=1)  # goes on with the second task
        batches += [*epoch]
        rows = torch.cat([batch["index"] for batch in batches])
        assert len(set(pairs(rows))) == len(pairs(rows))
        late = torch.cat([batch["index"] for batch in batches[1:]])
        mask = torch.cat([batch["collector", "mask"] for batch in batches[1:]])
        assert torch.equal(mask[:, :-1], late[:, 1:] == late[:, :-1] + 1)
        assert pairs(torch.cat([batch["index"] for batch in rb])) == transitions([5, 9])

    @pytest.mark.parametrize("clear", [lambda rb: rb.empty(), lambda rb: rb.storage.clear()])
    def test_a_cleared_store_begins_anew(self, clear):
        rb = replay_buffer(make_store([9, 9]), window=3, batch_size=2, sampling="sequential")
        rb.sample()
        clear(rb)
        with pytest.raises(RuntimeError, match="a store with no rows cannot be sampled"):
            rb.sample()
        add_task(rb.storage, 30, task=0)
        assert rb.sample()["index"].tolist() == [[0, 1, 2], [2, 3, 4]]
        assert len([*rb]) == 7

    def test_a_refilled_store_begins_anew(self):
        rb = replay_buffer(make_store([9, 9]), window=3, batch_size=2, sampling="sequential")
        rb.sample()
        rb.storage.clear()
        add_task(rb.storage, 5, task=0)
        add_task(rb.storage, 13, task=1)  # as many windows, elsewhere
        assert [batch["index"][:, 0].tolist() for batch in rb] == [[0, 2], [5, 7], [9, 11], [13, 15]]

    def test_another_store_begins_anew(self):
        sampler = WindowSampler(3, sampling="sequential")
        for store in (make_store([9]), make_store([9])):
            assert sampler.sample(store, 1)[0].tolist() == [[0, 1, 2]]

    def test_other_batch_sizes(self):
        sampler, store = WindowSampler(3, sampling="sequential"), make_store([21])
        rows = torch.cat([sampler.sample(store, size)[0] for size in (1, 4, 2, 9)])
        assert rows[:, 0].tolist() == [*range(0, 20, 2)]
        assert sampler.ran_out

    @pytest.mark.parametrize("sampling", EPOCHS)
    def test_left_and_entered_again(self, sampling):
        rb = replay_buffer(make_store([30]), window=3, batch_size=4, sampling=sampling, seed=0)
        rows = [next(iter(rb))["index"], *(batch["index"] for batch in rb)]
        assert pairs(torch.cat(rows)) == transitions([30])


class TestWholeTasks:
    LENGTHS = (3, 7, 1, 2, 5)
    TASKS = ((0, 1, 2), (3, 4, 5, 6, 7, 8, 9), (10,), (11, 12), (13, 14, 15, 16, 17))

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_padded_to_the_longest(self, sampling):
        rb = replay_buffer(make_store(self.LENGTHS), window=None, batch_size=2, sampling=sampling, seed=0)
        for _ in range(20):
            batch = rb.sample()
            tasks = [tuple(dict.fromkeys(row)) for row in batch["index"].tolist()]
            assert set(tasks) <= set(self.TASKS)
            assert batch.shape == (len(tasks), max(2, *map(len, tasks)))
            assert batch["is_init"][:, 0].all()
            assert batch["collector", "mask"].sum(-1).tolist() == [len(task) - 1 for task in tasks]

    def test_order(self):
        store = make_store(self.LENGTHS)
        rows = lambda **options: [  # noqa: E731
            tuple(dict.fromkeys(row))
            for batch in replay_buffer(store, window=None, batch_size=2, **options)
            for row in batch["index"].tolist()
        ]
        assert rows(sampling="sequential") == [*self.TASKS]
        assert sorted(rows(sampling="batch")) == [*self.TASKS]
        newest = replay_buffer(store, window=None, batch_size=2, sampling="last").sample()["index"]
        assert newest.tolist() == [[11, 12, 12, 12, 12], [13, 14, 15, 16, 17]]

    def test_tasks_are_uniform(self):
        starts = draw(make_store(self.LENGTHS), None, 20_000)[:, 0]
        assert chi_square(torch.bincount(starts)[[0, 3, 10, 11, 13]]) < 4


class TestWeights:
    @staticmethod
    def shares(store, weights, window=3, **options):
        """The shares of windows that start before record 60, before 90 and after."""
        starts = draw(store, window, 20_000, weights=weights, **options)[:, 0].contiguous()
        return (
            torch.bincount(torch.bucketize(starts, torch.tensor([60, 90]), right=True), minlength=3) / 20_000
        ).tolist()

    @pytest.fixture
    def store(self):
        """Two data sets, the second with a teacher, and appended rows of both kinds, in several tasks each."""
        task = [number // 20 for number in range(60)]
        teacher = {"metadata_q_star": [[1.0, 2.0]] * 30}
        store = DatasetStore().from_dataset(make_dataset(60, task=task)).from_dataset(make_dataset(30, **teacher))
        add_task(store, 10, task=0)
        add_task(store, 10, task=1, metadata_q_star=[3.0, 4.0])
        return store

    def test_shares(self, store):
        assert self.shares(store, [1, 6, 3]) == pytest.approx([0.1, 0.6, 0.3], abs=0.015)
        assert self.shares(store, [0, 1, 0], start_share=0.5) == [0.0, 1.0, 0.0]
        assert self.shares(store, [2, 1, 1], window=None) == pytest.approx([0.5, 0.25, 0.25], abs=0.015)
        assert self.shares(store, None) == pytest.approx([54 / 98, 28 / 98, 16 / 98], abs=0.015)

    @pytest.mark.parametrize("start_share", [0.0, 1.0])
    def test_uniform_within_a_data_set(self, store, start_share):
        starts = draw(store, 3, 40_000, weights=[8, 1, 1], start_share=start_share)[:, 0]
        counts = torch.bincount(starts, minlength=60)[:60].reshape(3, 20)[:, : 1 if start_share else 18]
        assert counts.sum() == (starts < 60).sum()
        assert chi_square(counts.flatten()) < 4

    def test_a_data_set_to_come(self):
        store = DatasetStore().from_dataset(make_dataset(60)).from_dataset(make_dataset(30))
        weights = [1, 1, 2]
        assert self.shares(store, weights) == pytest.approx([0.5, 0.5, 0.0], abs=0.015)
        rb = replay_buffer(store, window=3, batch_size=20_000, weights=weights, seed=0)
        assert rb.sample()["index"].max() < 90
        add_task(store, 5, task=0)
        assert (rb.sample()["index"][:, 0] >= 90).float().mean().item() == pytest.approx(0.5, abs=0.015)

    def test_splits_are_data_sets(self):
        splits = datasets.DatasetDict({"a": make_dataset(60), "b": make_dataset(30)})
        assert self.shares(DatasetStore().from_dataset(splits), [1, 3]) == pytest.approx([0.25, 0.75, 0.0], abs=0.015)

    def test_a_teacher_in_one_only(self, store):
        batch = replay_buffer(store, window=3, batch_size=64, weights=[1, 1, 1], seed=0).sample()
        first = batch["index"][:, 0] < 60
        assert torch.isinf(batch["q_star"][first]).all()
        assert batch["q_star"][~first][..., 0].isfinite().any()

    def test_too_few(self, store):
        with pytest.raises(ValueError, match=r"one for each of the store's 3 data sets.*got \[1.0, 1.0\]"):
            draw(store, 3, 2, weights=[1, 1])

    def test_none_of_those_there(self):
        with pytest.raises(ValueError, match="the store's 1 data sets, one of them positive"):
            draw(make_store([5]), 3, 2, weights=[0, 1])

    def test_ensemble_of_buffers(self):
        """TorchRL's own mixture works for stores of the same columns; it draws a data set per part of a batch."""

        def build(seed, **options):
            members = (replay_buffer(make_store([length]), window=4, batch_size=8) for length in (30, 50))
            generator = torch.Generator().manual_seed(seed)
            return ReplayBufferEnsemble(*members, p=[0.75, 0.25], batch_size=8, generator=generator, **options)

        first, second, ahead = build(0), build(0), build(0, prefetch=1)
        picked = []
        for _ in range(200):
            batch = first.sample()
            assert batch.shape == (2, 4, 4)
            assert torch.equal(batch["previous", "action"], batch["index", "index"])
            assert torch.equal(batch["index", "index"], second.sample()["index", "index"])
            assert torch.equal(batch["index", "index"], ahead.sample()["index", "index"])
            picked.append(batch["index", "buffer_ids"].float().mean().item())
        assert np.mean(picked) == pytest.approx(0.25, abs=0.08)
        assert set(picked) == {0.0, 0.5, 1.0}


class TestBuffer:
    def test_shapes_and_index(self):
        rb = replay_buffer(make_store([9, 9]), window=4, batch_size=5, seed=0)
        batch, info = rb.sample(return_info=True)
        assert batch.shape == batch["index"].shape == info["index"].shape == (5, 4)
        assert (batch["previous", "action"] == batch["index"]).all()
        assert rb[:].shape == (18,)
        assert rb[3]["action"] == 4
        assert "DatasetStore(steps=18, tasks=2)" in repr(rb)

    @pytest.mark.parametrize("sampling", ["random", "batch"])
    def test_seeds(self, sampling):
        build = lambda seed=None: replay_buffer(  # noqa: E731
            make_store([30]), window=4, batch_size=8, sampling=sampling, seed=seed
        )
        batches = [[replay.sample()["index"] for _ in range(4)] for seed in (1, 1, 2) for replay in [build(seed)]]
        assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
        assert not torch.equal(batches[0][0], batches[2][0])
        torch.manual_seed(5)
        first = build().sample()["index"]
        torch.manual_seed(5)
        assert torch.equal(first, build().sample()["index"])

    @pytest.mark.parametrize("window", [4, None])
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_prefetch_gives_the_same_batches(self, sampling, window):
        build = lambda prefetch: replay_buffer(  # noqa: E731
            make_store([30, 9, 2, 7]), window=window, batch_size=3, sampling=sampling, seed=1, prefetch=prefetch
        )
        plain, ahead = build(0), build(1)
        for _ in range(12):
            assert torch.equal(plain.sample()["index"], ahead.sample()["index"])

    @pytest.mark.parametrize("sampling", ["random", *EPOCHS])
    def test_deep_prefetch_draws_the_same_set(self, sampling):
        build = lambda prefetch: replay_buffer(  # noqa: E731
            make_store([90]), window=4, batch_size=8, sampling=sampling, seed=1, prefetch=prefetch
        )
        plain, ahead = build(0), build(3)
        expected = {tuple(plain.sample()["index"].flatten().tolist()) for _ in range(23)}
        got = {tuple(ahead.sample()["index"].flatten().tolist()) for _ in range(20)}
        assert len(got) == (4 if sampling == "sequential" else 20)
        assert got <= expected

    @pytest.mark.parametrize("prefetch", [1, 2, 5])
    @pytest.mark.parametrize("sampling", EPOCHS)
    def test_epochs_end_with_prefetch(self, sampling, prefetch):
        store = make_store([30, 9])
        rb = replay_buffer(store, window=3, batch_size=4, sampling=sampling, seed=1, prefetch=prefetch)
        for _ in range(15):
            sizes, rows = zip(*((len(batch), batch["index"]) for batch in rb), strict=True)
            assert sorted(sizes) == [3, 4, 4, 4, 4]
            assert pairs(torch.cat(rows)) == transitions([30, 9])
        for left in range(1, 5):  # also where all that remains is prefetched when the loop is left
            epoch = iter(rb)
            rows = [next(epoch)["index"] for _ in range(left)]
            time.sleep(0.02)
            rows += [batch["index"] for batch in rb]
            assert pairs(torch.cat(rows)) == transitions([30, 9])

    @pytest.mark.parametrize("prefetch", [0, 1])
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    @pytest.mark.parametrize("way", ["state", "files", "pickle"])
    def test_resume_is_exact(self, way, sampling, prefetch, tmp_path):
        options = {"start_share": 0.3, "weights": [1.0]} if sampling == "random" else {}

        def build(seed):
            return replay_buffer(
                make_store([30, 4]), window=4, batch_size=3, sampling=sampling, seed=seed, prefetch=prefetch, **options
            )

        rb = build(1)
        for done in range(6):  # the last one with nothing left, or nothing that is not prefetched
            rb.sample()
            time.sleep(0.01)
            other = build(2)
            other.sample()
            if way == "state":
                other.load_state_dict(rb.state_dict())
            elif way == "files":
                rb.dumps(tmp_path / str(done))
                other.loads(tmp_path / str(done))
            else:
                other = pickle.loads(pickle.dumps(rb))
            expected = build(1)
            for _ in range(done + 1):
                expected.sample()
            if sampling in EPOCHS:
                for _ in range(2):
                    assert [b["index"].tolist() for b in other] == [b["index"].tolist() for b in expected]
            for _ in range(4):
                a, b = expected.sample(), other.sample()
                assert torch.equal(a["index"], b["index"])
                assert (a == b).all()

    @pytest.mark.parametrize("done", [1, 3, 5])
    def test_resume_with_deep_prefetch(self, done):
        build = lambda: replay_buffer(  # noqa: E731
            make_store([30]), window=3, batch_size=2, sampling="batch", seed=1, prefetch=4
        )
        rb, other = build(), build()
        rows = [rb.sample()["index"] for _ in range(done)]
        other.load_state_dict(rb.state_dict())
        rows += [batch["index"] for batch in other]
        assert pairs(torch.cat(rows)) == transitions([30])

    @pytest.mark.parametrize("sampling", EPOCHS)
    def test_resume_after_rows_arrived(self, sampling):
        store, other = make_store([9, 9]), DatasetStore(max_action_dim=10**6)
        rb = replay_buffer(store, window=3, batch_size=2, sampling=sampling, seed=1)
        rows = [rb.sample()["index"]]
        add_task(store, 4, task=1)  # the second task grows
        add_task(store, 5, task=2)
        resumed = replay_buffer(other, window=3, batch_size=2, sampling=sampling, seed=2)
        resumed.load_state_dict(rb.state_dict())
        rows += [batch["index"] for batch in resumed]
        assert pairs(torch.cat(rows)) == transitions([9, 9])
        assert pairs(torch.cat([batch["index"] for batch in resumed])) == transitions([9, 13, 5])

    @pytest.mark.parametrize("store", [[8], [9, 9, 2], [9, 14], [30, 9, 5]])
    def test_resume_with_another_store(self, store):
        first, second = (WindowSampler(3, sampling="sequential") for _ in range(2))
        first.sample(make_store([9, 9, 5]), 2)
        second.load_state_dict(first.state_dict())
        with pytest.raises(ValueError, match=r"that of the restored epoch \(3 tasks, 10 windows\).*Restore the store"):
            second.sample(make_store(store), 2)

    def test_pin_memory(self):
        rb = replay_buffer(make_store([9]), window=3, batch_size=2, seed=0, pin_memory=True)
        assert rb._pin_memory
        assert rb.sample()["action"].is_pinned() == torch.cuda.is_available()

    def test_sampler_state_alone(self):
        store = make_store([30])
        first, second = WindowSampler(3), WindowSampler(3)
        assert "rng" not in first.state_dict()
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

    def test_a_dump_that_fails_leaves_the_earlier_one(self, monkeypatch, tmp_path):
        def until_full(file, text, **_):
            with file.open("w") as stream:
                stream.write(text[:-5])
            raise OSError("no space left")

        def state(buffer):
            return buffer._writer.state_dict(), buffer.sampler.state_dict()["epoch"]

        def load():
            other._writer.loads(tmp_path / "writer")
            other.sampler.loads(tmp_path / "sampler")
            return state(other)

        rb, other = (
            replay_buffer(make_store([9]), window=3, batch_size=2, sampling="sequential", seed=0) for _ in range(2)
        )
        states = []
        for failing in (False, True, False):
            rb._writer._write_count += 5
            rb.sample()
            states.append(state(rb))
            with monkeypatch.context() as patch:
                if failing:
                    patch.setattr(Path, "write_text", until_full)
                for name, part in (("writer", rb._writer), ("sampler", rb.sampler)):
                    with pytest.raises(OSError, match="no space left") if failing else contextlib.nullcontext():
                        part.dumps(tmp_path / name)
            assert load() == (states[0] if failing else states[-1])
        assert sorted(file.name for file in tmp_path.glob("*/*")) == ["sampler.json", "writer.json"]

    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), ()])
    def test_a_batch_without_rows_is_refused(self, shape):
        """Also where tensordict counts an empty batch's elements as one."""
        rb = replay_buffer(make_store([9]), window=3, batch_size=2)
        with pytest.raises(
            ValueError, match=rf"must have a batch dimension and rows, got shape {re.escape(str(shape))}\."
        ):
            rb.extend(TensorDict({}, shape))
        assert (rb.write_count, len(rb)) == (0, 9)

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

    def test_sampling(self):
        with pytest.raises(ValueError, match="sampling must be one of random, last, sequential, batch, got 'shuffle'"):
            WindowSampler(3, sampling="shuffle")

    @pytest.mark.parametrize("sampling", ["last", *EPOCHS])
    @pytest.mark.parametrize("options", [{"start_share": 0.5}, {"weights": [1.0]}])
    def test_no_effect(self, sampling, options):
        with pytest.raises(ValueError, match=f'sampling must be "random" where start_share or weights.*{sampling}'):
            WindowSampler(3, sampling=sampling, **options)

    @pytest.mark.parametrize("weights", [[], [0.0], [-1, 2], [float("nan")], [float("inf"), 1], [[1.0]], 1.0])
    def test_weights(self, weights):
        with pytest.raises(ValueError, match="weights must be numbers of at least 0, one of them positive"):
            WindowSampler(3, weights=weights)

    def test_other_storage(self):
        with pytest.raises(TypeError, match="must be a DatasetStore, got LazyTensorStorage"):
            WindowSampler(3).sample(LazyTensorStorage(4), 2)

    def test_no_rows(self):
        with pytest.raises(RuntimeError, match="cannot be sampled, got 0 rows and 0 unfinished tasks"):
            WindowSampler(3).sample(DatasetStore(), 2)


@pytest.mark.parametrize("sampling", ["random", "last", "sequential", "batch"])
def test_no_windows_asked_for(sampling):
    store = DatasetStore()
    store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0})
    with pytest.raises(ValueError, match=r"WindowSampler: batch_size must be at least 1, got 0"):
        WindowSampler(2, sampling=sampling).sample(store, 0)
