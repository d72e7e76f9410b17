"""What an environment's specs say about the inputs of an embedder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict.utils import unravel_key
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs import EnvBase

from torchrl_mouse.schema import MODALITY_KEYS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tensordict.utils import NestedKey
    from torchrl.data import TensorSpec

_WHERE = "embedding_kwargs_from_specs"
_NUMBERS = "floating-point numbers (Bounded, Unbounded)"
_ID = "an id (Categorical, OneHot)"


def _num_numbers(spec: TensorSpec) -> int | None:
    # Integers may be ids of an unknown number: only the user knows.
    return spec.shape.numel() if isinstance(spec, Bounded | Unbounded) and spec.dtype.is_floating_point else None


def _num_pixels(spec: TensorSpec) -> int | None:
    return spec.shape.numel() if isinstance(spec, Bounded | Unbounded) and spec.dtype == torch.uint8 else None


def _num_ids(spec: TensorSpec) -> int | None:
    if type(spec) not in (Categorical, OneHot):  # Subclasses (MultiOneHot, Binary, ...) hold several ids.
        return None
    num = int(spec.space.n)  # -1: not known
    if type(spec) is OneHot:
        return num if spec.shape == (num,) else None
    return num if num > 0 and spec.shape in ((), (1,)) and spec.dtype != torch.bool else None


def _num_times(spec: TensorSpec) -> int | None:
    bounded = isinstance(spec, Bounded) and not spec.dtype.is_floating_point and spec.shape.numel() == 1
    if not bounded:
        return _num_ids(spec)
    high = int(spec.space.high)
    return high + 1 if high < torch.iinfo(spec.dtype).max else None  # The type's largest number bounds nothing.


_OBSERVATIONS: dict[str, tuple[str, Callable[[TensorSpec], int | None], str]] = {
    "continuous": ("max_num_obs_continuous", _num_numbers, _NUMBERS),
    "discrete": ("max_num_obs_discrete", _num_ids, _ID),
    "image": ("max_num_obs_image", _num_pixels, "a uint8 image (Bounded, Unbounded)"),
}


def embedding_kwargs_from_specs(env: EnvBase, *, keys: Mapping[str, NestedKey] | None = None) -> dict[str, Any]:
    """Reads the sizes and modalities of a :class:`~torchrl_mouse.modules.StepEmbedder` from an environment's specs.

    An observation entry that the environment does not have gives no modality; nor do the previous action, reward and
    end where they are absent, as in an environment that is not inside a :class:`~torchrl_mouse.envs.TaskEnv`. The
    number of actions is given in any case, since it sizes a model's heads.

    .. note:: The time modality needs a spec that says how long an episode can be: integers with an upper bound, or
        ``Categorical``. ``TaskEnv`` cannot know: give ``max_num_time_steps=`` (the terminal frame counts) yourself.

    Args:
        env: the environment, batched or not.
        keys: by modality, the entry that it reads (``done``: the parent of ``terminated`` and ``truncated``); the
            others are those of :data:`~torchrl_mouse.schema.MODALITY_KEYS`. An entry that is named here is read by
            no other modality by default: ``{"discrete": "observation"}`` for ``GymEnv("FrozenLake-v1")``.

    Returns:
        Options of the embedder.

    Raises:
        TypeError: ``env`` is no environment, or an entry's space is none that its modality can read.
        ValueError: ``keys`` names something else than modalities, or the environment has nothing to embed.
        KeyError: an entry in ``keys`` does not exist.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_mouse.envs import TaskEnv
        >>> kwargs = embedding_kwargs_from_specs(TaskEnv(GymEnv("Pendulum-v1"), steps_per_task=400))
        >>> kwargs["max_num_action_continuous"], kwargs["max_num_obs_continuous"], kwargs["include_reward_token"]
        (1, 3, True)
    """
    if not isinstance(env, EnvBase):
        raise TypeError(f"{_WHERE}: env must be a torchrl EnvBase, got {type(env).__name__}.")
    given = {name: unravel_key(key) for name, key in (keys or {}).items()}
    if unknown := set(given) - set(MODALITY_KEYS):
        raise ValueError(f"{_WHERE}: keys must name modalities ({', '.join(MODALITY_KEYS)}), got {sorted(unknown)}.")
    specs = env.full_observation_spec_unbatched
    entries = set(specs.keys(True))
    listing = ", ".join(sorted(map(str, specs.keys(True, True)))) or "none"

    def find(name: str) -> NestedKey | None:
        """Returns the entry of a modality, if the environment has it."""
        key = given.get(name, MODALITY_KEYS[name])
        if name not in given and key in given.values():
            return None
        wanted = [unravel_key((key, end)) for end in ("terminated", "truncated")] if name == "done" else [key]
        absent = [entry for entry in wanted if entry not in entries]
        if absent and name in given:
            raise KeyError(f"{_WHERE}: keys[{name!r}] must be an entry of env, got {absent[0]!r}. It has {listing}.")
        return None if absent else key

    kwargs: dict[str, Any] = {f"include_{name}_token": find(name) is not None for name in ("action", "reward", "done")}
    found = any(kwargs.values())
    for name, (option, size_of, rule) in _OBSERVATIONS.items():
        if (key := find(name)) is None:
            continue
        if (size := size_of(specs[key])) is None:
            raise _refused(f"entry {key!r}", rule, specs[key], "Map it to a modality that fits with keys=")
        kwargs[option], found = size, True
    if (key := find("time")) is not None and (size := _num_times(specs[key])) is not None:
        kwargs["max_num_time_steps"], found = size, True
    if not found:
        raise ValueError(
            f"{_WHERE}: env must have an entry to embed, got {listing}. Name the entries with keys=, for one of "
            f"{', '.join(MODALITY_KEYS)}."
        )
    return {**kwargs, **_action_size(env)}


def _action_size(env: EnvBase) -> dict[str, int]:
    spec = env.action_spec_unbatched
    for option, size in (("max_num_actions", _num_ids(spec)), ("max_num_action_continuous", _num_numbers(spec))):
        if size is not None:
            return {option: size}
    entry = f"entry {', '.join(map(repr, env.action_keys))}"
    raise _refused(entry, f"{_ID} or {_NUMBERS}", spec, "Encode the action as one of these")


def _refused(entry: str, rule: str, spec: TensorSpec, remedy: str) -> TypeError:
    space = f"{type(spec).__name__} of shape {tuple(spec.shape)} and type {spec.dtype}"
    return TypeError(f"{_WHERE}: {entry} must hold {rule}, got {space}. {remedy}, or convert it with a transform.")
