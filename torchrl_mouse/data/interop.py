"""Gymnasium's world as records: Minari data sets, both ways, and vector environments recorded directly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from tqdm.auto import tqdm

from torchrl_mouse import schema
from torchrl_mouse.data.images import IMAGE
from torchrl_mouse.data.store import DatasetStore
from torchrl_mouse.data.trajectories import add_records, appearance, episode_records

if TYPE_CHECKING:
    from collections.abc import Callable

    import minari
    from gymnasium.vector import VectorEnv

TASK = "task"
"""The key of a Minari episode's metadata that says which task it belongs to."""


def from_minari(dataset: minari.MinariDataset, store: DatasetStore | None = None) -> DatasetStore:
    """Adds the episodes of a Minari data set to a store.

    The episodes of one call are one task (one MDP), in the data set's order. Where their metadata hold a ``"task"``, as
    :func:`to_minari` writes it, each of its values is a task of its own. For other groups, call once for each
    ``dataset.filter_episodes(...)`` with the same store.

    Args:
        dataset: observations of a ``Box`` (uint8 of 2 or 3 dimensions are images, in the store's ``observation_image``;
            others become float32; both are flattened) or ``Discrete`` space, actions of a ``Discrete`` space; ids count
            from 0 in the store, whatever the spaces' ``start``. An episode's last step that is neither terminated nor
            truncated was cut by the recording: it counts as truncated.
        store: where the records are appended; by default a new one with the sizes of the spaces.

    Returns:
        The store.

    Raises:
        TypeError: not a data set, or one with spaces that a store does not hold.
        ValueError: no steps, NaN, a value out of the store's range, or steps that Minari could not read.

    Examples:
        See :func:`to_minari`.
    """
    where = "from_minari"
    if isinstance(dataset, str):
        raise TypeError(f"{where}: dataset must be a MinariDataset, got {dataset!r}. Open it by minari.load_dataset.")
    observation_space, action_space = dataset.observation_space, dataset.action_space
    _check_spaces(observation_space, action_space, where)
    metadata = list(dataset.storage.get_episode_metadata(dataset.episode_indices))
    episodes = list(dataset)
    for number, about in enumerate(metadata):
        read = len(episodes[number]) if number < len(episodes) else 0
        if read != about["total_steps"]:
            raise ValueError(
                f"{where}: episode {about['id']} must be read whole, got {read} of {about['total_steps']} steps. "
                'Minari reads at most 32767 steps of an episode in "arrow" format: store longer ones as "hdf5".'
            )
    tasks = appearance(np.array([str(about.get(TASK)) for about in metadata]))
    kept = [number for number in np.argsort(tasks, kind="stable") if len(episodes[number])]
    if not kept:
        raise ValueError(f"{where}: dataset must have steps, got {len(metadata)} episodes without any. Record some.")
    lengths = torch.tensor([len(episodes[number]) for number in kept])

    def joined(field: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(episodes[number], field)) for number in kept])

    done = schema.done_code(*(torch.from_numpy(joined(flag)).bool() for flag in ("terminations", "truncations")))
    action = _to_ids(joined("actions"), action_space)
    records = episode_records(lengths, action, torch.from_numpy(joined("rewards").astype(np.float32)), done)
    records.update(_observations(joined("observations"), observation_space))
    task = torch.from_numpy(tasks[kept]).repeat_interleave(lengths + 1)
    return add_records(_store_for(observation_space, action_space) if store is None else store, records, task, where)


def to_minari(
    store: DatasetStore,
    dataset_id: str,
    observation_space: spaces.Space[Any],
    action_space: spaces.Discrete,
    **options: Any,
) -> minari.MinariDataset:
    """Writes a store's episodes as a local Minari data set, which :func:`from_minari` reads back to the same records.

    Each episode's metadata name its task (``"task"``, counted from 0). Teacher values are left out, and so are first
    frames that no step follows. An episode that was cut (the last of its task, if still running) is marked truncated,
    as Minari's own recorder does.

    Args:
        store: at least one transition.
        dataset_id: Minari's name for it, ``(namespace/)name-v0``.
        observation_space: ``Box``: the ``observation`` column is written, in this shape and type, or the
            ``observation_image`` column where it is uint8 of 2 or 3 dimensions; ``Discrete``: the
            ``observation_discrete`` column, counted from its ``start``.
        action_space: counted from its ``start``.
        **options: the rest of ``minari.create_dataset_from_buffers``, such as ``env``, ``author`` and ``data_format``,
            which is ``"arrow"`` here: it needs no more packages than ``torchrl_mouse[minari]`` installs. Images are
            kept as they are (``jpeg_encoding=False``).

    Returns:
        The data set; Minari keeps it under ``MINARI_DATASETS_PATH``.

    Raises:
        ImportError: Minari is not installed.
        KeyError: the store lacks the column of the observations.
        RuntimeError: the store has no rows.
        TypeError: a space that a store does not hold.
        ValueError: no transitions, or the spaces do not fit the values.

    Examples:
        >>> import os, tempfile
        >>> rows = {"action": [0, 3, 1], "reward": [0.0, 0.5, 1.0], "done": [0, 0, 1], "time": [0, 1, 2]}
        >>> store = DatasetStore(4, max_obs_discrete_dim=9)
        >>> for action, reward, done, time in zip(*rows.values()):
        ...     store.append({"action": action, "reward": reward, "done": done, "episode_step": time,
        ...                   "observation_discrete": 2 * time})
        >>> os.environ["MINARI_DATASETS_PATH"] = tempfile.mkdtemp()
        >>> about = {"author": "A", "author_email": "a@b.org", "code_permalink": "c", "algorithm_name": "none"}
        >>> about |= {"description": "an example", "env": "FrozenLake-v1", "eval_env": "FrozenLake-v1"}
        >>> dataset = to_minari(store, "lake-v0", spaces.Discrete(9), spaces.Discrete(4), **about)
        >>> dataset[0].observations.tolist(), dataset[0].actions.tolist()
        ([0, 2, 4], [3, 1])
        >>> from_minari(dataset)
        DatasetStore(steps=3, tasks=1)
    """
    where = "to_minari"
    try:
        import minari
        from minari.data_collector.episode_buffer import EpisodeBuffer
    except ImportError as error:
        raise ImportError(
            f'{where}: the package minari must be installed, got "{error}". Run pip install "torchrl-mouse[minari]".'
        ) from error
    _check_spaces(observation_space, action_space, where)
    rows = store.to_dataset().with_format("numpy")
    name = _column_of(observation_space)
    if name not in rows.column_names:
        present = ", ".join(rows.column_names)
        raise KeyError(f"{where}: column {name!r} must be in the store, got only {present}. Give another space.")
    done, reward, task = (rows[column][:] for column in ("done", "reward", TASK))
    action = _from_column(rows["action"][:], action_space, "action", where)
    frames = rows.with_format("numpy", dtype=np.uint8) if name == IMAGE else rows  # which reads integers as int64
    observation = _from_column(frames[name][:], observation_space, name, where)

    last = np.append((done[:-1] != schema.RUNNING) | (task[1:] != task[:-1]), True)
    ends = np.flatnonzero(last) + 1
    begins = np.append(0, ends[:-1])
    begins, ends = begins[ends - begins > 1], ends[ends - begins > 1]
    if not len(begins):
        raise ValueError(f"{where}: store must hold a transition, got first frames only. Record some steps.")
    truncated = (done == schema.TRUNCATED) | (last & (done == schema.RUNNING))
    episodes = [
        EpisodeBuffer(
            observations=observation[begin:end],
            actions=action[begin + 1 : end],
            rewards=reward[begin + 1 : end],
            terminations=done[begin + 1 : end] == schema.TERMINATED,
            truncations=truncated[begin + 1 : end],
        )
        for begin, end in zip(begins, ends, strict=True)
    ]
    options = {"data_format": "arrow", "jpeg_encoding": False, **options}
    dataset = minari.create_dataset_from_buffers(
        dataset_id, episodes, observation_space=observation_space, action_space=action_space, **options
    )
    dataset.storage.update_episode_metadata([{TASK: int(number)} for number in task[begins]], dataset.episode_indices)
    return dataset


def record_vector_env(
    envs: VectorEnv[Any, Any, Any],
    policy: Callable[[Any], Any] | None,
    num_steps: int,
    store: DatasetStore | None = None,
    *,
    seed: int | None = None,
    progress_bar: bool = True,
) -> DatasetStore:
    """Steps a Gymnasium vector environment and adds what happens to a store: each sub-environment is one task.

    The records are the same for every autoreset mode: an episode's last observation, with its reward and done code,
    is followed by the next episode's first. What differs is whether the policy is asked at that last observation: in
    ``NEXT_STEP`` mode (Gymnasium's default) it is, and its action is ignored.

    Args:
        envs: ``single_observation_space`` a ``Box`` or ``Discrete``, ``single_action_space`` ``Discrete``, both stored
            as by :func:`from_minari`. It is reset at the beginning and left open.
        policy: observations ``[num_envs, ...]`` -> actions ``[num_envs]``, both as the environment has them. ``None``:
            uniform random actions, drawn with ``seed``.
        num_steps: calls of ``envs.step``, at least 1; the last episodes may be cut by it.
        store: where the records are appended; by default a new one with the sizes of the spaces.
        seed: of the environments' first reset and of the random actions.
        progress_bar: whether to show one.

    Returns:
        The store.

    Raises:
        TypeError: a space that a store does not hold.
        ValueError: ``num_steps`` below 1, actions of another shape or type, NaN, or a value out of the store's range.

    .. note::
        The records wait in memory until the end, when they become visible all at once.

    Examples:
        >>> import gymnasium
        >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=3)
        >>> store = record_vector_env(envs, None, 100, seed=0, progress_bar=False)
        >>> store.num_tasks, store[0]["observation"].shape
        (3, torch.Size([4]))
        >>> lean = lambda observations: (observations[:, 2] > 0).astype(int)
        >>> record_vector_env(envs, lean, 100, store, seed=0, progress_bar=False).num_tasks
        6
    """
    where = "record_vector_env"
    observation_space, action_space = envs.single_observation_space, envs.single_action_space
    _check_spaces(observation_space, action_space, where)
    if num_steps < 1:
        raise ValueError(f"{where}: num_steps must be at least 1, got {num_steps}.")
    mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    # Not the plain seed: the first environment draws from that.
    generator = np.random.default_rng(None if seed is None else (seed, 1))
    zero = np.zeros(envs.num_envs, dtype=np.int64)
    frames: list[dict[str, np.ndarray]] = []

    def add(observation: Any, present: np.ndarray, action: Any = zero, reward: Any = zero, done: Any = zero) -> None:
        """Keeps one frame of each environment, copied: some environments write to the same arrays at each step."""
        frame = {"observation": observation, "present": present, "action": action, "reward": reward, "done": done}
        frames.append({name: np.array(value) for name, value in {**frame, "time": time}.items()})

    observation, _ = envs.reset(seed=seed)
    time, over, everywhere = zero, zero.astype(bool), np.ones(envs.num_envs, dtype=bool)
    add(observation, everywhere)
    for step in tqdm(range(1, num_steps + 1), desc="recording", unit="step", disable=not progress_bar):
        if policy is None:
            action = generator.integers(action_space.n, size=envs.num_envs) + action_space.start
        else:
            action = np.asarray(policy(observation))
            if action.shape != (envs.num_envs,) or action.dtype.kind not in "iu":
                raise ValueError(
                    f"{where}: policy must return integers of shape ({envs.num_envs},), got {action.dtype} of shape "
                    f"{action.shape}. Return one action id for each sub-environment."
                )
        observation, reward, terminated, truncated, infos = envs.step(action)
        begins = over if mode is AutoresetMode.NEXT_STEP else ~everywhere
        time, over = np.where(begins, 0, time + 1), terminated | truncated
        shown = observation
        if mode is AutoresetMode.SAME_STEP and over.any():
            shown = np.array(observation)
            shown[over] = np.stack(list(infos["final_obs"][over]))
        code = np.where(terminated, schema.TERMINATED, np.where(truncated, schema.TRUNCATED, schema.RUNNING))
        taken = action - action_space.start
        # A first frame that nothing follows is no part of the record.
        present = everywhere if step < num_steps else ~begins
        add(shown, present, *(np.where(begins, 0, value) for value in (taken, reward, code)))
        if mode is not AutoresetMode.NEXT_STEP and over.any() and step < num_steps:
            if mode is AutoresetMode.DISABLED:
                observation, _ = envs.reset(options={"reset_mask": over})
            time = np.where(over, 0, time)
            add(observation, over)

    # [frames, num_envs, ...] -> one environment after the other, each in the order of time
    table = {name: np.stack([frame[name] for frame in frames]).swapaxes(0, 1) for name in frames[0]}
    task = torch.from_numpy(table["present"].nonzero()[0])
    table = {name: value[table["present"]] for name, value in table.items()}
    records = {name: torch.from_numpy(table[name].astype(np.int64)) for name in ("action", "done", "time")}
    records["reward"] = torch.from_numpy(table["reward"].astype(np.float32))
    records.update(_observations(table["observation"], observation_space))
    return add_records(_store_for(observation_space, action_space) if store is None else store, records, task, where)


def _check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any], where: str) -> None:
    """Raises where a space is of a kind that records do not hold."""
    if not isinstance(observation_space, spaces.Box | spaces.Discrete):
        raise TypeError(
            f"{where}: the observation space must be Box or Discrete, got {observation_space}. Wrap the environment in "
            "gymnasium.wrappers.FlattenObservation."
        )
    if not isinstance(action_space, spaces.Discrete):
        raise TypeError(
            f"{where}: the action space must be Discrete, got {action_space}. A store holds action ids only: choose a "
            "finite set of actions and wrap the environment in gymnasium.wrappers.TransformAction."
        )


def _column_of(space: spaces.Space[Any]) -> str:
    """Names the column that holds the observations of a space."""
    if isinstance(space, spaces.Discrete):
        return "observation_discrete"
    return IMAGE if space.dtype == np.uint8 and len(space.shape) in (2, 3) else "observation"


def _store_for(observation_space: spaces.Space[Any], action_space: spaces.Discrete) -> DatasetStore:
    actions = int(action_space.n)
    if isinstance(observation_space, spaces.Discrete):
        return DatasetStore(actions, max_obs_discrete_dim=int(observation_space.n))
    width = int(np.prod(observation_space.shape))
    if _column_of(observation_space) == IMAGE:
        return DatasetStore(actions, max_obs_image_pixels=width)
    return DatasetStore(actions, max_obs_continuous_dim=width)


def _observations(values: np.ndarray, space: spaces.Space[Any]) -> dict[str, torch.Tensor]:
    """Turns observations ``[rows, ...]`` into the column of their space."""
    if isinstance(space, spaces.Discrete):
        return {"obs_discrete": _to_ids(values, space)}
    flat = values.reshape(len(values), -1)
    if _column_of(space) == IMAGE:
        return {"obs_image": torch.from_numpy(flat)}
    return {"obs_continuous": torch.from_numpy(flat.astype(np.float32))}


def _to_ids(values: np.ndarray, space: spaces.Discrete) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64).reshape(-1) - int(space.start))


def _from_column(values: np.ndarray, space: spaces.Space[Any], name: str, where: str) -> np.ndarray:
    """Turns a column back into elements of its space."""
    if isinstance(space, spaces.Discrete):
        if values.max() >= space.n:
            raise ValueError(
                f"{where}: column {name!r} must lie in [0, {space.n}), got {values.max()}. Give a larger space."
            )
        return np.asarray(values + space.start, dtype=space.dtype)
    if values.shape[1:] != (np.prod(space.shape),):
        raise ValueError(
            f"{where}: column {name!r} must fill the space's shape {space.shape}, got {values.shape[1]} values a row. "
            "Give a space of that size."
        )
    return values.reshape(-1, *space.shape).astype(space.dtype, copy=False)
