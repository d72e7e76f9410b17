"""Records a random policy on FrozenLake, a new map for every task, and uploads what it saw to the Hugging Face Hub.

Each task is a map that the agent does not see, with several episodes on it. Beside what the policy did, the data set
holds the optimal action values of each map, so that a policy can be taught from it as well as values learned. One map
in five is never recorded: on these, `offline_training.py` tests what was learned.

    python examples/create_dataset.py                            # 500 episodes; writes runs/frozen_lake/dataset
    python examples/create_dataset.py --episodes 40000           # 10 seconds; enough to learn from
    python examples/create_dataset.py --size 5 --slippery --output runs/slippery_lake/dataset
    python examples/create_dataset.py --push me/frozen-lake      # after `hf auth login`
"""

from __future__ import annotations

import argparse
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
from datasets import Dataset
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from tqdm.auto import tqdm

from torchrl_mouse.data import DatasetStore, push_stores_to_hub
from torchrl_mouse.envs.frozen_lake import optimal_action_values
from torchrl_mouse.schema import RUNNING, TERMINATED, TRUNCATED

NUM_ACTIONS = 4
TEACHER_GAMMA = 0.99  # The sooner the goal is reached, the better.
HELD_OUT = 5  # One map in so many.


def at_least(least: int) -> Callable[[str], int]:
    """Makes a reader of whole numbers."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=at_least(1), default=500, help="episodes in all")
    parser.add_argument("--episodes-per-task", type=at_least(1), default=20, help="episodes on each map")
    parser.add_argument("--size", type=at_least(3), default=4, help="side of the maps, at least 3")
    parser.add_argument("--slippery", action="store_true", help="moves go astray two times in three")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of maps and actions")
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
    if arguments.output.exists() and not (arguments.output / "state.json").exists():
        parser.error(f"--force replaces data sets only, and {arguments.output} is none: give another --output")
    return arguments


def is_held_out(lake: gym.Env) -> bool:
    """Tells whether a lake's map is one of those that are for testing only."""
    return zlib.crc32(lake.unwrapped.desc.tobytes()) % HELD_OUT == 0


def new_lake(arguments: argparse.Namespace, rng: np.random.Generator) -> gym.Env:
    """Draws a map that can be solved, and is not held out."""
    while True:
        drawn = generate_random_map(arguments.size, seed=int(rng.integers(2**31)))
        lake = gym.make("FrozenLake-v1", desc=drawn, is_slippery=arguments.slippery, disable_env_checker=True)
        if not is_held_out(lake):
            lake.reset(seed=int(rng.integers(2**31)))  # of the slips
            return lake


def play(lake: gym.Env, episodes: int, rng: np.random.Generator) -> Iterator[tuple[int, float, int, int, int]]:
    """Plays at random; yields of every frame the action, reward and done code that led to it, its time and cell."""
    for _ in range(episodes):
        cell, _ = lake.reset()
        time, done = 0, RUNNING
        yield 0, 0.0, done, time, cell
        while done == RUNNING:
            action = int(rng.integers(NUM_ACTIONS))
            cell, reward, terminated, truncated, _ = lake.step(action)
            time, done = time + 1, TERMINATED if terminated else TRUNCATED if truncated else RUNNING
            yield action, reward, done, time, cell


def record(arguments: argparse.Namespace) -> DatasetStore:
    """Plays every task; a data set is made of columns with a value for every frame, task after task."""
    rng = np.random.default_rng(arguments.seed)
    names = ("action", "reward", "done", "episode_step", "observation_discrete")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "metadata_q_star", "task")}
    tasks = arguments.episodes // arguments.episodes_per_task
    for task in tqdm(range(tasks), desc="tasks", unit="task"):
        lake = new_lake(arguments, rng)
        frames = zip(*play(lake, arguments.episodes_per_task, rng), strict=True)
        for name, values in zip(names, frames, strict=True):
            columns[name].append(np.array(values))
        cells = columns["observation_discrete"][-1]
        columns["metadata_q_star"].append(optimal_action_values(lake.unwrapped.P, TEACHER_GAMMA)[cells])
        columns["task"].append(np.full(len(cells), task))
    dataset = Dataset.from_dict({name: np.concatenate(parts) for name, parts in columns.items()})
    store = DatasetStore(max_action_dim=NUM_ACTIONS, max_obs_discrete_dim=arguments.size**2)
    return store.from_dataset(dataset, task="task")


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
