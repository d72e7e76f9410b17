"""The step: key names, episode ends, validation, and MOUSE's own record layout.

One in-memory layout is used online and offline, TorchRL's own transitions. At step ``t`` the root holds the
observation, the transition that *led to it* under ``"previous"``, the counters and the action taken; ``"next"``
holds the reward, the ends of the **task**, and the next frame. An episode end inside a task is an observation (the
*terminal frame*), not a TorchRL ``done``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from tensordict import TensorDict, TensorDictBase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tensordict.utils import NestedKey

OBSERVATION: NestedKey = "observation"
OBSERVATION_DISCRETE: NestedKey = "observation_discrete"
PIXELS: NestedKey = "pixels"
PREVIOUS_ACTION: NestedKey = ("previous", "action")
PREVIOUS_REWARD: NestedKey = ("previous", "reward")
PREVIOUS_XFORMED_REWARD: NestedKey = ("previous", "xformed_reward")
PREVIOUS_TERMINATED: NestedKey = ("previous", "terminated")
PREVIOUS_TRUNCATED: NestedKey = ("previous", "truncated")
EPISODE_STEP: NestedKey = "episode_step"
IS_INIT: NestedKey = "is_init"
STREAM: NestedKey = "stream"
ACTION: NestedKey = "action"
Q_STAR: NestedKey = "q_star"
ACTION_MASK: NestedKey = "action_mask"
MASK: NestedKey = ("collector", "mask")
HIDDEN: NestedKey = "hidden"
POSTERIOR_LOC: NestedKey = "posterior_loc"
POSTERIOR_SCALE: NestedKey = "posterior_scale"
LATENT: NestedKey = "latent"

MODALITY_KEYS: dict[str, NestedKey] = {
    "time": EPISODE_STEP,
    "action": PREVIOUS_ACTION,
    "continuous": OBSERVATION,
    "discrete": OBSERVATION_DISCRETE,
    "image": PIXELS,
    "reward": PREVIOUS_REWARD,
    "done": "previous",
}
"""The entry that each kind of input reads; ``done`` names the parent of ``terminated`` and ``truncated``."""

RUNNING, TERMINATED, TRUNCATED = 0, 1, 2
"""MOUSE's done codes: the episode goes on, was ended by the environment, or by a step limit."""
NUM_DONE_CODES = 3

_RECORD_ENTRIES = {
    "obs_continuous": OBSERVATION,
    "obs_discrete": OBSERVATION_DISCRETE,
    "obs_image": PIXELS,
    "action_mask": ACTION_MASK,
    "xformed_reward": PREVIOUS_XFORMED_REWARD,
}


def done_code(terminated: torch.Tensor, truncated: torch.Tensor) -> torch.Tensor:
    """Encodes episode ends as MOUSE's done code; ``terminated`` wins where both are set.

    Args:
        terminated: bool, any shape.
        truncated: bool, same shape.

    Returns:
        int64 of the same shape: 0 running, 1 terminated, 2 truncated.

    Examples:
        >>> flags = torch.tensor([[False, False], [True, True], [False, True]])
        >>> done_code(flags[:, 0], flags[:, 1]).tolist()
        [0, 1, 2]
    """
    return torch.where(terminated, TERMINATED, torch.where(truncated, TRUNCATED, RUNNING))


def is_terminal_frame(
    steps: TensorDictBase,
    *,
    terminated: NestedKey = PREVIOUS_TERMINATED,
    truncated: NestedKey = PREVIOUS_TRUNCATED,
) -> torch.Tensor:
    """Marks the frames that show an episode's end: nothing is decided there.

    Args:
        steps: steps ``[*]``.
        terminated: entry bool ``[*, 1]``, whether the previous transition terminated an episode.
        truncated: the same for a step limit.

    Returns:
        bool ``[*]``, true where the previous transition ended an episode.

    Raises:
        KeyError: an entry is missing.
        TypeError: an entry is not boolean.

    Examples:
        >>> previous = {"terminated": torch.tensor([[False], [True]]), "truncated": torch.zeros(2, 1, dtype=torch.bool)}
        >>> is_terminal_frame(TensorDict({"previous": previous}, [2])).tolist()
        [False, True]
    """
    return (require(steps, terminated, "bool") | require(steps, truncated, "bool")).squeeze(-1)


def decision_mask(
    steps: TensorDictBase,
    *,
    terminated: NestedKey = PREVIOUS_TERMINATED,
    truncated: NestedKey = PREVIOUS_TRUNCATED,
    masks: Iterable[NestedKey] = (MASK,),
) -> torch.Tensor:
    """Marks the steps whose action was a decision: no terminal frame, no padding.

    Args:
        steps: steps ``[*]``.
        terminated: entry that marks terminal frames, see :func:`is_terminal_frame`.
        truncated: the same for a step limit.
        masks: entries (bool, ``[*]`` or ``[*, 1]``) that are false at padding; honoured where present.

    Returns:
        bool ``[*]``.

    Raises:
        KeyError: an entry is missing.
        TypeError: an entry is not boolean.

    Examples:
        >>> flags = torch.tensor([[False], [True], [False]])
        >>> steps = TensorDict({"previous": {"terminated": flags, "truncated": flags}}, [3])
        >>> steps["collector", "mask"] = torch.tensor([True, True, False])
        >>> decision_mask(steps).tolist()
        [True, False, False]
    """
    decision = ~is_terminal_frame(steps, terminated=terminated, truncated=truncated)
    for key in masks:
        if steps.get(key, None) is not None:
            decision = decision & per_step(steps, key, "bool")
    return decision


def require(
    steps: TensorDictBase, key: NestedKey, kind: Literal["bool", "integer", "float"] | None = None
) -> torch.Tensor:
    """Returns an entry, or says what is missing and what there is.

    Args:
        steps: where the entry should be.
        key: the entry's key.
        kind: what its type must be, of any precision; any by default.

    Raises:
        KeyError: the entry is absent.
        TypeError: its type is of another kind.

    Examples:
        >>> require(TensorDict({"action": torch.tensor([1, 2])}, [2]), "action").tolist()
        [1, 2]
    """
    value: torch.Tensor | None = steps.get(key, None)
    if value is None:
        present = sorted(map(str, steps.keys(include_nested=True, leaves_only=True)))
        raise KeyError(f"steps: entry {key!r} must be present, got only {', '.join(present) or 'no entry'}.")
    if kind is not None and _kind(value.dtype) != kind:
        raise TypeError(f"steps: entry {key!r} must be of {kind} type, got {value.dtype}. Convert it where it is made.")
    return value


def per_step(
    steps: TensorDictBase, key: NestedKey, kind: Literal["bool", "integer", "float"] | None = None
) -> torch.Tensor:
    """Returns an entry that holds one value a step.

    Args:
        steps: steps ``[*]``.
        key: the key of an entry ``[*]`` or ``[*, 1]``.
        kind: see :func:`require`.

    Returns:
        ``[*]``.

    Raises:
        KeyError: the entry is absent.
        TypeError: its type is of another kind.
        ValueError: its shape is another.

    Examples:
        >>> per_step(TensorDict({"reward": torch.ones(2, 1)}, [2]), "reward").tolist()
        [1.0, 1.0]
    """
    value = require(steps, key, kind)
    if value.shape not in (steps.shape, (*steps.shape, 1)):
        raise ValueError(
            f"steps: entry {key!r} must hold one value a step, {tuple(steps.shape)} or {(*steps.shape, 1)}, got "
            f"{tuple(value.shape)}. Choose one of them where it is made."
        )
    return value.reshape(steps.shape)


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def to_ids(value: torch.Tensor, num: int, batch_ndim: int, key: NestedKey) -> torch.Tensor:
    """Reads a categorical or one-hot entry as ids.

    TorchRL encodes a discrete space as ids or one-hot vectors, by spec; an all-zero vector (the previous action at an
    episode's first frame) reads as id 0, which is how MOUSE stores it.

    Args:
        value: ``[*]`` or ``[*, 1]`` integer ids, or ``[*, num]`` one-hot or all zero, of any dtype.
        num: number of ids, at least 1.
        batch_ndim: number of leading batch dimensions ``*``.
        key: the entry's key, for the error.

    Returns:
        int64 ``[*]``.

    Raises:
        ValueError: the trailing shape is none of the three, or a vector is not one-hot (checked on the CPU alone).
        TypeError: ids that are not integers.

    Examples:
        >>> to_ids(torch.tensor([[0, 0, 1], [0, 0, 0]]), 3, 1, "action").tolist()
        [2, 0]
        >>> to_ids(torch.tensor([2, 0]), 3, 1, "action").tolist()
        [2, 0]
    """
    trailing = tuple(value.shape[batch_ndim:])
    if trailing == (num,) and num > 1:
        if can_look_at(value):
            wrong = (value.count_nonzero(-1) > 1) | (value.sum(-1) != value.any(-1))
            if wrong.any():
                raise ValueError(
                    f"steps: entry {key!r} must hold ids or one-hot vectors, got {value[wrong][0].tolist()}. Encode "
                    "the space as one of these."
                )
        return value.to(torch.int8).argmax(-1) if value.dtype == torch.bool else value.argmax(-1)
    if trailing not in ((), (1,)):
        raise ValueError(
            f"steps: entry {key!r} must hold ids [*] or [*, 1], or one-hot vectors [*, {num}], got trailing shape "
            f"{trailing}. Set the number of ids to the space's size, or encode the space as one of these."
        )
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"steps: entry {key!r} must hold integer ids, got {value.dtype}. Convert it with .long().")
    return (value.squeeze(-1) if trailing else value).long()


def can_look_at(value: torch.Tensor) -> bool:
    """Says whether checking values costs nothing: an accelerator would wait, and a compiled graph break.

    Examples:
        >>> can_look_at(torch.zeros(1))
        True
    """
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ids(ids: torch.Tensor, num: int, key: NestedKey) -> None:
    """Raises when an id lies outside ``[0, num)``.

    Reading the values would make an accelerator wait, so ids there are not looked at.

    Args:
        ids: integers of any shape.
        num: number of ids.
        key: the entry's key, for the error.

    Raises:
        ValueError: an id is negative or too large.

    Examples:
        >>> check_ids(torch.tensor([0, 7]), 5, "action")
        Traceback (most recent call last):
            ...
        ValueError: steps: entry 'action' must lie in [0, 5), got 7. Raise the model's size for it, or fix the data.
    """
    if not can_look_at(ids) or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= num:
        raise ValueError(
            f"steps: entry {key!r} must lie in [0, {num}), got {low if low < 0 else high}. "
            "Raise the model's size for it, or fix the data."
        )


def check_finite(value: torch.Tensor, key: NestedKey, reader: str, remedy: str) -> None:
    """Raises when a number is NaN or infinite; not looked at on an accelerator, as in :func:`check_ids`.

    Args:
        value: numbers of any shape.
        key: the entry's key, for the error.
        reader: what needs the numbers, for the error.
        remedy: a sentence, for the error.

    Raises:
        ValueError: a number is not finite.

    Examples:
        >>> check_finite(torch.tensor([0.5, torch.nan]), ("next", "reward"), "play", "Fix the environment.")
        Traceback (most recent call last):
            ...
        ValueError: play: entry ('next', 'reward') must be finite, got nan at (1,). Fix the environment.
    """
    if can_look_at(value) and not (finite := value.isfinite()).all():
        at = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(f"{reader}: entry {key!r} must be finite, got {value[at].item()} at {at}. {remedy}")


def from_mouse_records(records: TensorDictBase) -> TensorDict:
    """Converts a MOUSE record batch to steps.

    A MOUSE record holds an observation and the action, reward and done code that led to it, so the transition out of
    record ``t`` is read from record ``t + 1``. The last record has no successor: it carries no decision
    (``("collector", "mask")`` is false there) and its ``"next"`` repeats its own frame.

    Args:
        records: ``[B, S]`` with ``action`` int64, ``reward`` float32, ``done`` int64 in {0, 1, 2} and ``time`` int64,
            and any of ``obs_continuous`` ``[B, S, C]``, ``obs_discrete``, ``obs_image`` ``[B, S, P]``, ``q_star`` and
            ``action_mask`` ``[B, S, A]``, ``xformed_reward``.

    Returns:
        Steps ``[B, S]``; index 0 is marked as the task's first step.

    Raises:
        KeyError: an entry is missing.
        TypeError: an entry's type is of another kind.
        ValueError: the batch has no time dimension, an entry another shape, a done code is none of the three, or an
            action is negative.

    Examples:
        >>> records = {"action": [[0, 3]], "reward": [[0.0, 1.0]], "done": [[0, 1]], "time": [[0, 1]]}
        >>> records = TensorDict(records, [1, 2])
        >>> steps = from_mouse_records(records)
        >>> steps["action"].tolist(), steps["next", "reward"].squeeze(-1).tolist()
        ([[3, 0]], [[1.0, 0.0]])
        >>> bool((to_mouse_records(steps)["done"] == records["done"]).all())
        True
    """
    if records.ndim < 1 or records.shape[-1] < 1:
        raise ValueError(f"from_mouse_records: records must be [*, S] with S >= 1, got {tuple(records.shape)}.")
    done, action, time = (_column(records, name, "integer") for name in ("done", "action", "time"))
    reward = _column(records, "reward", "float").unsqueeze(-1)
    invalid = (done < RUNNING) | (done > TRUNCATED)
    if invalid.any():
        raise ValueError(f"from_mouse_records: done must be 0, 1 or 2, got {int(done[invalid][0])}.")
    if (action < 0).any():
        raise ValueError(f"from_mouse_records: action must be at least 0, got {int(action.min())}.")
    frame = TensorDict(
        {
            PREVIOUS_ACTION: action,
            PREVIOUS_REWARD: reward,
            PREVIOUS_TERMINATED: (done == TERMINATED).unsqueeze(-1),
            PREVIOUS_TRUNCATED: (done == TRUNCATED).unsqueeze(-1),
            EPISODE_STEP: time.unsqueeze(-1),
        },
        records.shape,
        device=records.device,
    )
    for theirs, ours in _RECORD_ENTRIES.items():
        if (entry := records.get(theirs, None)) is not None:
            is_reward = ours == PREVIOUS_XFORMED_REWARD
            frame[ours] = _column(records, theirs, "float").unsqueeze(-1) if is_reward else entry
    follows = torch.arange(1, records.shape[-1] + 1, device=records.device).clamp(max=records.shape[-1] - 1)
    mask = torch.ones(records.shape, dtype=torch.bool, device=records.device)
    mask[..., -1] = False

    def out_of(entry: torch.Tensor) -> torch.Tensor:
        following = entry.index_select(records.ndim - 1, follows)
        following.select(records.ndim - 1, -1).zero_()
        return following

    steps = frame.clone(recurse=False)
    steps[IS_INIT] = torch.zeros_like(steps[PREVIOUS_TERMINATED])
    steps[IS_INIT][..., 0, :] = True
    steps[ACTION] = out_of(action)
    steps[MASK] = mask
    if (q_star := records.get(Q_STAR, None)) is not None:
        steps[Q_STAR] = q_star
    following = frame[..., follows]
    following[IS_INIT] = torch.zeros_like(steps[IS_INIT])
    following["reward"] = out_of(reward)
    if (xformed := frame.get(PREVIOUS_XFORMED_REWARD, None)) is not None:
        following["xformed_reward"] = out_of(xformed)
    for end in ("done", "terminated", "truncated"):
        following[end] = torch.zeros_like(steps[IS_INIT])
    steps["next"] = following
    return steps


def _column(records: TensorDictBase, name: str, kind: Literal["integer", "float"]) -> torch.Tensor:
    value = require(records, name, kind)
    if value.shape != records.shape:
        raise ValueError(
            f"from_mouse_records: {name} must have the records' shape {tuple(records.shape)}, got {tuple(value.shape)}."
        )
    return value


def to_mouse_records(steps: TensorDictBase) -> TensorDict:
    """Converts steps back to MOUSE's record batch; the inverse of :func:`from_mouse_records`.

    Args:
        steps: ``[*, S]`` steps; only the frame entries at the root (and ``q_star``) are read.

    Returns:
        Records ``[*, S]`` under MOUSE's names.

    Raises:
        KeyError: a frame entry is missing.

    Examples:
        >>> records = {"action": [[0, 3]], "reward": [[0.0, 1.0]], "done": [[0, 1]], "time": [[0, 1]]}
        >>> records = TensorDict(records, [1, 2])
        >>> sorted(to_mouse_records(from_mouse_records(records)).keys())
        ['action', 'done', 'reward', 'time']
    """
    done = done_code(require(steps, PREVIOUS_TERMINATED), require(steps, PREVIOUS_TRUNCATED))
    records = TensorDict(
        {
            "action": require(steps, PREVIOUS_ACTION),
            "reward": require(steps, PREVIOUS_REWARD).squeeze(-1),
            "done": done.squeeze(-1),
            "time": require(steps, EPISODE_STEP).squeeze(-1),
        },
        steps.shape,
        device=steps.device,
    )
    for theirs, ours in _RECORD_ENTRIES.items():
        if (entry := steps.get(ours, None)) is not None:
            records[theirs] = entry.squeeze(-1) if ours == PREVIOUS_XFORMED_REWARD else entry
    if (q_star := steps.get(Q_STAR, None)) is not None:
        records[Q_STAR] = q_star
    return records
