"""Output heads: what is read from the hidden state of a step."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

from torchrl_mouse.modules.checks import check_size

if TYPE_CHECKING:
    import torch


class _SwiGLU(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 2 * hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.linear(x).chunk(2, -1)
        gated: torch.Tensor = F.silu(gate) * value
        return gated


class SwiGLUHead(nn.Module):
    """A small feed-forward network with gated units (Shazeer 2020, arXiv:2002.05202).

    Args:
        in_dim: size of the hidden state.
        out_dim: size of the output.
        hidden_dim: width of the gated layers.
        num_layers: number of layers, the last one linear; at least 1.
        scale: factor of the last layer's initial weights; small values begin near zero.
        use_norm: normalise the hidden state first (RMS norm).

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive.

    Examples:
        >>> import torch
        >>> SwiGLUHead(16, 5, hidden_dim=8, num_layers=2)(torch.zeros(3, 16)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 64,
        num_layers: int = 2,
        scale: float = 1.0,
        use_norm: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("out_dim", out_dim), ("hidden_dim", hidden_dim), ("num_layers", num_layers)):
            check_size("SwiGLUHead", name, value)
        self.norm = nn.RMSNorm(in_dim, eps=1e-5) if use_norm else None
        widths = [in_dim, *[hidden_dim] * (num_layers - 1)]
        gated = [_SwiGLU(*pair) for pair in itertools.pairwise(widths)]
        last = nn.Linear(widths[-1], out_dim)
        for parameter in last.parameters():
            parameter.data.mul_(scale)
        self.layers = nn.ModuleList([*gated, last])
        self.out_dim = out_dim

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns ``[*, out_dim]`` of hidden states ``[*, in_dim]``."""
        x = hidden if self.norm is None else self.norm(hidden)
        for layer in self.layers:
            x = layer(x)
        return x


class DQNHead(nn.Module):
    """Action values: an online :class:`SwiGLUHead` and its target, as MOUSE's files hold them.

    Losses train ``online`` and keep a target of their own, which a new loss starts from ``online``. Nothing here reads
    ``target``: it is kept for the file, where :meth:`torchrl_mouse.models.MouseModel.set_target` brings a loss's.

    Args:
        in_dim: size of the hidden state.
        num_actions: number ``A`` of actions.
        kwargs: further arguments of :class:`SwiGLUHead`.

    Examples:
        >>> import torch
        >>> head = DQNHead(16, 5, hidden_dim=8)
        >>> torch.equal(head(torch.ones(1, 16)), head.target(torch.ones(1, 16)))
        True
    """

    def __init__(self, in_dim: int, num_actions: int, **kwargs: int | float | bool) -> None:
        super().__init__()
        self.online = SwiGLUHead(in_dim, num_actions, **kwargs)  # type: ignore[arg-type]
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the online action values ``[*, A]`` of hidden states ``[*, in_dim]``."""
        values: torch.Tensor = self.online(hidden)
        return values
