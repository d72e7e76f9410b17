"""Steps per second of the batched point robot against one environment at a time in numpy, in one run.

Run it with ``python tests/benchmarks/bench_point_robot.py`` (about a minute). A unit is one step of one row. Both sides
play whole episodes of 20 steps, their resets included, on one thread. They take turns, and the best round counts, in
CPU time, so that other jobs matter little.

- step: the actions are given, and only the last frame is kept.
- rollout: uniform random actions; every transition is kept, as stacked arrays or tensors.
- play: as rollout, with the actions of PEARL's actor, three layers of 300 units, one latent for an episode.

A plain step without an actor is only some microseconds, and TorchRL's own part of a step (``floor``: the same
environment with a ``_step`` that hands out a ready frame) costs many of them, whatever the rows. So the ratio grows
with the rows.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from torchrl_mouse.envs import PointRobotEnv, point_robot_goals
from torchrl_mouse.modules import latent_actor

ROWS, STEPS, ROUNDS, TARGET = (10, 50, 400, 2_000), 20, 5, 20
LATENT = 5


class Point:
    """The plain environment: a numpy state, an action in [-0.1, 0.1]^2, a dictionary of extras."""

    low, high = np.full(2, -0.1), np.full(2, 0.1)

    def __init__(self, goal: np.ndarray, random: np.random.RandomState, sparse: bool) -> None:
        self.goal, self.random, self.sparse = goal, random, sparse

    def reset(self) -> np.ndarray:
        self.state = np.zeros(2) if self.sparse else self.random.uniform(-1, 1, size=2)
        return self.state.copy()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        self.state = self.state + action
        x, y = self.state - self.goal
        reward = -((x**2 + y**2) ** 0.5)
        extras = {"sparse_reward": reward + 1 if reward >= -0.2 else 0} if self.sparse else {}
        return self.state.copy(), reward, False, extras


class Normalised:
    """Maps actions in [-1, 1] to the inner environment's box, and clips."""

    def __init__(self, inner: Point) -> None:
        self.inner, self.reset = inner, inner.reset

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        low, high = self.inner.low, self.inner.high
        return self.inner.step(np.clip(low + (action + 1) * 0.5 * (high - low), low, high))


def plain_step(envs: list[Normalised], actions: np.ndarray) -> None:
    for env, row in zip(envs, actions, strict=True):
        env.reset()
        for action in row:
            env.step(action)


def plain_rollout(
    envs: list[Normalised], choose: Callable[[np.ndarray, torch.Tensor], np.ndarray]
) -> list[dict[str, Any]]:
    paths = []
    for env in envs:
        observation, latent, steps = env.reset(), torch.randn(1, LATENT), []
        for _ in range(STEPS):
            action = choose(observation, latent)
            following, reward, done, extras = env.step(action)
            steps.append((observation, action, reward, following, done, extras))
            observation = following
        columns = zip(*steps, strict=True)
        names = ("observation", "action", "reward", "next_observation", "done")
        path: dict[str, Any] = {name: np.array(column) for name, column in zip(names, columns, strict=False)}
        paths.append({**path, "extras": [step[-1] for step in steps]})
    return paths


@torch.no_grad()
def plain_actor(network: nn.Module, observation: np.ndarray, latent: torch.Tensor) -> np.ndarray:
    frame = torch.cat([torch.from_numpy(observation[None]).float(), latent], -1)
    mean, log_scale = network(frame).chunk(2, -1)
    return torch.tanh(torch.normal(mean, log_scale.clamp(-20, 2).exp())).numpy()[0]


def batched_play(env: PointRobotEnv, actor: TensorDictModuleBase) -> TensorDictBase:
    start = env.reset().set("latent", torch.randn(*env.batch_size, LATENT))
    with torch.no_grad():
        return env.rollout(STEPS, actor, tensordict=start, auto_reset=False, break_when_any_done=False)


def batched_step(env: PointRobotEnv, actions: torch.Tensor) -> None:
    frame = env.reset()
    for action in actions:
        frame = env.step_mdp(env.step(frame.set("action", action)))


class Ready(PointRobotEnv):
    """Computes its first frame only: what is left of a step is TorchRL's."""

    _ready: TensorDictBase | None = None

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._ready is None:
            self._ready = super()._step(tensordict)
        return self._ready.copy()


def seconds(variants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    best = dict.fromkeys(variants, math.inf)
    for _ in range(ROUNDS):
        for name, run in variants.items():
            began = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - began)
    return best


def main() -> None:
    torch.set_num_threads(1)
    random = np.random.RandomState(0)
    actor = latent_actor(2, 2, LATENT)
    layers = (nn.Linear(2 + LATENT, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU())
    network = nn.Sequential(*layers, nn.Linear(300, 4))
    print(f"microseconds per row and step, and how many times as fast (target: {TARGET} x)")
    print(f"{'variant':<8}{'rows':>5}  {'what':<8}{'plain':>8}{'batched':>9}{'floor':>8}{'ratio':>8}")
    for sparse in (False, True):
        for rows in ROWS:
            goals = point_robot_goals(rows, sparse=sparse)
            plain = [Normalised(Point(goal, random, sparse)) for goal in goals.double().numpy()]
            batched = PointRobotEnv(goals, sparse=sparse, max_steps=STEPS, seed=0)
            ready = Ready(goals, sparse=sparse, max_steps=STEPS, seed=0)
            actions = torch.rand(STEPS, rows, 2) * 2 - 1
            given = actions.transpose(0, 1).numpy()
            best = seconds(
                {
                    "plain step": lambda plain=plain, given=given: plain_step(plain, given),
                    "batched step": lambda batched=batched, actions=actions: batched_step(batched, actions),
                    "floor step": lambda ready=ready, actions=actions: batched_step(ready, actions),
                    "plain rollout": lambda plain=plain: plain_rollout(plain, lambda *_: random.uniform(-1, 1, size=2)),
                    "batched rollout": lambda batched=batched: batched.rollout(STEPS),
                    "floor rollout": lambda ready=ready: ready.rollout(STEPS),
                    "plain play": lambda plain=plain: plain_rollout(plain, partial(plain_actor, network)),
                    "batched play": lambda batched=batched: batched_play(batched, actor),
                    "floor play": lambda ready=ready: batched_play(ready, actor),
                }
            )
            for what in ("step", "rollout", "play"):
                sides = ("plain", "batched", "floor")
                slow, fast, floor = (best[f"{side} {what}"] / rows / STEPS * 1e6 for side in sides)
                name = "sparse" if sparse else "dense"
                print(f"{name:<8}{rows:>5}  {what:<8}{slow:8.2f}{fast:9.3f}{floor:8.3f}{slow / fast:7.1f}x", flush=True)


if __name__ == "__main__":
    main()
