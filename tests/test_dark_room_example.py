"""The main example runs end to end, resumes, and learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk

from torchrl_mouse.envs import split_goals
from torchrl_mouse.evaluation import Run

ROOT = Path(__file__).parents[1]


def run_example(output: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples/dark_room.py"), "--output", str(output), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output = tmp_path_factory.mktemp("dark_room")
    printed = run_example(output, "--smoke", "--seeds", "3")
    return output, printed


def test_smoke_writes_results(smoke):
    output, printed = smoke
    results = json.loads((output / "results.json").read_text())
    for group, tasks in (("held-out goals", 11), ("training goals", 70)):
        agents = results["seeds"]["3"][group]
        assert set(agents) == {"dqn", "dqn, context cleared", "sp", "sp, context cleared", "oracle", "random"}
        assert all(agent["num_tasks"] == tasks and len(agent["curve"]) == 10 for agent in agents.values())
        assert agents["oracle"]["nauc"] == 1.0
        assert 0 < results["mean"][group]["random"]["nauc"] < 0.4
    assert "held-out goals" in printed
    for name in ("curves.png", "model/config.json", "model/model.safetensors"):
        assert (output / "seed-3" / name).stat().st_size > 0


def test_histories_are_of_the_training_goals(smoke):
    rows = load_from_disk(smoke[0] / "DR9-70-1-seed-3-20-episodes").with_format("torch")[:]
    assert len(rows["task"].unique()) == 70
    goals = rows["observation_discrete"][rows["reward"] > 0].unique().tolist()
    assert len(goals) > 35
    assert set(goals) <= set(split_goals(70, seed=3)[0].tolist())


def test_second_run_reuses_data_and_checkpoint(smoke):
    output, _ = smoke
    model = output / "seed-3/model/model.safetensors"
    before = model.read_bytes()
    kept = [output / "DR9-70-1-seed-3-20-episodes", *(output / "seed-3/checkpoints").iterdir()]
    kept += (output / "seed-3/log").rglob("loss_*.csv")
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) >= 5
    run_example(output, "--smoke", "--seeds", "3")
    assert [path.stat().st_mtime_ns for path in kept] == stamps  # No data made, no update run.
    assert model.read_bytes() == before


def test_another_backbone_beside_it(smoke, tmp_path):
    output, _ = smoke
    options = ["--smoke", "--seeds", "3", "--heads", "dqn", "--backbone", "none"]
    run_example(tmp_path, *options)
    alone = (tmp_path / "seed-3/curves.png").read_bytes()
    run_example(tmp_path, *options, "--compare", str(output))  # Nothing is trained again.
    assert (tmp_path / "seed-3/curves.png").read_bytes() != alone
    runs = {run.label: run.panels for run in (Run.load(folder / "seed-3") for folder in (output, tmp_path))}
    assert {label: {agent for curves in panels.values() for agent in curves} for label, panels in runs.items()} == {
        "llama": {"dqn", "sp"},
        "none": {"dqn"},
    }
    held_out = runs["none"]["held-out goals"]["dqn"]
    assert held_out.shape == (11, 10)
    assert not torch.equal(held_out, runs["llama"]["held-out goals"]["dqn"])


def test_other_options_do_not_resume(smoke):
    output, _ = smoke
    command = [sys.executable, str(ROOT / "examples/dark_room.py"), "--output", str(output)]
    command += ["--smoke", "--seeds", "3", "--heads", "sp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "must have been begun with the same options, got heads ['sp'] instead of ['dqn', 'sp']" in done.stderr
    assert "--restart" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--heads", "dqm"], "invalid choice: 'dqm'"), (["--episodes", "0"], "--episodes: must be at least 1, got 0")],
)
def test_bad_options_are_refused(tmp_path, arguments, message):
    command = [sys.executable, str(ROOT / "examples/dark_room.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_improves_in_unseen_tasks(tmp_path):
    """A shorter run than the default: far above random and above the control, on goals never trained on."""
    run_example(tmp_path, "--updates", "600", "--heads", "dqn", "--episodes", "50")
    agents = json.loads((tmp_path / "results.json").read_text())["mean"]["held-out goals"]
    assert agents["dqn"]["last_10_episodes"] > 0.7
    assert agents["dqn"]["last_10_episodes"] > agents["dqn"]["first_episode"] + 0.2
    assert agents["dqn"]["nauc"] > 2 * agents["dqn, context cleared"]["nauc"]
