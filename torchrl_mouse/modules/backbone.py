"""The causal backbone: a `transformers` decoder stack over embedded steps."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3Model
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.decoding import check_pass, compiled_decode, decode_in_parts
from torchrl_mouse.modules.kv_cache import KeyValues

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

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

FURTHER_OPTIONS = (
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "initializer_range",
)
"""What is passed on to the configuration of `transformers`, where the family has it."""

_OLD_ROPE_OPTIONS = {"rope_theta", "rope_scaling"}  # as `transformers` 4 says it, and 5 converts

# With these a token's turn depends on its position alone. The others ("dynamic", "longrope") look at the longest
# context in the batch: a step's output would depend on other rows, and on how far its own context went later.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

MAX_SIZE, MAX_HEAD_DIM, MAX_LAYERS, MAX_PARAMETERS = 2**24, 2**14, 2**12, 10**11
"""What a configuration from a stranger may ask for, before any memory is taken."""

# Not cuDNN's, which has numerical issues (MOUSE switches it off everywhere).
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def default_kind(head_dim: int | None) -> BackboneKind:
    """Returns the family of a configuration that does not say it, as MOUSE reads it.

    Examples:
        >>> default_kind(None), default_kind(64)
        ('llama', 'qwen3')
    """
    return "llama" if head_dim is None else "qwen3"


class CausalBackbone(nn.Module):
    """Runs embedded tokens through Llama or Qwen3 decoder layers.

    It follows the tensor-level contract of TorchRL 0.15's ``TransformerModule`` backbones: explicit positions, an
    optional mask, and an opaque key-value cache, with the attributes ``num_layers``, ``num_heads``, ``head_dim`` and
    ``max_seq_len``. The final norm is left out: the heads have their own.

    With a cache, the parts of the layers are called one by one. Forward hooks of projections, norms and the MLP act
    then, too, and see tokens ``[B * L, D]``; those of a whole layer or its attention are an error, and so is a wrapper.

    Args:
        hidden_dim: size ``D`` of a token.
        kind: decoder family; by default ``"qwen3"`` if ``head_dim`` is given, else ``"llama"``, which is how MOUSE
            reads configurations that do not say.
        num_layers: number of decoder layers.
        num_heads: number of attention heads.
        num_key_value_heads: number of key and value heads, a divisor of ``num_heads``; all heads by default.
        head_dim: size of one head, even (positions turn pairs of numbers); ``D / num_heads`` by default.
        max_position_embeddings: largest number of tokens in a context; 4096 for Llama, 32768 for Qwen3.
        expand: width of the feed-forward layer in multiples of ``D``; 4 for Llama, 3 for Qwen3.
        intermediate_size: the same width outright; overrides ``expand``.
        num_hidden_layers: another name of ``num_layers``, as published configurations have it.
        num_attention_heads: another name of ``num_heads``.
        use_sliding_window: an option of published configurations, which must be false: every token sees its whole
            context.
        kwargs: further options of the `transformers` configuration: ``rope_parameters`` (of type ``"default"``,
            ``"linear"``, ``"llama3"`` or ``"yarn"``; or ``rope_theta`` and ``rope_scaling``, as of old),
            ``rms_norm_eps``, ``hidden_act``, ``attention_bias``, ``mlp_bias`` (Llama), ``attention_dropout``,
            ``initializer_range``.

    Raises:
        TypeError: an option that is missing, does not exist or has the wrong type.
        ValueError: an unknown kind, a size out of range, heads that do not divide the width, rotary positions of
            another type, or more than 1e11 parameters; all before memory is taken.

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
        kind: BackboneKind | None = None,
        *,
        num_layers: int | None = None,
        num_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int | None = None,
        expand: int | None = None,
        intermediate_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        use_sliding_window: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        kind = default_kind(head_dim) if kind is None else kind
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ValueError(
                f"CausalBackbone: kind must be one of {', '.join(FAMILIES)}, got {kind!r}. A GRU, 'gru' in "
                "backbone_kwargs, is a GRUBackbone."
            )
        if use_sliding_window:
            raise ValueError(
                f"CausalBackbone: use_sliding_window must be false, got {use_sliding_window!r}. Every token sees its "
                "whole context: leave it out if contexts are no longer than the window."
            )
        family = FAMILIES[kind]
        optional = {
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "max_position_embeddings": max_position_embeddings,
            "expand": expand,
            "intermediate_size": intermediate_size,
        }
        further = {entry.name for entry in dataclasses.fields(family.config)} & set(FURTHER_OPTIONS) | _OLD_ROPE_OPTIONS
        for name in kwargs:
            if name not in further:
                nearest = difflib.get_close_matches(
                    name, sorted({*further, "num_layers", "num_heads", *optional}), cutoff=0.0
                )
                raise TypeError(f"CausalBackbone: unknown option {name!r}. The nearest are {', '.join(nearest)}.")
        num_layers = _either(num_layers=num_layers, num_hidden_layers=num_hidden_layers)
        num_heads = _either(num_heads=num_heads, num_attention_heads=num_attention_heads)
        sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers, "num_heads": num_heads}
        for name, value in (sizes | {name: size for name, size in optional.items() if size is not None}).items():
            most = {"num_layers": MAX_LAYERS, "head_dim": MAX_HEAD_DIM}.get(name, MAX_SIZE)
            check_size("CausalBackbone", name, value, most=most)
        num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads % num_key_value_heads:
            raise ValueError(
                f"CausalBackbone: num_key_value_heads must divide num_heads={num_heads}, got {num_key_value_heads}."
            )
        if hidden_dim % num_heads and (head_dim is None or kind == "llama"):
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
            check_size("CausalBackbone", "expand * hidden_dim", intermediate_size, most=MAX_SIZE)
        # The matrices of a layer; biases and norms are next to nothing.
        attention = 2 * hidden_dim * head_dim * (num_heads + num_key_value_heads)
        parameters = num_layers * (attention + 3 * hidden_dim * intermediate_size)
        if parameters > MAX_PARAMETERS:
            raise ValueError(
                f"CausalBackbone: sizes must make at most {MAX_PARAMETERS:.0e} parameters, got {parameters:.1e} of "
                f"hidden_dim={hidden_dim}, num_layers={num_layers}, num_heads={num_heads}, head_dim={head_dim}, "
                f"intermediate_size={intermediate_size}. Make one of them smaller."
            )
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
        epsilon, dropout = kwargs.get("rms_norm_eps", family.rms_norm_eps), kwargs.get("attention_dropout", 0.0)
        if isinstance(epsilon, int | float) and not 0 < epsilon < math.inf:
            raise ValueError(f"CausalBackbone: rms_norm_eps must be positive, got {epsilon}.")
        if isinstance(dropout, int | float) and not 0 <= dropout < 1:
            raise ValueError(f"CausalBackbone: attention_dropout must lie in [0, 1), got {dropout}.")
        config = _make_config(family, fixed, {"rms_norm_eps": family.rms_norm_eps, **kwargs})
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
        shape = batch_size, heads, self.max_seq_len if capacity is None else capacity, self.head_dim
        device, dtype = device or weight.device, dtype or weight.dtype
        key, value = (
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(self.num_layers)) for _ in "kv"
        )
        return KeyValues(key, value)

    @staticmethod
    def reset_kv_cache(kv_cache: KeyValues, mask: torch.Tensor) -> KeyValues:
        """Clears slots in place.

        Args:
            kv_cache: a cache from :meth:`new_kv_cache`.
            mask: bool ``[slots]``, true where to clear.
        """
        for pool in kv_cache.pools:
            pool.masked_fill_(mask.view(-1, 1, 1, 1), 0)
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
            check_pass(self.model, features, kv_cache)
            with torch.no_grad(), _attention_kernels(features):
                return decode_in_parts(self.model, features, positions, kv_cache), kv_cache
        if mask is None and positions is not None:
            length = features.shape[1]
            mask = (
                torch.ones(length, length, dtype=torch.bool, device=features.device)
                .tril()
                .expand(len(features), -1, -1)
            )
        mask = mask if mask is None else mask.unsqueeze(1)
        with sdpa_kernel(_ATTENTION):
            out = self.model(inputs_embeds=features, position_ids=positions, attention_mask=mask, use_cache=False)
        return out.last_hidden_state, None

    def step(self, features: torch.Tensor, positions: torch.Tensor, kv_cache: KeyValues) -> torch.Tensor:
        """Does what :meth:`forward` does with a cache, compiled.

        It is meant for few new tokens a row, the same number at each call: another number is compiled anew.

        Args:
            features: ``[B, L, D]`` tokens.
            positions: int64 ``[B, L]`` of each token in its context.
            kv_cache: the contexts; keys and values are written into it at ``positions``, without gradient.

        Returns:
            ``[B, L, D]``.
        """
        check_pass(self.model, features, kv_cache)
        with torch.no_grad(), _attention_kernels(features):
            return compiled_decode(self.model, features, positions, kv_cache)


def _attention_kernels(features: torch.Tensor) -> AbstractContextManager[None]:
    # The CPU has none that is to be left out, and steps are so short there that saying so is felt.
    return sdpa_kernel(_ATTENTION) if features.is_cuda else nullcontext()


def _either(**spellings: int | None) -> int:
    """Returns the value of an option that has two names."""
    given = {name: value for name, value in spellings.items() if value is not None}
    if not given:
        raise TypeError(f"CausalBackbone: {' or '.join(spellings)} must be given, got neither.")
    first, *others = given.values()
    if any(other != first for other in others):
        raise ValueError(
            f"CausalBackbone: {' and '.join(given)} must be the same, got {first!r} and {others[0]!r}. Give one."
        )
    return first


@contextmanager
def clear_errors(where: str) -> Iterator[None]:
    """Turns what `transformers` raises at unusable options into a ``TypeError`` or ``ValueError``.

    Args:
        where: whose options they are, for the error.

    Examples:
        >>> with clear_errors("CausalBackbone"):
        ...     LlamaConfig(attention_bias="yes")
        Traceback (most recent call last):
            ...
        TypeError: CausalBackbone: options must make a configuration of transformers, got: TypeError: Field
        'attention_bias' expected bool, got str (value: 'yes').
    """
    try:
        yield
    except (StrictDataclassError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        kind = TypeError if isinstance(error.__cause__ or error, TypeError) else ValueError
        reason = str(error).splitlines()[-1].strip()
        raise kind(f"{where}: options must make a configuration of transformers, got: {reason}.") from error


def _make_config(family: _Family, fixed: dict[str, Any], options: dict[str, Any]) -> PreTrainedConfig:
    """Builds the configuration of a model; what `transformers` would stumble over later is refused here."""
    if str(activation := options.get("hidden_act", "silu")) not in ACT2FN:
        raise ValueError(f"CausalBackbone: hidden_act must be an activation of transformers, got {activation!r}.")
    old = [name for name in sorted(_OLD_ROPE_OPTIONS) if options.get(name) is not None]
    if old and options.get("rope_parameters") is not None:
        raise ValueError(
            f"CausalBackbone: rope_parameters must hold all about positions, got {old[0]} besides. Put it there."
        )
    with clear_errors("CausalBackbone"):
        # A copy, since `transformers` writes into what it is given.
        config = family.config(**fixed, attn_implementation="sdpa", **copy.deepcopy(options))
        rope_type = config.rope_parameters.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"CausalBackbone: rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}. Others turn a token "
            "by more than its position, so steps would not agree with windows: give rope_parameters of one of these."
        )
    with clear_errors("CausalBackbone"), torch.device("cpu"):  # On the meta device nothing could be looked at.
        rotary = LlamaRotaryEmbedding(config)
        turns = [*rotary.inv_freq.tolist(), rotary.attention_scaling]
        usable = len(turns) - 1 == fixed["head_dim"] // 2 and all(0 < turn < math.inf for turn in turns)
    if not usable:
        raise ValueError(
            "CausalBackbone: rope_parameters must give finite, positive frequencies for the whole head, got "
            f"{config.rope_parameters}."
        )
    return config
