"""PEARL's example: the benchmark's budgets and metric, what lands in which buffer, resuming, and its errors."""

import importlib
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from plain_pearl import REWARD_SCALE, PlainPEARL, make_batch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs import ExplorationType
from torchrl.envs.utils import exploration_type
from tqdm import tqdm

from torchrl_mouse.envs import PointRobotEnv, point_robot_oracle

EXAMPLES = Path(__file__).parents[1] / "examples"

ENCODER = """
import torch
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

# The goal, without learning: rewards are distances from it to where actions led.
GOAL_ENCODER = """
import torch
from rlkit.torch.core import PyTorchModule


class CustomContextEncoder(PyTorchModule):
    def __init__(self, hidden_sizes, input_size, output_size):
        super().__init__()
        self.output_size = output_size

    def forward(self, input, return_preactivations=False):
        at, distance = input[..., :2] + 0.1 * input[..., 2:4], input[..., 4:]
        # The square of the distance is linear in the goal and the square of its own length.
        rows = torch.cat([-2 * at, torch.ones_like(distance)], -1)
        squares = distance.square() - at.square().sum(-1, keepdim=True)
        goal = torch.linalg.lstsq(rows, squares).solution[..., :2, 0]
        mean = torch.cat([goal, torch.zeros(len(goal), 3)], -1)
        return torch.cat([mean, torch.full_like(mean, -9.0)], -1)  # of standard deviation .01
"""
ENCODERS = ("mlp", "recurrent", "attention")


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


# The benchmark's own table, row by row: point-robot, sparse-point-robot, cheetah-vel.
TABLE = {
    "num_train": (40, 40, 30),
    "num_test": (10, 10, 10),
    "max_steps": (20, 20, 200),
    "iterations": (20, 40, 20),
    "initial_steps": (200, 200, 2000),
    "tasks_per_iteration": (10, 10, 5),
    "prior_steps": (200, 100, 400),
    "posterior_steps": (0, 900, 0),
    "extra_steps": (200, 0, 600),
    "updates": (1000, 1000, 600),
    "meta_batch": (16, 16, 16),
    "rows": (256, 256, 256),
    "context_rows": (64, 1024, 100),
    "gamma": (0.99, 0.9, 0.99),
    "reward_scale": (100.0, 100.0, 5.0),
    "kl_weight": (0.1, 1.0, 0.1),
    "test_episodes": (3, 20, 3),
    "exploration_episodes": (1, 5, 1),
    "sparse": (False, True, False),
    "training_steps": (88_000, 408_000, 160_000),
}


@pytest.mark.parametrize(("column", "name"), [(0, "point-robot"), (1, "sparse-point-robot"), (2, "cheetah-vel")])
def test_budget_is_the_benchmarks(pearl, benchmark_of, column, name):
    budget = benchmark_of.BENCHMARKS[name]
    assert {field: getattr(budget, field) for field in TABLE} == {field: row[column] for field, row in TABLE.items()}
    assert {field.name for field in fields(budget)} <= set(TABLE)
    assert (pearl.LEARNING_RATE, pearl.TAU, pearl.HIDDEN_SIZES, benchmark_of.LATENT_DIM) == (3e-4, 0.005, [200] * 3, 5)


def test_tasks_of_a_smaller_budget_are_the_benchmarks(benchmark_of):
    for name in benchmark_of.BENCHMARKS:
        train, test = benchmark_of.make_tasks(name, benchmark_of.BENCHMARKS[name])
        few, few_test = benchmark_of.make_tasks(name, benchmark_of.SMOKE[name])
        assert len(train) == (30 if name == "cheetah-vel" else 40)
        assert len(test) == 10
        assert torch.equal(few, train[:4])
        assert torch.equal(few_test, test[:2])


def test_an_environment_that_there_is_not(benchmark_of):
    budget = benchmark_of.SMOKE["point-robot"]
    message = "name must be one of point-robot, sparse-point-robot, cheetah-vel, got 'walker'"
    with pytest.raises(ValueError, match=f"make_tasks: {message}"):
        benchmark_of.make_tasks("walker", budget)
    with pytest.raises(ValueError, match=f"make_env: {message}"):
        benchmark_of.make_env("walker", torch.zeros(1, 2), budget)


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


@pytest.mark.parametrize("env", ["point-robot", "sparse-point-robot"])
def test_context_of_a_task_that_comes_twice_is_its_last_visits(pearl, make_run, env):
    run = make_run(env)
    budget = run.benchmark
    pearl.collect(run.agent, env, run.tasks, torch.tensor([1, 1]), run.experience, first=False)
    assert len(run.experience.replay[1]) == 2 * budget.visit_steps
    # Extra steps are for the critics alone.
    assert len(run.experience.context[1]) == budget.prior_steps + budget.posterior_steps
    last = run.experience.replay[1][:].reshape(-1, 20)[-1]
    is_there = any(torch.equal(last["action"], rows["action"]) for rows in run.experience.context[1][:].reshape(-1, 20))
    assert is_there == bool(budget.posterior_steps)


@pytest.fixture
def watch(monkeypatch):
    """Notes each episode: exploration, mode, latents, and how large a context each latent was inferred from."""

    def start(pearl, benchmark_of, run):
        episodes, contexts = [], []
        play, infer = benchmark_of.play, run.agent.infer

        def noting_play(env, actor, latent, budget):
            episodes.append((exploration_type(), run.agent.loss.training, latent.clone()))
            return play(env, actor, latent, budget)

        def noting_infer(context):
            contexts.append(None if context is None else context.shape[1])
            return infer(context)

        for module in (pearl, benchmark_of):
            monkeypatch.setattr(module, "play", noting_play)
        monkeypatch.setattr(run.agent, "infer", noting_infer)
        return episodes, contexts

    return start


def test_collection_plays_as_the_benchmark_says(pearl, benchmark_of, make_run, watch, monkeypatch):
    run = make_run("sparse-point-robot")
    pearl.collect(run.agent, "sparse-point-robot", run.tasks, torch.arange(4), run.experience, first=True)
    modes = []
    monkeypatch.setattr(run, "update", lambda: modes.append(run.agent.loss.training) or TensorDict({}))
    monkeypatch.setattr(run, "test", lambda: {"test_return": 0.0})
    grown = []
    draw = pearl.draw_context
    monkeypatch.setattr(pearl, "draw_context", lambda seen, agent: grown.append(seen.shape[1]) or draw(seen, agent))
    episodes, contexts = watch(pearl, benchmark_of, run)
    run.iterate(tqdm(disable=True))
    # All episodes with latents from the prior at once, then two by the belief, the first of which has none yet.
    assert contexts == [None, None, 20]
    assert grown == [40 + 20]  # the prior phase's two episodes, and the first by the belief
    assert {kind for kind, _, _ in episodes} <= {None, ExplorationType.RANDOM}  # None is what actors do by default
    assert not any(training for _, training, _ in episodes)
    assert modes == [True] * run.benchmark.updates
    assert [len(latent) for _, _, latent in episodes] == [4, 2, 2]
    assert len(episodes[0][2].unique(dim=0)) == 4  # a latent of its own for each


def test_tests_act_without_chance_on_drawn_latents(pearl, benchmark_of, make_run, watch):
    run = make_run()
    run.agent.loss.eval()
    episodes, contexts = watch(pearl, benchmark_of, run)
    run.test()
    assert contexts == [None, 20, 40] * 2  # training tasks, then test tasks
    assert {kind for kind, _, _ in episodes} == {ExplorationType.DETERMINISTIC}
    first, second = (run.agent.infer(context) for context in [episode_context(benchmark_of, run)] * 2)
    assert not torch.equal(first, second)  # drawn, not the belief's mean


def test_agents_are_met_in_evaluation_mode(pearl, benchmark_of, make_run, watch, monkeypatch):
    run = make_run()
    monkeypatch.setattr(pearl, "collect", lambda *_, **__: None)
    monkeypatch.setattr(run, "update", lambda: TensorDict({}))
    run.file.parent.mkdir()
    episodes, _ = watch(pearl, benchmark_of, run)
    run.iterate(tqdm(disable=True))
    run.save()
    run.agent.loss.train()
    run.meet()
    assert [training for _, training, _ in episodes] == [False] * 9  # training and test tasks, and these once more


def test_figures_of_a_test(pearl, make_run, monkeypatch):
    """The last episode counts, as a mean over the tasks."""
    run = make_run()
    starts = torch.zeros(2, 3, 2)
    returns = {4: torch.arange(12.0).reshape(4, 3), 2: torch.tensor([[-9.0, 5.0, -3.0], [-8.0, 6.0, -4.5]])}
    met = []

    def meta_test(env, actor, infer, benchmark):
        met.append(env.goal)
        return returns[len(env.goal)], starts

    monkeypatch.setattr(pearl, "meta_test", meta_test)
    results = run.test()
    assert [torch.equal(*pair) for pair in zip(met, (run.tasks, run.test_tasks), strict=True)] == [True, True]
    oracle = point_robot_oracle(starts[:, -1], run.test_tasks).mean().item()
    assert results == pytest.approx(
        {"train_return": 6.5, "test_return": -3.75, "first_episode": -8.5, "regret": oracle + 3.75}
    )


def test_tasks_of_an_iteration_are_drawn(pearl, make_run, monkeypatch):
    run, drawn = make_run(), []
    monkeypatch.setattr(pearl, "collect", lambda agent, name, tasks, ids, experience, first: drawn.append(ids.tolist()))
    monkeypatch.setattr(run, "update", lambda: TensorDict({}))
    monkeypatch.setattr(run, "test", lambda: {"test_return": 0.0})
    for _ in range(30):
        run.iterate(tqdm(disable=True))
    assert {len(ids) for ids in drawn} == {2}
    assert {task for ids in drawn for task in ids} == set(range(4))
    assert 2 < sum(len(set(ids)) == 1 for ids in drawn) < 15  # with replacement, a quarter of 30


def test_a_recurrent_encoder_goes_on_from_one_episode_of_a_test_to_the_next(make_run):
    run = make_run(encoder="recurrent")
    run.agent.loss.eval()
    encoder, states = run.agent.posterior.encoder, []
    encoder.register_forward_pre_hook(lambda module, _: states.append(module.hidden))
    run.test()
    for before, after in (states[:2], states[2:]):  # training tasks, test tasks
        assert before is None
        assert after.abs().sum(-1).all()


@torch.no_grad()
def episode_context(benchmark_of, run):
    env = benchmark_of.make_env("point-robot", run.test_tasks, run.benchmark)
    run.agent.forget(2)
    steps = benchmark_of.play(env, run.agent.actor, run.agent.infer(None), run.benchmark)
    return benchmark_of.as_context(steps, run.benchmark)


@pytest.mark.parametrize("env", ["point-robot", "sparse-point-robot", "cheetah-vel"])
def test_loss_has_the_benchmarks_constants(benchmark_of, make_run, env):
    loss, budget = make_run(env).agent.loss, benchmark_of.BENCHMARKS[env]
    assert (loss.gamma, loss.reward_scale, loss.kl_weight) == (budget.gamma, budget.reward_scale, budget.kl_weight)
    assert loss.regularization == 1e-3


def test_update_is_the_plain_loops_step(pearl, make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(run.agent.loss, "reward_scale", REWARD_SCALE)
    reference, batch = PlainPEARL(run.agent.loss), make_batch(tasks=4, rows=8, context=6)
    monkeypatch.setattr(run.experience, "draw", batch.clone)
    for seed in range(3):
        torch.manual_seed(seed)
        ours = run.update()
        torch.manual_seed(seed)
        for name, value in reference.step(batch).items():
            torch.testing.assert_close(ours[name], value.detach(), rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_tasks_of_an_update_are_drawn_each_with_its_context(pearl, make_run):
    run = make_run()
    pearl.collect(run.agent, "point-robot", run.tasks, torch.arange(4), run.experience, first=True)
    drawn = []
    for _ in range(20):
        batch = run.experience.draw()
        for number in range(len(batch)):
            tasks = [
                task
                for task, buffer in enumerate(run.experience.replay)
                if torch.isin(batch["action"][number], buffer[:]["action"]).all()
            ]
            (task,) = tasks
            assert torch.isin(batch["context", "action"][number], run.experience.context[task][:]["action"]).all()
            drawn.append(task)
    updates = [drawn[at : at + 4] for at in range(0, len(drawn), 4)]
    assert set(drawn) == set(range(4))
    assert 10 < sum(len(set(tasks)) < 4 for tasks in updates) <= 20  # with replacement


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
    number = torch.arange(seen.shape[1])
    seen["observation"][..., 0] = number
    drawn = torch.stack([pearl.draw_context(seen, run.agent)["observation"][..., 0] for _ in range(200)])
    assert drawn.shape == (200, 4, 20)
    for task in drawn.unbind(1):
        assert torch.equal(task.unique(), number.float())
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    if encoder == "recurrent":  # as above
        length = run.benchmark.max_steps
        assert (drawn % length == torch.arange(20) % length).all()


# What the plot's lines are at: best without adaptation, mlp, recurrent, attention, best run; the oracle.
PLOTTED = {
    "point-robot": (-13.72, -11.878, -11.383, -10.837, -9.424),
    "sparse-point-robot": (4.40, 3.803, 2.818, 1.991, 6.687, 13.07),
    "cheetah-vel": (-166.9, -141.860, -170.882, -96.754, -78.369),
}


@pytest.mark.parametrize("env", PLOTTED)
def test_plot_shows_what_to_compare_with(benchmark_of, tmp_path, monkeypatch, env):
    figures = []
    monkeypatch.setattr(benchmark_of.plt, "close", figures.append)
    regret = {"regret": 5.0} if env == "point-robot" else {}
    history = [{"test_return": -10.0 - n, "train_return": -9.0, **regret} for n in range(3)]
    benchmark_of.save({"environment": env}, history, tmp_path)
    (axes,) = figures[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["test tasks"] == [-10.0, -11.0, -12.0]
    assert lines["training tasks"] == [-9.0] * 3
    if regret:
        assert lines["oracle, same starts"] == [-5.0, -6.0, -7.0]
    names = ["best without adaptation", *(f"published: {name} (mean of 3 seeds)" for name in ENCODERS)]
    names += ["published: best encoder", "oracle"]
    shown = [lines[name][0] for name in names if name in lines]
    assert shown == pytest.approx(PLOTTED[env])
    monkeypatch.undo()
    benchmark_of.plt.close(figures[0])


def test_figures_are_of_the_last_iterations(benchmark_of, tmp_path):
    history = [{"test_return": -float(2**n), "train_return": 0.0, "regret": float(3**n)} for n in range(7)]
    results = benchmark_of.save({"environment": "point-robot"}, history, tmp_path)
    assert results == {
        "meta_test_return": -64.0,
        "mean_of_last_5_iterations": -(4 + 8 + 16 + 32 + 64) / 5,
        "regret": 729.0,
        "mean_regret_of_last_5": (9 + 27 + 81 + 243 + 729) / 5,
    }
    assert json.loads((tmp_path / "results.json").read_text()).items() >= results.items()


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


def test_products_in_bfloat16(call, tmp_path):
    kept = []
    for precision in ("float32", "bfloat16"):
        call("--budget", "smoke", "--precision", precision, "--output", tmp_path / precision)
        results = json.loads((tmp_path / precision / "results.json").read_text())
        assert results["precision"] == precision
        kept.append(torch.tensor([entry["loss_qvalue"] for entry in results["iterations"]]))
    assert not torch.equal(*kept)
    torch.testing.assert_close(*kept, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("env", "encoder"), [("point-robot", "mlp"), ("point-robot", "recurrent"), ("sparse-point-robot", "bayesian")]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_end(pearl, make_run, monkeypatch, env, encoder):
    # Rewards nearby, as far ones are not found in so short a run.
    monkeypatch.setattr("torchrl_mouse.envs.point_robot._RADIUS", 1.0)
    whole = make_run(env, encoder)
    whole.file.parent.mkdir()
    whole.train()
    whole.file.unlink()

    class StopError(Exception):
        pass

    stopped = make_run(env, encoder)
    update, count = stopped.update, iter(range(99))

    def stop():
        if next(count) == 3:  # in the second iteration
            raise StopError
        return update()

    monkeypatch.setattr(stopped, "update", stop)
    with pytest.raises(StopError):
        stopped.train()
    resumed = make_run(env, encoder, seed=5)  # The seed does not matter: random states are in the checkpoint.
    resumed.train()
    assert resumed.history == whole.history
    if encoder == "bayesian":
        seen = torch.cat([buffer[:]["next", "sparse_reward"] for buffer in resumed.experience.context])
        assert seen.any(), "rewards were seen"
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
        (["--seed", "-1"], "argument --seed: must be at least 0"),
        (["--test", "--restart"], "argument --restart: not allowed with argument --test"),
        (["--test"], "--output must be the folder of a run with a finished iteration, got"),
    ],
)
def test_bad_arguments(call, tmp_path, arguments, message):
    assert message in call(*arguments, "--budget", "smoke", "--output", tmp_path / "run", fails=True)
    assert not (tmp_path / "run").exists()


def test_own_errors_are_clear_with_an_encoder_of_ones_own(call, tmp_path):
    (tmp_path / "mine.py").write_text(ENCODER)
    options = ["--encoder", tmp_path / "mine.py", "--budget", "smoke", "--output"]
    said = call(*options, tmp_path / "run", "--test", fails=True)
    assert "Train first, without --test." in said
    assert "mine.py must be a folder, got a file" in call(*options, tmp_path / "mine.py", fails=True)
    (tmp_path / "mine.py").write_text(ENCODER + "\nraise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        call(*options, tmp_path / "run")


def test_cuda_is_not_available(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda needs a GPU that this torch can use" in call("--device", "cuda", fails=True)


def test_mujoco_is_not_installed(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    message = call("--env", "cheetah-vel", "--budget", "smoke", "--output", tmp_path / "run", fails=True)
    assert 'pip install "torchrl-mouse[mujoco]"' in message


def test_a_run_says_what_it_is_and_its_agent_can_be_met(call, tmp_path):
    options = ("--budget", "smoke", "--encoder", "bayesian", "--output", tmp_path / "run")
    call(*options)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [results[name] for name in ("encoder", "budget", "seed")] == ["bayesian", "smoke", 42]
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    table = call(*options, "--test").splitlines()
    assert len(table) == 4  # a line of names, two tasks, the mean
    assert table[1].startswith("0.45, 0.59 ")
    assert [len(line[24:].split()) for line in table[1:]] == [3, 3, 3]
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_an_encoder_file_that_has_changed_is_no_resumption(call, tmp_path):
    (tmp_path / "mine.py").write_text(ENCODER)
    call("--encoder", tmp_path / "mine.py", "--budget", "smoke", "--output", tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.py").write_text(ENCODER)
    call("--encoder", tmp_path / "other/mine.py", "--budget", "smoke", "--output", tmp_path / "run")
    (tmp_path / "mine.py").write_text(ENCODER.replace("output = self.fc(input)", "output = self.fc(input) * 0"))
    said = call("--encoder", tmp_path / "mine.py", "--budget", "smoke", "--output", tmp_path / "run", fails=True)
    assert "encoder file" in said


def test_what_goes_wrong_in_an_encoder_file_is_seen_with_its_line(pearl, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(ENCODER.replace("self.fc(input)", "self.fc(input) + []"))
    options = ["--encoder", str(tmp_path / "mine.py"), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["pearl.py", *options])
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        pearl.main()
    assert any(str(entry.path).endswith("mine.py") for entry in caught.traceback)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("env", "encoder"),
    [("point-robot", "mlp"), ("point-robot", "mine.py"), ("sparse-point-robot", "bayesian"), ("cheetah-vel", "mlp")],
)
def test_runs_and_resumes_on_a_gpu(call, tmp_path, env, encoder):
    if encoder == "mine.py":
        encoder = tmp_path / encoder
        encoder.write_text(ENCODER.replace("self.fc(input)", "self.fc(input) + torch.zeros(1).to(ptu.device)"))
    where = ("--device", "cuda", "--output", tmp_path / "run")
    options = ("--env", env, "--encoder", encoder, "--budget", "smoke", *where)
    printed = call(*options)
    assert call(*options) == printed


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
    with pytest.raises(ValueError, match=r"must be finite, got nan at \(1, 2, 0\)"):
        run.update()


def test_a_run_that_diverges_stops_before_it_is_saved(make_run, monkeypatch):
    """Where the loss does not look at values itself, as on an accelerator."""
    run = make_run()
    run.file.parent.mkdir()
    update, count = run.update, iter(range(9))

    def diverge():
        losses = update()
        return losses.set("loss_actor", torch.tensor(float("nan"))) if next(count) == 3 else losses

    monkeypatch.setattr(run, "update", diverge)
    with pytest.raises(ValueError, match="loss_actor must be finite, got nan in iteration 2, of which nothing is"):
        run.train()
    assert len(torch.load(run.file, weights_only=False)["history"]) == 1


@pytest.mark.parametrize(("env", "key"), [("point-robot", "reward"), ("sparse-point-robot", "sparse_reward")])
def test_an_environments_reward_that_is_no_number_is_named(make_run, monkeypatch, env, key):
    """Before the belief and the actions that would be made of it."""
    run = make_run(env)
    run.file.parent.mkdir()
    step = PointRobotEnv._step

    def spoiled(self, tensordict):
        frame = step(self, tensordict)
        frame[key][1] = float("nan")
        return frame

    monkeypatch.setattr(PointRobotEnv, "_step", spoiled)
    with pytest.raises(
        ValueError, match=rf"\('next', '{key}'\) must be finite, got nan at \(1, 0, 0\)\. The indices are row"
    ):
        run.train()


def test_a_belief_that_is_no_number_is_named(call, tmp_path):
    """An encoder that passes its trial on zeros."""
    (tmp_path / "mine.py").write_text(ENCODER.replace("self.fc(input)", "self.fc(input) + input[..., -1:].sqrt()"))
    with pytest.raises(ValueError, match=r"'posterior_loc' must be finite, got nan at \(0, 0\)\. The first index is"):
        call("--encoder", tmp_path / "mine.py", "--budget", "smoke", "--output", tmp_path / "run")


def test_the_prior_is_drawn_without_context(make_run):
    run = make_run()
    run.agent.forget(1000)
    latent = run.agent.infer(None)
    assert latent.shape == (1000, 5)
    assert latent.std().item() == pytest.approx(1, abs=0.05)
    empty = TensorDict({"observation": torch.zeros(3, 0, 2), "action": torch.zeros(3, 0, 2)}, [3, 0])
    belief = run.agent.posterior(TensorDict({"context": empty.set("reward", torch.zeros(3, 0, 1))}, [3]))
    assert torch.equal(belief["posterior_scale"], torch.ones(3, 5))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_who_is_told_the_goal_reaches_it(pearl, tmp_path, monkeypatch):
    """All but the encoder learns within two of the benchmark's iterations, at a 16th of its rows."""
    (tmp_path / "goal.py").write_text(GOAL_ENCODER)
    options = ["--budget", "small", "--encoder", str(tmp_path / "goal.py"), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["pearl.py", *options])
    budgets = {"point-robot": replace(pearl.BUDGETS["small"]["point-robot"], iterations=2, rows=16)}
    monkeypatch.setitem(pearl.BUDGETS, "small", budgets)
    pearl.main()
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["regret"] < 1.0
    assert results["meta_test_return"] > -7.0
