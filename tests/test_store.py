"""The store: contents, collected tasks, data sets in every shape, round trips, errors."""

import gc
import itertools
import pickle
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import ReplayBuffer

from torchrl_mouse import schema
from torchrl_mouse.data import DatasetStore, TaskWriter, replay_buffer

ACTIONS, OBSERVATION = 5, 3


def make_columns(lengths, seed=0, task=True, first_task=0):
    """Random records of tasks of the given lengths."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    columns = {
        "action": rng.integers(0, ACTIONS, n),
        "reward": rng.standard_normal(n).astype(np.float32),
        "done": rng.integers(0, 3, n),
        "episode_step": rng.integers(0, 20, n),
        "observation": rng.standard_normal((n, OBSERVATION)).astype(np.float32),
        "observation_discrete": rng.integers(0, 7, n),
        "metadata_q_star": rng.standard_normal((n, ACTIONS)).astype(np.float32),
        "xformed_reward": rng.standard_normal(n).astype(np.float32),
    }
    if task:
        columns["task"] = np.repeat(np.arange(len(lengths)), lengths) + first_task
    return columns


def make_dataset(columns, fixed=True):
    features = {}
    for name, value in columns.items():
        kind = datasets.Value("float32" if value.dtype == np.float32 else "int64")
        features[name] = datasets.List(kind, length=value.shape[1] if fixed else -1) if value.ndim > 1 else kind
    return datasets.Dataset.from_dict(
        {name: value.tolist() for name, value in columns.items()}, features=datasets.Features(features)
    )


def make_store(**kwargs):
    return DatasetStore(**{"max_action_dim": ACTIONS, "max_obs_continuous_dim": OBSERVATION} | kwargs)


def loaded(lengths, fixed=True, **kwargs):
    return make_store(max_obs_discrete_dim=7).from_dataset(make_dataset(make_columns(lengths, **kwargs), fixed))


def assert_equal(got, expected):
    assert got.shape == expected.shape
    keys = set(got.keys(True, True))
    assert keys == set(expected.keys(True, True))
    for key in keys:
        assert got[key].dtype == expected[key].dtype, key
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0, equal_nan=True, msg=str(key))


def from_columns(columns, start, stop):
    """The steps of one task by the schema's own conversion, with the task's end written in."""
    part = {name: torch.from_numpy(np.asarray(value[start:stop])) for name, value in columns.items()}
    records = {
        "action": part["action"],
        "reward": part["reward"],
        "done": part["done"],
        "time": part["episode_step"],
        "obs_continuous": part["observation"],
        "obs_discrete": part["observation_discrete"],
        "q_star": part["metadata_q_star"],
        "xformed_reward": part["xformed_reward"],
    }
    steps = schema.from_mouse_records(TensorDict(records, [stop - start]).unsqueeze(0)).squeeze(0)
    ends = torch.zeros(stop - start, 1, dtype=torch.bool)
    ends[-2:] = True
    terminated = bool(part["done"][-1] == 1)
    steps["next", "done"] = ends
    steps["next", "terminated"] = ends & terminated
    steps["next", "truncated"] = ends & (not terminated)
    return steps


def collect(lengths, rows, seed=0, one_hot=False):
    """Transitions of environments: ``rows`` rows of ``T`` steps, tasks of the given lengths (in steps) one by one.

    Built by hand in the layout of TaskEnv's output; returns the batch and each task's records as they must be stored.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    batch, tasks = [], []
    for row in range(rows):
        pieces = []
        for length in lengths:
            done = torch.randint(0, 3, (length + 1,), generator=generator)
            records = {
                "action": torch.randint(0, ACTIONS, (length + 1,), generator=generator),
                "reward": torch.randn(length + 1, generator=generator),
                "done": done,
                "episode_step": torch.arange(length + 1),
                "observation": torch.randn(length + 1, OBSERVATION, generator=generator),
            }
            tasks.append((row, records))
            action = torch.nn.functional.one_hot(records["action"], ACTIONS) if one_hot else records["action"]
            frames = TensorDict(
                {
                    "observation": records["observation"],
                    "previous": {
                        "action": action,
                        "reward": records["reward"].unsqueeze(-1),
                        "terminated": (done == 1).unsqueeze(-1),
                        "truncated": (done == 2).unsqueeze(-1),
                    },
                    "episode_step": records["episode_step"].unsqueeze(-1),
                },
                [length + 1],
            )
            steps = frames[:-1].clone()
            steps["action"] = action[1:]
            steps["next"] = frames[1:].clone()
            steps["is_init"] = (torch.arange(length) == 0).unsqueeze(-1)
            steps["next", "done"] = (torch.arange(length) == length - 1).unsqueeze(-1)
            steps["stream"] = torch.full((length, 1), 10**15 - row)  # ids in an order of their own
            pieces.append(steps)
        batch.append(torch.cat(pieces))
        assert len(batch[-1]) == total
    return torch.stack(batch), tasks


def tasks_of(store):
    bounds = [*store.task_starts.tolist(), len(store)]
    return [store[a:b] for a, b in itertools.pairwise(bounds)]


def assert_task(steps, records):
    n = len(records["action"])
    assert len(steps) == n
    torch.testing.assert_close(steps["previous", "action"], records["action"])
    torch.testing.assert_close(steps["previous", "reward"].squeeze(-1), records["reward"])
    torch.testing.assert_close(steps["observation"], records["observation"])
    torch.testing.assert_close(steps["episode_step"].squeeze(-1), records["episode_step"])
    torch.testing.assert_close(
        schema.done_code(steps["previous", "terminated"], steps["previous", "truncated"]).squeeze(-1), records["done"]
    )
    assert steps["is_init"].squeeze(-1).tolist() == [True] + [False] * (n - 1)


class TestGet:
    def test_hand_written_records(self):
        columns = {
            "action": [0, 2, 1, 0, 2],
            "reward": [0.0, 0.5, 1.0, 0.0, -1.0],
            "done": [0, 0, 1, 0, 2],
            "episode_step": [0, 1, 2, 0, 1],
            "observation": [[0.0], [0.1], [0.2], [0.3], [0.4]],
            "metadata_q_star": [[1.0, 2.0], [3.0], [], [4.0, 5.0], [6.0, 7.0]],
            "task": [4, 4, 4, 9, 9],
        }
        store = DatasetStore(3, 1).from_dataset(datasets.Dataset.from_dict(columns))
        steps = store[:]
        assert store.task_starts.tolist() == [0, 3]
        assert steps["action"].tolist() == [2, 1, 0, 2, 0]
        assert steps["next", "reward"].squeeze(-1).tolist() == [0.5, 1.0, 0.0, -1.0, 0.0]
        assert steps["previous", "action"].tolist() == [0, 2, 1, 0, 2]
        assert steps["next", "previous", "action"].tolist() == [2, 1, 1, 2, 2]
        assert steps["next", "observation"].squeeze(-1).tolist() == pytest.approx([0.1, 0.2, 0.2, 0.4, 0.4])
        assert steps["is_init"].squeeze(-1).tolist() == [True, False, False, True, False]
        assert not steps["next", "is_init"].any()
        assert steps["collector", "mask"].tolist() == [True, True, False, True, False]
        assert steps["next", "done"].squeeze(-1).tolist() == [False, True, True, True, True]
        assert steps["next", "terminated"].squeeze(-1).tolist() == [False, True, True, False, False]
        assert steps["next", "truncated"].squeeze(-1).tolist() == [False, False, False, True, True]
        assert steps["previous", "terminated"].squeeze(-1).tolist() == [False, False, True, False, False]
        inf = float("inf")
        assert steps["q_star"].tolist() == [
            [1.0, 2.0, -inf],
            [3.0, -inf, -inf],
            [-inf, -inf, -inf],
            [4.0, 5.0, -inf],
            [6.0, 7.0, -inf],
        ]

    @pytest.mark.parametrize("fixed", [True, False])
    def test_equals_schema_conversion(self, fixed):
        lengths = [5, 1, 8]
        columns, store = make_columns(lengths), loaded(lengths, fixed)
        start = 0
        for length in lengths:
            assert_equal(store[start : start + length], from_columns(columns, start, start + length))
            start += length

    @pytest.mark.parametrize(
        "index",
        [
            slice(1, 7),
            slice(None),
            slice(None, None, -3),
            slice(5, 2),
            range(2, 9, 2),
            [3, 0, 3],
            torch.tensor([[1, 2, 3], [8, 9, 10]]),
            (torch.tensor([4, 13]),),
            torch.tensor([-1, -14]),
            np.array([3, 4]),
        ],
        ids=str,
    )
    def test_index_kinds(self, index):
        store = loaded([5, 1, 8])
        plain = index[0] if isinstance(index, tuple) else index
        if isinstance(plain, slice):
            rows = torch.tensor(range(14)[plain], dtype=torch.int64)
        else:
            rows = torch.as_tensor(list(plain) if isinstance(plain, range) else plain)
        whole = store[torch.arange(14)]
        assert_equal(store[index], whole[rows])

    def test_int(self):
        store = loaded([5, 1, 8])
        assert store[3].shape == ()
        assert_equal(store[3], store[:][3])
        assert_equal(store[-1], store[:][13])

    def test_reads_are_copies(self):
        store = loaded([6])
        first = store[:]
        expected = first.clone()
        again = store[:]
        for key in first.keys(True, True):
            first[key].zero_()
        assert_equal(again, expected)
        assert_equal(store[:], expected)

    def test_root_and_next_share_no_memory(self):
        steps = loaded([6])[:]
        pointers = [steps[key].data_ptr() for key in steps.keys(True, True)]
        assert len(set(pointers)) == len(pointers)

    def test_select(self):
        store = loaded([5, 4])
        whole = store[:]
        keys = ["observation", ("next", "reward"), ("next", "previous"), "action_value"]
        chosen = store.select(keys)[:]
        expected = {("collector", "mask"), "observation", ("next", "reward")}
        expected |= {
            ("next", "previous", name) for name in ("action", "reward", "terminated", "truncated", "xformed_reward")
        }
        assert set(chosen.keys(True, True)) == expected
        assert_equal(chosen, whole.select(*expected))
        assert_equal(store.select(None)[:], whole)

    def test_selected_columns_alone_are_read(self, monkeypatch):
        store = loaded([5]).select(["observation"])
        asked = []
        read = type(store._blocks[0]).read
        monkeypatch.setattr(
            type(store._blocks[0]), "read", lambda b, names, rows: asked.extend(names) or read(b, names, rows)
        )
        store[:]
        assert asked == ["observation"]

    def test_observation_is_cut_or_padded(self):
        columns = make_columns([4])
        dataset = make_dataset(columns)
        cut = make_store(max_obs_continuous_dim=2).from_dataset(dataset)[:]["observation"]
        padded = make_store(max_obs_continuous_dim=5).from_dataset(dataset)[:]["observation"]
        torch.testing.assert_close(cut, torch.from_numpy(columns["observation"][:, :2]))
        torch.testing.assert_close(padded[:, :3], torch.from_numpy(columns["observation"]))
        assert not padded[:, 3:].any()
        assert "observation" not in DatasetStore().from_dataset(dataset)[:]

    @given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
    @settings(max_examples=40, deadline=None)
    def test_next_stays_in_task(self, lengths, data):
        store = loaded(lengths)
        tasks = np.repeat(np.arange(len(lengths)), lengths)
        rows = torch.tensor(data.draw(st.lists(st.integers(0, sum(lengths) - 1), min_size=1, max_size=8)))
        columns = make_columns(lengths)
        for row, step in zip(rows.tolist(), store[rows].unbind(0), strict=True):
            following = row + 1 if row + 1 < len(tasks) and tasks[row + 1] == tasks[row] else row
            assert step["next", "previous", "action"].item() == columns["action"][following]
            assert bool(step["collector", "mask"]) == (following != row)
            assert step["next", "done"].item() == (
                following == row or following + 1 == len(tasks) or tasks[following + 1] != tasks[row]
            )


class TestDatasets:
    def test_several_datasets_are_several_tasks(self):
        parts = [make_dataset(make_columns([3], seed=s, task=False)) for s in range(3)]
        store = make_store(max_obs_discrete_dim=7)
        for part in parts:
            store.from_dataset(part)
        assert store.task_starts.tolist() == [0, 3, 6]
        single = [make_store(max_obs_discrete_dim=7).from_dataset(part)[:] for part in parts]
        assert_equal(store[:], torch.cat(single))
        rows = torch.tensor([8, 0, 4, 4, 1])
        assert_equal(store[rows], torch.cat(single)[rows])

    def test_runs_of_equal_ids(self):
        columns = make_columns([6])
        columns["task"] = np.array([1, 1, 0, 0, 1, 1])
        store = make_store().from_dataset(make_dataset(columns)).from_dataset(make_dataset(columns))
        assert store.task_starts.tolist() == [0, 2, 4, 6, 8, 10]

    def test_runs_over_check_borders(self, monkeypatch):
        monkeypatch.setattr("torchrl_mouse.data.rows.CHUNK", 4)
        assert loaded([3, 5, 4, 1, 9]).task_starts.tolist() == [0, 3, 8, 12, 13]

    @pytest.mark.parametrize("fixed", [True, False])
    def test_many_chunks(self, fixed):
        lengths = [4, 9, 2, 7]
        columns = make_columns(lengths)
        cuts = [0, 1, 6, 6, 13, 22]
        parts = [
            make_dataset({name: value[a:b] for name, value in columns.items()}, fixed)
            for a, b in itertools.pairwise(cuts)
        ]
        dataset = datasets.concatenate_datasets([part for part in parts if len(part)])
        assert dataset.data.table.column("action").num_chunks == 4
        store = make_store(max_obs_discrete_dim=7).from_dataset(dataset)
        assert store.task_starts.tolist() == [0, 4, 13, 15]
        assert_equal(store[:], loaded(lengths, fixed)[:])
        rows = torch.tensor([[21, 3, 7], [12, 5, 6]])
        assert_equal(store[rows], loaded(lengths, fixed)[rows])

    @pytest.mark.parametrize("fixed", [True, False])
    @pytest.mark.parametrize("change", ["select", "slice", "shuffle", "filter", "concatenated"])
    def test_indices(self, fixed, change):
        dataset = make_dataset(make_columns([4, 9, 2, 7], task=False), fixed)
        changed = {
            "select": lambda d: d.select([5, 3, 4, 0, 20]),
            "slice": lambda d: d.select(range(3, 15)),
            "shuffle": lambda d: d.shuffle(seed=3),
            "filter": lambda d: d.filter(lambda row: row["action"] > 1),
            "concatenated": lambda d: datasets.concatenate_datasets([d.select([7, 2]), d.select(range(5, 9))]),
        }[change](dataset)
        plain = datasets.Dataset.from_dict(changed.to_dict(), features=changed.features)
        store = make_store(max_obs_discrete_dim=7).from_dataset(changed)
        assert_equal(store[:], make_store(max_obs_discrete_dim=7).from_dataset(plain)[:])

    def test_filter_drops_bad_rows(self):
        columns = make_columns([5])
        columns["action"][2] = 99
        dataset = make_dataset(columns)
        assert len(make_store().from_dataset(dataset.filter(lambda row: row["action"] < ACTIONS))) == 4

    def test_ragged_rows_in_chunks(self):
        rows = [[1.0], [], [2.0, 3.0], [4.0, 5.0, 6.0], [], [7.0]]
        columns = make_columns([6])
        del columns["metadata_q_star"]
        dataset = make_dataset(columns).add_column("metadata_q_star", [r or None for r in rows])
        whole = datasets.concatenate_datasets([dataset.select(range(1, 4)), dataset.select(range(4, 6))])
        got = make_store().from_dataset(whole)[:]["q_star"]
        for row, expected in zip(got, rows[1:], strict=True):
            assert row[: len(expected)].tolist() == expected
            assert torch.isneginf(row[len(expected) :]).all()

    @pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int32"])
    def test_integer_types(self, kind):
        columns = make_columns([6])
        dataset = make_dataset(columns)
        for name in ("action", "done", "episode_step", "task"):
            dataset = dataset.cast_column(name, datasets.Value(kind))
        assert_equal(make_store().from_dataset(dataset)[:], make_store().from_dataset(make_dataset(columns))[:])

    @pytest.mark.parametrize("kind", ["float16", "float64", "int32"])
    def test_float_types(self, kind):
        columns = make_columns([6])
        columns["reward"] = np.round(columns["reward"]).astype(np.float32)
        dataset = make_dataset(columns).cast_column("reward", datasets.Value(kind))
        assert_equal(make_store().from_dataset(dataset)[:], make_store().from_dataset(make_dataset(columns))[:])

    def test_discrete_list_of_one(self):
        columns = make_columns([6])
        as_list = {**columns, "observation_discrete": columns["observation_discrete"][:, None]}
        stores = [
            make_store(max_obs_discrete_dim=7).from_dataset(make_dataset(c, fixed=False)) for c in (columns, as_list)
        ]
        assert_equal(stores[0][:], stores[1][:])

    def test_scalar_observation(self):
        columns = make_columns([6])
        scalar = {**columns, "observation": columns["observation"][:, 0]}
        got = make_store(max_obs_continuous_dim=1).from_dataset(make_dataset(scalar))[:]
        torch.testing.assert_close(got["observation"], torch.from_numpy(columns["observation"][:, :1]))

    def test_absent_columns_are_absent_keys(self):
        columns = {
            name: value
            for name, value in make_columns([4]).items()
            if name in ("action", "reward", "done", "episode_step")
        }
        keys = make_store().from_dataset(make_dataset(columns))[:].keys(True, True)
        assert not {"observation", "q_star", ("next", "xformed_reward")} & set(keys)

    def test_splits(self):
        parts = datasets.DatasetDict(
            {name: make_dataset(make_columns([n], seed=n)) for name, n in (("train_a", 2), ("train_b", 3), ("eval", 4))}
        )
        assert len(make_store().from_dataset(parts)) == 9
        assert len(make_store().from_dataset(parts, splits="eval")) == 4
        assert make_store().from_dataset(parts, splits=["eval", "train_a"]).task_starts.tolist() == [0, 4]
        assert len(make_store().from_dataset(parts, split_pattern="train_*")) == 5
        assert len(make_store().from_dataset(parts, split_pattern=["train_*", "*_a", "ev*"])) == 9

    @pytest.mark.parametrize("fixed", [True, False])
    def test_round_trip(self, tmp_path, fixed):
        store = loaded([4, 1, 9], fixed)
        store.to_dataset().save_to_disk(tmp_path / "rows", num_shards=2)
        back = make_store(max_obs_discrete_dim=7).from_dataset(datasets.load_from_disk(tmp_path / "rows"))
        assert back.task_starts.tolist() == [0, 4, 5]
        assert_equal(back[:], store[:])
        assert back.to_dataset().features == store.to_dataset().features
        assert store.to_dataset().features["observation"] == datasets.List(
            datasets.Value("float32"), length=OBSERVATION
        )

    def test_round_trip_of_ragged_teacher_values(self):
        columns = make_columns([3])
        del columns["metadata_q_star"]
        dataset = make_dataset(columns).add_column("metadata_q_star", [[1.0], [2.0, 3.0], []])
        store = make_store(max_action_dim=9).from_dataset(dataset)
        assert store.to_dataset().features["metadata_q_star"].length == 2
        assert_equal(make_store(max_action_dim=9).from_dataset(store.to_dataset())[:], store[:])

    def test_memory_mapped_and_picklable(self, tmp_path):
        make_dataset(make_columns([4, 9])).save_to_disk(tmp_path / "rows")
        gc.collect()
        before = pa.total_allocated_bytes()
        store = make_store().from_dataset(datasets.load_from_disk(tmp_path / "rows"))
        store[:]
        assert pa.total_allocated_bytes() <= before  # the rows stay in the file
        store.append({name: value[0] for name, value in make_columns([1]).items()})
        copy = pickle.loads(pickle.dumps(store))
        assert_equal(copy[:], store[:])
        assert len(pickle.dumps(store)) < 20_000


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


def bad(name, value, row=2):
    columns = make_columns([5])
    columns[name][row] = value
    return make_dataset(columns)


class TestErrors:
    @pytest.mark.parametrize("name", ["action", "reward", "done", "episode_step"])
    def test_missing_column(self, name):
        dataset = make_dataset(make_columns([3])).remove_columns(name)
        with pytest.raises(KeyError, match=f"column '{name}' must be present, got only .*Rename or add"):
            make_store().from_dataset(dataset)
        with pytest.raises(KeyError, match=f"column '{name}' must be present"):
            make_store().append(dataset[0])

    def test_missing_task_column(self):
        with pytest.raises(KeyError, match="column 'goal' must be present"):
            make_store().from_dataset(make_dataset(make_columns([3])), task="goal")

    @pytest.mark.parametrize(
        ("name", "kind", "rule"),
        [
            ("action", "string", "must hold integers, got string"),
            ("action", "float32", "must hold integers, got float"),
            ("reward", "string", "must hold numbers, got string"),
            ("task", "string", "must hold integers, got string"),
            ("done", "bool", "must hold integers, got bool"),
        ],
    )
    def test_wrong_type(self, name, kind, rule):
        dataset = make_dataset(make_columns([3])).cast_column(name, datasets.Value(kind))
        with pytest.raises(TypeError, match=f"column '{name}' {rule}.*cast_column"):
            make_store().from_dataset(dataset)

    def test_list_of_actions(self):
        columns = make_columns([3])
        columns["action"] = columns["action"][:, None]
        with pytest.raises(TypeError, match=r"column 'action' must hold integers, got .*list"):
            make_store().from_dataset(make_dataset(columns))

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("action", -1, r"'action' must lie in \[0, 5\), got -1 in row 2. Raise max_action_dim"),
            ("action", 5, r"'action' must lie in \[0, 5\), got 5 in row 2. Raise max_action_dim"),
            ("done", 3, r"'done' must lie in \[0, 3\), got 3 in row 2. Done codes are 0"),
            ("done", -1, r"'done' must lie in \[0, 3\), got -1 in row 2"),
            ("episode_step", -1, "'episode_step' must be at least 0, got -1 in row 2. It counts from 0"),
            ("observation_discrete", 7, r"'observation_discrete' must lie in \[0, 7\), got 7 in row 2"),
            ("reward", np.nan, "'reward' must not be NaN, got nan in row 2. Fix the data."),
            ("observation", [0.0, np.nan, 0.0], "'observation' must not be NaN, got .*nan.* in row 2"),
        ],
    )
    def test_values(self, name, value, message, monkeypatch):
        monkeypatch.setattr("torchrl_mouse.data.rows.CHUNK", 2)
        store = make_store(max_obs_discrete_dim=7)
        with pytest.raises(ValueError, match=f"from_dataset: column {message}"):
            store.from_dataset(bad(name, value))
        assert not len(store)
        with pytest.raises(ValueError, match=f"append: column {message.replace('row 2', 'row 0')}"):
            store.append({key: column[2] for key, column in bad(name, value)[:].items()})

    def test_nulls(self):
        columns = make_columns([3])
        del columns["reward"]
        dataset = make_dataset(columns).add_column("reward", [0.0, None, 1.0])
        with pytest.raises(ValueError, match=r"column 'reward' must hold no nulls, got 1\. Fill them"):
            make_store().from_dataset(dataset)

    def test_teacher_too_wide(self):
        with pytest.raises(
            ValueError, match="'metadata_q_star' must have at most max_action_dim=4 values a row, got 5"
        ):
            make_store(max_action_dim=4).from_dataset(make_dataset({**make_columns([3]), "action": np.zeros(3, int)}))

    def test_ragged_discrete(self):
        columns = make_columns([2])
        del columns["observation_discrete"]
        dataset = make_dataset(columns).add_column("observation_discrete", [[1], [1, 2]])
        with pytest.raises(ValueError, match="must hold one id a row, got lists of 1 to 2"):
            make_store(max_obs_discrete_dim=7).from_dataset(dataset)

    def test_columns_differ(self):
        store = loaded([3])
        with pytest.raises(KeyError, match="got a difference in xformed_reward"):
            store.from_dataset(make_dataset(make_columns([3])).remove_columns("xformed_reward"))
        assert len(store) == 3

    def test_unread_observation(self):
        batch, _ = collect([3], rows=1)
        with pytest.raises(
            ValueError, match="'observation' must be one that the store reads, got max_obs_continuous_dim=0"
        ):
            DatasetStore().extend(batch)

    def test_empty(self):
        with pytest.raises(ValueError, match="a data set must have rows, got 0"):
            make_store().from_dataset(make_dataset(make_columns([3])).select([]))
        store = make_store()
        for action in (lambda: store[0], lambda: store[:], store.to_dataset):
            with pytest.raises(RuntimeError, match="a store with no rows cannot be"):
                action()
        batch, _ = collect([3], rows=2)
        store.extend(batch[:, :2])
        with pytest.raises(RuntimeError, match="cannot be read, got 0 rows and 2 unfinished tasks"):
            store.get(0)

    @pytest.mark.parametrize("index", [3, -4, [0, 3], torch.tensor([[0, -4]]), range(2, 5)])
    def test_out_of_range(self, index):
        with pytest.raises(IndexError, match=r"must lie in \[-3, 3\), got (3|4|-4)\."):
            loaded([3])[index]

    @pytest.mark.parametrize("index", [0.5, torch.tensor([True, False, True])])
    def test_index_type(self, index):
        with pytest.raises(TypeError, match="an index must be an integer"):
            loaded([3])[index]

    def test_splits(self):
        parts = datasets.DatasetDict({"train": make_dataset(make_columns([2]))})
        with pytest.raises(ValueError, match="splits and split_pattern must not both be given"):
            make_store().from_dataset(parts, splits="train", split_pattern="t*")
        with pytest.raises(KeyError, match=r"a split must match \['eval'\], got only train"):
            make_store().from_dataset(parts, splits=["train", "eval"])
        with pytest.raises(KeyError, match=r"a split must match \['e\*'\], got only train"):
            make_store().from_dataset(parts, split_pattern="e*")
        with pytest.raises(ValueError, match="splits need a DatasetDict"):
            make_store().from_dataset(parts["train"], splits="train")
        with pytest.raises(TypeError, match="must be a Dataset or DatasetDict, got dict"):
            make_store().from_dataset({})

    def test_middle_of_a_task(self):
        batch, _ = collect([4], rows=2)
        store = make_store()
        store.extend(batch[:1, :2])
        with pytest.raises(ValueError, match=f"got stream {10**15 - 1} in the middle of a task at row 2"):
            store.extend(batch[:, 2:])
        store.extend(batch[:1, 2:])  # nothing of the refused batch was kept
        assert len(store) == 5

    @pytest.mark.parametrize("begin", [5, 20], ids=["repeated", "missing"])
    def test_batches_that_do_not_join(self, begin):
        batch, tasks = collect([30], rows=2)
        store = make_store()
        store.extend(batch[:, :8])
        store.extend(batch[:, 8:10])
        with pytest.raises(ValueError, match=rf"stream {10**15 - 1}: a batch is missing or repeated\. Give"):
            store.extend(batch[1:, begin:])
        store.extend(batch[:, 10:])  # nothing of the refused batch was kept
        for steps, (_, records) in zip(tasks_of(store), tasks, strict=True):
            assert_task(steps, records)

    def test_batches_that_do_not_join_after_others_of_the_stream(self):
        batch, _ = collect([4, 9], rows=2)
        store = make_store()
        store.extend(batch[:, :7])
        other = make_store()
        other.load_state_dict(store.state_dict())
        for one in (store, other):
            with pytest.raises(ValueError, match=f"stream {10**15 - 1}: a batch is missing or repeated"):
                one.extend(batch[1:, 8:])
            one.extend(batch[:, 7:])
            assert one.num_tasks == 4

    @pytest.mark.parametrize(
        "key",
        ["observation", "episode_step", ("previous", "action"), ("previous", "reward"), ("previous", "terminated")],
        ids=str,
    )
    def test_steps_of_one_batch_that_do_not_join(self, key):
        batch, _ = collect([6], rows=2)
        batch[key][1, 3] = ~batch[key][1, 3] if batch[key].dtype == torch.bool else (batch[key][1, 3] + 1) % ACTIONS
        with pytest.raises(ValueError, match=f"stream {10**15 - 1}: a batch is missing or repeated"):
            make_store().extend(batch)

    @pytest.mark.parametrize(
        ("key", "change", "error", "message"),
        [
            (("next", "done"), torch.Tensor.float, TypeError, "hold booleans, got torch.float32"),
            (("previous", "terminated"), torch.Tensor.float, TypeError, "hold booleans, got torch.float32"),
            (("next", "previous", "truncated"), torch.Tensor.int, TypeError, "hold booleans, got torch.int32"),
            ("is_init", torch.Tensor.int, TypeError, "hold booleans, got torch.int32"),
            ("stream", torch.Tensor.float, TypeError, "hold integers, got torch.float32"),
            ("episode_step", torch.Tensor.float, TypeError, "hold integers, got torch.float32"),
            (("previous", "action"), torch.Tensor.float, TypeError, "hold integer ids, got torch.float32"),
            (("previous", "reward"), lambda _: "x", TypeError, "hold numbers, got NonTensor"),
            (("previous", "reward"), lambda value: torch.cat([value, value], -1), ValueError, "hold one value a step"),
        ],
        ids=str,
    )
    def test_wrong_entry(self, key, change, error, message):
        batch, _ = collect([4], rows=2)
        batch[key] = change(batch[key])
        store = make_store()
        with pytest.raises(error, match=rf"entry {re.escape(repr(key))} must {message}"):
            store.extend(batch)
        assert not store._unfinished.waiting

    def test_negative_episode_step(self):
        batch, _ = collect([4], rows=2)
        with pytest.raises(ValueError, match="extend: column 'episode_step' must be at least 0, got -1"):
            make_store().extend(batch.set("episode_step", batch["episode_step"] - 1))

    @pytest.mark.parametrize(
        ("record", "error", "message"),
        [
            ({"reward": "x"}, TypeError, "column 'reward' must hold numbers, got 'x'"),
            ({"reward": 1j}, TypeError, "column 'reward' must hold numbers, got torch.complex64"),
            ({"action": 0.0}, TypeError, "column 'action' must hold integers, got torch.float32"),
            ({"action": [0, 1]}, ValueError, r"column 'action' must hold one value a record, got shape \(2,\)"),
            ({"done": True}, TypeError, "column 'done' must hold integers, got torch.bool"),
            ({"episode_step": -1}, ValueError, "column 'episode_step' must be at least 0, got -1"),
            ({"task": "x"}, TypeError, "column 'task' must hold integers, got 'x'"),
            ({"task": 1.5}, TypeError, "column 'task' must hold integers, got torch.float32"),
            ({"observatoin": [0.0]}, KeyError, "columns must be among action, .*, task, got 'observatoin'"),
        ],
        ids=str,
    )
    def test_wrong_record(self, record, error, message):
        store = make_store()
        with pytest.raises(error, match=f"DatasetStore.append: {message}"):
            store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0, **record})
        assert not len(store)

    def test_unread_columns_of_a_record_are_skipped(self):
        store = DatasetStore()
        store.append({name: value[0] for name, value in make_columns([1]).items()})
        assert "observation" not in store[0]

    def test_select_takes_a_list(self):
        with pytest.raises(TypeError, match=r"select: keys must be a list of keys, got 'action'\. Write \['action'\]"):
            make_store().select("action")

    def test_missing_entry(self):
        batch, _ = collect([4], rows=1)
        with pytest.raises(KeyError, match="'stream' must be present"):
            make_store().extend(batch.exclude("stream"))
        with pytest.raises(KeyError, match="must be present"):
            make_store().extend(batch.exclude(("previous", "reward")))

    def test_bad_collected_value(self):
        batch, _ = collect([4], rows=1)
        batch["next", "previous", "reward"][0, 3] = torch.nan
        store = make_store()
        with pytest.raises(ValueError, match="extend: column 'reward' must not be NaN"):
            store.extend(batch)
        assert not store._unfinished.waiting

    def test_set_is_refused(self):
        store = loaded([3])
        with pytest.raises(RuntimeError, match="rows must be appended, got a write at index 0"):
            store[0] = store[0]
        batch, _ = collect([4], rows=1)
        rb = ReplayBuffer(storage=make_store(), collate_fn=lambda x: x)
        with pytest.raises(RuntimeError, match=r"Use store\.extend or store\.append"):
            rb.extend(batch)

    def test_load_state_needs_the_data(self):
        with pytest.raises(ValueError, match=r"must have loaded data sets of \[3\] rows, got \[\]"):
            make_store().load_state_dict(loaded([3]).state_dict())

    def test_sizes(self):
        with pytest.raises(ValueError, match="sizes must be at least 1, 0 and 0, got 0, 0, 0"):
            DatasetStore(max_action_dim=0)


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
