"""Stored experience and its sampling."""

from torchrl_mouse.data.augmentation import JitterObservation, RandomSymmetry
from torchrl_mouse.data.samplers import TaskWriter, WindowSampler, replay_buffer
from torchrl_mouse.data.store import DatasetStore

__all__ = ["DatasetStore", "JitterObservation", "RandomSymmetry", "TaskWriter", "WindowSampler", "replay_buffer"]
