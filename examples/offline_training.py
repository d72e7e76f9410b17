"""Trains an agent on a data set of somebody's experience, from disk or from the Hugging Face Hub.

A Q-value head learns from the rewards (in-context DQN with CQL), and where the data set holds a teacher's action
values a policy head learns from these, both on one trunk. Sizes are read from the data set. An agent trained on
FrozenLake then plays on the maps that `create_dataset.py` leaves out, 20 episodes on each, with frozen weights: what
improves is the context. The control is the same model with its context cleared at every episode.

    python examples/create_dataset.py --episodes 40000        # 10 seconds
    python examples/offline_training.py                       # about 5 minutes on one core
    python examples/offline_training.py --data me/frozen-lake --split train
    python examples/offline_training.py --updates 20 --play-episodes 2 --output runs/smoke    # seconds, to see it run
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from backbones import BACKBONES, add_backbone_options, load_runs
from create_dataset import at_least, is_held_out
from datasets import Dataset, load_dataset, load_from_disk
from torchrl.envs import EnvBase, SerialEnv, TransformedEnv
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger

from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.data.columns import REQUIRED_COLUMNS
from torchrl_mouse.envs import ClearContext, FrozenLakeEnv, TaskEnv
from torchrl_mouse.evaluation import Run, evaluate, save_results
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.objectives import CombinedLoss, InContextLoss, MouseDQNLoss, SupervisedPolicyLoss
from torchrl_mouse.recipes import claim, offline_trainer, run, warmup_cosine

# What was tuned, for FrozenLake. A window (`--window`) holds the 20 episodes of an agent that knows its way. Some begin
# with their task, as play does. Unscaled rewards leave action values too close to tell apart. Returns span episodes
# (GAMMA_TERMINAL), so that what an episode finds out is worth something.
START_SHARE = 0.3
REWARD_SCALE = 20.0
GAMMA = 0.9
GAMMA_TERMINAL = 0.9
CQL_WEIGHT = 0.5
TAU = 0.01
LOSS_WEIGHTS = {"dqn": 1.0, "sp": 10.0}  # Squared errors of scaled rewards would drown the cross-entropy.
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01

# How to play: drawing actions, instead of taking the best, leads out of where an agent would go round in circles.
TEMPERATURE = {"dqn": 0.3, "sp": 0.7}
MAPS = 64
LONGEST_EPISODE = 100  # Gymnasium's limit on a lake
TASKS = "held-out maps"
PLAYING = ("TEMPERATURE", "MAPS", "LONGEST_EPISODE", "TASKS", "PLAYING")


class HeldOutLake(FrozenLakeEnv):
    """FrozenLake on the maps that `create_dataset.py` never records."""

    def sample_task(self, mask: torch.Tensor) -> None:
        """Draws maps until one is held out."""
        super().sample_task(mask)
        while bool(mask) and not is_held_out(self):
            super().sample_task(mask)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/frozen_lake/dataset", help="folder, or OWNER/NAME on the Hub")
    parser.add_argument("--split", default="train", help="of a data set on the Hub")
    parser.add_argument("--task", default="task", help="column that names the task of a row, where there is one")
    parser.add_argument("--window", type=at_least(2), default=176, help="steps per window, and in the agent's context")
    add_backbone_options(parser)
    parser.add_argument("--updates", type=at_least(1), default=1600, help="optimiser steps")
    parser.add_argument("--batch-size", type=at_least(1), default=12, help="windows per update")
    parser.add_argument(
        "--play-episodes", type=at_least(0), default=20, help="afterwards, on each of the held-out maps; 0: none"
    )
    parser.add_argument("--slippery", action="store_true", help="play where moves go astray two times in three")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, batches and play")
    parser.add_argument("--output", type=Path, default=Path("runs/offline_training"), help="folder for all results")
    parser.add_argument("--restart", action="store_true", help="delete what an earlier run has left")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> Dataset:
    """Loads the data set from a folder, or from the Hub."""
    folder = Path(arguments.data)
    if (folder / "state.json").exists():  # what `Dataset.save_to_disk` writes
        dataset = load_from_disk(folder)
    elif folder.exists() or arguments.data.count("/") == 1:
        dataset = load_dataset(arguments.data, split=arguments.split)
    else:
        raise SystemExit(
            f"{arguments.data} must be a folder with a data set, or OWNER/NAME on the Hub. "
            "python examples/create_dataset.py makes one."
        )
    if not len(dataset) or not set(REQUIRED_COLUMNS) <= set(dataset.column_names):
        raise SystemExit(
            f"{arguments.data} must have rows with the columns {', '.join(REQUIRED_COLUMNS)}, got {len(dataset)} rows "
            f"with {', '.join(dataset.column_names) or 'none'}."
        )
    return dataset


def sizes_of(dataset: Dataset) -> dict[str, int]:
    """Reads from the rows how large the spaces are."""

    def most(name: str) -> int:
        values = dataset.data.column(name)
        values = pc.list_flatten(values) if pa.types.is_nested(values.type) else values  # an id may be a list of one
        return int(pc.max(values).as_py()) + 1 if has(dataset, name) else 0

    def longest(name: str) -> int:
        values = dataset.data.column(name)
        if not pa.types.is_nested(values.type):
            raise SystemExit(f"column {name!r} must hold lists of numbers, got {values.type}. Cast it in the data set.")
        return int(pc.max(pc.list_value_length(values)).as_py())

    of_actions = [longest(name) for name in ("metadata_q_star", "action_mask") if has(dataset, name)]
    sizes = {
        "actions": max(most("action"), *of_actions, 1),
        "time_steps": most("episode_step"),
        "continuous": longest("observation") if has(dataset, "observation") else 0,
        "discrete": most("observation_discrete") if has(dataset, "observation_discrete") else 0,
    }
    if has(dataset, "observation_image") and not sizes["continuous"] and not sizes["discrete"]:
        raise SystemExit("column 'observation_image' is not read here, and there is no other observation.")
    return sizes


def has(dataset: Dataset, name: str) -> bool:
    """Says whether a column is there; one that is all null is another split's."""
    return name in dataset.column_names and dataset.data.column(name).null_count < len(dataset.data)


def build_model(sizes: dict[str, int], heads: list[str], window: int, backbone: str) -> MouseModel:
    """Builds the agent, of width 64."""
    config = MouseConfig(
        hidden_dim=64,
        window=window,
        embedding_kwargs={
            "max_num_actions": sizes["actions"],
            "max_num_time_steps": sizes["time_steps"],
            "max_num_obs_continuous": sizes["continuous"],
            "max_num_obs_discrete": sizes["discrete"],
            "std": 0.2,
        },
        backbone_kwargs=BACKBONES[backbone],
        **{f"{name}_head_kwargs": {"hidden_dim": 64} for name in heads},
    )
    return MouseModel(config)


def train(model: MouseModel, store: DatasetStore, arguments: argparse.Namespace) -> None:
    """Trains the heads together on one trunk."""
    losses: dict[str, InContextLoss] = {
        "dqn": MouseDQNLoss(
            model.head("dqn"),
            gamma=GAMMA,
            gamma_terminal=GAMMA_TERMINAL,
            reward_scale=REWARD_SCALE,
            cql_weight=CQL_WEIGHT,
            cql_scale_q=False,
        )
    }
    if "sp" in model.config.heads:
        losses["sp"] = SupervisedPolicyLoss(model.head("sp"))
    loss = CombinedLoss(model.trunk, losses, weights={name: LOSS_WEIGHTS[name] for name in losses})
    optimizer = torch.optim.AdamW(loss.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    buffer = replay_buffer(
        store.select(loss.in_keys),
        window=arguments.window,
        batch_size=arguments.batch_size,
        start_share=START_SHARE,
    )
    trainer = offline_trainer(
        loss,
        buffer,
        optimizer,
        updates=arguments.updates,
        directory=arguments.output,
        target_updaters=(SoftUpdate(losses["dqn"], tau=TAU),),
        scheduler=warmup_cosine(optimizer, arguments.updates, warmup=arguments.updates // 20),
        logger=CSVLogger("log", log_dir=arguments.output),
        seed=arguments.seed,
    )
    run(trainer)
    model.set_target("dqn", losses["dqn"].target_head_params)


def play(model: MouseModel, size: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Plays on held-out maps with each head, and with its context cleared; returns ``[maps, episodes]``."""
    episodes, first = arguments.play_episodes, MAPS * arguments.seed

    def lakes() -> EnvBase:
        def lake(seed: int) -> EnvBase:
            base = HeldOutLake(size, is_slippery=arguments.slippery, seed=seed)
            return TaskEnv(base, episodes_per_task=episodes)

        return SerialEnv(MAPS, [lambda seed=first + index: lake(seed) for index in range(MAPS)])

    spec = FrozenLakeEnv(size).action_spec_unbatched
    returns = {}
    for head in model.config.heads:
        actor = model.actor(spec, head=head, temperature=TEMPERATURE[head])
        returns[head] = evaluate(actor, lakes(), episodes, description=head)
        name = f"{head}, context cleared"
        returns[name] = evaluate(actor, TransformedEnv(lakes(), ClearContext()), episodes, description=name)
    return returns


def options_of(arguments: argparse.Namespace, dataset: Dataset, sizes: dict[str, int]) -> dict[str, Any]:
    """Returns what decides what is learned: the recipe and the data, too; how to play is not part of it."""
    names = ("data", "split", "task", "backbone", "window", "updates", "batch_size", "seed")
    recipe = {name: value for name, value in globals().items() if name.isupper() and name not in PLAYING}
    return {name: getattr(arguments, name) for name in names} | {"data set": dataset._fingerprint} | sizes | recipe


def make_store(dataset: Dataset, sizes: dict[str, int], arguments: argparse.Namespace) -> DatasetStore:
    """Opens a data set."""
    store = DatasetStore(
        max_action_dim=sizes["actions"],
        max_obs_continuous_dim=sizes["continuous"],
        max_obs_discrete_dim=sizes["discrete"],
    )
    return store.from_dataset(dataset, task=arguments.task)


def main() -> None:
    """Trains, saves the model, and plays."""
    arguments = parse_arguments()
    others = load_runs(arguments.compare, TASKS)
    try:
        dataset = load(arguments)
        sizes = sizes_of(dataset)
        store = make_store(dataset, sizes, arguments)
        print(f"{arguments.data}: {store}, {', '.join(f'{name} {size}' for name, size in sizes.items() if size)}")
        side = math.isqrt(sizes["discrete"])
        is_lake = sizes["actions"] == 4 and side > 1 and side**2 == sizes["discrete"]
        if is_lake:  # An agent that plays may live longer than any in the data.
            sizes["time_steps"] = max(sizes["time_steps"], LONGEST_EPISODE + 1)
        heads = ["dqn", "sp"] if has(dataset, "metadata_q_star") else ["dqn"]
        torch.manual_seed(arguments.seed)
        model = build_model(sizes, heads, arguments.window, arguments.backbone)
        claim(arguments.output, options_of(arguments, dataset, sizes), restart=arguments.restart)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{error} (--data, --task, --window, --restart, --output)") from None
    train(model, store, arguments)
    model.save_pretrained(arguments.output / "model")
    print(f"Written: {arguments.output / 'model'}, log and checkpoints beside it")

    if not is_lake:
        print("Nothing is played: the data set is not of a FrozenLake on which the goal was reached")
    if not arguments.play_episodes or not is_lake:
        return
    torch.manual_seed(arguments.seed)
    returns = play(model, side, arguments)
    Run(arguments.backbone, {TASKS: {head: returns[head] for head in heads}}).save(arguments.output)
    title = f"FrozenLake, backbone {arguments.backbone}: no weight changes"
    table = save_results(arguments.output, TASKS, returns, expert=1.0, title=title, others=others)
    print(f"\n{table}")
    print(f"Written: {arguments.output / 'results.json'}, curves.png")


if __name__ == "__main__":
    main()
