"""Playing and learning in processes that Ray places, here on a Ray of this machine."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict.nn import TensorDictSequential
from test_weight_updates import change_weights, check
from torchrl.collectors import Collector
from torchrl.modules import EGreedyModule
from torchrl.objectives import SoftUpdate

from torchrl_mouse import schema
from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.recipes import online_trainer, run, update_weights, warmup_cosine

ray = pytest.importorskip("ray")

# Every process that Ray starts imports torch first.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets and files
    pytest.mark.filterwarnings("ignore:placement_group:DeprecationWarning"),
]

PROGRAM = Path(__file__).parents[1] / "examples/online_training.py"
ROWS, TASK = 2, 9  # rows of a worker; two episodes of four steps, and a step from the first one's terminal frame
STEPS = TASK + 4  # of a batch, which ends in the middle of a task: contexts outlive updates
FRAMES = 2 * ROWS * STEPS
UPDATES = 2


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 200 * 2**20}
    ray.init(num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": path}}, **options)
    yield
    ray.shutdown()


def make_env(seed):
    torch.manual_seed(seed)  # A worker explores with its process's generator.
    room = DarkRoomEnv(range(9), batch_size=ROWS, size=3, max_steps=4, terminate_on_goal=False, seed=seed)
    return TaskEnv(room, episodes_per_task=2)


def make_collector(policy, *, steps=STEPS, batches=10):
    frames = 2 * ROWS * steps
    return Collector(
        [partial(make_env, 1), partial(make_env, 2)],
        policy,
        backend="ray",
        sync=True,
        frames_per_batch=frames,
        total_frames=batches * frames,
        backend_options={"remote_configs": {"num_cpus": 0.5}},
    )


class Training:
    """An online trainer whose players, and perhaps learner, are Ray's."""

    def __init__(self, model, directory, *, learner, batches=3, evaluate=None):
        spec = make_env(0).action_spec_unbatched
        self.model = model
        self.explore = EGreedyModule(spec, eps_init=0.5, eps_end=0.1, annealing_num_steps=1000)
        actor = model.actor(spec)
        self.loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk, actor=actor)
        self.store = DatasetStore(max_action_dim=5, max_obs_continuous_dim=2, max_obs_discrete_dim=9)
        remote = {"service_backend": "ray", "service_backend_options": {"remote_config": {"num_cpus": 0}}}
        options = remote if learner == "ray" else {}
        self.buffer = replay_buffer(self.store, window=6, batch_size=8, seed=0, **options)
        optimizer = torch.optim.Adam(self.loss.parameters(), lr=1e-2)
        policy = TensorDictSequential(actor, self.explore)
        self.collector = make_collector(policy)
        self.trainer = online_trainer(
            self.loss,
            self.collector,
            policy,
            self.buffer,
            optimizer,
            total_frames=batches * FRAMES,
            updates_per_batch=UPDATES,
            directory=directory,
            target_updaters=(SoftUpdate(self.loss, tau=0.1),),
            scheduler=warmup_cosine(optimizer, 3 * UPDATES, warmup=2),
            explore=self.explore,
            evaluate=None if evaluate is None else partial(evaluate, self),
            evaluation_interval=FRAMES,
            checkpoint_interval=FRAMES,
            progress_bar=False,
            learner_backend=learner,
        )

    def run(self):
        """Trains; returns whether there was anything to do, and the weights."""
        trained = run(self.trainer)
        if hasattr(self.buffer, "shutdown"):
            self.buffer.shutdown()
        return trained, {name: weight.clone() for name, weight in self.loss.state_dict().items()}


def assert_same(one, other):
    assert set(one) == set(other)
    for name in set(one) - {"trunk_params.weight_version"}:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0, msg=name)


def flat(params):
    return torch.cat([weight.detach().flatten() for weight in params.values(True, True)])


def test_workers_have_contexts_and_get_weights(make_model):
    model = make_model()
    actor = model.actor(make_env(0).action_spec_unbatched, temperature=1.0)
    old, batches = copy.deepcopy(model.trunk), []
    collector = make_collector(actor, steps=4)
    try:
        update_weights(actor, collector)
        for batch in collector:
            batches.append(batch.clone())
            if len(batches) == 2:
                break
            change_weights(model)
            update_weights(actor, collector)
    finally:
        collector.shutdown()
    assert batches[0].shape == (2, ROWS, 4)
    assert len(batches[0][schema.STREAM].unique()) == 2 * ROWS
    check([old, model.trunk], batches)


def test_a_remote_learner_learns_what_a_local_one_does(make_model, tmp_path):
    torch.manual_seed(0)
    start = make_model().state_dict()
    seen = []

    def evaluate(training):
        seen.append(flat(training.loss.target_head_params))
        return {"success": 0.0}

    weights = {}
    for learner in ("local", "ray"):
        model = make_model()
        model.load_state_dict(start)
        training = Training(model, tmp_path / learner, learner=learner, evaluate=evaluate)
        before = {name: weight.clone() for name, weight in training.loss.state_dict().items()}
        told = int(model.trunk.weight_version)
        trained, weights[learner] = training.run()
        assert trained
        assert training.trainer._optim_count == 3 * UPDATES
        assert training.explore.eps.item() == pytest.approx(0.5 - 0.4 * 3 * FRAMES / 1000, abs=1e-5)
        moved = {name for name in before if (before[name] != weights[learner][name]).any()}
        assert {name.split(".")[0] for name in moved} >= {"trunk_params", "head_params", "target_head_params"}
        assert int(model.trunk.weight_version) > told
    assert_same(weights["local"], weights["ray"])
    local, remote = seen[:3], seen[3:]
    assert (local[0] != local[2]).any()
    for one, other in zip(local, remote, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_stopped_run_with_a_remote_learner_goes_on(make_model, tmp_path):
    _, stopped = Training(make_model(), tmp_path, learner="ray", batches=2).run()
    second = Training(make_model(), tmp_path, learner="ray")
    trained, weights = second.run()
    assert trained
    assert second.trainer.collected_frames == 3 * FRAMES
    assert second.trainer._optim_count == 3 * UPDATES
    assert second.explore.eps.item() == pytest.approx(0.5 - 0.4 * 3 * FRAMES / 1000, abs=1e-5)
    assert any((weights[name] != stopped[name]).any() for name in weights if name.startswith("head_params"))
    third = Training(make_model(), tmp_path, learner="ray")
    trained, again = third.run()
    assert not trained, "nothing is left to do"
    assert_same(again, weights)


@pytest.mark.parametrize("learner", ["local", "ray"])
def test_the_example_plays_on_ray(learner, tmp_path):
    arguments = ["--smoke", "--output", tmp_path / "run", "--maps", 2, "--collector", "ray", "--learner", learner]
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=350, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads((tmp_path / "run/results.json").read_text())) == {"agent", "context cleared"}
    (file,) = (tmp_path / "run/log").rglob("loss_dqn.csv")
    assert len(file.read_text().splitlines()) >= 2
