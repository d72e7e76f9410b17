"""A recurrent backbone, to compare the transformer with: TorchRL's GRU over embedded steps."""

from __future__ import annotations

import sys
from typing import Literal

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import GRUModule, set_recurrent_mode

from torchrl_mouse.modules.backbone import MAX_LAYERS, MAX_PARAMETERS, MAX_SIZE, CausalBackbone
from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.kv_cache import KeyValues

_FEATURES, _STATE, _IS_INIT, _OUT = "features", "state", "is_init", "out"


class GRUBackbone(nn.Module):
    """Runs embedded tokens through TorchRL's GRU (RL^2, arXiv:1611.02779), the baseline with a recurrent memory.

    It takes :class:`CausalBackbone`'s place in a :class:`Trunk`, with the same contract. Its context is one state per
    layer instead of keys and values: a task may be of any length, each step costs the same, and there is nothing to
    compute anew after the weights have changed.

    .. note:: Windows in which tasks begin are cut there (:class:`~torchrl.modules.GRUModule`), for which an accelerator
        has to be waited for.

    Args:
        hidden_dim: size ``D`` of a token and of a layer's state.
        kind: ``"gru"``.
        num_layers: number of layers.

    Raises:
        TypeError: a size is no integer.
        ValueError: another kind, a size out of range, or more than 1e11 parameters; before memory is taken.

    Examples:
        >>> backbone = GRUBackbone(16, num_layers=1)
        >>> tokens = torch.randn(1, 3, 16)
        >>> window, _ = backbone(tokens)
        >>> cache = backbone.new_kv_cache(1)
        >>> steps = [backbone(tokens[:, t : t + 1], torch.tensor([[t]]), kv_cache=cache)[0] for t in range(3)]
        >>> torch.allclose(torch.cat(steps, 1), window, atol=1e-6)
        True
    """

    max_seq_len = sys.maxsize
    """Largest number of tokens in a context: there is no limit."""

    def __init__(self, hidden_dim: int, kind: Literal["gru"] = "gru", *, num_layers: int) -> None:
        super().__init__()
        if kind != "gru":
            raise ValueError(f"GRUBackbone: kind must be 'gru', got {kind!r}. Others are a CausalBackbone's.")
        for name, value, most in (("hidden_dim", hidden_dim, MAX_SIZE), ("num_layers", num_layers, MAX_LAYERS)):
            check_size("GRUBackbone", name, value, most=most)
        if (parameters := 6 * num_layers * hidden_dim**2) > MAX_PARAMETERS:
            raise ValueError(
                f"GRUBackbone: sizes must make at most {MAX_PARAMETERS:.0e} parameters, got {parameters:.1e} of "
                f"hidden_dim={hidden_dim}, num_layers={num_layers}. Make one of them smaller."
            )
        self.kind = kind
        self.model = nn.GRU(hidden_dim, hidden_dim, num_layers, batch_first=True)

    @property
    def hidden_dim(self) -> int:
        """Size of a token."""
        return int(self.model.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return int(self.model.num_layers)

    def new_kv_cache(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValues:
        """Allocates states that have seen nothing.

        Args:
            batch_size: number of slots.
            capacity: not read: a state has room for any number of tokens.
            device: that of the weights by default.
            dtype: that of the weights by default.

        Returns:
            The states in the keys' place, ``[slots, layers, 1, D]``, and no values.
        """
        weight = next(self.model.parameters())
        shape = batch_size, self.num_layers, 1, self.hidden_dim
        return KeyValues((torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype),), ())

    reset_kv_cache = staticmethod(CausalBackbone.reset_kv_cache)

    def forward(
        self,
        features: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        kv_cache: KeyValues | None = None,
    ) -> tuple[torch.Tensor, KeyValues | None]:
        """Runs the layers.

        Args:
            features: ``[B, L, D]`` tokens.
            positions: int64 ``[B, L]`` of each token in its context, which begins, from a state of zeros, at each 0;
                without a cache also at the first token, and ``None`` is there only.
            mask: not read: the state is of all tokens since the context began.
            kv_cache: the contexts; states go on from it, and the last are written into it, without gradient.

        Returns:
            ``[B, L, D]``, and the cache.

        Raises:
            ValueError: a cache without positions.
        """
        if kv_cache is None:
            return self._run(features, positions)[0], None
        if positions is None:
            raise ValueError("GRUBackbone: positions must be given with kv_cache, got None.")
        states = kv_cache.key[0][:, :, 0]  # (slots, layers, D)
        rows = slice(None) if kv_cache.rows is None else kv_cache.rows
        with torch.no_grad():
            out, last = self._run(features, positions, states[rows].to(features.dtype))
            states[rows] = last.to(states.dtype)
        return out, kv_cache

    def _run(
        self, features: torch.Tensor, positions: torch.Tensor | None, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns outputs ``[B, L, D]`` and last states ``[B, layers, D]``."""
        shape = features.shape[:2]
        if positions is None:
            starts = torch.zeros((*shape, 1), dtype=torch.bool, device=features.device)
        else:
            starts = (positions == 0).unsqueeze(-1)
        steps = TensorDict({_FEATURES: features, _IS_INIT: starts}, shape)
        if state is not None:  # GRUModule reads it at the first token, and where it cuts.
            steps[_STATE] = torch.where(starts.unsqueeze(-1), 0, state.unsqueeze(1))  # (B, L, layers, D)
        # Made anew, not held: as a submodule it would ask of environments, through TorchRL's automatic registration,
        # to carry its state in the data.
        gru = GRUModule(gru=self.model, in_keys=[_FEATURES, _STATE, _IS_INIT], out_keys=[_OUT, ("next", _STATE)])
        with set_recurrent_mode(True):
            steps = gru(steps)
        return steps[_OUT], steps["next", _STATE][:, -1]
