"""The store: its saved state, dumps that are whole or not there, and data sets that change on disk."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from store_data import assert_equal, collect, make_columns, make_dataset, make_store

from torchrl_mouse.data import DatasetStore, replay_buffer


def record(step):
    return {"action": 0, "reward": float(step), "done": 0, "episode_step": step}


def appended(steps):
    store = DatasetStore()
    for step in range(steps):
        store.append(record(step))
    return store


def save(path, columns, shards=1):
    make_dataset(columns).save_to_disk(path, num_shards=shards)
    return datasets.load_from_disk(path)


class TestDatasetsOnDisk:
    def test_moved(self, tmp_path):
        store = make_store(max_obs_discrete_dim=7).from_dataset(save(tmp_path / "rows", make_columns([5]), 2))
        store.append({**make_dataset(make_columns([1]))[0]})
        store.dumps(tmp_path / "dump")
        (tmp_path / "rows").rename(tmp_path / "moved")
        other = make_store(max_obs_discrete_dim=7).from_dataset(datasets.load_from_disk(tmp_path / "moved"))
        other.loads(tmp_path / "dump")
        assert_equal(other[:], store[:])

    def test_states_name_the_files(self, tmp_path):
        dataset = save(tmp_path / "rows", make_columns([5]), 2)
        state = make_store().from_dataset(dataset).state_dict()["blocks"][0]
        assert state["fingerprint"] == dataset._fingerprint
        assert state["rows"] == 5
        assert [path for path, _ in state["files"]] == [file["filename"] for file in dataset.cache_files]
        assert all(os.path.getsize(path) == size for path, size in state["files"])

    @pytest.mark.parametrize("change", ["values", "rows", "bytes"])
    def test_changed(self, change, tmp_path):
        store = make_store().from_dataset(make_dataset(make_columns([3])))
        store.from_dataset(save(tmp_path / "rows", make_columns([5])))
        store.dumps(tmp_path / "dump")
        if change == "bytes":  # as an edit or an interrupted copy leaves them: the fingerprint stays
            (file,) = (tmp_path / "rows").glob("*.arrow")
            with file.open("ab") as stream:
                stream.write(bytes(16))
            now = datasets.load_from_disk(tmp_path / "rows")
        else:
            now = save(tmp_path / "new", make_columns([5 if change == "values" else 6], seed=1))
        other = make_store().from_dataset(make_dataset(make_columns([3]))).from_dataset(now)
        before = other[:]
        expected = rf"data set 1 must be the saved one \(5 rows in {tmp_path}/rows/.* \(\d+ bytes\), fingerprint \w+\)"
        got = (
            rf"got {len(now)} rows in {tmp_path}/.* \(\d+ bytes\), fingerprint \w+\. It changed on disk, or is another"
        )
        with pytest.raises(ValueError, match=f"load_state_dict: {expected}, {got}"):
            other.loads(tmp_path / "dump")
        assert_equal(other[:], before)

    def test_order(self):
        parts = [make_dataset(make_columns([4], seed=seed)) for seed in range(2)]
        state = make_store().from_dataset(parts[0]).from_dataset(parts[1]).state_dict()
        other = make_store().from_dataset(parts[1]).from_dataset(parts[0])
        with pytest.raises(
            ValueError, match=r"data set 0 must be the saved one .*load the same ones in the same order"
        ):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"must have loaded 2 data sets \(4 rows in memory, .*\), got 1\. Call"):
            make_store().from_dataset(parts[0]).load_state_dict(state)

    def test_same_contents_in_another_process(self, tmp_path):
        """A fingerprint says what a data set holds, not which object it is."""
        make_store().from_dataset(make_dataset(make_columns([4]))).dumps(tmp_path)
        code = (
            "from store_data import *; s = make_store().from_dataset(make_dataset(make_columns([4])));"
            f"s.loads({str(tmp_path)!r}); print(len(s))"
        )
        assert run(code).stdout == "4\n"


class TestState:
    def test_saved_rows_must_fit(self):
        store = make_store()
        store.append({**record(0), "observation": [0.0], "action": 4})
        cases = [
            (make_store(max_action_dim=3), r"'action' must lie in \[0, 3\), got 4 in row 0"),
            (make_store(max_obs_continuous_dim=0), "'observation' must be one that the store reads"),
        ]
        for other, message in cases:
            other.append(record(0))
            with pytest.raises(ValueError, match=f"load_state_dict: column {message}"):
                other.load_state_dict(store.state_dict())
            assert len(other) == 1

    def test_saved_rows_of_unfinished_tasks_must_fit(self):
        batch, _ = collect([6], rows=2)
        batch["previous", "action"][0, 1] = batch["next", "previous", "action"][0, 0] = 4
        store = make_store()
        store.extend(batch[:, :3])
        cases = [
            (make_store(max_action_dim=4), r"'action' must lie in \[0, 4\), got 4 in row \d of an unfinished task"),
            (make_store(max_obs_continuous_dim=0), "'observation' must be one that the store reads"),
        ]
        for other, message in cases:
            other.append(record(0))
            before = other[:]
            with pytest.raises(ValueError, match=f"load_state_dict: column {message}"):
                other.load_state_dict(store.state_dict())
            assert_equal(other[:], before)
            assert not len(other._unfinished.open)

    def test_saved_columns_must_be_those_of_the_data_sets(self):
        dataset = make_dataset(make_columns([4]))
        store = DatasetStore(5).from_dataset(dataset)
        store.append({**record(0), "xformed_reward": 0.0})
        other = make_store(max_obs_discrete_dim=7).from_dataset(dataset)
        before = other[:]
        with pytest.raises(
            KeyError, match=r"load_state_dict: .* got a difference in observation, observation_discrete\."
        ):
            other.load_state_dict(store.state_dict())
        assert_equal(other[:], before)

    @pytest.mark.parametrize("held", ["data set", "appended"])
    def test_saved_columns_of_unfinished_tasks_too(self, held):
        columns = {k: v for k, v in make_columns([4]).items() if k in record(0)}
        dataset = make_dataset(columns)
        batch, _ = collect([6], rows=1)
        store = make_store()
        store.extend(batch[:, :3])
        state, other = store.state_dict(), make_store()
        if held == "data set":
            other.from_dataset(dataset)
            state["blocks"] = other.state_dict()["blocks"]
        else:
            other.append(record(0))
            state["blocks"] = other.state_dict()["blocks"]
            other = make_store()
        with pytest.raises(KeyError, match=r"load_state_dict: .* got a difference in observation\."):
            other.load_state_dict(state)
        assert len(other) == (4 if held == "data set" else 0)

    def test_saved_columns_may_differ_from_rows_that_are_replaced(self):
        store, other = appended(3), make_store()
        other.append({**record(0), "observation": [0.0]})
        other.load_state_dict(store.state_dict())
        assert_equal(other[:], store[:].to_tensordict())

    def test_tasks_go_on(self):
        """The task of appended and of collected rows goes on where the saved one stood."""
        batch, _ = collect([3, 4], rows=2)
        stores = [make_store(), make_store()]
        stores[0].extend(batch[:, :5])
        stores[0].append({**record(0), "observation": [0.0], "task": 3})
        stores[1].load_state_dict(stores[0].state_dict())
        for store in stores:
            store.append({**record(1), "observation": [0.0], "task": 3})
            store.extend(batch[:, 5:])
        assert stores[0].num_tasks == 5
        assert stores[0].task_starts.tolist() == stores[1].task_starts.tolist()
        assert_equal(stores[0][:], stores[1][:])

    def test_state_is_a_copy(self):
        store = appended(3)
        state = store.state_dict()
        expected = store[:]
        for step in range(3, 40):
            store.append(record(step))
        other = DatasetStore()
        other.load_state_dict(state)
        other.append(record(9))
        again = DatasetStore()
        again.load_state_dict(state)
        assert_equal(again[:], expected)

    def test_pickle_of_rows_on_disk(self, tmp_path):
        store = make_store().from_dataset(save(tmp_path / "rows", make_columns([5])))
        assert_equal(pickle.loads(pickle.dumps(store))[:], store[:])


TESTS = os.path.dirname(__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, os.path.dirname(TESTS)]), "OMP_NUM_THREADS": "1"}


def command(code):
    return [sys.executable, "-W", "ignore", "-c", code]


def run(code):
    return subprocess.run(command(code), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


class TestDumps:
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos")])
    def test_failure_keeps_the_earlier_dump(self, error, tmp_path, monkeypatch):
        store = appended(3)
        store.dumps(tmp_path / "dump")
        store.append(record(3))

        def half(state, file):
            file.write(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", half)
            with pytest.raises(
                OSError, match=rf"dumps: {tmp_path}/dump/store.pt must be writable, got .*{error.args[-1]}"
            ):
                store.dumps(tmp_path / "dump")
        assert [path.name for path in (tmp_path / "dump").iterdir()] == ["store.pt"]
        other = DatasetStore()
        other.loads(tmp_path / "dump")
        assert len(other) == 3
        assert len(store) == 4
        store.dumps(tmp_path / "dump")
        other.loads(tmp_path / "dump")
        assert_equal(other[:], store[:])

    def test_not_a_folder(self, tmp_path):
        (tmp_path / "dump").write_text("")
        with pytest.raises(OSError, match=r"dumps: .*/dump/store\.pt must be writable, got .*File exists"):
            appended(1).dumps(tmp_path / "dump")

    def test_full_disk(self, tmp_path):
        """The operating system's own limit, in the middle of a real write."""
        code = f"""
import resource
from test_store_saving import *
store = appended(100)
store.dumps({str(tmp_path)!r})
store._add_records({{k: v.repeat(10_000) for k, v in store._blocks[0].state().items()}}, torch.zeros(1).long())
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    store.dumps({str(tmp_path)!r})
except OSError as error:
    print(error)
print(len(store), store[-1]["episode_step"].item())
"""
        result = run(code)
        assert result.returncode == 0, result.stderr
        message, length = result.stdout.splitlines()
        assert "store.pt must be writable" in message
        assert "An earlier dump there is as it was" in message
        assert length == "1000100 99"
        assert [path.name for path in tmp_path.iterdir()] == ["store.pt"]
        other = DatasetStore()
        other.loads(tmp_path)
        assert len(other) == 100

    def test_kill_in_the_middle(self, tmp_path):
        """A process that appends and dumps for ever is killed at any moment: its last whole dump can be read."""
        code = f"""
from test_store_saving import *
store = appended(1)
while True:
    for step in range(len(store), len(store) + 50):
        store.append(record(step))
    store.dumps({str(tmp_path)!r})
    print(len(store), flush=True)
"""
        for delay in (0.003, 0.011, 0.02):
            with subprocess.Popen(command(code), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
                for _ in range(3):
                    reported = int(process.stdout.readline())
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                rest = process.stdout.read().split()
            assert process.returncode == -signal.SIGKILL
            store = DatasetStore()
            store.loads(tmp_path)
            reported = int(rest[-1]) if rest else reported
            assert len(store) in (reported, reported + 50)  # killed before or after it could say so
            steps = store[:]
            assert steps["episode_step"].squeeze(-1).tolist() == list(range(len(store)))
            assert steps["next", "reward"].squeeze(-1).tolist() == [*range(1, len(store)), 0]

    def test_half_written_file_is_not_read(self, tmp_path):
        appended(3).dumps(tmp_path)
        (tmp_path / "store.partial").write_bytes(b"half")
        store = DatasetStore()
        store.loads(tmp_path)
        assert len(store) == 3
        appended(4).dumps(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["store.pt"]

    def test_buffer_with_datasets(self, tmp_path):
        dataset = save(tmp_path / "rows", make_columns([5, 4]))
        dataset = dataset.remove_columns(["observation_discrete", "xformed_reward"])
        batch, _ = collect([3, 2], rows=2)
        buffers = [
            replay_buffer(make_store().from_dataset(dataset), window=2, batch_size=3, seed=seed) for seed in (0, 1)
        ]
        buffers[0].extend(batch[:, :4])
        buffers[0].dumps(tmp_path / "rb")
        buffers[1].loads(tmp_path / "rb")
        for rb in buffers:
            rb.extend(batch[:, 4:])
        assert len(buffers[0]) == len(buffers[1]) == 9 + 14
        for one, other in itertools.pairwise(buffers):
            assert_equal(one[:], other[:])
            assert_equal(one.sample(), other.sample())


@pytest.mark.parametrize("content", [b"", b"no dump at all", b"PK\x03\x04 half a file"])
def test_damaged_dump_is_named(tmp_path, content):
    (tmp_path / "store.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"DatasetStore.loads: .*store.pt must be a store's dump, got a damaged or other"
    ):
        DatasetStore().loads(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"store.pt"):
        DatasetStore().loads(tmp_path / "nowhere")
