"""TorchRL's trajectories as records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torchrl.data import ReplayBuffer

from torchrl_mouse import schema
from torchrl_mouse.data.columns import RECORD_NAMES
from torchrl_mouse.data.images import check_pixels, to_pixels
from torchrl_mouse.streams import draw_streams

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tensordict.utils import NestedKey

    from torchrl_mouse.data.store import DatasetStore

_WHERE = "from_trajectories"
_COLUMNS = {record: column for column, record in RECORD_NAMES.items()}
_TRAJECTORY: tuple[NestedKey, ...] = (("collector", "traj_ids"), "episode")


def from_trajectories(
    data: TensorDictBase | ReplayBuffer | Iterable[TensorDictBase],
    store: DatasetStore,
    *,
    observation: NestedKey | None = "observation",
    observation_discrete: NestedKey | None = None,
    pixels: NestedKey | None = None,
    action: NestedKey = "action",
    trajectory: NestedKey | None = None,
    task: NestedKey | None = None,
) -> DatasetStore:
    """Adds the trajectories of TorchRL transitions to a store: each trajectory is one or more episodes of a task.

    It is for transitions of single episodes, as collectors, TorchRL's data sets and its replay buffers hold them; what
    :class:`~torchrl_mouse.envs.TaskEnv` gives goes to ``store.extend``. An episode ends where ``("next", "done")`` is
    set; a trajectory that ends without (it was cut) counts as truncated there.

    Args:
        data: transitions ``[*, T]``, time in order along the last dimension: one tensordict, several, whose
            trajectories may go on from one to the next, or a replay buffer or data set. A buffer that has wrapped
            around is read from its oldest row; an episode whose beginning was overwritten begins at its oldest row.
            Padding (``("collector", "mask")`` false) is left out.
        store: where the records are appended; its sizes are those of the spaces, which the data do not say.
        observation: entry of real vectors ``[*, T, ...]``, flattened to the store's ``observation``; ``None``: none.
        observation_discrete: entry of ids or one-hot vectors, the store's ``observation_discrete``; ``None``: none.
        pixels: entry of images ``[*, T, ...]``, integers in 0..255 or floats in 0..1, flattened to the store's
            ``observation_image``; ``None``: none.
        action: entry of ids or one-hot vectors.
        trajectory: integer entry that names each step's trajectory, whose steps need then not be adjacent. By default
            ``("collector", "traj_ids")`` or ``"episode"`` if present, else each row of ``T`` steps is a trajectory.
        task: integer entry that names each step's task; by default all are one task.

    Returns:
        The store.

    Raises:
        KeyError: an entry is missing.
        TypeError: data of another kind, or actions that are not ids.
        ValueError: no steps, NaN, a value out of range, or a step that does not begin with the observation that the
            trajectory's last one led to.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_mouse.data import DatasetStore
        >>> steps = GymEnv("CartPole-v1").rollout(50, break_when_any_done=False)
        >>> steps.shape, bool(steps["next", "done"].any())
        (torch.Size([50]), True)
        >>> store = from_trajectories(steps, DatasetStore(2, max_obs_continuous_dim=4))
        >>> store.num_tasks, int(store[:]["collector", "mask"].sum()) > 50
        (1, True)
    """
    parts: Iterable[TensorDictBase] = [data] if isinstance(data, TensorDictBase) else data  # type: ignore[assignment]
    if isinstance(data, ReplayBuffer):
        parts = [_oldest_first(data)]
    columns = {"obs_continuous": observation, "obs_discrete": observation_discrete, "obs_image": pixels}
    keys = {name: key for name, key in columns.items() if key is not None}
    tables, rows = [], 0
    for part in parts:
        if not isinstance(part, TensorDictBase) or not part.ndim:
            got = f"shape {tuple(part.shape)}" if isinstance(part, TensorDictBase) else type(part).__name__
            raise TypeError(f"{_WHERE}: data must be tensordicts [*, T] or a replay buffer, got {got}.")
        if part.shape.numel():  # `TensorDict.numel` is 1 at least
            tables.append(_read_transitions(part, keys, action, trajectory, task, rows))
        rows += part.shape.numel()
    steps: TensorDictBase = torch.cat(tables) if tables else TensorDict({}, [0])  # type: ignore[call-overload]
    if not len(steps):
        raise ValueError(f"{_WHERE}: data must have steps, got none. Collect some first.")

    # Tasks in order of appearance, in each its trajectories in order of appearance, in each the order of time.
    keys_of = [appearance(steps[name].numpy()) for name in ("trajectory", "task")]
    order = torch.from_numpy(np.lexsort(keys_of))
    steps = steps[order]
    trajectories, tasks = (torch.from_numpy(values)[order] for values in keys_of)
    ends = steps["done"] != schema.RUNNING
    ends[:-1] |= (tasks[1:] != tasks[:-1]) | (trajectories[1:] != trajectories[:-1])
    ends[-1] = True
    last = ends.nonzero().squeeze(-1)
    records = episode_records(
        torch.diff(last, prepend=torch.tensor([-1])), steps["action"], steps["reward"], steps["done"]
    )
    for name, key in keys.items():
        begins, follows = steps[name], steps["next", name]
        differs = (begins[1:] != follows[:-1]) & ~(begins[1:].isnan() & follows[:-1].isnan())
        broken = (differs if differs.ndim == 1 else differs.any(-1)) & ~ends[:-1]
        if broken.any():
            row = int(order[1:][broken][0])
            raise ValueError(
                f"{_WHERE}: a step must begin with the observation that its trajectory's last step led to, got another "
                f"{key!r} at step {row} of the data. Name the trajectories' ids (trajectory=), or give each row of "
                "steps in the order of time."
            )
        # Every transition's observation, and behind each episode's last one the observation that it led to.
        frames = torch.arange(len(steps)) + torch.cat([ends.new_zeros(1), ends[:-1]]).cumsum(0)
        column = begins.new_empty(len(steps) + len(last), *begins.shape[1:])
        column[frames], column[frames[last] + 1] = begins, follows[last]
        records[name] = column
    task_of = tasks.repeat_interleave(1 + ends.long())
    return add_records(store, records, task_of, _WHERE)


def episode_records(
    lengths: torch.Tensor, action: torch.Tensor, reward: torch.Tensor, done: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Turns transitions into the records that they led to, behind a first frame for each episode.

    Args:
        lengths: transitions of each episode, int64 ``[episodes]``, each at least 1.
        action: int64 ``[transitions]``, one episode after the other.
        reward: float32 ``[transitions]``.
        done: done codes, int64 ``[transitions]``; an episode whose last is 0 was cut, which is stored as truncated.

    Returns:
        ``action``, ``reward``, ``done`` and ``time`` ``[transitions + episodes]``, as
        :func:`~torchrl_mouse.schema.from_mouse_records` reads them; the frames are the caller's.

    Examples:
        >>> one = torch.ones(3, dtype=torch.int64)
        >>> records = episode_records(torch.tensor([2, 1]), 7 * one, one.float(), torch.tensor([0, 1, 0]))
        >>> records["action"].tolist(), records["done"].tolist(), records["time"].tolist()
        ([0, 7, 7, 0, 7], [0, 0, 1, 0, 2], [0, 1, 2, 0, 1])
    """
    last = lengths.cumsum(0) - 1
    done = done.index_fill(0, last[done[last] == schema.RUNNING], schema.TRUNCATED)
    sizes = lengths + 1
    time = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    records = {"time": time}
    for name, value in {"action": action, "reward": reward, "done": done}.items():
        records[name] = value.new_zeros(len(time))
        records[name][time > 0] = value
    return records


def add_records(store: DatasetStore, records: dict[str, torch.Tensor], task: torch.Tensor, where: str) -> DatasetStore:
    """Appends whole tasks to a store.

    Args:
        store: where to.
        records: columns ``[rows, ...]`` under the names of :func:`~torchrl_mouse.schema.from_mouse_records`.
        task: int64 ``[rows]``; each run of equal values is a task, of two rows at least.
        where: who asks, for errors.

    Returns:
        The store.

    Raises:
        KeyError: the store has other columns.
        ValueError: a value that the store refuses. Its step is counted as a record, from the episode's first frame on.

    Examples:
        See :func:`from_trajectories`.
    """
    time = records["time"]

    def name_row(row: int) -> str:
        return f"step {int(time[row])} of episode {int((time[: row + 1] == 0).sum()) - 1}, both counted from 0"

    # As `extend` would find them, which cannot say where they are.
    columns = {_COLUMNS.get(name, name): value for name, value in records.items()}
    store._check_names(tuple(columns), where)
    store._columns.check_values(columns, where, name_row=name_row)
    first = torch.ones(len(task), dtype=torch.bool)
    first[1:] = task[1:] != task[:-1]
    last = first.roll(-1)  # the last row is followed by the first one
    steps = schema.from_mouse_records(TensorDict(records, [len(task)]))
    steps[schema.IS_INIT] = first.unsqueeze(-1)
    steps["next", "done"] = last.roll(-1).unsqueeze(-1)
    steps[schema.STREAM] = draw_streams(torch.Size([int(first.sum())]))[first.cumsum(0) - 1]
    store.extend(steps[~last])
    return store


def appearance(values: np.ndarray) -> np.ndarray:
    """Replaces each value by the place where it first appears, so that sorting keeps that order.

    Examples:
        >>> appearance(np.array([7, 7, 3, 7])).tolist()
        [0, 0, 2, 0]
    """
    _, seen, inverse = np.unique(values, return_index=True, return_inverse=True)
    first: np.ndarray = seen[inverse]
    return first


def _oldest_first(buffer: ReplayBuffer) -> TensorDictBase:
    """Reads a whole buffer, beginning where the next row would be written: there lies the oldest."""
    if not len(buffer):
        return TensorDict({}, [0])
    steps = buffer[:]
    dim, cursor = buffer.dim_extend, getattr(buffer.writer, "_cursor", 0)  # a data set's writer has none
    return steps[(slice(None),) * dim + (torch.arange(steps.shape[dim]).roll(-cursor),)]


def _read_transitions(
    steps: TensorDictBase,
    observations: dict[str, NestedKey],
    action: NestedKey,
    trajectory: NestedKey | None,
    task: NestedKey | None,
    first_row: int,
) -> TensorDict:
    """Reads TorchRL transitions ``[*, T]`` as a table ``[rows]``, without padding."""
    present, rows = steps.keys(include_nested=True), torch.arange(steps.numel())

    def column(*key: NestedKey) -> torch.Tensor:
        return schema.require(steps, unravel_key(key)).detach().cpu().flatten(0, steps.ndim - 1)

    def scalars(*key: NestedKey) -> torch.Tensor:
        value = column(*key)
        if value.numel() != len(rows):
            raise ValueError(
                f"{_WHERE}: entry {unravel_key(key)!r} must hold one value a step, got trailing shape "
                f"{tuple(value.shape[1:])}. Give another key."
            )
        return value.reshape(-1)

    def flag(name: str) -> torch.Tensor:
        return scalars("next", name).bool() if ("next", name) in present else torch.zeros(len(rows), dtype=torch.bool)

    if trajectory is None:
        trajectory = next((key for key in _TRAJECTORY if key in present), None)
    done = scalars("next", "done").bool()
    truncated = flag("truncated")
    # TorchRL's rule where only "done" is given: it is a termination.
    terminated = flag("terminated") if ("next", "terminated") in present else done & ~truncated
    table: dict[NestedKey, torch.Tensor] = {
        "action": _read_ids(column(action), action),
        "reward": scalars("next", "reward").float(),
        "done": schema.done_code(terminated, truncated | done),
        "trajectory": first_row + rows // steps.shape[-1] if trajectory is None else scalars(trajectory),
        "task": torch.zeros_like(rows) if task is None else scalars(task),
    }
    for name, key in observations.items():
        for at in ((), ("next",)):
            value = column(*at, key)
            if name == "obs_discrete":
                value = _read_ids(value, key)
            elif name == "obs_continuous":
                value = value.reshape(len(rows), -1).float()
            else:
                value = value.reshape(len(rows), -1)
                check_pixels(value, _WHERE, first_row, " under 'next'" if at else "")
                value = to_pixels(value)
            table[(*at, name)] = value
    read = TensorDict(table, [len(rows)])
    return read if schema.MASK not in present else read[scalars(schema.MASK).bool()]


def _read_ids(value: torch.Tensor, key: NestedKey) -> torch.Tensor:
    """Reads ids ``[rows]`` or ``[rows, 1]``, or one-hot vectors ``[rows, num]`` of any type."""
    trailing = value.shape[1:]
    if len(trailing) == 1 and trailing[0] > 1 and ((value == 0) | (value == 1)).all() and (value.sum(-1) == 1).all():
        return schema.to_ids(value, trailing[0], 1, key)
    if trailing.numel() != 1 or value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(
            f"{_WHERE}: entry {key!r} must hold ids or one-hot vectors, got {value.dtype} values of trailing shape "
            f"{tuple(trailing)}. A store holds ids only: turn continuous actions into a finite set first."
        )
    return value.reshape(-1).long()
