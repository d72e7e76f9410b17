"""The store: contents, data sets in every shape, round trips."""

import gc
import itertools
import math
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_data import (
    ACTIONS,
    OBSERVATION,
    assert_equal,
    from_columns,
    loaded,
    make_columns,
    make_dataset,
    make_store,
)

from torchrl_mouse.data import DatasetStore
from torchrl_mouse.data.columns import REQUIRED_COLUMNS


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

    @pytest.mark.parametrize("index", [4, torch.tensor(13), [5], torch.arange(14).reshape(2, 7).T])
    def test_each_entry_alone(self, index):
        store = loaded([5, 1, 8])
        whole = store[index]
        for key in whole.keys(True, True):
            assert_equal(store.select([key])[index], whole.select(key, ("collector", "mask")))

    def test_selected_columns_alone_are_read(self, monkeypatch):
        store = loaded([5]).select(["observation"])
        asked = []
        read = type(store._blocks[0]).read
        monkeypatch.setattr(
            type(store._blocks[0]), "read", lambda b, rows, parts: asked.extend(parts) or read(b, rows, parts)
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

    @pytest.mark.parametrize("name", ["metadata_q_star", "action_mask", "observation_image"])
    def test_rows_that_are_left_out_have_no_width(self, name):
        kind = datasets.Value({"action_mask": "bool", "observation_image": "uint8"}.get(name, "float32"))
        rows = [[1] * n for n in (2, 9, 4, 9, 3)]
        extra = datasets.Dataset.from_dict({name: rows}, features=datasets.Features({name: datasets.List(kind)}))
        rest = make_dataset({k: v for k, v in make_columns([5]).items() if k != "metadata_q_star"})
        dataset = datasets.concatenate_datasets([rest, extra], axis=1)
        sizes = {"max_action_dim": 5, "max_obs_image_pixels": 4}
        with pytest.raises(ValueError, match=f"'{name}' must have at most .* values a row, got 9"):
            make_store(**sizes).from_dataset(dataset)
        few = dataset.filter(lambda row: len(row[name]) < 5)
        store = make_store(**sizes).from_dataset(few)
        key = {"metadata_q_star": "q_star", "observation_image": "pixels"}.get(name, name)
        assert (store[:][key] == 1).sum(-1).tolist() == [2, 4, 3]
        assert store.to_dataset().features[name].length == 4
        plain = datasets.Dataset.from_dict(few.to_dict(), features=few.features)
        assert_equal(store[:], make_store(**sizes).from_dataset(plain)[:])

    def test_nulls_that_span_values(self):
        """Arrow lets anything stand in a null's place: such a row has no teacher all the same."""
        lists = pa.ListArray.from_arrays([0, 2, 7, 8], [1.0, 2.0, *[9.0] * 5, 3.0], mask=pa.array([False, True, False]))
        rows = make_dataset({k: v for k, v in make_columns([3]).items() if k != "metadata_q_star"}).data.table
        dataset = datasets.Dataset(rows.append_column("metadata_q_star", lists.cast(pa.list_(pa.float32()))))
        dataset = dataset.select([2, 1, 0])
        got = make_store(max_action_dim=5).from_dataset(dataset)[:]["q_star"]
        nothing = -torch.inf
        assert got.tolist() == [[3.0, *[nothing] * 4], [nothing] * 5, [1.0, 2.0, *[nothing] * 3]]

    def test_rows_of_no_length_alone(self):
        columns = {k: v for k, v in make_columns([3]).items() if k != "metadata_q_star"}
        dataset = make_dataset(columns).add_column("metadata_q_star", [[], [1.0], []])
        steps = make_store().from_dataset(dataset.select([2, 0]))[:]
        assert torch.isneginf(steps["q_star"]).all()

    def test_columns_of_which_only_nulls_are_left_are_absent(self):
        columns = make_columns([5])
        whole = make_dataset({k: v for k, v in columns.items() if k != "xformed_reward"})
        dataset = whole.add_column("xformed_reward", [1.0, None, 2.0, None, None])
        store = make_store().from_dataset(dataset.filter(lambda row: row["xformed_reward"] is None))
        assert_equal(store[:], make_store().from_dataset(whole.select([1, 3, 4]))[:])
        assert len(make_store().from_dataset(dataset.select([2, 0]))[:]["previous", "xformed_reward"]) == 2
        with pytest.raises(ValueError, match="'xformed_reward' must hold no nulls, got 1 bad rows, the first is row 1"):
            make_store().from_dataset(dataset.select([2, 4, 0]))

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

    def test_columns_of_nulls_are_absent(self):
        plain = make_dataset({k: v for k, v in make_columns([4]).items() if k in (*REQUIRED_COLUMNS, "task")})
        nulls = plain
        for name, value in make_dataset(make_columns([4])).features.items():
            if name not in plain.column_names:
                nulls = nulls.add_column(name, [None] * 4).cast_column(name, value)
        store = make_store(max_obs_discrete_dim=7)
        assert_equal(store.from_dataset(nulls)[:], make_store().from_dataset(plain)[:])

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

    def test_round_trip_of_empty_teacher_values(self):
        columns = make_columns([3])
        del columns["metadata_q_star"]
        features = datasets.Features({"metadata_q_star": datasets.List(datasets.Value("float32"))})
        teacher = datasets.Dataset.from_dict({"metadata_q_star": [[], [], []]}, features)
        store = make_store().from_dataset(datasets.concatenate_datasets([make_dataset(columns), teacher], axis=1))
        assert store.to_dataset()["metadata_q_star"][:] == [[-math.inf]] * 3

    def test_memory_mapped_and_picklable(self, tmp_path):
        make_dataset(make_columns([4, 9])).save_to_disk(tmp_path / "rows")
        gc.collect()
        before = pa.total_allocated_bytes()
        store = make_store(max_obs_discrete_dim=7).from_dataset(datasets.load_from_disk(tmp_path / "rows"))
        store[:]
        assert pa.total_allocated_bytes() <= before  # the rows stay in the file
        store.append({name: value[0] for name, value in make_columns([1]).items()})
        copy = pickle.loads(pickle.dumps(store))
        assert_equal(copy[:], store[:])
        assert len(pickle.dumps(store)) < 20_000


def test_tasks_named_by_a_column_that_is_read_too():
    rows = {"action": [0, 0, 1, 1], "reward": [0.0] * 4, "done": [0] * 4, "episode_step": [0, 1, 2, 3]}
    store = DatasetStore().from_dataset(datasets.Dataset.from_dict(rows), task="action")
    assert store.task_starts.tolist() == [0, 2]
    assert store[:]["previous", "action"].tolist() == [0, 0, 1, 1]
