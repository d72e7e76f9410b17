"""The store: what it refuses, and what it says then."""

import re

import datasets
import numpy as np
import pytest
import torch
from store_data import ACTIONS, assert_task, collect, loaded, make_columns, make_dataset, make_store, tasks_of
from torchrl.data import ReplayBuffer

from torchrl_mouse.data import DatasetStore
from torchrl_mouse.data.columns import Columns
from torchrl_mouse.envs import PointRobotEnv, TaskEnv, point_robot_goals


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
            ("reward", np.inf, "'reward' must be finite, got inf in row 2. Fix the data."),
            ("xformed_reward", -np.inf, "'xformed_reward' must be finite, got -inf in row 2"),
            ("observation", [0.0, 0.0, -np.inf], "'observation' must be finite, got .*-inf.* in row 2"),
            ("reward", np.nan, "'reward' must be finite, got nan in row 2. Fix the data."),
            ("observation", [0.0, np.nan, 0.0], "'observation' must be finite, got .*nan.* in row 2"),
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

    def test_the_split_is_named(self):
        good = make_dataset(make_columns([3]))
        store = make_store()
        for bad_split, message in (
            (good.select([]), "a data set must have rows, got 0"),
            (bad("action", 9), "column 'action' must lie"),
            (good.cast_column("done", datasets.Value("string")), "column 'done' must hold integers"),
        ):
            with pytest.raises((TypeError, ValueError), match=f"from_dataset: split 'eval': {message}"):
                store.from_dataset(datasets.DatasetDict({"train": good, "eval": bad_split}))
        assert not len(store)

    @pytest.mark.parametrize("fixed", [True, False])
    def test_nulls_in_lists(self, fixed):
        columns = make_columns([4])
        del columns["observation"]
        features = datasets.Features(
            {"observation": datasets.List(datasets.Value("float32"), length=2 if fixed else -1)}
        )
        values = [[0.0, 1.0], [0.0, None], [1.0, 1.0], None]
        extra = datasets.Dataset.from_dict({"observation": values}, features)
        dataset = datasets.concatenate_datasets([make_dataset(columns), extra], axis=1)
        with pytest.raises(ValueError, match="'observation' must hold no nulls, got 2 bad rows, the first is row 1"):
            make_store().from_dataset(dataset)
        with pytest.raises(ValueError, match="got 1 bad rows, the first is row 2"):
            make_store().from_dataset(dataset.select([0, 2, 3]))
        assert make_store().from_dataset(dataset.select([2, 0]))[:]["observation"].tolist() == [[1, 1, 0], [0, 1, 0]]

    def test_nulls(self):
        columns = make_columns([3])
        del columns["reward"]
        dataset = make_dataset(columns).add_column("reward", [0.0, None, 1.0])
        with pytest.raises(
            ValueError, match=r"column 'reward' must hold no nulls, got 1 bad rows, the first is row 1\. Fill"
        ):
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
        with pytest.raises(
            ValueError, match="'observation_discrete' must hold one id a row, got 1 bad rows, the first is row 1"
        ):
            make_store(max_obs_discrete_dim=7).from_dataset(dataset)

    def test_columns_differ(self):
        store = loaded([3])
        with pytest.raises(KeyError, match="got a difference in xformed_reward"):
            store.from_dataset(make_dataset(make_columns([3])).remove_columns("xformed_reward"))
        assert len(store) == 3

    def test_continuous_actions(self):
        env = TaskEnv(PointRobotEnv(point_robot_goals(3)), episodes_per_task=2)
        with pytest.raises(ValueError, match=r"'action'\) must hold ids or one-hot vectors, got \[-?0"):
            make_store().extend(env.rollout(3))

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

    @pytest.mark.parametrize("index", [(0, 1), (), None, ..., "action", {0}, [None], ["a"], [[0], [0, 1]]], ids=str)
    def test_no_index(self, index):
        with pytest.raises(TypeError, match=f"an index must be an int, .* got {re.escape(repr(index))}"):
            loaded([3])[index]

    @pytest.mark.parametrize("choice", [{"splits": []}, {"split_pattern": []}, {"splits": ""}], ids=str)
    def test_no_splits(self, choice):
        store, parts = make_store(), datasets.DatasetDict({"train": make_dataset(make_columns([2]))})
        with pytest.raises(ValueError, match=r"from_dataset: splits must be at least one, got .* of train\. Name one"):
            store.from_dataset(parts, **choice)
        with pytest.raises(ValueError, match=r"splits must be at least one, got None of an empty DatasetDict"):
            store.from_dataset(datasets.DatasetDict())

    @pytest.mark.parametrize("steps", [None, {}, [collect([3], rows=1)[0]]], ids=["none", "dict", "list"])
    def test_no_steps(self, steps):
        with pytest.raises(TypeError, match=r"extend: steps must be a tensordict, got \w+\. Join several"):
            make_store().extend(steps)

    def test_columns_of_splits_differ(self):
        whole = make_dataset(make_columns([3]))
        store, parts = make_store(), {"train": whole, "eval": whole.remove_columns("xformed_reward")}
        with pytest.raises(
            KeyError, match=r"from_dataset: columns must be those .* got a difference in xformed_reward"
        ):
            store.from_dataset(datasets.DatasetDict(parts))
        assert not len(store)

    def test_columns_differ_from_those_of_tasks_that_wait(self):
        batch, _ = collect([5], rows=1)
        store = make_store()
        store.extend(batch[:, :2])
        with pytest.raises(KeyError, match=r"append: columns must be those .* got a difference in observation\."):
            store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0})
        with pytest.raises(
            KeyError, match=r"from_dataset: columns must be those .* got a difference in xformed_reward"
        ):
            store.from_dataset(make_dataset(make_columns([3])))
        assert not len(store)
        store.extend(batch[:, 2:])
        assert len(store) == 6

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
            ({"reward": "x"}, TypeError, "column 'reward' must hold numbers, got 'x' in row 0"),
            (
                {"reward": None},
                KeyError,
                "column 'reward' must be present, got only action, done, episode_step in row 0",
            ),
            (
                {"observation": [[0.0], [0.0, 1.0]]},
                TypeError,
                "column 'observation' must hold numbers, got .* in row 0",
            ),
            (
                {"observation": [[0.0], [1.0]]},
                ValueError,
                r"'observation' must hold a list a record, got shape \(2, 1\)",
            ),
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
        with pytest.raises(error, match=rf"DatasetStore\.append: .*{message}"):
            store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0, **record})
        assert not len(store)

    def test_unread_columns_of_a_record_are_refused(self):
        store = DatasetStore(4)
        record = {"action": 0, "reward": 0.0, "done": 0, "episode_step": 0}
        sizes = {"observation": "continuous_dim", "observation_discrete": "discrete_dim"}
        for name, size in {**sizes, "observation_image": "image_pixels"}.items():
            with pytest.raises(ValueError, match=f"append: column '{name}' .* the store reads, got max_obs_{size}=0"):
                store.append({**record, name: [1]})
        assert not len(store)
        store.append({**record, "observation": None})
        assert "observation" not in store[0]

    def test_absent_columns_are_none_of_a_read(self):
        columns = Columns(5, 3, 0, 0)
        assert torch.isneginf(columns.convert("metadata_q_star", None, torch.Size([2]))).all()
        for name in ("reward", "observation"):
            with pytest.raises(KeyError, match=f"column '{name}' must be in all rows"):
                columns.convert(name, None, torch.Size([2]))

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
        with pytest.raises(ValueError, match="extend: column 'reward' must be finite, got nan in row 3 under 'next'"):
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
        with pytest.raises(
            ValueError, match=r"must have loaded 1 data sets \(3 rows in memory, .*\), got 0. Call from_dataset"
        ):
            make_store().load_state_dict(loaded([3]).state_dict())

    def test_sizes(self):
        with pytest.raises(ValueError, match="sizes must be at least 1, 0, 0 and 0, got 0, 0, 0, 0"):
            DatasetStore(max_action_dim=0)
