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


class VectorHead(SwiGLUHead):
    """A :class:`SwiGLUHead` that gives one vector per action.

    Args:
        in_dim: size of the hidden state.
        num_actions: number ``A`` of actions.
        vec_dim: size ``V`` of a vector; even, as its numbers are turned in pairs.
        bias_scale: fills the last layer's bias, so that all vectors begin in one direction; by default the bias begins
            like any linear layer's.
        kwargs: further arguments of :class:`SwiGLUHead`.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive, or ``vec_dim`` is odd.

    Examples:
        >>> import torch
        >>> VectorHead(16, 5, vec_dim=4, hidden_dim=8)(torch.zeros(3, 16)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        in_dim: int,
        num_actions: int,
        *,
        vec_dim: int,
        bias_scale: float | None = None,
        **kwargs: int | float | bool,
    ) -> None:
        check_size("VectorHead", "num_actions", num_actions)
        check_size("VectorHead", "vec_dim", vec_dim, least=2)
        if vec_dim % 2:
            raise ValueError(f"VectorHead: vec_dim must be even, got {vec_dim}.")
        super().__init__(in_dim, num_actions * vec_dim, **kwargs)  # type: ignore[arg-type]
        if bias_scale is not None:
            nn.init.constant_(self.layers[-1].bias, bias_scale)  # type: ignore[arg-type]
        self.num_actions = num_actions
        self.vec_dim = vec_dim

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the vectors ``[*, A, V]`` of hidden states ``[*, in_dim]``."""
        return super().forward(hidden).reshape(*hidden.shape[:-1], self.num_actions, self.vec_dim)


class MultiDiscountHead(SwiGLUHead):
    """A :class:`SwiGLUHead` that gives action values for each of several discounts.

    Args:
        in_dim: size of the hidden state.
        num_actions: number ``A`` of actions.
        num_discounts: number ``D`` of discounts.
        kwargs: further arguments of :class:`SwiGLUHead`.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive.

    Examples:
        >>> import torch
        >>> MultiDiscountHead(16, 5, num_discounts=3, hidden_dim=8)(torch.zeros(2, 16)).shape
        torch.Size([2, 3, 5])
    """

    def __init__(self, in_dim: int, num_actions: int, *, num_discounts: int, **kwargs: int | float | bool) -> None:
        check_size("MultiDiscountHead", "num_actions", num_actions)
        check_size("MultiDiscountHead", "num_discounts", num_discounts)
        super().__init__(in_dim, num_discounts * num_actions, **kwargs)  # type: ignore[arg-type]
        self.num_actions = num_actions
        self.num_discounts = num_discounts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns action values ``[*, D, A]`` of hidden states ``[*, in_dim]``."""
        return super().forward(hidden).reshape(*hidden.shape[:-1], self.num_discounts, self.num_actions)


class GaussianHead(SwiGLUHead):
    """The location and the raw scale of a policy over continuous actions, side by side.

    What reads it (:func:`~torchrl_mouse.modules.gaussian_policy`) turns the raw scale into a positive one.

    Args:
        in_dim: size of the hidden state.
        action_dim: size of an action.
        kwargs: further arguments of :class:`SwiGLUHead`.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive.

    Examples:
        >>> import torch
        >>> GaussianHead(16, 3, hidden_dim=8)(torch.zeros(2, 16)).shape
        torch.Size([2, 6])
    """

    def __init__(self, in_dim: int, action_dim: int, **kwargs: int | float | bool) -> None:
        check_size("GaussianHead", "action_dim", action_dim)
        super().__init__(in_dim, 2 * action_dim, **kwargs)  # type: ignore[arg-type]
        self.action_dim = action_dim


class _HeadWithTarget(nn.Module):
    def __init__(self, online: SwiGLUHead) -> None:
        super().__init__()
        self.online = online
        self.target = copy.deepcopy(online).requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the online network's output for hidden states ``[*, in_dim]``."""
        output: torch.Tensor = self.online(hidden)
        return output


class DQNHead(_HeadWithTarget):
    """Action values ``[*, A]``: an online :class:`SwiGLUHead` and its target, as MOUSE's files hold them.

    With several discounts they are ``[*, D, A]``, of a :class:`MultiDiscountHead`; one acts by the first.

    Losses train ``online`` and keep a target of their own, which a new loss starts from ``online``. Nothing here reads
    ``target``: it is kept for the file, where :meth:`torchrl_mouse.models.MouseModel.set_target` brings a loss's.

    Args:
        in_dim: size of the hidden state.
        num_actions: number ``A`` of actions.
        num_discounts: number ``D`` of discounts, each with action values of its own; with 1 there is no such dimension.
        kwargs: further arguments of :class:`SwiGLUHead`.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive.

    Examples:
        >>> import torch
        >>> head = DQNHead(16, 5, hidden_dim=8)
        >>> torch.equal(head(torch.ones(1, 16)), head.target(torch.ones(1, 16)))
        True
    """

    def __init__(self, in_dim: int, num_actions: int, *, num_discounts: int = 1, **kwargs: int | float | bool) -> None:
        super().__init__(
            SwiGLUHead(in_dim, num_actions, **kwargs)  # type: ignore[arg-type]
            if num_discounts == 1
            else MultiDiscountHead(in_dim, num_actions, num_discounts=num_discounts, **kwargs)
        )


class VecDQNHead(_HeadWithTarget):
    """Vectors ``[*, A, V]`` as action values: an online :class:`VectorHead` and its target, as in :class:`DQNHead`.

    :func:`~torchrl_mouse.functional.vec_dqn_scores` makes scores of them.

    Args:
        in_dim: size of the hidden state.
        num_actions: number ``A`` of actions.
        vec_dim: size ``V`` of a vector; even.
        bias_scale: fills the last layer's bias.
        kwargs: further arguments of :class:`SwiGLUHead`.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive, or ``vec_dim`` is odd.

    Examples:
        >>> import torch
        >>> VecDQNHead(16, 5, vec_dim=2, hidden_dim=8)(torch.ones(1, 16)).shape
        torch.Size([1, 5, 2])
    """

    def __init__(
        self,
        in_dim: int,
        num_actions: int,
        *,
        vec_dim: int,
        bias_scale: float | None = None,
        **kwargs: int | float | bool,
    ) -> None:
        super().__init__(VectorHead(in_dim, num_actions, vec_dim=vec_dim, bias_scale=bias_scale, **kwargs))
