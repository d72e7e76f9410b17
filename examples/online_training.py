"""Learns FrozenLake by playing it: a new map for every task, many episodes a task, weights that change meanwhile.

An agent plays with a growing context, whole tasks land in a replay buffer, and in-context DQN learns from windows of
them. While it trains it is tested on maps that it never plays, with frozen weights; the control is the same model with
its context cleared at every episode. An interrupted run resumes from its newest checkpoint.

    python examples/online_training.py               # about 15 minutes on two cores
    python examples/online_training.py --smoke       # seconds, to see it run
    python examples/online_training.py --collector process                  # play in two processes
    python examples/online_training.py --collector ray --learner ray        # play and learn wherever Ray runs

Ray (`pip install torchrl-mouse[ray]`) is started on this machine; with RAY_ADDRESS set, the cluster there is used.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from backbones import add_backbone_options, load_runs
from create_dataset import at_least, is_held_out
from offline_training import LONGEST_EPISODE, TASKS, HeldOutLake, build_model
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase, SerialEnv, TransformedEnv
from torchrl.modules import EGreedyModule
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger

from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.envs import ClearContext, FrozenLakeEnv, TaskEnv
from torchrl_mouse.evaluation import Run, evaluate, save_results
from torchrl_mouse.models import MouseModel
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.recipes import claim, online_trainer, run, warmup_cosine

SIZE = 4
ROWS = 16  # played side by side
WORKERS = 2  # that share them, where they are played in other processes
EPISODES = 20  # of a task
WINDOW = 176
BATCH_SIZE = 12
START_SHARE = 0.3
FRAMES_PER_BATCH = 300 * ROWS  # Even at first a task takes fewer steps than that: its end is in the first batch.
UPDATES_PER_BATCH = 25

# As in `offline_training.py`, without the conservative penalty: what an action is worth, the agent can find out.
REWARD_SCALE = 20.0
GAMMA = 0.9
TAU = 0.01
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01

# Exploration: random actions first, then actions drawn by their values.
TEMPERATURE = 0.3
EPSILON = (1.0, 0.02)
EXPLORING_SHARE = 0.5  # of all frames, until epsilon is at its end
MAPS = 64


class TrainingLake(FrozenLakeEnv):
    """FrozenLake on the maps that are not held out."""

    def sample_task(self, mask: torch.Tensor) -> None:
        """Draws maps until one is not held out."""
        super().sample_task(mask)
        while bool(mask) and is_held_out(self):
            super().sample_task(mask)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_options(parser)
    parser.add_argument(
        "--collector",
        choices=["direct", "process", "ray"],
        default="direct",
        help=f"TorchRL's backend: play here, in {WORKERS} processes, or in {WORKERS} processes that Ray distributes",
    )
    parser.add_argument(
        "--learner",
        choices=["local", "ray"],
        default="local",
        help="TorchRL's learner backend: learn here, or (with --collector ray) in a process that Ray places",
    )
    parser.add_argument("--frames", type=at_least(1), default=300_000, help="steps to play, over all rows")
    parser.add_argument(
        "--evaluate-every", type=at_least(1), default=50_000, help="frames between tests, and checkpoints"
    )
    parser.add_argument("--maps", type=at_least(1), default=MAPS, help="held-out maps to test on")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of maps, weights and exploration")
    parser.add_argument("--output", type=Path, default=Path("runs/online_training"), help="folder for all results")
    parser.add_argument("--restart", action="store_true", help="delete what an earlier run has left")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes: shows that it runs")
    if parser.parse_args().smoke:
        parser.set_defaults(frames=2 * FRAMES_PER_BATCH, evaluate_every=FRAMES_PER_BATCH, maps=4)
        parser.set_defaults(output=Path("runs/online_training_smoke"))
    arguments = parser.parse_args()
    if arguments.learner == "ray" and arguments.collector != "ray":
        parser.error(f"--learner ray needs --collector ray, got --collector {arguments.collector}")
    return arguments


def make_env(lake: type[FrozenLakeEnv], rows: int, first_seed: int) -> EnvBase:
    """Makes rows of tasks side by side."""

    def row(seed: int) -> EnvBase:
        return TaskEnv(lake(SIZE, seed=seed), episodes_per_task=EPISODES)

    return SerialEnv(rows, [partial(row, first_seed + index) for index in range(rows)])


def play(model: MouseModel, arguments: argparse.Namespace, *, clear: bool = False) -> torch.Tensor:
    """Plays the held-out maps with frozen weights; returns ``[maps, episodes]``."""
    env = make_env(HeldOutLake, arguments.maps, 10**6 * (arguments.seed + 1))
    actor = model.actor(env.action_spec_unbatched, temperature=TEMPERATURE)
    env = TransformedEnv(env, ClearContext()) if clear else env
    return evaluate(actor, env, EPISODES, description="context cleared" if clear else "held-out maps")


def log_of(model: MouseModel, arguments: argparse.Namespace) -> dict[str, float]:
    """Tests, and returns the success in the first and the last ten episodes of a task."""
    returns = play(model, arguments)
    return {"first_10_episodes": float(returns[:, :10].mean()), "last_10_episodes": float(returns[:, -10:].mean())}


def make_collector(policy: TensorDictModuleBase, arguments: argparse.Namespace) -> BaseCollector:
    """Makes the collector, which plays here or in several processes."""
    workers = 1 if arguments.collector == "direct" else WORKERS
    rows = ROWS // workers
    envs = [partial(make_env, TrainingLake, rows, 10**3 * arguments.seed + rows * number) for number in range(workers)]
    options: dict[str, Any] = {} if arguments.collector == "direct" else {"sync": True}
    if arguments.collector == "ray":  # Half a core each, so that two are enough for players and learner.
        options["backend_options"] = {"remote_configs": {"num_cpus": 1 / WORKERS}}
    return Collector(
        envs,
        policy,
        backend=arguments.collector,
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=FRAMES_PER_BATCH * math.ceil(arguments.frames / FRAMES_PER_BATCH),
        **options,
    )


def train(model: MouseModel, arguments: argparse.Namespace) -> None:
    """Plays and learns in turns."""
    spec = FrozenLakeEnv(SIZE).action_spec_unbatched
    actor = model.actor(spec, temperature=TEMPERATURE)
    exploring = int(EXPLORING_SHARE * arguments.frames)
    explore = EGreedyModule(spec, eps_init=EPSILON[0], eps_end=EPSILON[1], annealing_num_steps=exploring)
    policy = TensorDictSequential(actor, explore)
    loss = MouseDQNLoss(
        model.head("dqn"),
        trunk=model.trunk,
        actor=actor,
        gamma=GAMMA,
        gamma_terminal=GAMMA,
        reward_scale=REWARD_SCALE,
        double_dqn=True,
    )
    optimizer = torch.optim.AdamW(loss.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    updates = UPDATES_PER_BATCH * (arguments.frames // FRAMES_PER_BATCH)
    store = DatasetStore(max_action_dim=4, max_obs_discrete_dim=SIZE**2, keys=loss.in_keys)
    options: dict[str, Any] = {}
    if arguments.learner == "ray":  # The store lives in a process of its own, which player and learner reach.
        options = {"service_backend": "ray", "service_backend_options": {"remote_config": {"num_cpus": 0}}}
    trainer = online_trainer(
        loss,
        make_collector(policy, arguments),
        policy,
        replay_buffer(store, window=WINDOW, batch_size=BATCH_SIZE, start_share=START_SHARE, **options),
        optimizer,
        total_frames=arguments.frames,
        updates_per_batch=UPDATES_PER_BATCH,
        directory=arguments.output,
        target_updaters=(SoftUpdate(loss, tau=TAU),),
        scheduler=warmup_cosine(optimizer, updates, warmup=updates // 20, floor=0.1),
        explore=explore,
        evaluate=partial(log_of, model, arguments),
        evaluation_interval=arguments.evaluate_every,
        checkpoint_interval=arguments.evaluate_every,
        logger=CSVLogger("log", log_dir=arguments.output),
        seed=arguments.seed,
        learner_backend=arguments.learner,
    )
    run(trainer)
    model.set_target("dqn", loss.target_head_params)


def main() -> None:
    """Trains, saves the model, tests it, and plots."""
    arguments = parse_arguments()
    recipe = {name: value for name, value in globals().items() if name.isupper()}
    names = ("backbone", "collector", "learner", "frames", "seed")
    options = {name: getattr(arguments, name) for name in names} | recipe
    others = load_runs(arguments.compare, TASKS)
    try:
        claim(arguments.output, options, restart=arguments.restart)
    except ValueError as error:
        raise SystemExit(f"{error} (--restart, --output)") from None
    torch.manual_seed(arguments.seed)
    sizes = {"actions": 4, "time_steps": LONGEST_EPISODE + 1, "continuous": 0, "discrete": SIZE**2}
    model = build_model(sizes, ["dqn"], WINDOW, arguments.backbone)
    train(model, arguments)
    model.save_pretrained(arguments.output / "model")

    torch.manual_seed(arguments.seed)
    returns = {"agent": play(model, arguments), "context cleared": play(model, arguments, clear=True)}
    Run(arguments.backbone, {TASKS: {"agent": returns["agent"]}}).save(arguments.output)
    title = f"FrozenLake, backbone {arguments.backbone}: no weight changes"
    table = save_results(arguments.output, TASKS, returns, expert=1.0, title=title, others=others)
    print(f"\n{table}")
    print(f"Written: {arguments.output / 'results.json'}, curves.png, model, log and checkpoints")


if __name__ == "__main__":
    main()
