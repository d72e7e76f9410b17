"""Plays FrozenLake with a trained agent: several tasks at once, frozen weights, one key-value cache.

Every task is a map that no example trains on, and that the agent does not see. What it learns about the map from its
own episodes, the rewards at their ends included, stands in its context, which lives as long as the task.

    python examples/inference.py --model runs/offline_training/model
    python examples/inference.py --model me/frozen-lake-agent --tasks 64 --episodes 50
    python examples/inference.py --model runs/offline_training/model --clear    # the control: contexts cleared
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from create_dataset import at_least
from offline_training import HeldOutLake
from torchrl.envs import EnvBase, SerialEnv, TransformedEnv

from torchrl_mouse.data.saving import replacing
from torchrl_mouse.envs import ClearContext, TaskEnv
from torchrl_mouse.evaluation import evaluate, plot_curves
from torchrl_mouse.models import load_model


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or OWNER/NAME on the Hugging Face Hub")
    parser.add_argument("--head", help="head to act with; the model's own choice by default")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the best action; above it, drawn")
    parser.add_argument("--tasks", type=at_least(1), default=16, help="maps, played side by side")
    parser.add_argument("--episodes", type=at_least(1), default=20, help="on each map")
    parser.add_argument("--size", type=at_least(2), default=4, help="side of the maps")
    parser.add_argument("--slippery", action="store_true", help="moves go astray two times in three")
    parser.add_argument("--clear", action="store_true", help="clear the context at every episode")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of maps and actions")
    parser.add_argument("--output", type=Path, default=Path("runs/inference"), help="folder for returns and plot")
    return parser.parse_args()


def make_task(arguments: argparse.Namespace, seed: int) -> EnvBase:
    """Makes one row: a map, and all the episodes on it."""
    lake = HeldOutLake(arguments.size, is_slippery=arguments.slippery, seed=seed)
    return TaskEnv(lake, episodes_per_task=arguments.episodes)


def main() -> None:
    """Plays, and writes ``returns.json`` and ``curves.png``."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    first = 10**6 * (arguments.seed + 1)
    env: EnvBase = SerialEnv(
        arguments.tasks, [partial(make_task, arguments, first + task) for task in range(arguments.tasks)]
    )
    try:
        model = load_model(arguments.model)
        actor = model.actor(env.action_spec_unbatched, head=arguments.head, temperature=arguments.temperature)
        known, cells = model.config.embedding_kwargs.get("max_num_obs_discrete", 0), arguments.size**2
        if known < cells:
            raise ValueError(f"The model must know maps of {cells} cells, got one that knows {known}. Change --size.")
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{error} (--model, --head, --temperature, --size)") from None
    if arguments.clear:
        env = TransformedEnv(env, ClearContext())
    returns = evaluate(actor, env, arguments.episodes, description="episodes")

    with replacing(arguments.output / "returns.json") as file:
        file.write_text(json.dumps(returns.tolist()), encoding="utf-8")
    plot_curves({"FrozenLake": {"agent": returns}}, arguments.output / "curves.png", title="No weight changes")
    for episode, share in enumerate(returns.mean(0).tolist(), 1):
        print(f"episode {episode:3}: {share:4.0%} of {arguments.tasks} maps solved  {'#' * round(40 * share)}")
    print(f"Written: {arguments.output / 'returns.json'}, curves.png")


if __name__ == "__main__":
    main()
