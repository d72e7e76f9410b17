"""The example that learns by playing: it runs, and a killed run goes on where it was."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.modules import EGreedyModule
from torchrl.objectives import SoftUpdate

from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.envs import DarkRoomEnv, DecisionMask, TaskEnv
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.recipes import online_trainer, run

PROGRAM = Path(__file__).parents[1] / "examples/online_training.py"
ROWS, TASK = 4, 9  # two episodes of four steps, and a step from the first one's terminal frame


class Training:
    """An online trainer on a small Dark Room, and its parts."""

    def __init__(self, model, directory, *, frames=3 * ROWS * TASK, postproc=None, **options):
        room = DarkRoomEnv(range(9), batch_size=ROWS, size=3, max_steps=4, terminate_on_goal=False, seed=0)
        env = TaskEnv(room, episodes_per_task=2)
        self.explore = EGreedyModule(env.action_spec, eps_init=0.5, eps_end=0.1, annealing_num_steps=1000)
        self.policy = TensorDictSequential(model.actor(env.action_spec_unbatched, head="dqn"), self.explore)
        self.collector = Collector(env, self.policy, frames_per_batch=ROWS * TASK, total_frames=-1, postproc=postproc)
        self.loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk)
        self.store = DatasetStore(max_action_dim=5, max_obs_continuous_dim=2, max_obs_discrete_dim=9)
        self.model = model
        self.evaluations = []
        self.trainer = online_trainer(
            self.loss,
            self.collector,
            self.policy,
            replay_buffer(self.store, window=6, batch_size=8),
            torch.optim.Adam(self.loss.parameters(), lr=1e-2),
            total_frames=frames,
            directory=directory,
            **{
                "updates_per_batch": 2,
                "target_updaters": (SoftUpdate(self.loss, tau=0.1),),
                "explore": self.explore,
                "evaluate": self.evaluate,
                "evaluation_interval": 2 * ROWS * TASK,
                "checkpoint_interval": ROWS * TASK,
                "progress_bar": False,
                **options,
            },
        )

    def evaluate(self):
        self.evaluations.append(self.trainer.collected_frames)
        return {"success": 1.0}


def test_plays_stores_learns_and_tests_in_turns(make_model, tmp_path):
    training = Training(make_model(), tmp_path)
    before = {name: weight.clone() for name, weight in training.loss.named_parameters()}
    target = training.loss.target_head_params.clone()
    assert run(training.trainer)
    assert len(training.store) == 3 * ROWS * (TASK + 1)
    changed = {name for name, weight in training.loss.named_parameters() if (weight != before[name]).any()}
    assert changed == {name for name in before if "embed_tokens" not in name}
    assert (training.loss.target_head_params != target).any()
    assert training.explore.eps.item() == pytest.approx(0.5 - 0.4 * 3 * ROWS * TASK / 1000, abs=1e-5)
    assert training.evaluations == [2 * ROWS * TASK]
    told = 3 * 2 + 4  # by every update, and with the weights at the beginning and after each batch
    assert int(training.model.trunk.weight_version) == told
    assert training.trainer._log_dict["success"] == [1.0]


def test_masked_steps_are_not_counted(make_model, tmp_path):
    frames = 3 * ROWS * (TASK - 1)  # without the steps from terminal frames
    training = Training(
        make_model(), tmp_path, frames=frames, postproc=DecisionMask(), evaluation_interval=2 * frames // 3
    )
    run(training.trainer)
    assert training.evaluations == [2 * frames // 3]
    assert training.explore.eps.item() == pytest.approx(0.5 - 0.4 * frames / 1000, abs=1e-5)


def test_checkpoints_are_as_far_apart_as_asked(make_model, tmp_path):
    training = Training(make_model(), tmp_path, frames=4 * ROWS * TASK)
    run(training.trainer)
    kept = [int(path.name.rpartition("-")[2]) for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(kept) == [3 * ROWS * TASK, 4 * ROWS * TASK]  # The newest two are kept.


def test_a_stopped_run_goes_on(make_model, tmp_path):
    first = Training(make_model(), tmp_path, frames=2 * ROWS * TASK)
    run(first.trainer)
    second = Training(make_model(), tmp_path)
    assert run(second.trainer)
    assert second.trainer.collected_frames == 3 * ROWS * TASK
    assert len(second.store) == 3 * ROWS * (TASK + 1), "what was played before is there"
    assert second.explore.eps.item() == pytest.approx(0.5 - 0.4 * 3 * ROWS * TASK / 1000, abs=1e-5)
    assert not run(Training(make_model(), tmp_path).trainer), "nothing is left to do"


@pytest.mark.parametrize("name", ["total_frames", "updates_per_batch", "evaluation_interval", "checkpoint_interval"])
def test_numbers_below_one(name, make_model, tmp_path):
    options = {"frames" if name == "total_frames" else name: 0}
    with pytest.raises(ValueError, match=f"online_trainer: {name} must be at least 1, got 0"):
        Training(make_model(), tmp_path, **options)


def test_a_remote_learner_needs_the_actor(make_model, tmp_path):
    with pytest.raises(ValueError, match="loss must know its actor where learner_backend is 'ray', got MouseDQNLoss"):
        Training(make_model(), tmp_path, learner_backend="ray")


@pytest.fixture
def example(monkeypatch):
    """The program as a module, with shorter tasks; a function that calls it."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import online_training

    for name, value in {"ROWS": 4, "EPISODES": 2, "FRAMES_PER_BATCH": 400, "UPDATES_PER_BATCH": 2}.items():
        monkeypatch.setattr(online_training, name, value)

    def call(output, *arguments):
        options = ["--frames", "800", "--evaluate-every", "400", "--maps", "2", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["online_training.py", *options, *arguments])
        online_training.main()

    return call


def test_backbones_are_compared_in_one_figure(example, tmp_path, monkeypatch):
    beside = []
    monkeypatch.setattr("torchrl_mouse.evaluation.plot_curves", lambda *_, others, **__: beside.append(others))
    example(tmp_path / "none", "--backbone", "none")
    example(tmp_path / "gru", "--backbone", "gru", "--compare", str(tmp_path / "none"))
    config = json.loads((tmp_path / "gru/model/config.json").read_text())
    assert config["backbone_kwargs"]["kind"] == "gru"
    assert [[run.label for run in others] for others in beside] == [[], ["none"]]
    assert beside[1][0].panels["held-out maps"]["agent"].shape == (2, 2)


def test_a_remote_learner_needs_remote_players(example, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        example(tmp_path / "out", "--learner", "ray")
    assert "--learner ray needs --collector ray, got --collector direct" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def program(output, *arguments):
    command = [sys.executable, str(PROGRAM), "--smoke", "--output", str(output), *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_program_plays_in_two_processes(tmp_path):
    assert program(tmp_path, "--collector", "process", "--maps", "2").wait() == 0
    (file,) = tmp_path.glob("log/scalars/loss_dqn.csv")
    assert [int(row[0]) for row in csv.reader(file.read_text().splitlines())] == [4800, 9600]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_program_goes_on_where_it_was(tmp_path):
    output = tmp_path / "run"
    process = program(output, "--frames", "14400")
    while not list(output.glob("checkpoints/*/manifest.json")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    assert not (output / "results.json").exists()
    assert program(output, "--frames", "14400").wait() == 0
    results = json.loads((output / "results.json").read_text())
    assert {"agent", "context cleared"} == set(results)
    assert (output / "model/model.safetensors").exists()
    assert (output / "curves.png").exists()
    (file,) = output.glob("log/scalars/last_10_episodes.csv")
    frames = [int(row[0]) for row in csv.reader(file.read_text().splitlines())]
    assert frames[-1] == 14400
    assert frames[0] < frames[-1]
    assert program(output, "--frames", "9600").wait() == 1, "other options are another run"
