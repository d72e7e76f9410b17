"""The examples that make a data set and learn from one run end to end, resume, and learn."""

import argparse
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from hub import hub_fixture  # noqa: F401

from torchrl_mouse.evaluation import Run

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = ("create_dataset", "offline_training", "online_training", "inference")


def run_example(name: str, *arguments: object, timeout: int = 250) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def programs():
    """The programs as modules: to run them in this process spares the seconds of a start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        modules = {name: importlib.import_module(name) for name in PROGRAMS}
        patch.setattr(modules["offline_training"], "MAPS", 3)  # An agent that has not learned plays long episodes.
        yield modules


@pytest.fixture(scope="module")
def call(programs):
    """Runs a program; returns what it printed, or what it said where it is to fail."""

    def run(name: str, *arguments: object, fails: bool = False) -> str:
        out, error = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
            patch.setattr(sys, "argv", [name, *map(str, arguments)])
            if not fails:
                programs[name.removesuffix(".py")].main()
                return out.getvalue()
            with pytest.raises(SystemExit) as caught:
                programs[name.removesuffix(".py")].main()
        return f"{caught.value.code}{error.getvalue()}"

    return run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lakes") / "dataset"
    printed = run_example("create_dataset.py", "--episodes", 120, "--episodes-per-task", 4, "--output", folder)
    return folder, printed


@pytest.fixture(scope="module")
def trained(call, dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("training")
    printed = call("offline_training.py", *smoke(dataset[0], output))
    return output, printed


def smoke(data: Path, output: Path) -> list[object]:
    sizes = ["--updates", 10, "--batch-size", 2, "--window", 16, "--play-episodes", 2]
    return ["--data", data, "--output", output, *sizes]


def test_dataset_holds_whole_episodes_of_tasks(dataset):
    folder, printed = dataset
    rows = {name: np.array(column) for name, column in load_from_disk(folder).to_dict().items()}
    done, first = rows["done"], rows["episode_step"] == 0
    assert (done > 0).sum() == first.sum() == 120
    np.testing.assert_array_equal(np.append(done[:-1] > 0, True), np.append(first[1:], True))
    assert np.bincount(rows["task"][first]).tolist() == [4] * 30
    np.testing.assert_array_equal(rows["reward"], (rows["observation_discrete"] == 15) & (done == 1))
    for name in ("action", "reward", "done", "observation_discrete"):
        assert not rows[name][first].any()
    wins = int(rows["reward"].sum())
    assert 0 < wins < 60
    assert f"DatasetStore(steps={len(done)}, tasks=30): 120 episodes, {wins} of them reached the goal" in printed
    assert f"--data {folder}" in printed


def test_recorded_moves_follow_the_recorded_actions(dataset):
    rows = {name: np.array(column) for name, column in load_from_disk(dataset[0]).to_dict().items()}
    cell, moved = rows["observation_discrete"], rows["episode_step"][1:] > 0
    row, column = np.divmod(cell, 4)
    step = np.array([[0, -1], [1, 0], [0, 1], [-1, 0]])[rows["action"]]
    there = np.clip(row[:-1] + step[1:, 0], 0, 3) * 4 + np.clip(column[:-1] + step[1:, 1], 0, 3)
    np.testing.assert_array_equal(cell[1:][moved], there[moved])
    assert np.bincount(rows["action"][1:][moved], minlength=4).min() > moved.sum() / 5


def test_teacher_values_are_of_the_cell_that_is_seen(dataset):
    rows = {name: np.array(column) for name, column in load_from_disk(dataset[0]).to_dict().items()}
    q_star, reward, over = rows["metadata_q_star"], rows["reward"], rows["done"] == 1
    here = q_star[:-1][np.arange(len(reward) - 1), rows["action"][1:]]
    moved = rows["episode_step"][1:] > 0
    backup = reward[1:] + 0.99 * np.where(over[1:], 0, q_star[1:].max(1))
    np.testing.assert_allclose(here[moved], backup[moved], atol=1e-5)
    assert (q_star.max(1)[rows["episode_step"] == 0] > 0.8).all()  # Every map can be solved.


def test_an_episode_that_never_ends_is_cut(programs):
    class Left:
        def integers(self, _: int) -> int:
            return 0

    options = argparse.Namespace(size=4, slippery=False)
    lake = programs["create_dataset"].new_lake(options, np.random.default_rng(0))
    frames = list(programs["create_dataset"].play(lake, 2, Left()))
    assert frames == [(0, 0.0, 2 * (time == 100), time, 0) for _ in range(2) for time in range(101)]


def test_same_seed_same_dataset_and_force_replaces(call, dataset, tmp_path):
    folder = tmp_path / "again"
    arguments = ["--episodes", 120, "--episodes-per-task", 4, "--output", folder]
    call("create_dataset.py", *arguments)
    assert load_from_disk(folder).to_dict() == load_from_disk(dataset[0]).to_dict()
    assert "is there already: give --force" in call("create_dataset.py", *arguments, fails=True)
    call("create_dataset.py", *arguments, "--force", "--seed", 1, "--slippery", "--size", 3)
    replaced = load_from_disk(folder)
    assert max(replaced["observation_discrete"]) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_force_replaces_nothing_but_datasets(call, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    error = call("create_dataset.py", "--force", "--output", tmp_path, fails=True)
    assert f"--force replaces data sets only, and {tmp_path} is none" in error
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--episodes", "0"], "--episodes: must be at least 1, got 0"),
        (["--episodes", "many"], "--episodes: invalid whole_number value: 'many'"),
        (["--episodes", "30"], "--episodes must be a multiple of --episodes-per-task 20, got 30"),
        (["--size", "2"], "--size: must be at least 3, got 2"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
    ],
)
def test_bad_options_of_create_dataset(call, tmp_path, arguments, message):
    assert message in call("create_dataset.py", "--output", tmp_path / "data", *arguments, fails=True)


def test_recorded_and_played_maps_have_none_in_common(programs):
    create, offline = programs["create_dataset"], programs["offline_training"]
    options = argparse.Namespace(size=4, slippery=False)
    rng = np.random.default_rng(0)
    recorded = {create.new_lake(options, rng).unwrapped.desc.tobytes() for _ in range(200)}
    lake, played = offline.HeldOutLake(4, seed=0), set()
    assert not create.is_held_out(lake)
    lake.sample_task(torch.tensor(False))  # It stays what it is.
    for _ in range(50):
        lake.sample_task(torch.tensor(True))
        played.add(lake.unwrapped.desc.tobytes())
        before = lake.unwrapped
        lake.sample_task(torch.tensor(False))
        assert lake.unwrapped is before
    assert len(recorded) > 100
    assert len(played) > 25
    assert not recorded & played
    training, trained_on = programs["online_training"].TrainingLake(4, seed=0), set()
    for _ in range(200):
        training.sample_task(torch.tensor(True))
        trained_on.add(training.unwrapped.desc.tobytes())
    assert len(trained_on) > 100
    assert not trained_on & played


def test_training_writes_results(trained):
    output, printed = trained
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"dqn", "dqn, context cleared", "sp", "sp, context cleared"}
    for result in results.values():
        assert result["num_tasks"] == 3
        assert len(result["curve"]) == 2
        assert 0 <= result["nauc"] <= 1
    for name in ("curves.png", "model/config.json", "model/model.safetensors"):
        assert (output / name).stat().st_size > 0
    config = json.loads((output / "model/config.json").read_text())
    assert config["embedding_kwargs"]["max_num_time_steps"] == 101  # Longer episodes than there are in the data.
    assert "actions 4, time_steps" in printed
    assert "held-out maps" in printed


def test_a_trained_agent_plays(call, trained, tmp_path):
    options = ["--model", trained[0] / "model", "--tasks", 3, "--episodes", 2, "--seed", 1]
    for name, more in (("whole", []), ("cleared", ["--clear"])):
        printed = call("inference.py", *options, "--output", tmp_path / name, *more)
        assert printed.count("of 3 maps solved") == 2
        assert np.shape(json.loads((tmp_path / name / "returns.json").read_text())) == (3, 2)
        assert (tmp_path / name / "curves.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--model", "nosuch"), "nosuch"),
        (("--head", "sv"), "sv"),
        (("--temperature", "-1"), "temperature must"),
        (("--size", "5"), "The model must know maps of 25 cells, got one that knows 16. Change --size."),
        (("--size", "1"), "--size: must be at least 2, got 1"),
        (("--seed", "-5"), "--seed: must be at least 0, got -5"),
    ],
)
def test_bad_options_of_inference(call, trained, tmp_path, option, message):
    assert message in call(
        "inference.py", "--model", trained[0] / "model", "--output", tmp_path / "run", *option, fails=True
    )
    assert not (tmp_path / "run").exists()


def test_training_goes_on_where_it_stopped(call, dataset, trained, tmp_path):
    output, _ = trained
    kept = [*(output / "checkpoints").iterdir(), *(output / "log").rglob("loss_*.csv")]
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) >= 4
    model = (output / "model/model.safetensors").read_bytes()
    played = {name: (output / name).read_bytes() for name in ("results.json",)}
    call("offline_training.py", *smoke(dataset[0], output))
    assert [path.stat().st_mtime_ns for path in kept] == stamps  # No update run.
    assert (output / "model/model.safetensors").read_bytes() == model
    assert {name: (output / name).read_bytes() for name in played} == played
    error = call("offline_training.py", *smoke(dataset[0], output), "--batch-size", 3, fails=True)
    assert "must have been begun with the same options, got batch_size 3 instead of 2" in error
    assert "--restart" in error
    call("offline_training.py", *smoke(dataset[0], output), "--batch-size", 3, "--restart", "--play-episodes", 0)
    assert not (output / "results.json").exists()


def test_backbones_are_compared_in_one_figure(call, dataset, tmp_path, monkeypatch):
    beside = []
    monkeypatch.setattr("torchrl_mouse.evaluation.plot_curves", lambda *_, others, **__: beside.append(others))
    kinds = {}
    for backbone in ("none", "gru"):
        compare = ["--compare", tmp_path / "none"] if backbone == "gru" else []
        call("offline_training.py", *smoke(dataset[0], tmp_path / backbone), "--backbone", backbone, *compare)
        config = json.loads((tmp_path / backbone / "model/config.json").read_text())
        kinds[backbone] = (config["backbone_kwargs"] or {}).get("kind")
        run = Run.load(tmp_path / backbone)
        assert run.label == backbone
        results = json.loads((tmp_path / backbone / "results.json").read_text())
        assert set(run.panels["held-out maps"]) == {"dqn", "sp"}
        for head, returns in run.panels["held-out maps"].items():
            torch.testing.assert_close(returns.mean(0), torch.tensor(results[head]["curve"]), atol=1e-4, rtol=0)
    assert kinds == {"none": None, "gru": "gru"}
    assert [[run.label for run in others] for others in beside] == [[], ["none"]]


def test_another_backbone_is_another_run(call, dataset, tmp_path):
    call("offline_training.py", *smoke(dataset[0], tmp_path), "--backbone", "none", "--play-episodes", 0)
    error = call("offline_training.py", *smoke(dataset[0], tmp_path), "--backbone", "gru", fails=True)
    assert "must have been begun with the same options, got backbone gru instead of none" in error


@pytest.mark.parametrize(
    ("panel", "message"),
    [
        (None, "must hold the results of a run, got no returns.safetensors in it"),
        ("held-out goals", "must hold returns on held-out maps, got held-out goals"),
    ],
)
def test_runs_that_cannot_be_compared(call, dataset, tmp_path, panel, message):
    """It is said before the training."""
    (tmp_path / "other").mkdir()
    if panel is not None:
        Run("gru", {panel: {"dqn": torch.zeros(2, 3)}}).save(tmp_path / "other")
    options = [*smoke(dataset[0], tmp_path / "out"), "--compare", tmp_path / "other"]
    error = call("offline_training.py", *options, fails=True)
    assert message in error
    assert "--compare" in error
    assert not (tmp_path / "out").exists()


def test_data_go_to_the_hub_and_come_from_there(hub, call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)  # as `hf auth login` leaves it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    arguments = ["--episodes", 8, "--episodes-per-task", 4, "--output", tmp_path / "data", "--push", "user/lake"]
    printed = call("create_dataset.py", *arguments, "--private")
    assert "Uploaded: http" in printed
    assert any(path.endswith(".parquet") for path in hub.files("user/lake", "dataset"))
    printed = call("offline_training.py", *smoke("user/lake", tmp_path / "out"), "--play-episodes", 0)
    assert "user/lake: DatasetStore(steps=" in printed
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_other_data_are_another_run(call, tmp_path):
    rows = {"action": [0, 2, 1, 0], "reward": [0.0, 1.0, 0.0, 0.5], "done": [0, 0, 0, 1], "episode_step": [0, 1, 2, 3]}
    data, output = tmp_path / "data", tmp_path / "out"
    Dataset.from_dict(rows).save_to_disk(data)
    call("offline_training.py", *smoke(data, output))
    shutil.rmtree(data)
    Dataset.from_dict({**rows, "reward": [0.0, 2.0, 0.0, 0.5]}).save_to_disk(data)
    error = call("offline_training.py", *smoke(data, output), fails=True)
    assert "must have been begun with the same options, got data set" in error


def test_columns_of_another_split_are_none(call, tmp_path):
    """As `push_to_hub` writes them: null in every row."""
    rows = {"action": [0, 2, 1, 0], "reward": [0.0, 1.0, 0.0, 0.5], "done": [0, 0, 0, 1], "episode_step": [0, 1, 2, 3]}
    features = {"metadata_q_star": List(Value("float32")), "observation_discrete": List(Value("int64"))}
    features |= {name: Value("float32" if name == "reward" else "int64") for name in rows}
    rows |= {"metadata_q_star": [None] * 4, "observation_discrete": [[3], [0], [1], [2]]}
    Dataset.from_dict(rows, features=Features(features)).save_to_disk(tmp_path / "data")
    call("offline_training.py", *smoke(tmp_path / "data", tmp_path / "out"))
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert not config["sp_head_kwargs"]
    assert config["embedding_kwargs"]["max_num_obs_discrete"] == 4


def test_data_with_images_only_are_refused(call, tmp_path):
    rows = {"action": [0, 1], "reward": [0.0, 1.0], "done": [0, 1], "episode_step": [0, 1]}
    Dataset.from_dict({**rows, "observation_image": [[[0, 1]], [[2, 3]]]}).save_to_disk(tmp_path / "data")
    error = call("offline_training.py", *smoke(tmp_path / "data", tmp_path / "out"), fails=True)
    assert "column 'observation_image' is not read here" in error


def test_data_without_teacher_or_lake(call, tmp_path):
    """Only the Q-value head is trained, and nothing is played."""
    rows = {"action": [0, 2, 1, 0], "reward": [0.0, 1.0, 0.0, 0.5], "done": [0, 0, 0, 1], "episode_step": [0, 1, 2, 3]}
    Dataset.from_dict({**rows, "observation": [[0.5, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]}).save_to_disk(
        tmp_path / "data"
    )
    printed = call("offline_training.py", *smoke(tmp_path / "data", tmp_path / "out"))
    assert "Nothing is played" in printed
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config["sp_head_kwargs"] is None or not config["sp_head_kwargs"]
    assert config["embedding_kwargs"]["max_num_actions"] == 3
    assert config["embedding_kwargs"]["max_num_obs_continuous"] == 2
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/folder"], "no/such/folder must be a folder with a data set, or OWNER/NAME on the Hub"),
        (["--window", "1"], "--window: must be at least 2, got 1"),
        (["--updates", "0"], "--updates: must be at least 1, got 0"),
        (["--play-episodes", "-1"], "--play-episodes: must be at least 0, got -1"),
    ],
)
def test_bad_options_of_offline_training(call, tmp_path, arguments, message):
    assert message in call("offline_training.py", "--output", tmp_path / "out", *arguments, fails=True)
    assert not (tmp_path / "out").exists()


def test_rows_that_lack_a_column(call, tmp_path):
    Dataset.from_dict({"action": [0, 1], "reward": [0.0, 1.0]}).save_to_disk(tmp_path / "data")
    error = call("offline_training.py", *smoke(tmp_path / "data", tmp_path / "out"), fails=True)
    assert "must have rows with the columns action, reward, done, episode_step, got 2 rows with action, reward" in error


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_improves_on_maps_that_are_not_in_the_data(tmp_path):
    """A shorter run than the default: both heads reach the goal twice as often as without their context."""
    run_example("create_dataset.py", "--episodes", 20000, "--output", tmp_path / "data")
    options = ["--updates", 800, "--data", tmp_path / "data", "--output", tmp_path / "out"]
    run_example("offline_training.py", *options, timeout=3000)
    agents = json.loads((tmp_path / "out/results.json").read_text())
    assert agents["sp"]["last_10_episodes"] > 0.7
    for head in ("sp", "dqn"):
        last = agents[head]["last_10_episodes"]
        assert last > 0.5
        assert last > 1.8 * agents[f"{head}, context cleared"]["last_10_episodes"]
        assert last > agents[head]["first_episode"] + 0.2
