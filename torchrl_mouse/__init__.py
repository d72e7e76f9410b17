"""In-context reinforcement learning as TorchRL components."""
