"""Learns to explore from the learning histories of others, and improves inside tasks it has never seen.

A tabular Q-learner plays the terminating 9x9 Dark Room on 70 goals (the data set DR9-70-1 of arXiv:2502.17666). A
small transformer is trained on these histories: a Q-value head by in-context DQN with CQL, which sees rewards only, and
a policy head by cross-entropy with the optimal actions. Both then play 100 episodes on every goal, the 11 held-out ones
included, with frozen weights: what improves is the context. The control is the same model with its context cleared at
every episode.

    python examples/dark_room.py                 # about 15 minutes on two cores
    python examples/dark_room.py --seeds 0 1 2
    python examples/dark_room.py --smoke         # seconds, to see it run
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from backbones import BACKBONES, add_backbone_options, load_runs
from datasets import load_from_disk
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector, RandomPolicy
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger
from tqdm.auto import tqdm

from torchrl_mouse.data import DatasetStore, JitterObservation, RandomSymmetry, replay_buffer
from torchrl_mouse.data.saving import replacing
from torchrl_mouse.envs import ClearContext, DarkRoomEnv, TaskEnv, grid_symmetries, oracle_policy, split_goals
from torchrl_mouse.evaluation import Run, evaluate, plot_curves, summarize
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules import StickyActions, TabularQLearner
from torchrl_mouse.objectives import CombinedLoss, InContextLoss, MouseDQNLoss, SupervisedPolicyLoss
from torchrl_mouse.recipes import claim, offline_trainer, run, warmup_cosine

NUM_CELLS = 81
NUM_ACTIONS = 5
NUM_TRAIN_GOALS = 70
MAX_STEPS = 20
EXPERT_RETURN = 1.0
REPEATS = 8  # Each held-out goal is played that often: once leaves a standard error of .05 on the mean of eleven.

# What was tuned. Unscaled rewards leave the action values of far cells too close to tell apart. Returns span episodes
# (GAMMA_TERMINAL). Turned, mirrored and jittered windows keep the model from remembering the 70 goals, and so from
# never looking for the others.
WINDOW = 120
START_SHARE = 0.3
JITTER_SCALE = 0.3
JITTER_SHIFT = 0.25  # one cell
REWARD_SCALE = 20.0
GAMMA = 0.8
GAMMA_TERMINAL = 0.8
CQL_WEIGHT = 0.5
TAU = 0.01
LOSS_WEIGHTS = {"dqn": 1.0, "sp": 10.0}  # Squared errors of scaled rewards would drown the cross-entropy.
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
WARMUP = 50

# How to act, chosen on the training goals of seed 0. Drawing actions, instead of taking the best, explores; repeating
# some leads away from where the agent has been.
TEMPERATURE = {"dqn": 1.0, "sp": 1.5}
STICKINESS = 0.3
ACTING = ("TEMPERATURE", "STICKINESS", "REPEATS", "ACTING")


def positive(text: str) -> int:
    """Reads a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed_number(text: str) -> int:
    """Reads a seed, a number of at least 0."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must lie in [0, 2**32), got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0], help="one run each: goals, data, training")
    parser.add_argument("--heads", nargs="+", choices=["dqn", "sp"], default=["dqn", "sp"], help="heads on the trunk")
    parser.add_argument(
        "--observation",
        choices=["coordinates", "ids"],
        default="coordinates",
        help="what the agent sees of its cell: two numbers, or one of 81 ids",
    )
    add_backbone_options(parser)
    parser.add_argument("--updates", type=positive, default=3000, help="optimiser steps")
    parser.add_argument("--batch-size", type=positive, default=32, help="windows per update")
    parser.add_argument("--history-episodes", type=positive, default=200, help="episodes of each learning history")
    parser.add_argument("--episodes", type=positive, default=100, help="episodes per task in the evaluation")
    parser.add_argument("--output", type=Path, default=Path("runs/dark_room"), help="folder for everything written")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete what earlier runs of these seeds have left, but for the learning histories",
    )
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes: shows that it runs")
    if parser.parse_args().smoke:
        parser.set_defaults(updates=20, batch_size=8, history_episodes=20, episodes=10)
        parser.set_defaults(output=Path("runs/dark_room_smoke"))
    arguments = parser.parse_args()
    arguments.heads = sorted(set(arguments.heads))
    arguments.seeds = list(dict.fromkeys(arguments.seeds))
    return arguments


def learning_histories(goals: torch.Tensor, *, episodes: int, seed: int, directory: Path) -> DatasetStore:
    """Returns one Q-learning history per goal, from disk where it is there already."""
    if not directory.exists():
        torch.manual_seed(seed)
        env = TaskEnv(DarkRoomEnv(goals, max_steps=MAX_STEPS, teacher=True), episodes_per_task=episodes)
        learner = TabularQLearner(num_states=NUM_CELLS, num_actions=NUM_ACTIONS, num_episodes=episodes)
        store = empty_store()
        # A task takes longer than that many steps, so a row ends at most one in a batch.
        collector = Collector(env, learner, frames_per_batch=len(goals) * episodes, total_frames=-1)
        learning = torch.ones(len(goals), dtype=torch.bool)
        with tqdm(total=len(goals), desc="learning histories", unit="goal") as bar:
            for batch in collector:
                store.extend(batch[learning])  # A goal's second history, begun after the first, is left out.
                learning &= ~batch["next", "done"].any(1).squeeze(-1)
                bar.update(len(goals) - int(learning.sum()) - bar.n)
                if not learning.any():
                    break
        collector.shutdown()
        unfinished = directory.with_name(directory.name + ".part")
        store.to_dataset().save_to_disk(unfinished)
        unfinished.rename(directory)  # An interrupted run leaves nothing that looks complete.
    return empty_store().from_dataset(load_from_disk(directory), task="task")


def empty_store() -> DatasetStore:
    """Returns a store that reads what Dark Room records hold."""
    return DatasetStore(max_action_dim=NUM_ACTIONS, max_obs_continuous_dim=2, max_obs_discrete_dim=NUM_CELLS)


def build_model(heads: list[str], observation: str, backbone: str) -> MouseModel:
    """Builds the agent: with 4 layers of a transformer of width 64, about 290,000 parameters with both heads."""
    seen = {"max_num_obs_continuous": 2} if observation == "coordinates" else {"max_num_obs_discrete": NUM_CELLS}
    config = MouseConfig(
        hidden_dim=64,
        window=WINDOW,
        embedding_kwargs={
            "max_num_actions": NUM_ACTIONS,
            "max_num_time_steps": MAX_STEPS + 1,
            "continuous_encoder": "linear",
            "std": 0.2,
            **seen,
        },
        backbone_kwargs=BACKBONES[backbone],
        **{f"{name}_head_kwargs": {"hidden_dim": 64, "num_layers": 2} for name in heads},
    )
    return MouseModel(config)


def train(model: MouseModel, store: DatasetStore, arguments: argparse.Namespace, seed: int, directory: Path) -> None:
    """Trains the heads together on one trunk."""
    losses: dict[str, InContextLoss] = {}
    if "dqn" in arguments.heads:
        losses["dqn"] = MouseDQNLoss(
            model.head("dqn"),
            gamma=GAMMA,
            gamma_terminal=GAMMA_TERMINAL,
            reward_scale=REWARD_SCALE,
            cql_weight=CQL_WEIGHT,
            cql_scale_q=False,
        )
    if "sp" in arguments.heads:
        losses["sp"] = SupervisedPolicyLoss(model.head("sp"))
    loss = CombinedLoss(model.trunk, losses, weights={name: LOSS_WEIGHTS[name] for name in losses})
    optimizer = torch.optim.AdamW(loss.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    buffer = replay_buffer(
        store.select(loss.in_keys), window=WINDOW, batch_size=arguments.batch_size, start_share=START_SHARE
    )
    if arguments.observation == "coordinates":
        buffer.append_transform(RandomSymmetry(*grid_symmetries()))
        buffer.append_transform(JitterObservation(scale=JITTER_SCALE, shift=JITTER_SHIFT))
    trainer = offline_trainer(
        loss,
        buffer,
        optimizer,
        updates=arguments.updates,
        directory=directory,
        target_updaters=(SoftUpdate(losses["dqn"], tau=TAU),) if "dqn" in losses else (),
        scheduler=warmup_cosine(optimizer, arguments.updates, warmup=min(WARMUP, arguments.updates // 10)),
        logger=CSVLogger("log", log_dir=directory),
        seed=seed,
    )
    run(trainer)
    if "dqn" in losses:
        model.set_target("dqn", losses["dqn"].target_head_params)


def play(model: MouseModel, goals: torch.Tensor, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Plays every goal, all in one batch; returns of each agent ``[goals, episodes]``."""

    def tasks() -> EnvBase:
        base = DarkRoomEnv(goals, max_steps=MAX_STEPS, teacher=True)
        return TaskEnv(base, episodes_per_task=arguments.episodes)

    spec = tasks().action_spec_unbatched
    returns = {}
    for head in arguments.heads:
        actor = model.actor(spec, head=head, temperature=TEMPERATURE[head])
        actor = TensorDictSequential(actor, StickyActions(STICKINESS))
        cleared = TransformedEnv(tasks(), ClearContext())
        returns[head] = evaluate(actor, tasks(), arguments.episodes, description=head)
        returns[f"{head}, context cleared"] = evaluate(
            actor, cleared, arguments.episodes, description=f"{head}, context cleared"
        )
    returns["oracle"] = evaluate(oracle_policy(), tasks(), arguments.episodes, description="oracle")
    returns["random"] = evaluate(
        RandomPolicy(tasks().full_action_spec), tasks(), arguments.episodes, description="random"
    )
    return returns


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what decides a run's result: the recipe is an option, too; how to act on what was learned is not."""
    names = ("heads", "observation", "backbone", "updates", "batch_size", "history_episodes")
    recipe = {name: value for name, value in globals().items() if name.isupper() and name not in ACTING}
    return {name: getattr(arguments, name) for name in names} | recipe


def run_seed(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes the data, trains, evaluates and plots for one seed."""
    began = time.monotonic()
    directory = arguments.output / f"seed-{seed}"
    others = load_runs([folder / directory.name for folder in arguments.compare], "held-out goals")
    try:
        claim(directory, options_of(arguments), restart=arguments.restart)
    except ValueError as error:
        raise SystemExit(f"{error} (--restart, --output)") from None
    train_goals, held_out_goals = split_goals(NUM_TRAIN_GOALS, seed=seed)
    histories = arguments.output / f"DR9-{NUM_TRAIN_GOALS}-1-seed-{seed}-{arguments.history_episodes}-episodes"
    store = learning_histories(train_goals, episodes=arguments.history_episodes, seed=seed, directory=histories)

    torch.manual_seed(seed)
    model = build_model(arguments.heads, arguments.observation, arguments.backbone)
    train(model, store, arguments, seed, directory)
    model.save_pretrained(directory / "model")

    torch.manual_seed(seed)
    returns = play(model, torch.cat([train_goals, held_out_goals.repeat(REPEATS)]), arguments)
    groups = {
        "held-out goals": {
            name: values[NUM_TRAIN_GOALS:].unflatten(0, (REPEATS, -1)).mean(0) for name, values in returns.items()
        },
        "training goals": {name: values[:NUM_TRAIN_GOALS] for name, values in returns.items()},
    }
    learned = {group: {head: curves[head] for head in arguments.heads} for group, curves in groups.items()}
    Run(arguments.backbone, learned).save(directory)
    title = f"Dark Room, seed {seed}, backbone {arguments.backbone}: no weight changes"
    plot_curves(groups, directory / "curves.png", others=others, title=title)
    results = {
        "minutes": (time.monotonic() - began) / 60,
        **{
            group: {name: summarize(values, EXPERT_RETURN) for name, values in curves.items()}
            for group, curves in groups.items()
        },
    }
    write(directory / "results.json", results)
    return results


def write(file: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON, whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(json.dumps(results, indent=2, default=str), encoding="utf-8")


def main() -> None:
    """Runs every seed, and writes ``results.json``."""
    arguments = parse_arguments()
    results: dict[str, Any] = {"arguments": vars(arguments), "seeds": {}}
    for seed in arguments.seeds:
        results["seeds"][seed] = run_seed(seed, arguments)
    for group in ("held-out goals", "training goals"):
        print(f"\n{group:<26}{'NAUC':>16}{'first 10':>10}{'last 10':>10}")
        for name in results["seeds"][arguments.seeds[0]][group]:
            runs = [results["seeds"][seed][group][name] for seed in arguments.seeds]
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key != "curve"}
            spread = statistics.pstdev([run["nauc"] for run in runs])
            results.setdefault("mean", {}).setdefault(group, {})[name] = {**mean, "nauc_std_over_seeds": spread}
            nauc = f"{mean['nauc']:.3f} +- {spread:.3f}"
            print(f"{name:<26}{nauc:>16}{mean['first_10_episodes']:>10.3f}{mean['last_10_episodes']:>10.3f}")
    write(arguments.output / "results.json", results)
    print(f"\nWritten: {arguments.output / 'results.json'}, and for each seed results, curves.png, model and log")


if __name__ == "__main__":
    main()
