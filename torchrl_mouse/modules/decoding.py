"""New tokens against cached keys and values: the decoder layers of `transformers`, without their bookkeeping."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3Model,
    Qwen3RotaryEmbedding,
)
from transformers.utils import output_capturing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from torchrl_mouse.modules.kv_cache import KeyValues

_MASKED_AT_ONCE = 2**24
"""Bytes of a mask: many tokens of a few contexts, and little beside the contexts themselves."""

_FORWARDS = {
    "model": (LlamaModel.forward, Qwen3Model.forward),
    "rotary_emb": (LlamaRotaryEmbedding.forward, Qwen3RotaryEmbedding.forward),
    "norm": (torch.nn.Identity.forward,),
    "layer": (LlamaDecoderLayer.forward, Qwen3DecoderLayer.forward),
    "self_attn": (LlamaAttention.forward, Qwen3Attention.forward),
}
"""What :func:`decode` does in place of calling it."""

_without_hooks: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
"""The models that were seen to have no hooks, with the number of the newest hook of the process at that time."""


def check_pass(model: PreTrainedModel, features: torch.Tensor, cache: KeyValues) -> None:
    """Raises unless :func:`decode` can stand in for ``model.forward``, before anything is written.

    The model is looked at in its first pass, and again once a hook was registered anywhere.

    Args:
        model: see :func:`decode`, as for the others.
        features: ``[B, L, D]``.
        cache: the contexts.

    Raises:
        ValueError: the cache is of another number of rows.
        TypeError: the model, a layer, its attention, the rotary embedding or the final norm is wrapped, or has a
            ``forward`` that is not of `transformers`, which would act in training only.
        RuntimeError: one of these has forward hooks, which would act in training only.
    """
    slots = len(cache.key[0] if cache.rows is None else cache.rows)
    if len(features) != slots:
        raise ValueError(
            f"CausalBackbone: kv_cache must have a slot for each row of features, got {slots} for {len(features)}. "
            "Give the slots of the rows as its rows."
        )
    _has_hooks(model)


def _check_part(kind: str, name: str, part: torch.nn.Module) -> None:
    if getattr(part.forward, "__func__", None) not in _FORWARDS[kind]:
        raise TypeError(
            f"CausalBackbone: {name} must have the forward of transformers to act step by step, got one of "
            f"{type(part).__name__}, which would act in training only. Change projections, norms or the MLP instead."
        )
    for hook in _hooks(part):
        raise RuntimeError(
            f"CausalBackbone: {name} must have no forward hooks to act step by step, got {hook!r}, which would act in "
            "training only. Hook projections, norms or the MLP instead."
        )


def _hooks(module: torch.nn.Module) -> Iterator[Callable[..., Any]]:
    """Goes through a module's forward hooks, but for those with which `transformers` only looks on."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if getattr(hook, "__module__", None) != output_capturing.__name__:
            yield hook


def _has_hooks(model: PreTrainedModel) -> bool:
    """Says whether any module has hooks; raises where :func:`check_pass` says so.

    To look at all modules takes as long as a layer: they are looked at again once a hook was registered anywhere.
    """
    newest = RemovableHandle.next_id
    if _without_hooks.get(model) == newest:
        return False
    for kind in ("rotary_emb", "norm"):
        _check_part(kind, f"model.{kind}", getattr(model, kind))
    for number, layer in enumerate(model.layers):
        _check_part("layer", f"model.layers.{number}", layer)
        _check_part("self_attn", f"model.layers.{number}.self_attn", layer.self_attn)
    _check_part("model", "model", model)
    if any(True for module in model.modules() for _ in _hooks(module)):
        return True
    _without_hooks[model] = newest
    return False


def decode_in_parts(
    model: PreTrainedModel, features: torch.Tensor, positions: torch.Tensor, cache: KeyValues
) -> torch.Tensor:
    """Does what :func:`decode` does, many new tokens a few contexts at a time: masks grow with both.

    Args:
        model: see :func:`decode`, as for the others.
        features: ``[B, L, D]``.
        positions: int64 ``[B, L]``, increasing along ``L``.
        cache: the contexts.

    Returns:
        ``[B, L, D]``.
    """
    batch, num, _ = features.shape
    _, heads, length, _ = cache.key[0].shape
    per_token = model.config.num_attention_heads // heads * length * features.element_size()
    tokens = max(1, _MASKED_AT_ONCE // per_token)
    if num == 1 or batch * num <= tokens:
        return decode(model, features, positions, cache)
    rows, steps = max(1, tokens // num), min(num, tokens)
    out = torch.empty_like(features)
    for first in range(0, batch, rows):
        some = slice(first, first + rows)
        contexts = cache.of_rows(some)
        for begin in range(0, num, steps):  # In this order: later tokens see earlier ones.
            at = some, slice(begin, begin + steps)
            out[at] = decode(model, features[at], positions[at], contexts)
    return out


def decode(model: PreTrainedModel, features: torch.Tensor, positions: torch.Tensor, cache: KeyValues) -> torch.Tensor:
    """Runs the decoder layers of a Llama or Qwen3 model over new tokens, and writes their keys and values.

    It computes what ``model.forward`` does with a cache, and calls the same projections and norms. That one looks up
    per layer how to attend, and builds masks for contexts of one length, which is most of a step of a small model.

    Args:
        model: the layers; its final norm is not applied.
        features: ``[B, L, D]`` new tokens.
        positions: int64 ``[B, L]``, each token's place in its context; what lies at later places is invisible.
        cache: the contexts, longer than the largest position; written to in place.

    Returns:
        ``[B, L, D]``.

    Examples:
        >>> from torchrl_mouse.modules import CausalBackbone
        >>> backbone = CausalBackbone(16, num_layers=1, num_heads=2)
        >>> with torch.no_grad():
        ...     decode(backbone.model, torch.zeros(3, 1, 16), torch.zeros(3, 1).long(), backbone.new_kv_cache(3)).shape
        torch.Size([3, 1, 16])
    """
    batch, num, _ = features.shape
    slots, heads, length, width = cache.key[0].shape
    groups = model.config.num_attention_heads // heads
    device = features.device
    later = torch.arange(length, device=device) > positions.unsqueeze(-1)
    mask = features.new_zeros(later.shape).masked_fill_(later, -math.inf).unsqueeze(1)  # (B, 1, L, length)
    if num > 1 and groups > 1:
        mask = mask.repeat(1, 1, groups, 1)
    rows = torch.arange(slots, device=device) if cache.rows is None else cache.rows
    # Writes by index, and not `scatter_`, which a compiler would make on a copy of all contexts.
    places = rows.repeat_interleave(num).unsqueeze(1), torch.arange(heads, device=device), positions.reshape(-1, 1)
    turns = _turns(model.rotary_emb, positions, features.dtype)
    hidden = features.flatten(0, 1)  # (B * L, D)
    for layer, keys, values in zip(model.layers, cache.key, cache.value, strict=True):
        attention = layer.self_attn
        query, key, value = _project(attention, layer.input_layernorm(hidden), turns)
        keys.index_put_(places, key.to(keys.dtype))
        values.index_put_(places, value.to(values.dtype))
        if cache.rows is not None:  # Else a view: no copy of the contexts at each step.
            keys, values = keys[rows], values[rows]
        # Queries that share a key head become further queries of that head: its keys and values are not repeated.
        query = query.view(batch, num, heads, groups, width).permute(0, 2, 3, 1, 4)
        out = functional.scaled_dot_product_attention(
            query.reshape(batch, heads, groups * num, width),
            keys.to(query.dtype),
            values.to(query.dtype),
            attn_mask=mask,
            dropout_p=attention.attention_dropout if attention.training else 0.0,
            scale=attention.scaling,
        )
        out = out.view(batch, heads, groups, num, width).permute(0, 3, 1, 2, 4).reshape(batch * num, -1)
        hidden = hidden + attention.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden.view(batch, num, -1)


@functools.cache
def _compiled() -> Any:
    # Once for all models: those of one architecture share what is compiled, and others shall not use up what these may.
    return torch.compile(decode, recompile_limit=64)  # type: ignore[call-overload]  # torch's types lack it


def compiled_decode(
    model: PreTrainedModel, features: torch.Tensor, positions: torch.Tensor, cache: KeyValues
) -> torch.Tensor:
    """Does what :func:`decode` does, compiled at the first call for any number of rows and length of contexts.

    Models of one architecture share what is compiled. A single row is compiled apart, and so are rows that do not
    begin at the first slot, inference mode, training mode, autocast and each type of the weights. What is rarer is left
    to :func:`decode`: rows in no order, and a model with hooks, which a compiler would not see come and go.

    Args:
        model: see :func:`decode`, as for the others.
        features: ``[B, L, D]``.
        positions: int64 ``[B, L]``.
        cache: the contexts.

    Returns:
        ``[B, L, D]``.
    """
    first = cache.key[0]
    if cache.rows is not None or not first.is_contiguous() or _has_hooks(model):
        return decode(model, features, positions, cache)
    pools = () if hasattr(first, "_dynamo_weak_dynamic_indices") else cache.pools  # The same views serve many steps.
    for rows in (features, positions, *pools):
        torch._dynamo.maybe_mark_dynamic(rows, 0)
    for pool in pools:
        torch._dynamo.maybe_mark_dynamic(pool, 2)
    out: torch.Tensor = _compiled()(model, features, positions, cache)
    return out


def _turns(rotary: Any, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what :func:`_project` turns by: cosines and sines ``[B * L, 1, hd]``, the sines' first half negated."""
    angles = positions.reshape(-1, 1, 1) * rotary.inv_freq.float()
    cos, sin = ((turn * rotary.attention_scaling).to(dtype) for turn in (angles.cos(), angles.sin()))
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _project(
    attention: Any, hidden: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries ``[B * L, heads, hd]``, and keys and values ``[B * L, kv_heads, hd]``, turned by position."""
    shape = *hidden.shape[:1], -1, attention.head_dim
    query = attention.q_proj(hidden).view(shape)
    key, value = attention.k_proj(hidden).view(shape), attention.v_proj(hidden).view(shape)
    if isinstance(attention, Qwen3Attention):
        query, key = attention.q_norm(query), attention.k_norm(key)
    both = torch.cat([query, key], 1)
    both = both * turns[0] + both.roll(attention.head_dim // 2, -1) * turns[1]
    heads = query.shape[1]
    return both[:, :heads], both[:, heads:], value
