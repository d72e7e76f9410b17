"""The three meta-environments that PEARL's encoders are compared on: tasks, budgets, the metric, published figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

from torchrl_mouse import schema
from torchrl_mouse.data.saving import replace_json
from torchrl_mouse.envs import (
    HalfCheetahVelEnv,
    PointRobotEnv,
    half_cheetah_velocities,
    point_robot_goals,
    point_robot_oracle,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tensordict import TensorDictBase
    from tensordict.nn import TensorDictModuleBase

LATENT_DIM = 5


@dataclass(frozen=True)
class Benchmark:
    """An environment, and the budget that an agent has for it."""

    num_train: int
    num_test: int
    max_steps: int  # of an episode
    iterations: int
    initial_steps: int  # with each training task, before the first iteration
    tasks_per_iteration: int
    prior_steps: int  # with latents from the prior, for critics and context
    posterior_steps: int  # with latents from the belief, for critics and context
    extra_steps: int  # with latents from the belief, for critics alone
    updates: int  # gradient steps of an iteration
    context_rows: int  # transitions of a task that its latent is inferred from, in an update
    gamma: float
    reward_scale: float
    kl_weight: float
    test_episodes: int
    exploration_episodes: int  # first ones of a test, in which the latent comes from the prior
    rows: int = 256  # transitions of a task in an update
    meta_batch: int = 16  # tasks of an update
    sparse: bool = False  # context and metric see the sparse reward, critics the dense one

    @property
    def visit_steps(self) -> int:
        """Steps with a task in an iteration."""
        return self.prior_steps + self.posterior_steps + self.extra_steps

    @property
    def most_steps(self) -> int:
        """Steps with one task at most, if every iteration draws it every time."""
        return self.initial_steps + self.iterations * self.tasks_per_iteration * self.visit_steps

    @property
    def training_steps(self) -> int:
        """Steps of a run, tests aside."""
        return self.num_train * self.initial_steps + self.iterations * self.tasks_per_iteration * self.visit_steps


_POINT = Benchmark(
    num_train=40,
    num_test=10,
    max_steps=20,
    iterations=20,
    initial_steps=200,
    tasks_per_iteration=10,
    prior_steps=200,
    posterior_steps=0,
    extra_steps=200,
    updates=1000,
    context_rows=64,
    gamma=0.99,
    reward_scale=100.0,
    kl_weight=0.1,
    test_episodes=3,
    exploration_episodes=1,
)
BENCHMARKS = {
    "point-robot": _POINT,
    "sparse-point-robot": replace(
        _POINT,
        iterations=40,
        prior_steps=100,
        posterior_steps=900,
        extra_steps=0,
        context_rows=1024,
        gamma=0.9,
        kl_weight=1.0,
        test_episodes=20,
        exploration_episodes=5,
        sparse=True,
    ),
    "cheetah-vel": replace(
        _POINT,
        num_train=30,
        max_steps=200,
        initial_steps=2000,
        tasks_per_iteration=5,
        prior_steps=400,
        extra_steps=600,
        updates=600,
        context_rows=100,
        reward_scale=5.0,
    ),
}
# Fewer rows in an update, and in sparse-point-robot fewer iterations and a smaller context too: a sixth of the time and
# less, for trying things out.
SMALL = {
    "point-robot": replace(BENCHMARKS["point-robot"], rows=32),
    "sparse-point-robot": replace(BENCHMARKS["sparse-point-robot"], rows=16, context_rows=256, iterations=20),
    "cheetah-vel": replace(BENCHMARKS["cheetah-vel"], rows=16),
}
# Seconds, to see it run; not to compare with anything.
SMOKE = {
    name: replace(
        benchmark,
        num_train=4,
        num_test=2,
        iterations=2,
        initial_steps=benchmark.max_steps,
        tasks_per_iteration=2,
        prior_steps=2 * benchmark.max_steps,
        posterior_steps=2 * benchmark.max_steps if benchmark.posterior_steps else 0,
        extra_steps=2 * benchmark.max_steps if benchmark.extra_steps else 0,
        updates=2,
        context_rows=benchmark.max_steps,
        rows=8,
        meta_batch=4,
    )
    for name, benchmark in BENCHMARKS.items()
}
BUDGETS = {"benchmark": BENCHMARKS, "small": SMALL, "smoke": SMOKE}

# Mean and standard deviation over the seeds of the published table of encoders, and the best run in it.
PUBLISHED = {
    "point-robot": {"mlp": (-11.878, 1.84), "recurrent": (-11.383, 0.87), "attention": (-10.837, 0.77)},
    "sparse-point-robot": {"mlp": (3.803, 0.33), "recurrent": (2.818, 2.30), "attention": (1.991, 1.48)},
    "cheetah-vel": {"mlp": (-141.860, 24.3), "recurrent": (-170.882, 54.9), "attention": (-96.754, 5.1)},
}
BEST_PUBLISHED = {"point-robot": -9.424, "sparse-point-robot": 6.687, "cheetah-vel": -78.369}
# What one who knows the task can reach (nobody has worked it out for the cheetah), and the best that does the same in
# every test task, chosen for these: go to (.25, 0), go to 94 degrees, run at 1.39 m/s from the start at no cost.
ORACLE = {"sparse-point-robot": 13.07}  # That of point-robot depends on the starts.
NO_ADAPTATION = {"point-robot": -13.72, "sparse-point-robot": 4.40, "cheetah-vel": -166.9}


def make_tasks(name: str, benchmark: Benchmark) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes what sets training and test tasks apart, goals ``[tasks, 2]`` or velocities ``[tasks]``.

    Raises:
        ValueError: an unknown environment, or more tasks are asked for than there are.
    """
    _check_name("make_tasks", name)
    # All of the benchmark's are drawn, and the last are those of the test, in a smaller budget too.
    full = BENCHMARKS[name]
    for kind in ("num_train", "num_test"):
        if not 1 <= getattr(benchmark, kind) <= getattr(full, kind):
            raise ValueError(
                f"make_tasks: {kind} must be at least 1 and at most the {getattr(full, kind)} that {name} has, got "
                f"{getattr(benchmark, kind)}. Ask for a number of these."
            )
    num = full.num_train + full.num_test
    tasks = half_cheetah_velocities(num) if name == "cheetah-vel" else point_robot_goals(num, sparse=full.sparse)
    return tasks[: benchmark.num_train], tasks[full.num_train :][: benchmark.num_test]


def make_env(name: str, tasks: torch.Tensor, benchmark: Benchmark, device: str = "cpu") -> EnvBase:
    """Makes an environment with a row for each of the tasks; its seed comes from torch's.

    Raises:
        ImportError: it needs MuJoCo, which is not installed.
        ValueError: an unknown environment.
    """
    _check_name("make_env", name)
    seed = int(torch.randint(2**31, ()))
    if name == "cheetah-vel":
        return HalfCheetahVelEnv(tasks, max_steps=benchmark.max_steps, seed=seed, device=device)
    return PointRobotEnv(tasks, max_steps=benchmark.max_steps, sparse=benchmark.sparse, seed=seed, device=device)


def _check_name(where: str, name: str) -> None:
    if name not in BENCHMARKS:
        raise ValueError(f"{where}: name must be one of {', '.join(BENCHMARKS)}, got {name!r}. Choose one of them.")


def play(env: EnvBase, actor: TensorDictModuleBase, latent: torch.Tensor, benchmark: Benchmark) -> TensorDictBase:
    """Plays one episode in each row with its latent ``[rows, Z]``; returns transitions ``[rows, T]``.

    Raises:
        ValueError: a reward is not finite.
    """
    steps = env.rollout(
        benchmark.max_steps,
        actor,
        tensordict=env.reset().set("latent", latent),
        auto_reset=False,
        break_when_any_done=False,
    )
    for key in ("reward", "sparse_reward"):  # here, before a belief and actions made of it are blamed
        if (reward := steps.get(("next", key), None)) is not None:
            remedy = "The indices are row and step. Fix the environment."
            schema.check_finite(reward.cpu(), ("next", key), "play", remedy)
    following = [("next", key) for key in ("observation", "reward", "sparse_reward", "terminated", "done")]
    return steps.select("observation", "action", *following, strict=False)


def as_context(steps: TensorDictBase, benchmark: Benchmark) -> TensorDict:
    """Returns what an encoder sees of transitions ``[*]``."""
    reward = steps["next", "sparse_reward" if benchmark.sparse else "reward"]
    return TensorDict({"observation": steps["observation"], "action": steps["action"], "reward": reward}, steps.shape)


@torch.no_grad()
def meta_test(
    env: EnvBase,
    actor: TensorDictModuleBase,
    infer: Callable[[TensorDict | None], torch.Tensor],
    benchmark: Benchmark,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Meets each of the environment's tasks anew, as the benchmark's metric asks.

    Actions are without chance, latents are drawn, once for an episode: from the prior at first, then from the belief
    after all that was seen in the task. Only the last episode counts: ``meta_test_return`` is its mean over the tasks.

    Args:
        env: a row for each task.
        actor: reads ``observation`` and ``latent``.
        infer: draws latents ``[tasks, Z]`` from the belief after a context ``[tasks, N]``; for None, from the prior.
        benchmark: how many episodes there are.

    Returns:
        The episodes' returns, and their first observations, ``[tasks, episodes, *]``.
    """
    seen: list[TensorDictBase] = []
    for episode in range(benchmark.test_episodes):
        known = as_context(torch.cat(seen, 1), benchmark) if episode >= benchmark.exploration_episodes else None
        latent = infer(known)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            seen.append(play(env, actor, latent, benchmark))
    starts = torch.stack([steps["observation"][:, 0] for steps in seen], 1)
    returns = torch.stack([as_context(steps, benchmark)["reward"].sum((1, 2)) for steps in seen], 1)
    return returns.cpu(), starts.cpu()


def regret(returns: torch.Tensor, starts: torch.Tensor, goals: torch.Tensor) -> float:
    """Returns how far the last episodes of point robots stay behind who knows the goals, from the same starts."""
    return float((point_robot_oracle(starts[:, -1], goals) - returns[:, -1]).mean())


def save(options: dict[str, Any], history: list[dict[str, float]], directory: Path) -> dict[str, float]:
    """Writes ``results.json`` and ``returns.png``; returns the figures that count.

    Args:
        options: what the run is; ``environment`` is one of :data:`BENCHMARKS`.
        history: ``test_return`` and ``train_return`` of each iteration, and what else is known of it.
        directory: where to write.
    """
    name, title = options["environment"], ", ".join(f"{key} {value}" for key, value in options.items())
    last = history[-1]["test_return"]
    recent = [entry["test_return"] for entry in history[-5:]]
    results = {"meta_test_return": last, "mean_of_last_5_iterations": sum(recent) / len(recent)}
    if "regret" in history[-1]:
        regrets = [entry["regret"] for entry in history[-5:]]
        results["regret"], results["mean_regret_of_last_5"] = history[-1]["regret"], sum(regrets) / len(regrets)
    replace_json(directory / "results.json", {**options, **results, "iterations": history})
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    iterations = range(1, len(history) + 1)
    axes.plot(iterations, [entry["test_return"] for entry in history], "o-", color="black", label="test tasks")
    axes.plot(iterations, [entry["train_return"] for entry in history], ":", color="gray", label="training tasks")
    if "regret" in history[-1]:
        oracle = [entry["test_return"] + entry["regret"] for entry in history]
        axes.plot(iterations, oracle, "--", color="tab:green", label="oracle, same starts")
    elif name in ORACLE:
        axes.axhline(ORACLE[name], linestyle="--", color="tab:green", label="oracle")
    axes.axhline(NO_ADAPTATION[name], linestyle="--", color="tab:red", label="best without adaptation")
    for color, (encoder, (mean, _)) in zip(
        ("tab:blue", "tab:orange", "tab:purple"), PUBLISHED[name].items(), strict=True
    ):
        axes.axhline(mean, linewidth=1, color=color, label=f"published: {encoder} (mean of 3 seeds)")
    axes.axhline(BEST_PUBLISHED[name], linewidth=1, linestyle="-.", color="tab:brown", label="published: best encoder")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="iteration", ylabel="return of the last episode")
    axes.set_title(title, fontsize=9)  # It names all options.
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(directory / "returns.png", dpi=120)
    plt.close(figure)
    return results
