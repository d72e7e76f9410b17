"""The causal backbone: a `transformers` decoder stack over embedded steps."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import Cache, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3Model

from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.kv_cache import KeyValues

BackboneKind = Literal["llama", "qwen3"]


class _Family(NamedTuple):
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    expand: int
    max_position_embeddings: int
    rms_norm_eps: float


FAMILIES: dict[str, _Family] = {
    "llama": _Family(LlamaConfig, LlamaModel, 4, 4096, 1e-5),
    "qwen3": _Family(Qwen3Config, Qwen3Model, 3, 32768, 1e-6),
}
"""The kinds of backbone, with MOUSE's defaults."""


class _RowCache(Cache):
    """Shows `transformers` a :class:`KeyValues` in which every row has a length of its own."""

    def __init__(self, key_values: KeyValues, positions: torch.Tensor) -> None:
        super().__init__(layers=[])
        self._kv = key_values
        self._positions = positions  # (B, L)
        rows = key_values.rows
        self._rows = torch.arange(len(positions), device=positions.device) if rows is None else rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._write(self._kv.key, key_states, layer_idx), self._write(self._kv.value, value_states, layer_idx)

    def _write(self, pool: torch.Tensor, states: torch.Tensor, layer: int) -> torch.Tensor:
        rows = self._rows.unsqueeze(-1)
        pool[rows, layer, :, self._positions] = states.transpose(1, 2).to(pool.dtype)  # (B, L, H, hd)
        context = pool[:, layer] if self._kv.rows is None else pool[self._kv.rows, layer]
        return context.to(states.dtype)


class CausalBackbone(nn.Module):
    """Runs embedded tokens through Llama or Qwen3 decoder layers.

    It follows the tensor-level contract of TorchRL 0.15's ``TransformerModule`` backbones: explicit positions, an
    optional mask, and an opaque key-value cache, with the attributes ``num_layers``, ``num_heads``, ``head_dim`` and
    ``max_seq_len``. The final norm is left out: the heads have their own.

    Args:
        hidden_dim: size ``D`` of a token.
        kind: decoder family.
        num_layers: number of decoder layers.
        num_heads: number of attention heads.
        num_key_value_heads: number of key and value heads, a divisor of ``num_heads``; all heads by default.
        head_dim: size of one head, even (positions turn pairs of numbers); ``D / num_heads`` by default.
        max_position_embeddings: largest number of tokens in a context; 4096 for Llama, 32768 for Qwen3.
        expand: width of the feed-forward layer in multiples of ``D``; 4 for Llama, 3 for Qwen3.
        intermediate_size: the same width outright; overrides ``expand``.
        kwargs: further options of the `transformers` configuration (``rope_parameters``, ``rms_norm_eps``,
            ``attention_bias``, ``attention_dropout``, ``initializer_range``).

    Raises:
        TypeError: an option that does not exist, or a size that is no integer.
        ValueError: an unknown kind, a non-positive size, or heads that do not divide the width.

    Examples:
        >>> backbone = CausalBackbone(16, num_layers=1, num_heads=2)
        >>> tokens = torch.randn(1, 3, 16)
        >>> window, _ = backbone(tokens)
        >>> cache = backbone.new_kv_cache(1)
        >>> steps = [backbone(tokens[:, t : t + 1], torch.tensor([[t]]), kv_cache=cache)[0] for t in range(3)]
        >>> torch.allclose(torch.cat(steps, 1), window, atol=1e-6)
        True
    """

    def __init__(
        self,
        hidden_dim: int,
        kind: BackboneKind = "llama",
        *,
        num_layers: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int | None = None,
        expand: int | None = None,
        intermediate_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kind not in FAMILIES:
            raise ValueError(f"CausalBackbone: kind must be one of {', '.join(FAMILIES)}, got {kind!r}.")
        family = FAMILIES[kind]
        sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers, "num_heads": num_heads}
        optional = {
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_position_embeddings,
            "expand": expand,
            "intermediate_size": intermediate_size,
        }
        for name, value in (sizes | {name: size for name, size in optional.items() if size is not None}).items():
            check_size("CausalBackbone", name, value)
        num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads % num_key_value_heads:
            raise ValueError(
                f"CausalBackbone: num_key_value_heads must divide num_heads={num_heads}, got {num_key_value_heads}."
            )
        if head_dim is None and hidden_dim % num_heads:
            raise ValueError(
                f"CausalBackbone: num_heads must divide hidden_dim={hidden_dim}, got {num_heads}. "
                "Change one of them, or give head_dim (Qwen3)."
            )
        head_dim = hidden_dim // num_heads if head_dim is None else head_dim
        if head_dim % 2:
            raise ValueError(
                f"CausalBackbone: head_dim must be even, got {head_dim}. By default it is hidden_dim / num_heads."
            )
        if max_position_embeddings is None:
            max_position_embeddings = family.max_position_embeddings
        if intermediate_size is None:
            intermediate_size = (family.expand if expand is None else expand) * hidden_dim
        fixed: dict[str, Any] = {
            "vocab_size": 1,  # Steps come embedded; the table of `transformers` is a stub.
            "hidden_size": hidden_dim,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_position_embeddings,
            "intermediate_size": intermediate_size,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "use_cache": False,
        }
        further = {entry.name for entry in dataclasses.fields(family.config)} - set(fixed)
        for name in kwargs:
            if name not in further:
                nearest = difflib.get_close_matches(name, sorted({*further, *sizes, *optional}), cutoff=0.0)
                raise TypeError(f"CausalBackbone: unknown option {name!r}. The nearest are {', '.join(nearest)}.")
        kwargs.setdefault("rms_norm_eps", family.rms_norm_eps)
        config = family.config(**fixed, attn_implementation="sdpa", **kwargs)
        self.kind = kind
        self.model = family.model(config)
        self.model.norm = nn.Identity()
        self.model.embed_tokens.requires_grad_(False)

    @property
    def hidden_dim(self) -> int:
        """Size of a token."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return int(self.model.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return int(self.model.layers[0].self_attn.head_dim)

    @property
    def max_seq_len(self) -> int:
        """Largest number of tokens in a context."""
        return int(self.model.config.max_position_embeddings)

    def new_kv_cache(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValues:
        """Allocates an empty cache.

        Args:
            batch_size: number of slots.
            capacity: number of tokens of a context, at least 1; ``max_seq_len`` by default.
            device: that of the weights by default.
            dtype: that of the weights by default.
        """
        weight = self.model.layers[0].self_attn.k_proj.weight
        heads = int(self.model.config.num_key_value_heads)
        shape = (batch_size, self.num_layers, heads, self.max_seq_len if capacity is None else capacity, self.head_dim)
        key, value = (torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype) for _ in "kv")
        return KeyValues(key, value)

    @staticmethod
    def reset_kv_cache(kv_cache: KeyValues, mask: torch.Tensor) -> KeyValues:
        """Clears slots in place.

        Args:
            kv_cache: a cache from :meth:`new_kv_cache`.
            mask: bool ``[slots]``, true where to clear.
        """
        for pool in kv_cache[:2]:
            pool.masked_fill_(mask.view(-1, 1, 1, 1, 1), 0)
        return kv_cache

    def forward(
        self,
        features: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        kv_cache: KeyValues | None = None,
    ) -> tuple[torch.Tensor, KeyValues | None]:
        """Runs the decoder layers.

        Args:
            features: ``[B, L, D]`` tokens.
            positions: int64 ``[B, L]`` of each token in its context; without a cache ``None`` is 0 to L-1, the fastest
                path when no mask is given either.
            mask: bool ``[B, L, L]``, true where to attend; causal by default. Not read with a cache, whose rows see
                what lies at or before their positions.
            kv_cache: the contexts; keys and values are written into it at ``positions``, without gradient.

        Returns:
            ``[B, L, D]``, and the cache.
        """
        if kv_cache is not None:
            if positions is None:
                raise ValueError("CausalBackbone: positions must be given with kv_cache, got None.")
            index = torch.arange(kv_cache.key.shape[-2], device=features.device)
            visible = (index <= positions.unsqueeze(-1)).unsqueeze(1)  # (B, 1, L, capacity)
            with torch.no_grad():
                out = self._run(features, positions, visible, _RowCache(kv_cache, positions))
            return out, kv_cache
        if mask is None and positions is not None:
            length = features.shape[1]
            mask = (
                torch.ones(length, length, dtype=torch.bool, device=features.device)
                .tril()
                .expand(len(features), -1, -1)
            )
        return self._run(features, positions, mask if mask is None else mask.unsqueeze(1), None), None

    def _run(
        self,
        features: torch.Tensor,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: _RowCache | None,
    ) -> torch.Tensor:
        out: torch.Tensor = self.model(
            inputs_embeds=features,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        return out
