"""Batches per second of the store and its buffer, against named baselines, in one run.

Run it with ``python tests/benchmarks/bench_store.py``. Data: 300,000 records, tasks of 4,000, 8 floats of observation,
4 teacher values, windows of 64 x 32, one thread.
"""

import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from torchrl_mouse import schema
from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.objectives import MouseDQNLoss

ROWS, TASK, BATCH, WINDOW = 300_000, 4_000, 64, 32
ROW_KEYS = {"observation": "obs_continuous", "episode_step": "time", "metadata_q_star": "q_star"}
ROW_KEYS |= {name: name for name in ("action", "reward", "done")}


def build(path: Path) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    columns = {
        "action": rng.integers(0, 4, ROWS),
        "reward": rng.standard_normal(ROWS).astype(np.float32),
        "done": rng.integers(0, 3, ROWS),
        "episode_step": rng.integers(0, 100, ROWS),
        "observation": list(rng.standard_normal((ROWS, 8)).astype(np.float32)),
        "metadata_q_star": list(rng.standard_normal((ROWS, 4)).astype(np.float32)),
        "task": np.arange(ROWS) // TASK,
    }
    datasets.Dataset.from_dict(columns).save_to_disk(path)
    return datasets.load_from_disk(path)


def row_dictionaries(dataset: datasets.Dataset, starts: torch.Tensor) -> TensorDict:
    """The usual way with a Hugging Face data set: Python lists of rows, encoded to tensors, one window at a time."""
    windows = []
    for start in starts.tolist():
        rows = dataset[start : start + WINDOW]
        windows.append(TensorDict({ours: torch.tensor(rows[name]) for name, ours in ROW_KEYS.items()}, [WINDOW]))
    return schema.from_mouse_records(torch.stack(windows))


def per_second(calls, rounds=12, seconds=0.15):
    """Batches per second of several calls, taken in turns; the best round counts, for other work slows any of them."""
    best = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            count, begin = 0, time.perf_counter()
            while (spent := time.perf_counter() - begin) < seconds:
                call()
                count += 1
            best[name] = max(best[name], count / spent)
    return best


def report(title, rates, baseline):
    print(title)
    for name, rate in rates.items():
        print(f"  {name:<34}{rate:9.0f} batches/s {rate / rates[baseline]:6.1f}x")


def main():
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = build(Path(folder) / "rows")
        chunks = dataset.data.table.column("action").num_chunks
        store = DatasetStore(max_action_dim=4, max_obs_continuous_dim=8)
        begin = time.perf_counter()
        store.from_dataset(dataset)
        print(f"from_dataset: {time.perf_counter() - begin:.3f} s for {len(store):,} rows in {chunks} chunks")

        starts = torch.randint(0, ROWS - WINDOW, (BATCH,))
        index = starts.unsqueeze(-1) + torch.arange(WINDOW)
        keys = ["observation", "action", ("next", "reward"), ("next", "done")]
        few = DatasetStore(max_action_dim=4, max_obs_continuous_dim=8, keys=keys).from_dataset(dataset)
        sizes = {"max_num_actions": 4, "max_num_obs_continuous": 8, "max_num_time_steps": 100}
        model = MouseModel(MouseConfig(embedding_kwargs=sizes, backbone_kwargs=None, dqn_head_kwargs={}))
        declared = MouseDQNLoss(model.head("dqn"), trunk=model.trunk).in_keys
        learner = DatasetStore(max_action_dim=4, max_obs_continuous_dim=8, keys=declared).from_dataset(dataset)
        everything = store[:]
        everything["task"] = torch.arange(ROWS) // TASK
        rates = per_second(
            {
                "row dictionaries": lambda: row_dictionaries(dataset, starts),
                "store.get, all entries": lambda: store.get(index),
                "store.get, a model's and DQN's": lambda: learner.get(index),
                "store.get, 4 entries": lambda: few.get(index),
                "TensorDict in memory, td[index]": lambda: everything[index],
            }
        )
        report("reading 64 x 32 (target: 50x)", rates, "row dictionaries")

        memory = TensorDictReplayBuffer(
            storage=LazyTensorStorage(ROWS),
            sampler=SliceSampler(slice_len=WINDOW, traj_key="task", cache_values=True),
            batch_size=BATCH * WINDOW,
        )
        memory.extend(everything)
        buffers = {
            name: replay_buffer(one, window=WINDOW, batch_size=BATCH, seed=0)
            for name, one in (
                ("rb.sample, all entries", store),
                ("rb.sample, a model's and DQN's", learner),
                ("rb.sample, 4 entries", few),
            )
        }
        baseline = "LazyTensorStorage + SliceSampler"
        calls = {baseline: memory.sample, **{name: rb.sample for name, rb in buffers.items()}}
        report("sampling 64 x 32 (target: 1x)", per_second(calls), baseline)

        batch = collected(70, 4_200)
        fresh = DatasetStore(max_action_dim=4, max_obs_continuous_dim=8)
        begin = time.perf_counter()
        fresh.extend(batch)
        whole = time.perf_counter() - begin
        print(f"extend, 70 rows x 4,200 steps at once: {whole:.3f} s ({fresh})")
        fresh = DatasetStore(max_action_dim=4, max_obs_continuous_dim=8)
        begin = time.perf_counter()
        for low in range(0, 4_200, 60):
            fresh.extend(batch[:, low : low + 60])
        print(f"extend, 70 batches of 70 x 60 steps:   {time.perf_counter() - begin:.3f} s ({fresh})")


def collected(rows, steps):
    """Transitions of one task per row, in the layout of a collector's batch."""
    done = torch.zeros(rows, steps + 1, 1, dtype=torch.bool)
    frames = TensorDict(
        {
            "observation": torch.randn(rows, steps + 1, 8),
            "previous": {
                "action": torch.randint(0, 4, (rows, steps + 1)),
                "reward": torch.randn(rows, steps + 1, 1),
                "terminated": done,
                "truncated": done,
            },
            "episode_step": torch.arange(steps + 1).expand(rows, -1).unsqueeze(-1),
        },
        [rows, steps + 1],
    )
    batch = frames[:, :-1].clone()
    batch["next"] = frames[:, 1:].clone()
    batch["is_init"] = (torch.arange(steps) == 0).expand(rows, -1).unsqueeze(-1)
    batch["next", "done"] = (torch.arange(steps) == steps - 1).expand(rows, -1).unsqueeze(-1)
    batch["stream"] = torch.randint(2**62, (rows, 1, 1)).expand(rows, steps, 1)
    return batch


if __name__ == "__main__":
    main()
