"""What it costs to open and to sample data sets of 300 thousand, 3 million and 30 million rows on disk.

Run it with ``python tests/benchmarks/bench_large_store.py``; the largest needs 3 GB of disk and as much memory for the
page cache, and ``--rows 300000 3000000`` leaves it out. Rows and windows are those of ``bench_store.py``, in the chunks
of 1,000 rows that `datasets` writes. Each size has a process of its own, and their rounds take turns, so that other
work slows all of them. MB are of anonymous memory above that of the imports: resident pages of mapped files are not
counted, for the system takes them back whenever it needs to.
"""

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from bench_store import BATCH, TASK, WINDOW, per_second
from torchrl.objectives import SoftUpdate

from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.objectives import MouseDQNLoss

ROWS = (300_000, 3_000_000, 30_000_000)
PIECE = 249_900  # rows written at a time; the last chunk of each piece is shorter, as in any large data set
BYTES_PER_ROW = 100  # on disk, rounded up
ROUNDS = 20
FEATURES = datasets.Features(
    {
        **dict.fromkeys(("action", "done", "episode_step", "task"), datasets.Value("int64")),
        "reward": datasets.Value("float32"),
        **dict.fromkeys(("observation", "metadata_q_star"), datasets.List(datasets.Value("float32"))),
    }
)

calls: dict[str, Callable] = {}  # in a size's own process, what `sample` times


def anonymous_memory() -> float:
    """MB that this process holds, mapped files aside."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


@contextmanager
def watch_memory() -> Iterator[dict[str, float]]:
    """Measures the MB above those at the beginning: the ``peak``, and what is ``kept`` at the end."""
    begin, over, used = anonymous_memory(), threading.Event(), {"peak": 0.0}

    def watch():
        while not over.wait(0.01):
            used["peak"] = max(used["peak"], anonymous_memory() - begin)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield used
    finally:
        over.set()
        thread.join()
        used["kept"] = anonymous_memory() - begin
        used["peak"] = max(used.values())


def lists(rng: np.random.Generator, rows: int, width: int) -> pa.Array:
    values = rng.standard_normal(rows * width, dtype=np.float32)
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * width, values)


def write(folder: Path, rows: int) -> dict[str, float]:
    """Writes one data set after the other, so that memory does not grow with the rows; :func:`load` joins them."""
    datasets.disable_progress_bars()
    rng, begin = np.random.default_rng(0), time.perf_counter()
    with watch_memory() as used:
        for low in range(0, rows, PIECE):
            count = min(PIECE, rows - low)
            columns = {
                "action": rng.integers(0, 4, count),
                "reward": rng.standard_normal(count, dtype=np.float32),
                "done": rng.integers(0, 3, count),
                "episode_step": rng.integers(0, 100, count),
                "observation": lists(rng, count, 8),
                "metadata_q_star": lists(rng, count, 4),
                "task": np.arange(low, low + count) // TASK,
            }
            table = pa.table({name: columns[name] for name in FEATURES}, schema=FEATURES.arrow_schema)
            piece = datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=FEATURES))
            piece.save_to_disk(folder / f"{low:010}")
    return {"to write, s": time.perf_counter() - begin, "peak of writing, MB": used["peak"]}


def load(folder: Path) -> datasets.Dataset:
    return datasets.concatenate_datasets([datasets.load_from_disk(piece) for piece in sorted(folder.iterdir())])


def open_store(folder: Path) -> dict[str, float]:
    """Opens a data set and prepares what :func:`sample` calls."""
    torch.set_num_threads(1)
    for file in folder.glob("*/*.arrow"):  # brings it into the page cache
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
    with watch_memory() as used:
        begin, worked = time.perf_counter(), time.process_time()
        dataset = load(folder)
        loaded = time.perf_counter()
        store = DatasetStore(max_action_dim=4, max_obs_continuous_dim=8).from_dataset(dataset)
        end, worked = time.perf_counter(), time.process_time() - worked
    # Places near each other tell what does not come from memory's caches.
    for name, rows in (("anywhere", len(store)), ("in 300,000 rows", min(ROWS))):
        places = torch.randint(rows - WINDOW, (1000, BATCH, 1)) + torch.arange(WINDOW)
        calls[f"store.get, {name}, ms"] = lambda places=places: store.get(places[torch.randint(len(places), ())])
    for sampling in ("random", "batch"):
        rb = replay_buffer(store, window=WINDOW, batch_size=BATCH, sampling=sampling, seed=0)
        calls[f"rb.sample, {sampling}, ms"] = rb.sample
    return {
        "chunks": dataset.data.table.column("action").num_chunks,
        "load_from_disk, s": loaded - begin,
        "from_dataset, s": end - loaded,
        "to open, s": end - begin,
        "to open, s of work": worked,
        "peak of opening, MB": used["peak"],
        "kept, MB": used["kept"],
    }


def sample() -> dict[str, float]:
    """Times each call for one round."""
    with watch_memory() as used:
        rates = per_second(calls, rounds=1)
    return {**{name: 1000 / rate for name, rate in rates.items()}, "peak of sampling, MB": used["peak"]}


def consume(folder: Path) -> dict[str, float]:
    """Compares batches with the training step that they are for."""
    torch.set_num_threads(1)
    sizes = {"max_num_actions": 4, "max_num_obs_continuous": 8, "max_num_time_steps": 100}
    model = MouseModel(MouseConfig(embedding_kwargs=sizes, dqn_head_kwargs={}))
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk)
    optimizer, targets = torch.optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.01)
    store = DatasetStore(max_action_dim=4, max_obs_continuous_dim=8, keys=loss.in_keys).from_dataset(load(folder))
    rb = replay_buffer(store, window=WINDOW, batch_size=BATCH, seed=0, prefetch=2)
    batch = rb.sample()

    def step():
        optimizer.zero_grad()
        out = loss(batch)
        sum(value for key, value in out.items() if key.startswith("loss")).backward()
        optimizer.step()
        targets.step()

    rates = per_second({"batches": rb.sample, "steps": step}, seconds=0.5)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(20):
        asked = time.perf_counter()
        batch = rb.sample()
        waited += time.perf_counter() - asked
        step()
    return {**rates, "waited": waited / (time.perf_counter() - begin)}


def print_table(results: dict[int, dict[str, float]]) -> None:
    base = next(iter(results.values()))
    print(f"{'rows':<32}" + "".join(f"{rows:>13,}{'':8}" for rows in results))
    for name in base:
        cells = (f"{one[name]:>13,.{0 if one[name] >= 100 else 2}f}" for one in results.values())
        ratios = (f"{one[name] / base[name]:>7.2f}x" if name.endswith(", ms") else " " * 8 for one in results.values())
        print(f"{name:<32}" + "".join(f"{cell}{ratio}" for cell, ratio in zip(cells, ratios, strict=True)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=ROWS, help="numbers of rows")
    sizes = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        needed, free = sum(sizes) * BYTES_PER_ROW, shutil.disk_usage(folder).free
        if free < 1.2 * needed:
            parser.error(f"{folder} must have {1.2 * needed / 1e9:.1f} GB free, got {free / 1e9:.1f} GB. Use TMPDIR.")
        folders = {rows: Path(folder) / str(rows) for rows in sizes}
        workers = {rows: ProcessPoolExecutor(1, mp_context=get_context("spawn")) for rows in sizes}
        results: dict[int, dict[str, float]] = {}
        for rows, path in folders.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
                results[rows] = writer.submit(write, path, rows).result()
        for rows, path in folders.items():
            results[rows] |= workers[rows].submit(open_store, path).result()
        for _ in range(ROUNDS):
            for rows, worker in workers.items():
                for name, value in worker.submit(sample).result().items():
                    better = max if name.endswith("MB") else min
                    results[rows][name] = better(value, results[rows].get(name, value))
        for worker in workers.values():
            worker.shutdown()
        print_table(results)
        rates = consume(folders[sizes[0]])
        print(
            f"a training step of {BATCH} x {WINDOW}: {1000 / rates['steps']:.0f} ms; rb.sample, prefetch=2: "
            f"{1000 / rates['batches']:.2f} ms, {rates['batches'] / rates['steps']:.0f}x as fast; a loop of both waits "
            f"{rates['waited']:.1%} of its time for batches"
        )


if __name__ == "__main__":
    main()
