"""Windows in which tasks begin: each token's position in its own context, and what it may see."""

from __future__ import annotations

import torch


def segment_positions(is_init: torch.Tensor) -> torch.Tensor:
    """Counts the steps since each context began.

    Args:
        is_init: bool ``[*, T]``, true at the first step of a task; index 0 always begins a context.

    Returns:
        int64 ``[*, T]``.

    Examples:
        >>> segment_positions(torch.tensor([False, False, True, False])).tolist()
        [0, 1, 0, 1]
    """
    index = torch.arange(is_init.shape[-1], device=is_init.device)
    return index - torch.where(is_init, index, 0).cummax(-1).values


def segment_mask(is_init: torch.Tensor) -> torch.Tensor:
    """Builds the attention mask that is causal and never looks into another task.

    Args:
        is_init: bool ``[*, T]``, true at the first step of a task; index 0 always begins a context.

    Returns:
        bool ``[*, T, T]``: entry ``[i, j]`` is true where step ``i`` may attend to step ``j``.

    Examples:
        >>> segment_mask(torch.tensor([True, False, True])).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    segment = is_init.cumsum(-1)
    segment = segment - segment[..., :1]
    return (segment.unsqueeze(-1) == segment.unsqueeze(-2)).tril()
