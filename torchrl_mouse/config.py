"""The configuration of a model, the content of ``config.json``: MOUSE's options, checked before anything is built."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchrl_mouse.modules.backbone import FAMILIES, MAX_SIZE, CausalBackbone, default_kind
from torchrl_mouse.modules.checks import check_options, check_size
from torchrl_mouse.modules.embedding import StepEmbedder
from torchrl_mouse.modules.heads import DQNHead, GaussianHead, SwiGLUHead, VecDQNHead
from torchrl_mouse.modules.recurrent import GRUBackbone
from torchrl_mouse.modules.trunk import Trunk

HEADS: dict[str, type[nn.Module]] = {
    "vec_dqn": VecDQNHead,
    "dqn": DQNHead,
    "sp": SwiGLUHead,
    "sv": SwiGLUHead,
    "gaussian": GaussianHead,
}
"""The kinds of head, in the order in which one is chosen to act."""

REQUIRED = ("hidden_dim", "embedding_kwargs", "backbone_kwargs")
"""What a file must say: a default in its place would be another model."""

IGNORED = ("obs_continuous_encoder",)
"""Options of the embedder in published configurations that MOUSE itself drops."""

MAX_WINDOW = 2**20

_OF_HEADS = ("in_dim", "out_dim", "num_actions", "action_dim")  # these come from the other options


@dataclass(frozen=True)
class MouseConfig:
    """What a :class:`~torchrl_mouse.models.MouseModel` is built from.

    Args:
        hidden_dim: size ``D`` of a token.
        window: steps that a context holds while acting, and the length of window to train on.
        embedding_kwargs: options of :class:`~torchrl_mouse.modules.StepEmbedder`; ``max_num_actions`` (for the gaussian
            head ``max_num_action_continuous``) also sizes the heads.
        backbone_kwargs: options of :class:`~torchrl_mouse.modules.CausalBackbone`, or with ``kind`` ``"gru"`` of
            :class:`~torchrl_mouse.modules.GRUBackbone`; ``None``, or an empty dictionary as in MOUSE's files, reads out
            each step by itself. A missing ``kind`` is filled in: ``"qwen3"`` where there is a ``head_dim``, else
            ``"llama"``.
        vec_dqn_head_kwargs: options of the vector Q-value head. This and the following heads are absent when ``None``,
            or with ``num_layers`` 0 as in MOUSE's files.
        dqn_head_kwargs: options of the Q-value head.
        sp_head_kwargs: options of the policy head.
        sv_head_kwargs: options of the value head.
        gaussian_head_kwargs: options of the policy head for continuous actions.
        action_head: the head to act with; by default the first present, in this order.
        trunk_kwargs: further options of :class:`~torchrl_mouse.modules.Trunk` (``keys``, ``overflow``,
            ``on_weight_update``, ``max_streams``, ``compile``); a nested key in ``keys`` may be a list, as in JSON.

    Raises:
        TypeError: an option has the wrong type, or does not exist.
        ValueError: an unknown head, a size that is missing or out of range.

    Examples:
        >>> MouseConfig(embedding_kwargs={"max_num_actions": 3}, sp_head_kwargs={"hidden_dmi": 8})
        Traceback (most recent call last):
            ...
        TypeError: sp_head_kwargs: unknown option 'hidden_dmi'. The options are hidden_dim, num_layers, scale, use_norm.
    """

    hidden_dim: int = 64
    window: int = 128
    embedding_kwargs: dict[str, Any] = field(default_factory=dict)
    backbone_kwargs: dict[str, Any] | None = field(default_factory=lambda: {"num_layers": 4, "num_heads": 4})
    vec_dqn_head_kwargs: dict[str, Any] | None = None
    dqn_head_kwargs: dict[str, Any] | None = None
    sp_head_kwargs: dict[str, Any] | None = None
    sv_head_kwargs: dict[str, Any] | None = None
    gaussian_head_kwargs: dict[str, Any] | None = None
    action_head: str | None = None
    trunk_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options("MouseConfig", vars(self), MouseConfig)
        for name, most in (("hidden_dim", MAX_SIZE), ("window", MAX_WINDOW)):
            check_size("MouseConfig", name, getattr(self, name), most=most)
        for name in HEADS:
            if (kwargs := getattr(self, f"{name}_head_kwargs")) is not None:
                absent = kwargs.get("num_layers") == 0
                check_options(
                    f"{name}_head_kwargs", kwargs, HEADS[name], SwiGLUHead, given=_OF_HEADS, complete=not absent
                )
        self._normalize()
        if self.backbone_kwargs is not None and self.backbone_kwargs["kind"] not in (*FAMILIES, "gru"):
            raise ValueError(
                f"backbone_kwargs: kind must be one of {', '.join((*FAMILIES, 'gru'))}, got "
                f"{self.backbone_kwargs['kind']!r}. Choose one."
            )
        check_options("embedding_kwargs", self.embedding_kwargs, StepEmbedder)
        if (backbone := self.backbone_class) is not None:
            check_options("backbone_kwargs", self.backbone_kwargs or {}, backbone, given=("hidden_dim",))
        check_options("trunk_kwargs", self.trunk_kwargs, Trunk, given=("window", "embedder", "backbone"))
        for name in self.heads:
            self.action_dim(name)
        if self.action_head is not None and self.action_head not in self.heads:
            raise ValueError(
                f"MouseConfig: action_head must be one of the model's heads ({', '.join(self.heads) or 'none'}), got "
                f"{self.action_head!r}. Give the head's options, such as dqn_head_kwargs."
            )

    def _normalize(self) -> None:
        """Gives what can be said in several ways its one form, so that equal models have equal configurations."""

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if dropped := [name for name in IGNORED if name in self.embedding_kwargs]:
            warnings.warn(f"MouseConfig: embedding_kwargs holds {dropped[0]!r}, which has no effect.", stacklevel=4)
            put("embedding_kwargs", {name: v for name, v in self.embedding_kwargs.items() if name not in dropped})
        if not self.backbone_kwargs:
            put("backbone_kwargs", None)
        elif self.backbone_kwargs.get("kind") is None:
            kind = default_kind(self.backbone_kwargs.get("head_dim"))
            put("backbone_kwargs", {**self.backbone_kwargs, "kind": kind})
        for name in HEADS:
            if (getattr(self, f"{name}_head_kwargs") or {}).get("num_layers") == 0:
                put(f"{name}_head_kwargs", None)
        if isinstance(keys := self.trunk_kwargs.get("keys"), dict):
            keys = {name: tuple(key) if isinstance(key, list) else key for name, key in keys.items()}
            put("trunk_kwargs", {**self.trunk_kwargs, "keys": keys})

    @property
    def backbone_class(self) -> type[CausalBackbone | GRUBackbone] | None:
        """What takes the options of the backbone; ``None`` where there is none."""
        if self.backbone_kwargs is None:
            return None
        return GRUBackbone if self.backbone_kwargs["kind"] == "gru" else CausalBackbone

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        """The options of each head that is present."""
        options = {name: getattr(self, f"{name}_head_kwargs") for name in HEADS}
        return {name: kwargs for name, kwargs in options.items() if kwargs is not None}

    def action_dim(self, head: str) -> int:
        """Returns the number of actions of a head, or the size of its continuous action.

        Raises:
            ValueError: the embedder's options do not say.
        """
        option = "max_num_action_continuous" if head == "gaussian" else "max_num_actions"
        size = self.embedding_kwargs.get(option, 0)
        if size < 1:
            raise ValueError(
                f"MouseConfig: embedding_kwargs must hold {option} >= 1 for the {head} head, got {size}. Give it."
            )
        return int(size)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MouseConfig:
        """Builds a configuration from the content of ``config.json``, ours or MOUSE's.

        Raises:
            TypeError: the content is no JSON object, or an option has the wrong type.
            ValueError: an option that does not exist, or one that is missing.

        Examples:
            >>> MouseConfig.from_dict({"hidden_dim": 16, "embedding_kwargs": {}})
            Traceback (most recent call last):
                ...
            ValueError: MouseConfig: the configuration must hold hidden_dim, embedding_kwargs, backbone_kwargs; got no
            'backbone_kwargs'.
        """
        if not isinstance(values, dict):
            raise TypeError(f"MouseConfig: the configuration must be a JSON object, got {type(values).__name__}.")
        names = [entry.name for entry in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"MouseConfig: unknown option {name!r}. The options are {', '.join(names)}.")
        for name in REQUIRED:
            if name not in values:
                raise ValueError(f"MouseConfig: the configuration must hold {', '.join(REQUIRED)}; got no {name!r}.")
        return cls(**values)
