"""What context encoders have in common, and PEARL's own."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchrl_mouse.modules.checks import check_heads, check_size
from torchrl_mouse.modules.encoder_files import PyTorchModule, fanin_init

if TYPE_CHECKING:
    from collections.abc import Sequence


class ContextEncoder(PyTorchModule):
    """Reads transitions and returns the parameters of Gaussians over the task's latent variable.

    A new kind is a class that defines :meth:`encode` and ``last_fc``, and a line in
    :data:`~torchrl_mouse.modules.context_encoders.CONTEXT_ENCODERS`.

    Args:
        hidden_sizes: sizes of the hidden layers that each transition goes through by itself.
        input_size: size of a transition: observation, action and reward, say.
        output_size: twice that of the latent variable; means come first, then what softplus makes variances of.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1.

    Examples:
        >>> class MeanContextEncoder(ContextEncoder):
        ...     def __init__(self, hidden_sizes, input_size, output_size):
        ...         super().__init__(hidden_sizes, input_size, output_size)
        ...         self.last_fc = nn.Linear(input_size, output_size)
        ...
        ...     def encode(self, context):
        ...         return context.mean(1)
        >>> MeanContextEncoder([], 5, 10)(torch.zeros(16, 64, 5)).shape
        torch.Size([16, 10])
    """

    last_fc: nn.Linear
    """The last layer, from features to ``output_size``."""

    def __init__(self, hidden_sizes: Sequence[int], input_size: int, output_size: int) -> None:
        self.save_init_params(locals())
        super().__init__()
        named = [("hidden_sizes", size) for size in hidden_sizes]
        for name, size in (*named, ("input_size", input_size), ("output_size", output_size)):
            check_size(type(self).__name__, name, size)
        self.hidden_sizes = list(hidden_sizes)
        self.input_size = input_size
        self.output_size = output_size

    def forward(
        self, input: torch.Tensor, return_preactivations: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encodes the context of each task.

        Args:
            input: ``[tasks, N, input_size]``, ``N`` at least 1; ``[N, input_size]`` of one task.
            return_preactivations: return the output twice, as nothing is applied after the last layer.

        Returns:
            ``[tasks, N, output_size]``, a Gaussian for each transition, or ``[tasks, output_size]``, one for each
            task; without the dimension of tasks if the input has none.

        Raises:
            ValueError: the input has another shape.
        """
        if input.ndim not in (2, 3) or not input.shape[-2] or input.shape[-1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__}: input must be [tasks, N, {self.input_size}] or [N, {self.input_size}] with N "
                f"at least 1, got {list(input.shape)}. Give it what it was made for; an empty context is the prior."
            )
        context = input if input.ndim == 3 else input.unsqueeze(0)
        output = self.infer(context)
        output = output if input.ndim == 3 else output.squeeze(0)
        return (output, output) if return_preactivations else output

    def infer(self, context: torch.Tensor) -> torch.Tensor:
        """Computes the output of ``[tasks, N, input_size]``, by the last layer on features unless it is overridden."""
        output: torch.Tensor = self.last_fc(self.encode(context))
        return output

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Computes features ``[tasks, N, H]`` or ``[tasks, H]`` of ``[tasks, N, input_size]``."""
        raise NotImplementedError


def make_hidden_layers(input_size: int, hidden_sizes: Sequence[int]) -> nn.Sequential:
    """Makes the layers that each transition goes through by itself, initialised as PEARL's are."""
    layers: list[nn.Module] = []
    for size, following in pairwise((input_size, *hidden_sizes)):
        linear = nn.Linear(size, following)
        fanin_init(linear.weight)
        nn.init.constant_(linear.bias, 0.1)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def make_last_layer(size: int, output_size: int) -> nn.Linear:
    """Makes a layer that is nearly zero: untrained encoders' means are about 0, variances about softplus(0) = 0.69."""
    linear = nn.Linear(size, output_size)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -3e-3, 3e-3)
    return linear


class LinearContextEncoder(ContextEncoder):
    """One linear layer for each transition; it has no hidden layers, whatever ``hidden_sizes``.

    Examples:
        >>> LinearContextEncoder([], 5, 10)(torch.zeros(16, 64, 5)).shape
        torch.Size([16, 64, 10])
    """

    def __init__(self, hidden_sizes: Sequence[int], input_size: int, output_size: int) -> None:
        super().__init__(hidden_sizes, input_size, output_size)
        self.last_fc = make_last_layer(input_size, output_size)

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Returns ``[tasks, N, H]``."""
        return context


class MLPContextEncoder(ContextEncoder):
    """PEARL's own encoder (arXiv:1903.08254): a multi-layer perceptron for each transition.

    Examples:
        >>> MLPContextEncoder([200, 200, 200], 5, 10)(torch.zeros(16, 64, 5)).shape
        torch.Size([16, 64, 10])
    """

    def __init__(self, hidden_sizes: Sequence[int], input_size: int, output_size: int) -> None:
        super().__init__(hidden_sizes, input_size, output_size)
        self.hidden_layers = make_hidden_layers(input_size, hidden_sizes)
        self.last_fc = make_last_layer([input_size, *hidden_sizes][-1], output_size)

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Returns ``[tasks, N, H]``."""
        features: torch.Tensor = self.hidden_layers(context)
        return features


class RecurrentContextEncoder(ContextEncoder):
    """Reads transitions in their order: a perceptron for each, an LSTM over them, one Gaussian from its last output.

    As in PEARL's code the hidden state goes on from call to call, without gradient, until :meth:`reset`, while each
    call begins with a cell state of zeros. It is no part of the ``state_dict``.

    Examples:
        >>> encoder = RecurrentContextEncoder([200, 200, 200], 5, 10)
        >>> encoder(torch.zeros(16, 64, 5)).shape, encoder.hidden.shape
        (torch.Size([16, 10]), torch.Size([1, 16, 200]))
    """

    IS_RECURRENT = True

    def __init__(self, hidden_sizes: Sequence[int], input_size: int, output_size: int) -> None:
        super().__init__(hidden_sizes, input_size, output_size)
        size = [input_size, *hidden_sizes][-1]
        self.hidden_layers = make_hidden_layers(input_size, hidden_sizes)
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.last_fc = make_last_layer(size, output_size)
        self.hidden: torch.Tensor | None = None
        """Hidden state ``[1, tasks, H]`` after the last call; ``None`` where nothing was read since the reset."""

    def reset(self, num_tasks: int = 1) -> None:
        """Forgets the hidden state.

        Args:
            num_tasks: not read: a state of zeros fits any number of tasks.
        """
        self.hidden = None

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Returns ``[tasks, H]``, and keeps the hidden state.

        Raises:
            RuntimeError: the number of tasks is not that of the hidden state.
        """
        tasks = len(context)
        if self.hidden is not None and self.hidden.shape[1] != tasks:
            raise RuntimeError(
                f"RecurrentContextEncoder: the number of tasks must not change between resets, got {tasks} after "
                f"{self.hidden.shape[1]}. Call reset({tasks}) first."
            )
        embed = self.hidden_layers(context)  # (tasks, N, H)
        zeros = embed.new_zeros(1, tasks, embed.shape[-1])
        last: torch.Tensor
        _, (last, _) = self.lstm(embed, (zeros if self.hidden is None else self.hidden.to(zeros), zeros))
        self.hidden = last.detach()
        return last[0]


class AttentionContextEncoder(ContextEncoder):
    """Lets transitions read each other: a perceptron for each, one self-attention with residual and LayerNorm.

    There are no positions: transitions may come in any order, and so come their Gaussians.

    Args:
        hidden_sizes: as for :class:`ContextEncoder`; the last is the attention's width.
        input_size: as for :class:`ContextEncoder`.
        output_size: as for :class:`ContextEncoder`.
        num_heads: number of attention heads; the width is a multiple of it.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1, or the width no multiple of ``num_heads``.

    Examples:
        >>> AttentionContextEncoder([200, 200, 200], 5, 10)(torch.zeros(16, 64, 5)).shape
        torch.Size([16, 64, 10])
    """

    def __init__(self, hidden_sizes: Sequence[int], input_size: int, output_size: int, *, num_heads: int = 4) -> None:
        self.save_init_params(locals())
        super().__init__(hidden_sizes, input_size, output_size)
        size = [input_size, *hidden_sizes][-1]
        check_heads("AttentionContextEncoder", size, num_heads)
        self.hidden_layers = make_hidden_layers(input_size, hidden_sizes)
        self.attention = nn.MultiheadAttention(size, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(size)
        self.last_fc = make_last_layer(size, output_size)

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Returns ``[tasks, N, H]``."""
        embed = self.hidden_layers(context)
        attended, _ = self.attention(embed, embed, embed, need_weights=False)
        features: torch.Tensor = self.norm(embed + attended)
        return features
