"""Two processes that share each batch learn what one learns from the whole of it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from torchrl.objectives import SoftUpdate

from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.recipes import warmup_cosine

EXAMPLES = Path(__file__).parents[1] / "examples"
WINDOW, BATCH_SIZE, UPDATES, SEED = 8, 6, 12, 3
ACTIONS, CELLS = 3, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Episodes of one to nine steps: the shares of a batch hold different numbers of steps that count."""
    generator = torch.Generator().manual_seed(0)
    rows = {"action": [], "reward": [], "done": [], "episode_step": [], "observation_discrete": [], "task": []}
    for episode in range(40):
        length = 1 + int(torch.randint(9, (), generator=generator))
        for step in range(length + 1):
            rows["action"].append(int(torch.randint(ACTIONS, (), generator=generator)) if step else 0)
            rows["reward"].append(float(torch.randn((), generator=generator)) if step else 0.0)
            rows["done"].append(int(step == length))
            rows["episode_step"].append(step)
            rows["observation_discrete"].append(int(torch.randint(CELLS, (), generator=generator)))
            rows["task"].append(episode // 2)
    folder = tmp_path_factory.mktemp("data") / "dataset"
    Dataset.from_dict(rows).save_to_disk(folder)
    return folder


def launch(data, output, processes, *arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    program = [EXAMPLES / "data_parallel.py", "--data", data, "--output", output, "--window", WINDOW, "--seed", SEED]
    program += ["--batch-size", BATCH_SIZE, "--updates", UPDATES, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(part) for part in torchrun + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)


@pytest.fixture
def offline_training(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import offline_training

    return offline_training


def by_one_process(example, data):
    """The same training written down once more, with nothing of several processes; returns losses and the model."""
    dataset = load_from_disk(data)
    sizes = example.sizes_of(dataset)
    store = DatasetStore(max_action_dim=ACTIONS, max_obs_discrete_dim=CELLS).from_dataset(dataset, task="task")
    torch.manual_seed(SEED)
    model = example.build_model(sizes, ["dqn"], WINDOW, "llama")
    options = {"gamma": 0.9, "gamma_terminal": 0.9, "reward_scale": 20.0, "cql_weight": 0.5, "cql_scale_q": False}
    loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, reduction="sum", **options)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule, targets = warmup_cosine(optimizer, UPDATES), SoftUpdate(loss, tau=0.01)
    buffer = replay_buffer(store, window=WINDOW, batch_size=BATCH_SIZE, start_share=0.3, seed=SEED)
    curve = []
    for _ in range(UPDATES):
        losses = loss(buffer.sample())
        mean = (losses["loss_dqn"] + losses["loss_cql"]) / (BATCH_SIZE * WINDOW)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        targets.step()
        curve.append(mean.item())
    model.set_target("dqn", loss.target_head_params)
    return torch.tensor(curve), model


def test_two_processes_learn_what_one_does(data, tmp_path, offline_training):
    done = launch(data, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "log").rglob("loss.csv")
    curve = torch.tensor([float(row[1]) for row in csv.reader(file.read_text().splitlines())])
    expected, model = by_one_process(offline_training, data)
    assert len(curve) == UPDATES
    assert expected.diff().abs().min() > 1e-3, "every update learns from another batch"
    torch.testing.assert_close(curve, expected, atol=0, rtol=1e-5)
    weights = load_file(tmp_path / "model/model.safetensors")
    for name, weight in model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0, msg=name)
    assert len(weights) > 20
    assert done.stdout.count("Written") == 1, "one process writes"


@pytest.mark.parametrize(
    ("world_size", "message"),
    [(None, "must be started by torchrun"), ("4", "--batch-size must be a multiple of the 4 processes, got 6")],
)
def test_bad_calls(world_size, message, monkeypatch, capsys, offline_training):
    import data_parallel

    monkeypatch.setattr(sys, "argv", ["data_parallel.py", "--batch-size", "6"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit, match="2"):
        data_parallel.main()
    assert message in capsys.readouterr().err


def test_a_folder_with_a_run_is_refused(tmp_path, monkeypatch, capsys, offline_training):
    import data_parallel

    (tmp_path / "log").mkdir()
    monkeypatch.setattr(sys, "argv", ["data_parallel.py", "--output", str(tmp_path)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        data_parallel.main()
    assert "holds a run already, and none is gone on with: give another --output" in capsys.readouterr().err
