"""The configuration of a token augmenter: MOUSE's options, checked when built."""

from __future__ import annotations

import math
import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

SCALARS = {
    "scale_reward": 1.0,
    "shift_reward": 0.0,
    "scale_obs": 1.0,
    "shift_obs": 0.0,
    "scale_obs_image": 1.0,
    "shift_obs_image": 0.0,
}
"""The factors and offsets, and the value of each that changes nothing."""

_Config = TypeVar("_Config")


def _build(config: type[_Config], values: Mapping[str, Any]) -> _Config:
    """Builds a configuration from a dictionary, or says what does not fit."""
    where = config.__name__
    if not isinstance(values, dict):
        raise TypeError(f"{where}: the options must be a dictionary, got {type(values).__name__}.")
    known: dict[str, Any] = {entry.name: entry for entry in fields(config)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise TypeError(f"{where}: unknown option {name!r}. The options are {', '.join(known)}.")
    for name, entry in known.items():
        if entry.default is MISSING and entry.default_factory is MISSING and name not in values:
            raise TypeError(f"{where}: option {name!r} must be given, got only {', '.join(values) or 'none'}.")
    return config(**values)


def _check_number(where: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be finite, got {value}.")


@dataclass(frozen=True)
class AugmentScalarSpec:
    """The distribution of a factor or an offset, of which a batch gets one draw.

    Args:
        mean: of a normal distribution, in the unit of the value that is changed.
        std: its standard deviation, at least 0; 0 is a constant.
        low: with ``high``, a uniform distribution on ``[low, high)`` instead; the other two are then not used.
        high: at least ``low``.

    Raises:
        TypeError: an option is no number.
        ValueError: an option is not finite or out of range, or one bound is given without the other.

    Examples:
        >>> AugmentScalarSpec(1.0, low=2.0, high=0.5)
        Traceback (most recent call last):
            ...
        ValueError: AugmentScalarSpec: high must be at least low=2.0, got 0.5. Swap them.
    """

    mean: float
    std: float = 0.0
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        where = "AugmentScalarSpec"
        for name in ("mean", "std", "low", "high"):
            if (value := getattr(self, name)) is not None or name in ("mean", "std"):
                _check_number(where, name, value)
        if self.std < 0:
            raise ValueError(f"{where}: std must be at least 0, got {self.std}.")
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"{where}: low and high must be given together, got low={self.low} and high={self.high}. "
                "Give both for a uniform distribution, or none for a normal one."
            )
        if self.low is not None and self.high is not None and self.high < self.low:
            raise ValueError(f"{where}: high must be at least low={self.low}, got {self.high}. Swap them.")

    def is_always(self, value: float) -> bool:
        """Says whether every draw is this value."""
        if self.low is not None:
            return self.low == self.high == value
        return self.mean == value and self.std == 0


@dataclass(frozen=True)
class AugmentMaskProbConfig:
    """The probabilities, in [0, 1], with which a kind of input is masked at a step.

    Args:
        action: of the previous action, then 0 (or an all-zero one-hot vector).
        reward: of the previous reward, then 0.
        done: of the previous transition's ends, then "running".
        time: of the episode step, then -1, which the embedder reads as absent.
        obs_continuous: of the continuous observation, then all 0.
        obs_discrete: of the discrete observation, then 0 (or an all-zero one-hot vector).
        obs_image: of the image, then black.

    Raises:
        TypeError: a probability is no number.
        ValueError: a probability lies outside [0, 1].

    Examples:
        >>> AugmentMaskProbConfig(reward=0.1).action
        0.0
    """

    action: float = 0.0
    reward: float = 0.0
    done: float = 0.0
    time: float = 0.0
    obs_continuous: float = 0.0
    obs_discrete: float = 0.0
    obs_image: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_number("AugmentMaskProbConfig", name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"AugmentMaskProbConfig: {name} must lie in [0, 1], got {value}. It is a probability.")


@dataclass(frozen=True)
class AugmentTokensConfig:
    """What a :class:`~torchrl_mouse.data.token_augmentation.TokenAugmenter` changes; by default nothing.

    ``dataclasses.asdict`` turns it into a dictionary that JSON can hold, :meth:`from_dict` back.

    Args:
        enabled: false switches everything off.
        permute_tokens: without effect in MOUSE and here; a warning says so.
        scale_reward: factor of the previous reward; then
        shift_reward: is added to it.
        scale_obs: factor of the continuous observation; then
        shift_obs: is added to it.
        scale_obs_image: factor of pixels in 0..255; then
        shift_obs_image: is added to them; the result is rounded and clamped to 0..255.
        permute_obs_discrete: permute the ids of the discrete observation.
        permute_action: permute the action ids that the model sees (``"input"``: the previous actions), those that
            losses read (``"target"``: actions, teacher's values, action masks), or both alike (``"both"``, or
            ``True``): then the window is one of the same task with its actions renamed.
        permute_done: permute the three codes (running, terminated, truncated) by which the model sees ends.
        mask_prob: how often kinds of input are masked.

    Raises:
        TypeError: an option is of another type.
        ValueError: ``permute_action`` is none of those.

    Examples:
        >>> from dataclasses import asdict
        >>> config = AugmentTokensConfig(scale_reward=AugmentScalarSpec(1.0, low=0.5, high=2.0), permute_action="both")
        >>> AugmentTokensConfig.from_dict(asdict(config)) == config
        True
    """

    enabled: bool = True
    permute_tokens: bool = False
    scale_reward: AugmentScalarSpec = AugmentScalarSpec(1.0)
    shift_reward: AugmentScalarSpec = AugmentScalarSpec(0.0)
    scale_obs: AugmentScalarSpec = AugmentScalarSpec(1.0)
    shift_obs: AugmentScalarSpec = AugmentScalarSpec(0.0)
    scale_obs_image: AugmentScalarSpec = AugmentScalarSpec(1.0)
    shift_obs_image: AugmentScalarSpec = AugmentScalarSpec(0.0)
    permute_obs_discrete: bool = False
    permute_action: bool | Literal["input", "target", "both"] = False
    permute_done: bool = False
    mask_prob: AugmentMaskProbConfig = field(default_factory=AugmentMaskProbConfig)

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(SCALARS, AugmentScalarSpec) | {"mask_prob": AugmentMaskProbConfig}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(
                    f"AugmentTokensConfig: {name} must be {kind.__name__}, got {value!r}. Build one, or read nested "
                    "dictionaries with AugmentTokensConfig.from_dict."
                )
        for name in ("enabled", "permute_tokens", "permute_obs_discrete", "permute_done"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"AugmentTokensConfig: {name} must be true or false, got {value!r}.")
        if self.permute_action is True:
            object.__setattr__(self, "permute_action", "both")  # Equal settings are equal configurations.
        if self.permute_action is not False and self.permute_action not in ("input", "target", "both"):
            raise ValueError(
                "AugmentTokensConfig: permute_action must be False, True, 'input', 'target' or 'both', got "
                f"{self.permute_action!r}."
            )
        if self.permute_tokens:
            warnings.warn("AugmentTokensConfig: permute_tokens has no effect, as in MOUSE.", stacklevel=3)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a configuration from what ``dataclasses.asdict`` made of one.

        Raises:
            TypeError: no dictionary, an unknown or missing option, or a value of another type.
            ValueError: a value out of range.

        Examples:
            >>> AugmentTokensConfig.from_dict({"mask_prob": {"reward": 0.5}}).mask_prob.reward
            0.5
        """
        nested: dict[str, type[Any]] = dict.fromkeys(SCALARS, AugmentScalarSpec)
        nested["mask_prob"] = AugmentMaskProbConfig
        if isinstance(values, dict):
            values = {
                name: _build(nested[name], value) if name in nested and isinstance(value, dict) else value
                for name, value in values.items()
            }
        return _build(cls, values)
