"""Trains an agent on a data set of somebody's experience, from disk or from the Hugging Face Hub.

A Q-value head learns from the rewards (in-context DQN with CQL), and where the data set holds a teacher's action
values a policy head learns from these, both on one trunk. Sizes are read from the data set. An agent trained on
FrozenLake then plays on maps that it has never seen, with frozen weights.

    python examples/create_dataset.py --episodes 4000 --output runs/frozen_lake/dataset
    python examples/offline_training.py --data runs/frozen_lake/dataset
    python examples/offline_training.py --data me/frozen-lake --split train
    python examples/offline_training.py --updates 20 --play-episodes 2 --output runs/smoke    # seconds, to see it run
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, load_dataset, load_from_disk
from torchrl.envs import EnvBase, SerialEnv, TransformedEnv
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger

from torchrl_mouse.data import DatasetStore, replay_buffer
from torchrl_mouse.envs import ClearContext, FrozenLakeEnv, TaskEnv
from torchrl_mouse.evaluation import evaluate, plot_curves, summarize
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.objectives import CombinedLoss, InContextLoss, MouseDQNLoss, SupervisedPolicyLoss
from torchrl_mouse.recipes import claim, offline_trainer, run, warmup_cosine

LOSS_WEIGHTS = {"dqn": 1.0, "sp": 1.0}
TEMPERATURE = {"dqn": 0.05, "sp": 1.0}  # Action values of a reward of 1 lie close together.
MAPS = 32


def positive(text: str) -> int:
    """Reads a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/frozen_lake/dataset", help="folder, or OWNER/NAME on the Hub")
    parser.add_argument("--split", default="train", help="of a data set on the Hub")
    parser.add_argument("--task", default="task", help="column that names the task of a row, where there is one")
    parser.add_argument("--window", type=positive, default=128, help="steps per window, and in the agent's context")
    parser.add_argument("--start-share", type=float, default=0.3, help="windows that begin with their task, in [0, 1]")
    parser.add_argument("--updates", type=positive, default=1500, help="optimiser steps")
    parser.add_argument("--batch-size", type=positive, default=16, help="windows per update")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--gamma", type=float, default=0.9, help="discount")
    parser.add_argument("--gamma-terminal", type=float, default=0.9, help="discount over the ends of episodes")
    parser.add_argument("--cql-weight", type=float, default=0.1, help="of the conservative penalty")
    parser.add_argument("--play-episodes", type=int, default=20, help="afterwards, on fresh FrozenLake maps; 0: none")
    parser.add_argument("--slippery", action="store_true", help="play where moves go astray two times in three")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and play")
    parser.add_argument("--output", type=Path, default=Path("runs/offline_training"), help="folder for all results")
    parser.add_argument("--restart", action="store_true", help="delete what an earlier run has left")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> Dataset:
    """Loads the data set from a folder, or from the Hub."""
    folder = Path(arguments.data)
    if (folder / "state.json").exists():  # what `Dataset.save_to_disk` writes
        return load_from_disk(folder)
    if folder.exists() or arguments.data.count("/") == 1:
        return load_dataset(arguments.data, split=arguments.split)
    raise SystemExit(
        f"{arguments.data} must be a folder with a data set, or OWNER/NAME on the Hub. "
        "python examples/create_dataset.py makes one."
    )


def sizes_of(dataset: Dataset) -> dict[str, int]:
    """Reads from the rows how large the spaces are."""

    def most(name: str) -> int:
        return int(pc.max(dataset.data.column(name)).as_py()) + 1

    def longest(name: str) -> int:
        return int(pc.max(pc.list_value_length(dataset.data.column(name))).as_py())

    names = dataset.column_names
    return {
        "actions": max(most("action"), longest("metadata_q_star") if "metadata_q_star" in names else 1),
        "time_steps": most("episode_step"),
        "continuous": longest("observation") if "observation" in names else 0,
        "discrete": most("observation_discrete") if "observation_discrete" in names else 0,
    }


def build_model(sizes: dict[str, int], heads: list[str], window: int) -> MouseModel:
    """Builds the agent: 4 layers of width 64."""
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
        backbone_kwargs={"kind": "llama", "num_layers": 4, "num_heads": 4, "initializer_range": 0.1},
        **{f"{name}_head_kwargs": {"hidden_dim": 64} for name in heads},
    )
    return MouseModel(config)


def train(model: MouseModel, store: DatasetStore, arguments: argparse.Namespace) -> None:
    """Trains the heads together on one trunk."""
    losses: dict[str, InContextLoss] = {
        "dqn": MouseDQNLoss(
            model.head("dqn"),
            gamma=arguments.gamma,
            gamma_terminal=arguments.gamma_terminal,
            cql_weight=arguments.cql_weight,
            double_dqn=True,
        )
    }
    if "sp" in model.config.heads:
        losses["sp"] = SupervisedPolicyLoss(model.head("sp"))
    loss = CombinedLoss(model.trunk, losses, weights={name: LOSS_WEIGHTS[name] for name in losses})
    optimizer = torch.optim.AdamW(loss.parameters(), lr=arguments.learning_rate)
    buffer = replay_buffer(
        store.select(loss.in_keys),
        window=arguments.window,
        batch_size=arguments.batch_size,
        start_share=arguments.start_share,
    )
    trainer = offline_trainer(
        loss,
        buffer,
        optimizer,
        updates=arguments.updates,
        directory=arguments.output,
        target_updaters=(SoftUpdate(losses["dqn"], tau=0.01),),
        scheduler=warmup_cosine(optimizer, arguments.updates, warmup=arguments.updates // 20),
        logger=CSVLogger("log", log_dir=arguments.output),
        seed=arguments.seed,
    )
    run(trainer)
    model.set_target("dqn", losses["dqn"].target_head_params)


def play(model: MouseModel, size: int, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Plays on fresh maps with each head, and with its context cleared; returns ``[maps, episodes]``."""
    episodes, first = arguments.play_episodes, 10**6 * (arguments.seed + 1)  # no seed of maps in a data set

    def lakes() -> EnvBase:
        def lake(seed: int) -> EnvBase:
            base = FrozenLakeEnv(size, is_slippery=arguments.slippery, seed=seed)
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


def main() -> None:
    """Trains, saves the model, and plays."""
    arguments = parse_arguments()
    dataset = load(arguments)
    sizes = sizes_of(dataset)
    store = DatasetStore(
        max_action_dim=sizes["actions"],
        max_obs_continuous_dim=sizes["continuous"],
        max_obs_discrete_dim=sizes["discrete"],
    ).from_dataset(dataset, task=arguments.task)
    print(f"{arguments.data}: {store}, {', '.join(f'{name} {size}' for name, size in sizes.items() if size)}")
    side = math.isqrt(sizes["discrete"])
    is_lake = sizes["actions"] == 4 and side > 1 and side**2 == sizes["discrete"]
    if is_lake:  # An agent that plays may live longer than any in the data.
        sizes["time_steps"] = max(sizes["time_steps"], 101)

    outcome = ("output", "restart", "play_episodes", "slippery")
    options = {name: value for name, value in vars(arguments).items() if name not in outcome}
    try:
        claim(arguments.output, options, restart=arguments.restart)
    except ValueError as error:
        raise SystemExit(f"{error} (--restart, --output)") from None
    torch.manual_seed(arguments.seed)
    model = build_model(
        sizes, ["dqn", "sp"] if "metadata_q_star" in dataset.column_names else ["dqn"], arguments.window
    )
    train(model, store, arguments)
    model.save_pretrained(arguments.output / "model")
    print(f"Written: {arguments.output / 'model'}, log and checkpoints beside it")

    if not arguments.play_episodes or not is_lake:
        return
    torch.manual_seed(arguments.seed)
    returns = play(model, side, arguments)
    results: dict[str, Any] = {name: summarize(values, 1.0) for name, values in returns.items()}
    plot_curves({"fresh maps": returns}, arguments.output / "curves.png", title="FrozenLake: no weight changes")
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"\n{'fresh maps':<26}{'NAUC':>8}{'first 10':>10}{'last 10':>10}")
    for name, result in results.items():
        print(
            f"{name:<26}{result['nauc']:>8.3f}{result['first_10_episodes']:>10.3f}{result['last_10_episodes']:>10.3f}"
        )
    print(f"Written: {arguments.output / 'results.json'}, curves.png")


if __name__ == "__main__":
    main()
