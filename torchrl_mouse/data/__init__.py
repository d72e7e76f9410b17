"""Stored experience and its sampling."""

from torchrl_mouse.data.augmentation import JitterObservation, RandomSymmetry
from torchrl_mouse.data.hub import push_stores_to_hub, push_to_hub
from torchrl_mouse.data.interop import from_minari, record_vector_env, to_minari
from torchrl_mouse.data.merging import encode_hf_rows, merge_stores_to_dataset
from torchrl_mouse.data.samplers import TaskWriter, WindowSampler, replay_buffer
from torchrl_mouse.data.store import DatasetStore
from torchrl_mouse.data.token_augmentation import TokenAugmenter
from torchrl_mouse.data.token_augmentation_config import (
    AugmentMaskProbConfig,
    AugmentScalarSpec,
    AugmentTokensConfig,
)
from torchrl_mouse.data.trajectories import from_trajectories

__all__ = [
    "AugmentMaskProbConfig",
    "AugmentScalarSpec",
    "AugmentTokensConfig",
    "DatasetStore",
    "JitterObservation",
    "RandomSymmetry",
    "TaskWriter",
    "TokenAugmenter",
    "WindowSampler",
    "encode_hf_rows",
    "from_minari",
    "from_trajectories",
    "merge_stores_to_dataset",
    "push_stores_to_hub",
    "push_to_hub",
    "record_vector_env",
    "replay_buffer",
    "to_minari",
]
