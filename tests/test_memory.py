"""The cache costs a collector its own size and no more, however long a task is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MIB = 2**20
ROWS, FRAMES = 4, 256
CACHE_PER_ROW = 64 * MIB
TOKENS_PER_STEP = 32

PROGRAM = """
import json
from functools import partial
from pathlib import Path
import torch
from torchrl.collectors import Collector
from torchrl.envs import SerialEnv
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.models import MouseConfig, MouseModel

def make_env(seed):
    return TaskEnv(DarkRoomEnv(range(9), batch_size=(), size=3, seed=seed), steps_per_task={steps})

torch.set_num_threads(1)
torch.manual_seed(0)
env = SerialEnv({rows}, [partial(make_env, seed) for seed in range({rows})])
embedding = {{"max_num_actions": 5, "max_num_obs_continuous": 2, "num_compute_tokens": {tokens} - 1}}
backbone = {{"num_layers": 4, "num_heads": 4, "head_dim": 256, "max_position_embeddings": {steps} * {tokens}}}
config = {{"embedding_kwargs": embedding, "backbone_kwargs": backbone, "dqn_head_kwargs": {{}}}}
model = MouseModel(MouseConfig(16, window={window}, **config))
collector = Collector(env, model.actor(env.action_spec_unbatched), frames_per_batch={frames}, total_frames=2 * {frames})
sizes, shapes = [], set()
for batch in collector:
    sizes.append(batch.bytes())
    shapes.update(tuple(leaf.shape[2:]) for leaf in batch.values(True, True))
collector.shutdown()
pool = model.trunk._cache._key_values
# the peak of this program alone: the kernel hands ``ru_maxrss`` down from the process that started it
status = Path("/proc/self/status").read_text()
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
result = {{
    "peak": peak,
    "batches": sizes,
    "dims": max(map(len, shapes)),
    "length": model.trunk._cache.length.tolist(),
    "cache": sum(part.numel() * part.element_size() for part in pool.pools),
    "touched": all(bool((part[:, :, -1] != 0).all()) for part in pool.key),
}}
print(json.dumps(result))
"""


LONG_TASK = """
import json
from pathlib import Path
import torch
from torchrl.collectors import Collector
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.models import MouseConfig, MouseModel

torch.set_num_threads(1)
torch.manual_seed(0)
env = TaskEnv(DarkRoomEnv(range(9), batch_size=2, size=3, seed=0), steps_per_task=10_001)
embedding = {"max_num_actions": 5, "max_num_obs_continuous": 2}
backbone = {"num_layers": 1, "num_heads": 4, "head_dim": 64}
model = MouseModel(
    MouseConfig(16, window=256, embedding_kwargs=embedding, backbone_kwargs=backbone, dqn_head_kwargs={})
)
collector = Collector(env, model.actor(env.action_spec_unbatched), frames_per_batch=2 * 500, total_frames=2 * 10_000)
resident, starts = [], 0
for batch in collector:
    starts += int(batch["is_init"].sum())
    # the first number is the program's size, the second what is in memory, in pages of 4 KiB
    resident.append(4096 * int(Path("/proc/self/statm").read_text().split()[1]))
pools = model.trunk._cache._key_values.pools
bytes_of_a_step = sum(pool.nbytes for pool in pools) // 256
print(json.dumps([resident, starts, bytes_of_a_step]))
collector.shutdown()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a process's memory is read from Linux's /proc")
@pytest.mark.timeout(300)
def test_a_task_of_10000_steps_takes_the_memory_of_2000():
    resident, starts, step = run(LONG_TASK)
    assert len(resident) == 20
    assert starts == 2, "there must be one task in each row"
    assert 8_000 * step > 30 * MIB, "the keys and values of all steps must be seen"
    assert max(resident[3:]) - resident[3] < 4 * MIB


def collect(window: int) -> dict:
    return run(PROGRAM.format(rows=ROWS, frames=FRAMES, steps=FRAMES // ROWS, tokens=TOKENS_PER_STEP, window=window))


def run(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.timeout(300)
def test_cache_costs_a_collector_its_own_size():
    """Against the same program with a window of two steps: same model, environment, steps and entries."""
    steps = FRAMES // ROWS
    big, small = collect(window=steps), collect(window=2)
    assert big["cache"] == ROWS * CACHE_PER_ROW
    assert small["cache"] == big["cache"] * 2 // steps
    # zeros are not backed by memory until they are written: every context has been filled to its end
    assert big["length"] == [steps] * ROWS
    assert big["touched"]
    extra = big["peak"] - small["peak"]
    assert 0.75 * (big["cache"] - small["cache"]) < extra <= 1.25 * big["cache"]
    # what travels is the steps, never the contexts
    assert big["batches"] == small["batches"]
    assert max(big["batches"]) < FRAMES * 1000
    assert big["dims"] <= 1
