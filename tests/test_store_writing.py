"""The store: appended and collected rows, beside loaded ones, and its replay buffer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_data import (
    ACTIONS,
    assert_equal,
    assert_task,
    collect,
    loaded,
    make_columns,
    make_dataset,
    make_store,
    tasks_of,
)
from tensordict import TensorDict
from torchrl.data import ReplayBuffer

from torchrl_mouse.data import TaskWriter, replay_buffer

NAMES = ("action", "reward", "done", "episode_step", "observation")


class TestWriting:
    def test_append(self):
        columns, store = make_columns([3, 4]), make_store(max_obs_discrete_dim=7)
        for row in range(7):
            store.append({name: value[row] for name, value in columns.items()})
            assert len(store) == row + 1
        assert repr(store) == "DatasetStore(steps=7, tasks=2)"
        assert_equal(store[:], loaded([3, 4])[:])

    def test_append_after_loading_starts_a_task(self):
        store = loaded([3])
        record = {name: value[0] for name, value in make_columns([1], task=False).items()}
        store.append(record)
        store.append(record)
        store.from_dataset(make_dataset(make_columns([2])))
        store.append(record)
        assert store.task_starts.tolist() == [0, 3, 5, 7]
        assert_equal(store[torch.tensor([2, 3, 6, 7])], torch.stack([store[2], store[3], store[6], store[7]]))

    def test_returned_batches_survive_growth(self):
        store = loaded([3])
        before = store[:]
        expected = before.clone()
        for _ in range(5):
            store.append({name: value[0] for name, value in make_columns([1]).items()})
        assert_equal(before, expected)

    def test_extend_whole_tasks(self):
        batch, tasks = collect([4, 1, 3], rows=2)
        store = make_store()
        store.extend(batch)
        assert store.num_tasks == 6
        for steps, (_, records) in zip(tasks_of(store), tasks, strict=True):
            assert_task(steps, records)
        # What comes back is what went in, entry by entry.
        collected = batch.reshape(-1).exclude("stream")
        decisions = store[:][store[:]["collector", "mask"]]
        assert_equal(decisions.select(*collected.keys(True, True)), collected)

    @given(
        st.lists(st.integers(1, 7), min_size=1, max_size=5),
        st.integers(1, 4),
        st.lists(st.integers(1, 6), min_size=1, max_size=8),
        st.sampled_from(["rows", "flat", "interleaved"]),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_cut_gives_the_same_tasks(self, lengths, rows, cuts, layout):
        batch, tasks = collect(lengths, rows)
        store, low, turn = make_store(), 0, 0
        while low < batch.shape[1]:
            high = low + cuts[turn % len(cuts)]
            part = batch[:, low:high]
            if layout == "flat":
                part = part.reshape(-1)
            elif layout == "interleaved":
                part = part.transpose(0, 1).contiguous().reshape(-1)
            store.extend(part)
            low, turn = high, turn + 1
        assert store.num_tasks == len(tasks)
        assert not store._unfinished.waiting
        got = tasks_of(store)
        for _, records in tasks:
            match = [
                g
                for g in got
                if len(g) == len(records["reward"]) and torch.equal(g["observation"], records["observation"])
            ]
            assert len(match) == 1
            assert_task(match[0], records)

    def test_order_does_not_depend_on_stream_ids(self):
        batch, _ = collect([2, 3], rows=3)
        renamed = batch.clone()
        renamed["stream"] = -renamed["stream"]
        stores = [make_store(), make_store()]
        stores[0].extend(batch)
        stores[1].extend(renamed)
        assert_equal(stores[0][:], stores[1][:])

    def test_single_row_and_lazy_stack(self):
        batch, tasks = collect([3], rows=2)
        store = make_store()
        store.extend(batch[0])
        assert_task(store[:], tasks[0][1])
        stacked = make_store()
        stacked.extend(TensorDict.lazy_stack([batch[:, t] for t in range(3)], 1))
        whole = make_store()
        whole.extend(batch)
        assert_equal(stacked[:], whole[:])

    def test_one_hot_actions(self):
        batch, _ = collect([3, 2], rows=2)
        encoded, _ = collect([3, 2], rows=2, one_hot=True)
        stores = [make_store(), make_store()]
        stores[0].extend(batch)
        stores[1].extend(encoded)
        assert_equal(stores[0][:], stores[1][:])

    def test_reset_from_outside_cuts_the_task(self):
        batch, tasks = collect([5], rows=1)
        store = make_store()
        store.extend(batch[:, :2])
        store.extend(batch[:, 2:3])
        assert not len(store)
        store.extend(batch)  # is_init again: the environment was reset
        assert store.num_tasks == 2
        first, second = tasks_of(store)
        records = {name: value[:4] for name, value in tasks[0][1].items()}
        assert_task(first, records)
        assert_task(second, tasks[0][1])
        assert first["next", "done"].squeeze(-1).tolist() == [False, False, True, True]

    def test_collected_tasks_end_the_appended_one(self):
        batch, _ = collect([3], rows=1)
        store = make_store()
        record = {"action": 0, "reward": 0.0, "done": 0, "episode_step": 0, "observation": [0.0]}
        store.append(record)
        store.extend(batch)
        store.append(record)
        store.append(record)
        assert store.task_starts.tolist() == [0, 1, 5]

    def test_reset_from_outside_inside_the_first_batch(self):
        batch, tasks = collect([5], rows=1)
        store = make_store()
        store.extend(torch.cat([batch[:, :2], batch[:, :3]], 1))
        assert store.num_tasks == 1
        assert_task(store[:], {name: value[:3] for name, value in tasks[0][1].items()})
        store.extend(batch[:, 3:])
        assert_task(tasks_of(store)[1], tasks[0][1])

    def test_unsigned_streams(self):
        batch, _ = collect([4], rows=2)
        stores = [make_store(), make_store()]
        stores[0].extend(batch)
        for part in (batch[:, :2], batch[:, 2:]):
            stores[1].extend(part.clone().set("stream", part["stream"].to(torch.uint64)))
        assert_equal(stores[1][:], stores[0][:])

    def test_teachers_that_come_and_go(self):
        """Appended rows are one block whoever has a teacher, as wide as the widest."""
        stores = [make_store(), make_store()]
        for step in range(20):
            record = {"action": 0, "reward": 0.0, "done": 0, "episode_step": step, "observation": [0.0]}
            q_star = [float(step)] * (step % 4)
            stores[0].append({**record, "metadata_q_star": q_star or None})
            stores[1].append({**record, "metadata_q_star": q_star})
            assert len(stores[0]._blocks) == 1
            assert ("q_star" in stores[0][0]) == (step > 0)
        assert_equal(stores[0][:], stores[1][:])
        q_star = stores[0][:]["q_star"]
        assert q_star.isfinite().sum(-1).tolist() == [0, 1, 2, 3] * 5
        assert stores[0].to_dataset().features["metadata_q_star"].length == 3
        copy = make_store()
        copy.load_state_dict(stores[0].state_dict())
        assert_equal(copy[:], stores[1][:])

    def test_a_teacher_of_collected_rows_beside_appended_ones(self):
        batch, tasks = collect([3], rows=1)
        taught = batch.clone().set("q_star", torch.zeros(1, 3, ACTIONS))
        store = make_store().from_dataset(make_dataset({k: v for k, v in make_columns([2]).items() if k in NAMES}))
        for steps in (batch, taught, batch):
            store.extend(steps)
        assert len(store._blocks) == 2
        finite = [part["q_star"].isfinite().any(-1).tolist() for part in tasks_of(store)]
        assert finite == [[False] * 2, [False] * 4, [True] * 3 + [False], [False] * 4]
        for part in tasks_of(store)[1:]:
            assert_task(part, tasks[0][1])

    def test_teacher_values_of_collected_steps(self):
        batch, _ = collect([3], rows=1)
        batch["q_star"] = torch.arange(6.0).reshape(1, 3, 2)
        store = make_store()
        store.extend(batch[:, :1])
        store.extend(batch[:, 1:])
        q_star = store[:]["q_star"]
        assert q_star.shape == (4, ACTIONS)
        assert q_star[:3, :2].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        assert torch.isneginf(q_star[3]).all()
        assert torch.isneginf(q_star[:, 2:]).all()

    def test_mixed_rows(self):
        columns = {k: v for k, v in make_columns([4]).items() if k not in ("xformed_reward", "observation_discrete")}
        store = make_store().from_dataset(make_dataset(columns))
        before = store[:]
        batch, tasks = collect([3, 2], rows=1)
        store.extend(batch)
        store.extend(batch)
        assert store.task_starts.tolist() == [0, 4, 8, 11, 15]
        steps = store[torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [11, 12, 13, 14]])]
        assert_equal(steps[0], before)
        assert_task(steps[1].exclude("q_star"), tasks[0][1])
        assert torch.isneginf(steps[1]["q_star"]).all()
        assert_equal(steps[1], steps[2])
        assert store[[]].shape == (0,)

    def test_state_dict_with_unfinished_tasks(self):
        batch, tasks = collect([3, 4], rows=2)
        store = make_store().from_dataset(
            make_dataset(
                {
                    k: v
                    for k, v in make_columns([4]).items()
                    if k not in ("xformed_reward", "observation_discrete", "metadata_q_star")
                }
            )
        )
        store.extend(batch[:, :5])
        state = store.state_dict()
        other = make_store().from_dataset(store._blocks[0]._arguments[0])
        other.load_state_dict(state)
        assert_equal(other[:], store[:])
        for one in (store, other):
            one.extend(batch[:, 5:])
        assert_equal(other[:], store[:])
        assert other.num_tasks == 1 + len(tasks)

    def test_clear(self):
        batch, _ = collect([3], rows=1)
        store = loaded([3])
        store.clear()
        assert len(store) == store.num_tasks == 0
        store.extend(batch[:, :2])
        store._empty()
        with pytest.raises(ValueError, match="in the middle of a task"):
            store.extend(batch[:, 2:])

    def test_contains(self):
        store = loaded([3])
        assert 2 in store
        assert 3 not in store
        assert store.contains(torch.tensor([0, 3, -3])).tolist() == [True, False, True]


class TestBuffer:
    def test_extend_and_plain_buffer(self):
        batch, _ = collect([3, 2], rows=2)
        store = make_store()
        rb = ReplayBuffer(storage=store, writer=TaskWriter(), collate_fn=lambda x: x, batch_size=6)
        assert rb.extend(batch) is None
        assert rb.write_count == 10
        assert len(rb) == 14
        assert rb.sample().shape == (6,)
        rb.empty()
        assert len(store) == rb.write_count == 0

    def test_dumps(self, tmp_path):
        batch, _ = collect([3, 2], rows=2)
        buffers = [replay_buffer(make_store(), window=2, batch_size=3, seed=s) for s in (0, 1)]
        buffers[0].extend(batch[:, :4])
        buffers[0].dumps(tmp_path / "rb")
        buffers[1].loads(tmp_path / "rb")
        assert buffers[1].write_count == 8
        for rb in buffers:
            rb.extend(batch[:, 4:])
        assert_equal(buffers[0].storage[:], buffers[1].storage[:])
        assert_equal(buffers[0].sample(), buffers[1].sample())
