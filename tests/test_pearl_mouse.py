"""MOUSE on PEARL's tasks: the example runs, a killed run goes on, and what it measures is what the benchmark asks."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives import SoftUpdate

from torchrl_mouse import schema
from torchrl_mouse.envs import (
    DecisionMask,
    PointRobotEnv,
    point_robot_oracle,
    sparse_point_robot_oracle,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAM = EXAMPLES / "pearl_mouse.py"


@pytest.fixture(scope="module")
def example():
    """The program as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("pearl_mouse")


def make_agent(example, name):
    torch.manual_seed(0)
    benchmark = example.BUDGETS["smoke"][name]
    return example.Agent(name, benchmark, example.RECIPES[name]), benchmark


def program(output):
    command = [sys.executable, str(PROGRAM), "--budget", "smoke", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def figures(printed):
    return [line for line in printed.splitlines() if line.startswith(("meta_test_return", "mean", "regret", "episode"))]


def test_a_killed_run_goes_on_and_a_finished_one_stays(example, monkeypatch, capsys, tmp_path):
    output = tmp_path / "run"
    process = program(output)
    while not list(output.glob("checkpoints/*/manifest.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was still at work"
    assert not (output / "results.json").exists()
    before = json.loads((output / "history.json").read_text())

    process = program(output)
    printed, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    history = json.loads((output / "history.json").read_text())
    assert list(history) == ["2", "4", "6"], "of the six tasks that the budget allows, two at a time"
    assert [entry["environment_steps"] for entry in history.values()] == [120, 240, 360]
    assert list(history.items())[:1] == list(before.items())[:1], "what was done was not done again"
    results = json.loads((output / "results.json").read_text())
    assert results["iterations"] == list(history.values())
    assert results["meta_test_return"] == history["6"]["test_return"]
    episodes = json.loads((output / "episodes.json").read_text())
    assert {name: len(values) for name, values in episodes.items()} == {"agent": 3, "context cleared": 3}
    assert f"episode 3, agent: {episodes['agent'][-1]:.3f}" in figures(printed)
    assert all((output / name).exists() for name in ("returns.png", "episodes.png"))
    agent, _ = make_agent(example, "point-robot")
    agent.actor.load_state_dict(torch.load(output / "actor.pt"))

    arguments = [str(PROGRAM), "--budget", "smoke", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    example.main()
    assert figures(capsys.readouterr().out) == figures(printed), "nothing was left to do"
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
    with pytest.raises(SystemExit, match=r"got seed 1 instead of 42.*--restart"):
        example.main()


@pytest.fixture
def train(example, monkeypatch, tmp_path):
    """Trains until some tasks were played and noted, but not saved; returns where their second episodes begin."""

    def start(name, *, tasks, seed=42):
        output = tmp_path / name
        monkeypatch.setattr(
            sys, "argv", [str(PROGRAM), "--budget", "smoke", "--seed", str(seed), "--output", str(output)]
        )
        arguments = example.parse_arguments()
        training = example.Run(arguments)
        output.mkdir(exist_ok=True)
        evaluate, begin = training.evaluate, []

        def stop():
            noted = evaluate()
            begin.append(training.buffer[len(training.buffer) - 2 : len(training.buffer)]["observation"][:, 21])
            if len(training.buffer) == tasks:
                raise KeyboardInterrupt
            return noted

        training.evaluate = stop
        with pytest.raises(KeyboardInterrupt):
            training.train()
        return begin, training.history

    return start


def test_the_seed_decides_a_run(train):
    first, history = train("first", tasks=4)
    again, same = train("again", tasks=4)
    other, _ = train("other", tasks=2, seed=7)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert history == same
    assert not torch.isclose(first[0], other[0]).any()


def test_a_resumed_run_plays_other_tasks(train):
    """It is stopped after the second test, before the second checkpoint."""
    first, history = train("run", tasks=4)
    resumed, after = train("run", tasks=6)
    assert [len(first), len(resumed)] == [2, 2], "what was saved is not done again"
    assert list(after) == ["2", "4", "6"]
    assert after["2"] == history["2"]
    starts = torch.cat([*first, *resumed])
    assert len(starts.unique(dim=0)) == len(starts), "nor are its tasks"


@pytest.mark.parametrize(
    ("name", "most"), [("point-robot", 88_000), ("sparse-point-robot", 408_000), ("cheetah-vel", 160_000)]
)
def test_it_plays_no_more_than_pearl_does(example, name, most):
    run = object.__new__(example.Run)
    run.benchmark, run.recipe = example.BUDGETS["benchmark"][name], example.RECIPES[name]
    run.agent = type("Tasks", (), {"episodes": run.benchmark.test_episodes})
    each, total = run.frames
    assert total % each == 0
    assert most - each < total <= most


@pytest.mark.parametrize("name", ["point-robot", "sparse-point-robot"])
def test_returns_are_those_of_the_benchmarks_reward(example, name):
    agent, benchmark = make_agent(example, name)
    _, goals = example.make_tasks(name, benchmark)
    returns, starts = agent.test(goals)
    assert returns.shape == (2, benchmark.test_episodes)

    class Oracle(torch.nn.Module):
        def forward(self, tensordict):
            return tensordict.set("action", ((goals - tensordict["observation"]) * 10).clamp(-1, 1))

    agent.actor = Oracle()
    returns, starts = agent.test(goals)
    expected = point_robot_oracle(starts, goals.unsqueeze(1))
    if benchmark.sparse:
        expected = sparse_point_robot_oracle(goals).unsqueeze(1).expand_as(returns)
    torch.testing.assert_close(returns, expected, atol=1e-4, rtol=0)


def test_figures_of_a_test(example, monkeypatch, tmp_path):
    """The last episode counts, as a mean over the tasks."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--budget", "smoke", "--output", str(tmp_path)])
    training = example.Run(example.parse_arguments())
    training.buffer = range(6)  # tasks played, of three episodes of 20 steps
    shown = []

    def test(tasks):
        shown.append(tasks)
        returns = torch.arange(3.0 * len(tasks)).reshape(-1, 3) - 10
        return returns, torch.zeros(len(tasks), 3, 2)

    monkeypatch.setattr(training.agent, "test", test)
    entry = training.evaluate()
    assert [len(tasks) for tasks in shown] == [4, 20]
    assert torch.equal(shown[0], training.tasks)
    assert torch.equal(shown[1].reshape(10, 2, 2)[3], example.make_tasks("point-robot", training.benchmark)[1])
    oracle = point_robot_oracle(torch.zeros(2), shown[1]).mean().item()
    expected = {"environment_steps": 360, "train_return": -3.5, "test_return": 20.5, "first_episode": 18.5}
    assert entry == pytest.approx({**expected, "regret": oracle - 20.5})
    assert training.history == {"6": entry}


@pytest.fixture
def fixed(example, monkeypatch):
    """An agent, and a goal to which every episode begins at the origin."""
    agent, _ = make_agent(example, "point-robot")
    for weight in agent.actor.parameters():
        weight.data.mul_(3)  # At first a context hardly moves an action.

    def make_env(name, tasks, benchmark):
        return PointRobotEnv(tasks, max_steps=benchmark.max_steps, start="origin")

    monkeypatch.setattr(example, "make_env", make_env)
    return agent, torch.tensor([[0.3, 0.8]])


def test_a_test_is_without_chance_and_leaves_no_context(fixed):
    agent, goals = fixed
    first, second = (agent.test(goals)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(agent.trunk._cache) == 0


def test_episodes_differ_by_what_was_seen_before_them(fixed):
    agent, goals = fixed
    returns, _ = agent.test(goals)
    assert len(set(returns[0].tolist())) == 3
    cleared, _ = agent.test(goals, clear=True)
    torch.testing.assert_close(cleared[0], returns[0, :1].expand(3))


@pytest.mark.parametrize(
    ("name", "seen"), [("point-robot", schema.PREVIOUS_REWARD), ("sparse-point-robot", "sparse_reward")]
)
def test_the_agent_sees_the_reward_that_it_is_measured_by(example, name, seen):
    agent, _ = make_agent(example, name)
    rewards = {schema.PREVIOUS_REWARD, "sparse_reward"}
    assert rewards.intersection(agent.trunk.in_keys) == {seen}
    assert ("next", "reward") in agent.loss.in_keys
    assert ("next", "sparse_reward") not in set(agent.loss.in_keys) - {("next", seen)}


def play(example, agent, benchmark):
    """Every step of tasks as the losses read them."""
    tasks, _ = example.make_tasks("point-robot", benchmark)
    recipe = dataclasses.replace(agent.recipe, rows=6)
    env = example.training_env("point-robot", tasks, benchmark, recipe)
    with torch.no_grad():
        return DecisionMask()(env.rollout(agent.task_steps, agent.actor, break_when_any_done=False))


@pytest.mark.parametrize("name", ["point-robot", "sparse-point-robot", "cheetah-vel"])
def test_recipes_reach_losses_and_observations(example, name):
    agent, benchmark = make_agent(example, name)
    recipe, (tasks, _) = example.RECIPES[name], example.make_tasks(name, benchmark)
    assert agent.loss.losses["belief"].kl_weight == recipe.kl_weight
    assert agent.sac._alpha.item() == pytest.approx(recipe.entropy_weight)
    estimator = agent.sac.value_estimator
    assert estimator.gamma.item() == pytest.approx(recipe.gamma)
    assert getattr(estimator, "lmbda", torch.zeros(())).item() == pytest.approx(recipe.trace)
    raw = example.TaskEnv(example.make_env(name, tasks, benchmark), episodes_per_task=2)
    scaled = example.task_env(example.make_env(name, tasks, benchmark), 2, recipe)
    seen = []
    for env in (raw, scaled):
        env.set_seed(0)
        torch.manual_seed(0)
        seen.append(env.rollout(2)["next", "observation"])
    scales = torch.tensor(recipe.scales) if name == "cheetah-vel" else 1
    torch.testing.assert_close(seen[1] * scales, seen[0])


@pytest.mark.parametrize("max_steps", [1, 2])
def test_values_end_with_the_episode(example, max_steps):
    torch.manual_seed(0)
    benchmark = dataclasses.replace(example.BUDGETS["smoke"]["point-robot"], max_steps=max_steps)
    agent = example.Agent("point-robot", benchmark, example.RECIPES["point-robot"])
    steps = agent.tell(play(example, agent, benchmark))
    SoftUpdate(agent.sac, tau=0.1)
    losses = []
    for change in (0.0, 1.0):
        agent.sac.target_qvalue_network_params.data.add_(change)
        torch.manual_seed(0)
        losses.append(agent.loss(steps)["loss_qvalue"].item())
    assert (losses[0] == losses[1]) is (max_steps == 1)


def test_each_loss_moves_its_own(example):
    agent, benchmark = make_agent(example, "point-robot")
    steps = agent.tell(play(example, agent, benchmark))
    SoftUpdate(agent.sac, tau=0.1)
    trunk, belief, _, policy, _ = agent.actor
    parts = {
        "trunk": trunk.parameters(),
        "belief": belief.parameters(),
        "codes": agent.codes.parameters(),
        "rewards": agent.loss.losses["belief"].rewards_params.values(True, True),
        "policy": policy.parameters(),
        "values": agent.sac.qvalue_network_params.values(True, True),
    }
    parts = {name: list(weights) for name, weights in parts.items()}
    assert all(parts.values())
    moved = {}
    for name in ("loss_actor", "loss_qvalue", "loss_reward", "loss_kl", "loss_belief"):
        agent.loss.zero_grad()
        agent.loss(steps)[name].backward()
        moved[name] = {
            part for part, weights in parts.items() if any(w.grad is not None and (w.grad != 0).any() for w in weights)
        }
    assert moved == {
        "loss_actor": {"policy"},
        "loss_qvalue": {"values"},
        "loss_reward": {"codes", "rewards"},
        "loss_kl": {"codes"},
        "loss_belief": {"trunk", "belief"},
    }
    assert {id(w) for weights in parts.values() for w in weights if w.requires_grad} == {
        id(w) for w in agent.loss.parameters() if w.requires_grad
    }


@pytest.mark.parametrize(
    ("name", "read"), [("point-robot", "goal"), ("sparse-point-robot", "goal"), ("cheetah-vel", "velocity")]
)
def test_steps_tell_which_task_they_are_of(example, name, read):
    benchmark = dataclasses.replace(example.BUDGETS["smoke"][name], max_steps=2, test_episodes=1)
    tasks, _ = example.make_tasks(name, benchmark)
    recipe = dataclasses.replace(example.RECIPES[name], rows=6)
    env = example.training_env(name, tasks, benchmark, recipe)
    env.set_seed(0)
    base = env.base_env.base_env
    seen = set()
    for _ in range(3):
        steps = env.rollout(2)
        assert (steps["task"] == steps["task"][:, :1]).all()
        assert (steps["next", "task"] == steps["task"]).all()
        torch.testing.assert_close(tasks[steps["task"][:, 0, 0]], getattr(base, read), rtol=0, atol=0)
        seen.update(steps["task"].flatten().tolist())
    assert seen == set(range(4))


def test_a_guess_is_kept_for_an_episode(example):
    agent, benchmark = make_agent(example, "point-robot")
    steps = play(example, agent, benchmark)
    noise = steps["noise"][:, : 3 * 21].split(21, 1)
    for episode in noise:
        assert (episode == episode[:, :1]).all()
    starts = torch.stack([episode[:, 0] for episode in noise])
    assert len(starts.unique()) == starts.numel()
    assert starts.std().item() == pytest.approx(1, abs=0.25)
    torch.testing.assert_close(steps["code"], steps["belief_loc"] + steps["belief_scale"] * steps["noise"])


@pytest.mark.parametrize(("name", "guesses"), [("point-robot", False), ("sparse-point-robot", True)])
def test_tests_guess_where_rewards_are_sparse(example, name, guesses):
    agent, benchmark = make_agent(example, name)
    _, tasks = example.make_tasks(name, benchmark)
    noise = []

    class Spy(example.Draw):
        def forward(self, loc, scale, noise_):
            noise.append(noise_.clone())
            return super().forward(loc, scale, noise_)

    agent.actor[2].module = Spy()
    agent.test(tasks)
    assert any((entry != 0).any() for entry in noise) is guesses


def test_policy_and_values_know_the_code_of_the_task(example):
    agent, benchmark = make_agent(example, "point-robot")
    table = agent.codes.module
    table.table.weight.data.copy_(torch.arange(4.0).unsqueeze(1).expand(-1, 2 * example.CODE_DIM) / 10)
    table.table.weight.data[:, example.CODE_DIM :] = -10
    steps = agent.tell(play(example, agent, benchmark))
    expected = steps["task"].expand(-1, -1, example.CODE_DIM).float()
    torch.testing.assert_close(steps["code"], expected, atol=0.1, rtol=0)
    assert torch.equal(steps["next", "code"], steps["code"])
    assert not steps["code"].requires_grad
    table.table.weight.data[:, example.CODE_DIM :] = 0
    code = agent.tell(steps)["code"]
    assert (code == code[:, :1]).all(), "one draw for a task"
    assert (code - expected).abs().mean() > 0.5


def test_what_the_transformer_reads_is_blurred_only_while_it_learns(example):
    agent, benchmark = make_agent(example, "point-robot")
    steps = agent.tell(play(example, agent, benchmark))
    SoftUpdate(agent.sac, tau=0.1)
    assert not any(isinstance(module, example.Blur) for module in agent.actor.modules())
    blur = agent.loss.trunk[0].module
    torch.manual_seed(0)
    observation, action = blur(steps["observation"], steps["previous", "action"])
    assert (observation - steps["observation"]).std().item() == pytest.approx(agent.recipe.blur, rel=0.1)
    assert (action - steps["previous", "action"]).std().item() == pytest.approx(example.ACTION_BLUR, rel=0.1)
    before = steps["observation"].clone()
    agent.loss(steps)
    assert torch.equal(steps["observation"], before), "the losses know where the agent was"


def known(example):
    """Steps of two tasks whose rewards, those of decisions, are the sums of their transitions."""
    torch.manual_seed(0)
    moved, acted, following = (torch.randn(2, 7, 2) for _ in range(3))
    reward = (moved + acted + following).sum(-1, keepdim=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 3] = False
    reward[:, 3] += 1
    return TensorDict(
        {
            "hidden": torch.zeros(2, 7, 1),
            "code": torch.zeros(2, 7, example.CODE_DIM),
            "task": torch.tensor([[0], [1]]).expand(2, 7).unsqueeze(-1),
            "observation": moved,
            "action": acted,
            "collector": {"mask": mask},
            "next": {"observation": following, "reward": reward},
        },
        [2, 7],
    )


class Constant(torch.nn.Module):
    """The same for every step."""

    def __init__(self, *values):
        super().__init__()
        self.values = torch.nn.ParameterList(torch.tensor(value) for value in values)

    def forward(self, read):
        shape = (*read.shape[:-1], 5)
        return tuple(value.expand(shape) for value in self.values)


def loss_of(example, *, belief=(0.0, 1.0), code=(0.0, 1.0), rewards=lambda _, moved: moved.sum(-1, keepdim=True)):
    class Network(torch.nn.Module):
        def forward(self, drawn, *transition):
            return rewards(drawn, torch.cat(transition, -1))

    return example.BeliefLoss(
        TensorDictModule(Constant(*belief), ["hidden"], ["belief_loc", "belief_scale"]),
        TensorDictModule(Constant(*code), ["task"], ["code_loc", "code_scale"]),
        TensorDictModule(Network(), ["drawn", "observation", "action", ("next", "observation")], ["predicted"]),
        kl_weight=0.5,
    )


def test_rewards_of_decisions_are_predicted(example):
    loss, steps = loss_of(example), known(example)
    assert loss(steps)["loss_reward"] < 1e-9
    steps["next", "reward"][0, 4] += 6
    assert loss(steps)["loss_reward"].item() == pytest.approx(6**2 / 12, rel=1e-5)


def test_codes_are_drawn_and_kept_near_the_prior(example):
    drawn = []

    def rewards(code, moved):
        drawn.append(code)
        return moved[..., :1]

    loss, steps = loss_of(example, code=(2.0, 0.5), rewards=rewards), known(example)
    for _ in range(100):
        kl = loss(steps)["loss_kl"].item()
    samples = torch.stack(drawn)
    assert samples.mean().item() == pytest.approx(2, abs=0.05)
    assert samples.std().item() == pytest.approx(0.5, abs=0.05)
    target = torch.distributions.Normal(0.0, 1.0)
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(2.0, 0.5), target)
    assert kl == pytest.approx(0.5 * example.CODE_DIM * exact.item(), rel=1e-5)
    assert loss_of(example)(known(example))["loss_kl"] == 0


def test_beliefs_are_measured_by_the_density_of_the_code(example):
    steps = known(example)
    steps["code"] = torch.full((2, 7, example.CODE_DIM), 3.0)
    steps["code"][:, 3] = 100.0  # no decision
    surprise = loss_of(example, belief=(2.0, 0.5))(steps)["loss_belief"].item() / example.BELIEF_WEIGHT
    exact = -torch.distributions.Normal(2.0, 0.5).log_prob(torch.tensor(3.0)).item()
    assert surprise == pytest.approx(example.CODE_DIM * exact, rel=1e-5)
