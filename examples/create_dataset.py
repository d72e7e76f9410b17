"""Records a random policy on FrozenLake, a new map for every task, and uploads what it saw to the Hugging Face Hub.

Each task is a map that the agent does not see, with several episodes on it. Beside what the policy did, the data set
holds the optimal action values of each map, so that a policy can be taught from it as well as values learned.

    python examples/create_dataset.py                            # seconds; writes runs/frozen_lake/dataset
    python examples/create_dataset.py --episodes 20000 --size 5
    python examples/create_dataset.py --push me/frozen-lake      # after `hf auth login`
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torchrl.collectors import Collector, RandomPolicy
from tqdm.auto import tqdm

from torchrl_mouse.data import DatasetStore, push_stores_to_hub
from torchrl_mouse.envs import FrozenLakeEnv, TaskEnv

NUM_ACTIONS = 4
FRAMES_PER_BATCH = 1000


def positive(text: str) -> int:
    """Reads a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=positive, default=500, help="episodes in all")
    parser.add_argument("--episodes-per-task", type=positive, default=20, help="episodes on each map")
    parser.add_argument("--size", type=positive, default=4, help="side of the maps, at least 2")
    parser.add_argument("--slippery", action="store_true", help="moves go astray two times in three")
    parser.add_argument("--seed", type=int, default=0, help="of maps and actions")
    parser.add_argument("--output", type=Path, default=Path("runs/frozen_lake/dataset"), help="folder of the data set")
    parser.add_argument("--force", action="store_true", help="replace the data set that is there")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="with --push: make a new repository private")
    arguments = parser.parse_args()
    if arguments.episodes % arguments.episodes_per_task:
        parser.error(
            f"--episodes must be a multiple of --episodes-per-task {arguments.episodes_per_task}, got "
            f"{arguments.episodes}"
        )
    if arguments.output.exists() and not arguments.force:
        parser.error(f"{arguments.output} is there already: give --force to replace it, or another --output")
    return arguments


def record(arguments: argparse.Namespace) -> DatasetStore:
    """Plays until every task is finished."""
    torch.manual_seed(arguments.seed)
    base = FrozenLakeEnv(arguments.size, is_slippery=arguments.slippery, seed=arguments.seed, teacher=True)
    env = TaskEnv(base, episodes_per_task=arguments.episodes_per_task)
    policy = RandomPolicy(env.full_action_spec)
    store = DatasetStore(max_action_dim=NUM_ACTIONS, max_obs_discrete_dim=arguments.size**2)
    tasks = arguments.episodes // arguments.episodes_per_task
    collector = Collector(env, policy, frames_per_batch=FRAMES_PER_BATCH, total_frames=-1)
    with tqdm(total=tasks, desc="tasks", unit="task") as bar:
        for batch in collector:
            finished = batch["next", "done"].squeeze(-1).cumsum(0)
            missing = tasks - store.num_tasks
            enough = (finished >= missing).nonzero()  # What comes after the last task's end is left out.
            store.extend(batch[: int(enough[0]) + 1] if len(enough) else batch)
            bar.update(store.num_tasks - bar.n)
            if store.num_tasks == tasks:
                break
    collector.shutdown()
    return store


def main() -> None:
    """Records, writes and, where asked, uploads the data set."""
    arguments = parse_arguments()
    store = record(arguments)
    unfinished = arguments.output.with_name(arguments.output.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    store.to_dataset().save_to_disk(unfinished)
    shutil.rmtree(arguments.output, ignore_errors=True)
    unfinished.rename(arguments.output)  # An interrupted run leaves nothing that looks complete.
    steps = store[:]
    wins = int((steps["next", "reward"] > 0).sum())
    print(f"{store}: {arguments.episodes} episodes, {wins} of them reached the goal. Written: {arguments.output}")
    print(f"Train on it: python examples/offline_training.py --data {arguments.output}")
    if arguments.push:
        commit = push_stores_to_hub([store], arguments.push, split="train", private=arguments.private or None)
        print(f"Uploaded: {commit.commit_url}")


if __name__ == "__main__":
    main()
