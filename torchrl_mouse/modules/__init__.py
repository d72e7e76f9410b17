"""Networks: embedder, backbone and its cache, trunk, heads, actors."""

from torchrl_mouse.modules.actors import StickyActions, categorical_policy, gaussian_policy, make_actor
from torchrl_mouse.modules.backbone import CausalBackbone
from torchrl_mouse.modules.context_encoders import CONTEXT_ENCODERS, BayesianContextEncoder, make_context_encoder
from torchrl_mouse.modules.context_posterior import ContextPosterior, sample_latent
from torchrl_mouse.modules.embedding import StepEmbedder, TokenType
from torchrl_mouse.modules.encoder_files import PyTorchModule, fanin_init
from torchrl_mouse.modules.heads import DQNHead, GaussianHead, MultiDiscountHead, SwiGLUHead, VecDQNHead, VectorHead
from torchrl_mouse.modules.kv_cache import KeyValues, KVCache
from torchrl_mouse.modules.latent import latent_actor, latent_qvalue, latent_value
from torchrl_mouse.modules.pearl_encoders import (
    AttentionContextEncoder,
    ContextEncoder,
    LinearContextEncoder,
    MLPContextEncoder,
    RecurrentContextEncoder,
)
from torchrl_mouse.modules.pretrained import backbone_kwargs_from_pretrained, load_pretrained_layers
from torchrl_mouse.modules.recurrent import GRUBackbone
from torchrl_mouse.modules.specs import embedding_kwargs_from_specs
from torchrl_mouse.modules.tabular import TabularQLearner
from torchrl_mouse.modules.trunk import Trunk

__all__ = [
    "CONTEXT_ENCODERS",
    "AttentionContextEncoder",
    "BayesianContextEncoder",
    "CausalBackbone",
    "ContextEncoder",
    "ContextPosterior",
    "DQNHead",
    "GRUBackbone",
    "GaussianHead",
    "KVCache",
    "KeyValues",
    "LinearContextEncoder",
    "MLPContextEncoder",
    "MultiDiscountHead",
    "PyTorchModule",
    "RecurrentContextEncoder",
    "StepEmbedder",
    "StickyActions",
    "SwiGLUHead",
    "TabularQLearner",
    "TokenType",
    "Trunk",
    "VecDQNHead",
    "VectorHead",
    "backbone_kwargs_from_pretrained",
    "categorical_policy",
    "embedding_kwargs_from_specs",
    "fanin_init",
    "gaussian_policy",
    "latent_actor",
    "latent_qvalue",
    "latent_value",
    "load_pretrained_layers",
    "make_actor",
    "make_context_encoder",
    "sample_latent",
]
