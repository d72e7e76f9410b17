"""Random changes to sampled windows, so that a model reads its context instead of remembering its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict.utils import unravel_key
from torchrl.envs.transforms import Transform

from torchrl_mouse import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey


class _WindowTransform(Transform):
    """A transform of sampled windows ``[*, T]``, which an environment's frames are not."""

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        raise NotImplementedError(
            f"{type(self).__name__}: must be a transform of a replay buffer. Do not add it to an environment."
        )


def _check_width(place: NestedKey, value: torch.Tensor, width: int) -> None:
    if value.shape[-1] != width:
        raise ValueError(f"RandomSymmetry: entry {place!r} must be [B, T, {width}], got {tuple(value.shape)}.")


def _root_and_next(key: NestedKey) -> tuple[NestedKey, NestedKey]:
    return key, unravel_key(("next", key))


class JitterObservation(_WindowTransform):
    """Scales and shifts the continuous observation of each sampled window at random, the same at all of its steps.

    With few training tasks a model remembers where their goals were, and never looks anywhere else. In a frame of
    reference that differs from window to window, places are known by what happened around them in the context. One
    factor and one offset are drawn per window and number: ``x * (1 + scale * u) + shift * n``, ``u`` uniform on
    [-1, 1) and ``n`` standard normal. What losses read as targets is left alone. It is a transform of a replay buffer.

    Args:
        scale: largest relative change, in [0, 1).
        shift: standard deviation of the offset, in the observation's unit, at least 0.
        in_keys: the entries to change, ``[*, T, C]``, the same one under ``"next"`` with it.

    Raises:
        ValueError: an option is out of range.

    .. note::
        The draws come from torch's global generator: with the buffer's seed alone they do not reproduce, with
        :func:`torch.manual_seed` they do.

    Examples:
        >>> from tensordict import TensorDict
        >>> _ = torch.manual_seed(0)
        >>> windows = TensorDict({"observation": torch.ones(2, 3, 1)}, [2, 3])
        >>> jittered = JitterObservation(scale=0.5)(windows)["observation"].squeeze(-1)
        >>> bool((jittered == jittered[:, :1]).all()), bool((jittered[0] != jittered[1]).all())
        (True, True)
    """

    def __init__(
        self, *, scale: float = 0.0, shift: float = 0.0, in_keys: Sequence[NestedKey] = (schema.OBSERVATION,)
    ) -> None:
        if not 0 <= scale < 1:
            raise ValueError(f"JitterObservation: scale must lie in [0, 1), got {scale}. More would turn signs around.")
        if shift < 0:
            raise ValueError(f"JitterObservation: shift must be at least 0, got {shift}.")
        super().__init__(in_keys=list(in_keys))
        self.scale, self.shift = scale, shift

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Changes windows ``[*, T]``."""
        for key in self.in_keys:
            value = schema.require(tensordict, key)
            shape = (*tensordict.shape[:-1], 1, *value.shape[tensordict.ndim :])
            factor = 1 + self.scale * (2 * torch.rand(shape, device=value.device) - 1)
            offset = self.shift * torch.randn(shape, device=value.device)
            for place in _root_and_next(key):
                if (value := tensordict.get(place, None)) is not None:
                    tensordict.set(place, value * factor + offset)
        return tensordict


class RandomSymmetry(_WindowTransform):
    """Turns each sampled window by a random symmetry of its environment, the same at all of its steps.

    A mirrored or turned maze is as good a task as the maze itself: with few training tasks this gives many more, none
    of them invented. One symmetry is drawn per window, and moves together what belongs together: the observation, the
    actions that were taken, the teacher's values per action and the action mask. Previous actions need
    ``episode_step`` beside them: an episode's first frame has none. It is a transform of a replay buffer.

    Args:
        observation_maps: ``[K, C, C]``, for each of ``K`` symmetries the matrix that is applied to the observation.
        action_maps: int64 ``[K, A]``, for each symmetry a permutation: action ``a`` becomes ``action_maps[k, a]``.

    Raises:
        ValueError: the shapes do not fit, or a row of ``action_maps`` is no permutation.

    .. note::
        The draws come from torch's global generator: with the buffer's seed alone they do not reproduce, with
        :func:`torch.manual_seed` they do.

    Examples:
        >>> from tensordict import TensorDict
        >>> mirror = RandomSymmetry(-torch.eye(1).expand(1, 1, 1), torch.tensor([[1, 0]]))
        >>> windows = {"observation": torch.tensor([[[1.0], [2.0]]]), "action": torch.tensor([[0, 1]])}
        >>> mirrored = mirror(TensorDict(windows, [1, 2]))
        >>> mirrored["observation"].flatten().tolist(), mirrored["action"].tolist()
        ([-1.0, -2.0], [[1, 0]])
    """

    observation_maps: torch.Tensor
    action_maps: torch.Tensor

    def __init__(self, observation_maps: torch.Tensor, action_maps: torch.Tensor) -> None:
        if (
            observation_maps.ndim != 3
            or not len(observation_maps)
            or observation_maps.shape[1] != observation_maps.shape[2]
        ):
            raise ValueError(
                f"RandomSymmetry: observation_maps must be [K, C, C], K >= 1, got {tuple(observation_maps.shape)}."
            )
        if action_maps.ndim != 2 or len(action_maps) != len(observation_maps):
            raise ValueError(
                f"RandomSymmetry: action_maps must be [K, A] with K={len(observation_maps)}, got "
                f"{tuple(action_maps.shape)}."
            )
        if action_maps.is_floating_point() or not torch.equal(
            action_maps.sort(-1).values, torch.arange(action_maps.shape[1]).expand_as(action_maps)
        ):
            raise ValueError(
                f"RandomSymmetry: each row of action_maps must be a permutation of 0 to {action_maps.shape[1] - 1}, "
                f"got {action_maps.tolist()}."
            )
        super().__init__(in_keys=[])
        self.register_buffer("observation_maps", observation_maps)
        self.register_buffer("action_maps", action_maps)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Changes windows ``[B, T]`` with action ids; entries that are not there are left out.

        Raises:
            ValueError: other shapes, or discrete observations, which cannot be turned.
        """
        if tensordict.ndim != 2:
            raise ValueError(f"RandomSymmetry: windows must be [B, T], got {tuple(tensordict.shape)}.")
        drawn = torch.randint(len(self.action_maps), tensordict.shape[:1], device=self.action_maps.device)
        turn, permutation = self.observation_maps[drawn], self.action_maps[drawn]  # (B, C, C), (B, A)
        for place in _root_and_next(schema.OBSERVATION_DISCRETE):
            if tensordict.get(place, None) is not None:
                raise ValueError(f"RandomSymmetry: windows must not hold {place!r}, got it: ids cannot be turned.")
        for place in _root_and_next(schema.OBSERVATION):
            if (value := tensordict.get(place, None)) is not None:
                _check_width(place, value, turn.shape[-1])
                tensordict.set(place, value @ turn.mT.to(value))
        for place in (schema.ACTION, *_root_and_next(schema.PREVIOUS_ACTION)):
            if tensordict.get(place, None) is not None:
                tensordict.set(place, self._turn_actions(tensordict, place, permutation))
        for key in (schema.Q_STAR, schema.ACTION_MASK):
            for place in _root_and_next(key):
                if (value := tensordict.get(place, None)) is not None:
                    _check_width(place, value, permutation.shape[-1])
                    tensordict.set(place, value.gather(-1, permutation.argsort(-1).unsqueeze(1).expand_as(value)))
        return tensordict

    @staticmethod
    def _turn_actions(steps: TensorDictBase, place: NestedKey, permutation: torch.Tensor) -> torch.Tensor:
        ids = schema.require(steps, place, "integer")
        if ids.shape not in (steps.shape, (*steps.shape, 1)):
            raise ValueError(f"RandomSymmetry: entry {place!r} must hold ids [B, T], got {tuple(ids.shape)}.")
        num = permutation.shape[-1]
        turned = permutation.gather(1, ids.clamp(0, num - 1).flatten(1)).reshape(ids.shape)
        # Ids that are none stay for the loss to refuse, or not: what stands at a terminal frame is no action.
        turned = torch.where((ids >= 0) & (ids < num), turned, ids)
        if place == schema.ACTION:
            return turned
        # An episode's first frame has no previous action: what stands there stays.
        step = schema.EPISODE_STEP if place == schema.PREVIOUS_ACTION else ("next", schema.EPISODE_STEP)
        first = schema.require(steps, step).reshape(ids.shape) == 0
        return torch.where(first, ids, turned)
