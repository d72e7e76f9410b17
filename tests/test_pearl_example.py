"""PEARL's example: the benchmark's budgets and metric, what lands in which buffer, resuming, and its errors."""

import importlib
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from torchrl_mouse.envs import point_robot_oracle

EXAMPLES = Path(__file__).parents[1] / "examples"

ENCODER = """
import torch.nn as nn
import rlkit.torch.pytorch_util as ptu
from rlkit.torch.core import PyTorchModule


class CustomContextEncoder(PyTorchModule):
    def __init__(self, hidden_sizes, input_size, output_size, **kwargs):
        self.save_init_params(locals())
        super().__init__()
        self.output_size = output_size
        self.fc = nn.Linear(input_size, output_size)
        ptu.fanin_init(self.fc.weight)

    def forward(self, input, return_preactivations=False):
        output = self.fc(input)
        return (output, output) if return_preactivations else output

    def reset(self, num_tasks=1):
        pass
"""


@pytest.fixture(scope="module")
def pearl():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("pearl")


@pytest.fixture(scope="module")
def benchmark_of(pearl):
    return importlib.import_module("pearl_benchmark")


@pytest.fixture
def call(pearl):
    """Runs the program; returns what it printed, or what it said where it is to fail."""

    def run(*arguments, fails=False):
        out, error = StringIO(), StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
            patch.setattr(sys, "argv", ["pearl.py", *map(str, arguments)])
            if not fails:
                pearl.main()
                return out.getvalue()
            with pytest.raises(SystemExit) as caught:
                pearl.main()
        return f"{caught.value.code}{error.getvalue()}"

    return run


@pytest.fixture
def make_run(pearl, tmp_path):
    """Makes a run that has not begun."""

    def make(env="point-robot", encoder="mlp", seed=0):
        with pytest.MonkeyPatch.context() as patch:
            options = ["--env", env, "--encoder", encoder, "--seed", str(seed)]
            patch.setattr(sys, "argv", ["pearl.py", *options, "--budget", "smoke", "--output", str(tmp_path / "run")])
            return pearl.Run(pearl.parse_arguments())

    return make


@pytest.mark.parametrize(
    ("name", "steps", "updates", "tests"),
    [
        ("point-robot", 88_000, 20_000, 60),
        ("sparse-point-robot", 408_000, 40_000, 400),
        ("cheetah-vel", 160_000, 12_000, 600),
    ],
)
def test_budget_is_the_benchmarks(benchmark_of, name, steps, updates, tests):
    budget = benchmark_of.BENCHMARKS[name]
    assert budget.training_steps == steps
    assert budget.iterations * budget.updates == updates
    assert budget.test_episodes * budget.max_steps == tests
    assert (budget.meta_batch, budget.rows) == (16, 256)


def test_tasks_of_a_smaller_budget_are_the_benchmarks(benchmark_of):
    for name in benchmark_of.BENCHMARKS:
        train, test = benchmark_of.make_tasks(name, benchmark_of.BENCHMARKS[name])
        few, few_test = benchmark_of.make_tasks(name, benchmark_of.SMOKE[name])
        assert len(train) == (30 if name == "cheetah-vel" else 40)
        assert len(test) == 10
        assert torch.equal(few, train[:4])
        assert torch.equal(few_test, test[:2])


def test_more_tasks_than_there_are(benchmark_of):
    budget = replace(benchmark_of.BENCHMARKS["point-robot"], num_train=41)
    with pytest.raises(
        ValueError, match="num_train must be at least 1 and at most the 40 that point-robot has, got 41"
    ):
        benchmark_of.make_tasks("point-robot", budget)


@pytest.mark.parametrize("sparse", [False, True])
def test_metric_is_the_last_episode_after_all_that_was_seen(benchmark_of, sparse):
    """With an actor that walks to where its latent says, and a belief that is told the goals after so many steps."""
    name = "sparse-point-robot" if sparse else "point-robot"
    budget = benchmark_of.BENCHMARKS[name]
    _, goals = benchmark_of.make_tasks(name, budget)
    contexts = []

    def infer(context):
        contexts.append(context)
        return torch.full_like(goals, 9.0) if context is None else goals

    actor = TensorDictModule(lambda at, to: ((to - at) * 10).clamp(-1, 1), ["observation", "latent"], ["action"])
    env = benchmark_of.make_env(name, goals, budget)
    returns, starts = benchmark_of.meta_test(env, actor, infer, budget)
    first = budget.exploration_episodes
    assert contexts[:first] == [None] * first
    assert [seen.shape[1] for seen in contexts[first:]] == [20 * n for n in range(first, budget.test_episodes)]
    assert returns.shape == (10, budget.test_episodes)
    rewards = torch.cat([contexts[-1]["reward"]], 1).reshape(10, -1, 20).sum(-1)
    torch.testing.assert_close(returns[:, :-1], rewards)  # what the context saw is what is counted
    if sparse:
        assert returns[:, :first].abs().max() == 0  # far beyond the goal
        assert returns[:, -1].mean() == pytest.approx(13.07, abs=0.01)
    else:
        torch.testing.assert_close(returns[:, -1], point_robot_oracle(starts[:, -1], goals), atol=1e-4, rtol=0)
        assert benchmark_of.regret(returns, starts, goals) == pytest.approx(0, abs=1e-4)


def test_transitions_land_where_they_belong(pearl, make_run):
    run = make_run("sparse-point-robot")
    budget, experience = run.benchmark, run.experience
    pearl.collect(run.agent, "sparse-point-robot", run.tasks, torch.arange(4), experience, first=True)
    assert [len(buffer) for buffer in experience.replay] == [budget.initial_steps] * 4
    assert [len(buffer) for buffer in experience.context] == [budget.initial_steps] * 4
    pearl.collect(run.agent, "sparse-point-robot", run.tasks, torch.tensor([2, 0]), experience, first=False)
    visited = budget.initial_steps + budget.visit_steps
    assert [len(buffer) for buffer in experience.replay] == [
        visited,
        budget.initial_steps,
        visited,
        budget.initial_steps,
    ]
    # The context's buffer was emptied first. In this environment steps by the belief are context too.
    assert [len(buffer) for buffer in experience.context] == [
        budget.visit_steps,
        budget.initial_steps,
        budget.visit_steps,
        budget.initial_steps,
    ]
    for task, buffer in enumerate(experience.replay):  # every transition is of its task
        steps = buffer[:]
        distance = (steps["next", "observation"] - run.tasks[task]).norm(dim=-1, keepdim=True)
        torch.testing.assert_close(steps["next", "reward"], -distance, atol=1e-5, rtol=0)


def test_extra_steps_are_no_context(pearl, make_run):
    run = make_run("point-robot")
    pearl.collect(run.agent, "point-robot", run.tasks, torch.tensor([1, 1]), run.experience, first=False)
    assert len(run.experience.replay[1]) == 2 * run.benchmark.visit_steps
    assert len(run.experience.context[1]) == run.benchmark.prior_steps  # the second visit's


@pytest.mark.parametrize("encoder", ["mlp", "recurrent"])
def test_batches(pearl, make_run, encoder):
    run = make_run("sparse-point-robot", encoder)
    pearl.collect(run.agent, "sparse-point-robot", run.tasks, torch.arange(4), run.experience, first=True)
    pearl.collect(run.agent, "sparse-point-robot", run.tasks, torch.arange(4), run.experience, first=False)
    batch = run.experience.draw()
    assert batch["observation"].shape == (4, 8, 2)
    assert batch["context", "reward"].shape == (4, 20, 1)
    assert (batch["context", "reward"] >= 0).all()  # sparse
    assert (batch["next", "reward"] < 0).all()  # dense
    at = batch["context", "observation"]
    follows = (at[:, 1:] - at[:, :-1]).norm(dim=-1) < 0.1 * 2**0.5 + 1e-5
    if encoder == "recurrent":  # whole episodes in their order, which begin at the origin
        assert follows.all()
        assert at[:, 0].abs().max() == 0
    seen = torch.stack([buffer[:] for buffer in run.experience.context])
    drawn = pearl.draw_context(seen, run.agent)
    assert drawn.shape == (4, 20)
    if encoder == "recurrent":
        assert drawn["observation"][:, 0].abs().max() == 0


@pytest.mark.parametrize("env", ["point-robot", "sparse-point-robot", "cheetah-vel"])
def test_runs_and_leaves_results(call, tmp_path, env):
    printed = call("--env", env, "--budget", "smoke", "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert f"meta_test_return: {results['meta_test_return']:.3f}" in printed
    assert [len(results["iterations"]), results["environment"]] == [2, env]
    assert (tmp_path / "run/returns.png").stat().st_size > 10_000
    assert (tmp_path / "run/log/scalars/test_return.csv").read_text().count("\n") == 2
    # A second call has nothing to do, and says the same.
    assert call("--env", env, "--budget", "smoke", "--output", tmp_path / "run") == printed


@pytest.mark.parametrize("encoder", ["mlp", "recurrent"])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(pearl, make_run, monkeypatch, encoder):
    whole = make_run(encoder=encoder)
    whole.file.parent.mkdir()
    whole.train()
    whole.file.unlink()

    class StopError(Exception):
        pass

    stopped = make_run(encoder=encoder)
    update, count = stopped.update, iter(range(99))

    def stop():
        if next(count) == 3:  # in the second iteration
            raise StopError
        return update()

    monkeypatch.setattr(stopped, "update", stop)
    with pytest.raises(StopError):
        stopped.train()
    resumed = make_run(encoder=encoder, seed=5)  # The seed does not matter: random states are in the checkpoint.
    resumed.train()
    assert resumed.history == whole.history
    for (name, mine), other in zip(resumed.agent.loss.named_parameters(), whole.agent.loss.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_checkpoint_is_replaced_whole(pearl, make_run, monkeypatch):
    run = make_run()
    run.file.parent.mkdir()
    pearl.collect(run.agent, "point-robot", run.tasks, torch.arange(4), run.experience, first=True)
    run.save()
    before = run.file.read_bytes()
    weights = sum(parameter.numel() for parameter in run.agent.loss.parameters()) * 4
    assert len(before) < 1.5 * weights  # what was seen so far, not all the room for what may come

    def fail(state, file):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    assert run.file.read_bytes() == before


def test_seeds_reproduce_and_differ(make_run, pearl):
    latents = []
    for seed in (1, 1, 2):
        run = make_run(seed=seed)
        pearl.collect(run.agent, "point-robot", run.tasks, torch.arange(4), run.experience, first=True)
        latents.append(run.experience.replay[0][:]["action"])
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


def test_an_encoder_of_ones_own(call, tmp_path):
    (tmp_path / "mine.py").write_text(ENCODER)
    printed = call("--encoder", tmp_path / "mine.py", "--budget", "smoke", "--output", tmp_path / "run")
    assert "meta_test_return" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "point-robots"], "invalid choice: 'point-robots'"),
        (["--encoder", "lstm"], "name_or_path must be one of linear, mlp, recurrent"),
        (["--encoder", "missing.py"], "missing.py"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_bad_arguments(call, tmp_path, arguments, message):
    assert message in call(*arguments, "--budget", "smoke", "--output", tmp_path / "run", fails=True)
    assert not (tmp_path / "run").exists()


def test_mujoco_is_not_installed(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    message = call("--env", "cheetah-vel", "--budget", "smoke", "--output", tmp_path / "run", fails=True)
    assert 'pip install "torchrl-mouse[mujoco]"' in message


def test_other_options_are_no_resumption(call, tmp_path):
    call("--budget", "smoke", "--output", tmp_path / "run")
    said = call("--budget", "smoke", "--seed", 7, "--output", tmp_path / "run", fails=True)
    assert "seed 7 instead of 42" in said
    assert "--restart" in said


def test_a_reward_that_is_no_number_stops_the_run(make_run, pearl, monkeypatch):
    run = make_run()
    pearl.collect(run.agent, "point-robot", run.tasks, torch.arange(4), run.experience, first=True)
    draw = run.experience.draw

    def spoiled():
        batch = draw()
        batch["next", "reward"][1, 2] = float("nan")
        return batch

    monkeypatch.setattr(run.experience, "draw", spoiled)
    with pytest.raises(ValueError, match="must be finite, got nan at task 1, row 2"):
        run.update()


def test_the_prior_is_drawn_without_context(make_run):
    run = make_run()
    run.agent.forget(1000)
    latent = run.agent.infer(None)
    assert latent.shape == (1000, 5)
    assert latent.std().item() == pytest.approx(1, abs=0.05)
    empty = TensorDict({"observation": torch.zeros(3, 0, 2), "action": torch.zeros(3, 0, 2)}, [3, 0])
    belief = run.agent.posterior(TensorDict({"context": empty.set("reward", torch.zeros(3, 0, 1))}, [3]))
    assert torch.equal(belief["posterior_scale"], torch.ones(3, 5))
