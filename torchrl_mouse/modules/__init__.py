"""Networks: embedder, backbone and its cache, trunk, heads, actors."""

from torchrl_mouse.modules.actors import StickyActions, make_actor
from torchrl_mouse.modules.backbone import CausalBackbone
from torchrl_mouse.modules.embedding import StepEmbedder, TokenType
from torchrl_mouse.modules.heads import DQNHead, SwiGLUHead
from torchrl_mouse.modules.kv_cache import KeyValues, KVCache
from torchrl_mouse.modules.tabular import TabularQLearner
from torchrl_mouse.modules.trunk import Trunk

__all__ = [
    "CausalBackbone",
    "DQNHead",
    "KVCache",
    "KeyValues",
    "StepEmbedder",
    "StickyActions",
    "SwiGLUHead",
    "TabularQLearner",
    "TokenType",
    "Trunk",
    "make_actor",
]
