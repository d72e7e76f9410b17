"""Random changes to sampled windows, so that a model reads its context instead of remembering its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchrl.envs.transforms import Transform

from torchrl_mouse import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey


class JitterObservation(Transform):
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
            path = key if isinstance(key, tuple) else (key,)
            for place in (path, ("next", *path)):
                if (value := tensordict.get(place, None)) is not None:
                    tensordict.set(place, value * factor + offset)
        return tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        """Raises: an environment's frame is no window."""
        raise NotImplementedError(
            "JitterObservation: must be a transform of a replay buffer. Do not add it to an environment."
        )
