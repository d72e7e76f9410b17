"""PEARL's context encoders, and the belief about the task that they infer from its transitions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from tensordict import unravel_key_list
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import nn
from torch.nn import functional as F

from torchrl_mouse.functional import gaussian_product
from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.encoder_files import PyTorchModule as PyTorchModule
from torchrl_mouse.modules.encoder_files import encode_context, load_encoder
from torchrl_mouse.modules.encoder_files import fanin_init as fanin_init
from torchrl_mouse.schema import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey


class ContextEncoder(PyTorchModule):
    """Reads transitions and returns the parameters of Gaussians over the task's latent variable.

    A new kind is a class that defines :meth:`encode` and ``last_fc``, and a line in :data:`CONTEXT_ENCODERS`.

    Args:
        hidden_sizes: sizes of the hidden layers that each transition goes through by itself.
        input_size: size of a transition: observation, action and reward, say.
        output_size: twice that of the latent variable; means come first, then what softplus makes variances of.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1.
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
        """
        context = input if input.ndim == 3 else input.unsqueeze(0)
        output = self.last_fc(self.encode(context))
        output = output if input.ndim == 3 else output.squeeze(0)
        return (output, output) if return_preactivations else output

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Computes features ``[tasks, N, H]`` or ``[tasks, H]`` of ``[tasks, N, input_size]``."""
        raise NotImplementedError


def _hidden_layers(input_size: int, hidden_sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in pairwise((input_size, *hidden_sizes)):
        linear = nn.Linear(size, following)
        fanin_init(linear.weight)
        nn.init.constant_(linear.bias, 0.1)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def _last_layer(size: int, output_size: int) -> nn.Linear:
    # Nearly zero, whatever it reads: an untrained encoder's means are about 0, its variances about softplus(0) = 0.69.
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
        self.last_fc = _last_layer(input_size, output_size)

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
        self.hidden_layers = _hidden_layers(input_size, hidden_sizes)
        self.last_fc = _last_layer([input_size, *hidden_sizes][-1], output_size)

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
        self.hidden_layers = _hidden_layers(input_size, hidden_sizes)
        self.lstm = nn.LSTM(size, size, batch_first=True)
        self.last_fc = _last_layer(size, output_size)
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
        _check_heads("AttentionContextEncoder", size, num_heads)
        self.hidden_layers = _hidden_layers(input_size, hidden_sizes)
        self.attention = nn.MultiheadAttention(size, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(size)
        self.last_fc = _last_layer(size, output_size)

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Returns ``[tasks, N, H]``."""
        embed = self.hidden_layers(context)
        attended, _ = self.attention(embed, embed, embed, need_weights=False)
        features: torch.Tensor = self.norm(embed + attended)
        return features


class TransformerContextEncoder(ContextEncoder):
    """Lets a few learned queries read the set of transitions, layer by layer, and makes one Gaussian of them.

    A product of Gaussians grows surer with every transition, as if each were news, so that it is wrong with confidence
    where they are few or alike. Here the whole set makes one Gaussian, and in training mode each task shows its first
    ``n`` transitions only, ``n`` drawn uniformly in its logarithm from 1 to ``N``: beliefs are trained for every number
    of them. (Of independent draws the first are a random subset, of trajectories what an agent has seen at some time.)
    In evaluation mode all are read.

    The order of the transitions that are read does not matter, and the cost grows linearly with their number (as with
    the Set Transformer's inducing points, arXiv:1810.00825): transitions meet in the queries, not each other.

    Args:
        hidden_sizes: as for :class:`ContextEncoder`.
        input_size: as for :class:`ContextEncoder`.
        output_size: as for :class:`ContextEncoder`.
        width: size of a query; a multiple of ``num_heads``.
        num_layers: number of layers.
        num_heads: number of attention heads.
        num_queries: number of queries.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1, or the width no multiple of ``num_heads``.

    Examples:
        >>> TransformerContextEncoder([200, 200, 200], 5, 10)(torch.zeros(16, 64, 5)).shape
        torch.Size([16, 10])
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        *,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        num_queries: int = 16,
    ) -> None:
        self.save_init_params(locals())
        super().__init__(hidden_sizes, input_size, output_size)
        for name, size in (("num_layers", num_layers), ("num_queries", num_queries)):
            check_size("TransformerContextEncoder", name, size)
        _check_heads("TransformerContextEncoder", width, num_heads)
        self.hidden_layers = _hidden_layers(input_size, hidden_sizes)
        # Normalised, as nothing else keeps what is read in one scale: positions of a cheetah go up to 30.
        self.embed = nn.Sequential(nn.Linear([input_size, *hidden_sizes][-1], width), nn.LayerNorm(width))
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.scarcity = nn.Linear(1, width, bias=False)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, num_heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.last_fc = _last_layer(width, output_size)

    def encode(self, context: torch.Tensor) -> torch.Tensor:
        """Returns ``[tasks, H]``."""
        tasks, num, _ = context.shape
        count = context.new_full((tasks, 1), num)
        hidden_rows = None
        if self.training:
            count = torch.exp(torch.rand_like(count) * math.log(num + 1)).floor().clamp_max(num)
            hidden_rows = torch.arange(num, device=count.device) >= count
        # Attention averages, it cannot count. The root's inverse is bounded: more than in training is like the most.
        queries = self.queries + self.scarcity(count.rsqrt()).unsqueeze(1)  # (tasks, Q, width)
        rows = self.embed(self.hidden_layers(context))  # (tasks, N, width)
        for layer in self.layers:
            queries = layer(queries, rows, memory_key_padding_mask=hidden_rows)
        features: torch.Tensor = self.norm(queries.mean(1))
        return features


def _check_heads(where: str, width: int, num_heads: int) -> None:
    check_size(where, "width", width)
    check_size(where, "num_heads", num_heads)
    if width % num_heads:
        raise ValueError(
            f"{where}: width must be a multiple of num_heads, got {width} and {num_heads}. Change one of them."
        )


CONTEXT_ENCODERS: dict[str, type[PyTorchModule]] = {
    "linear": LinearContextEncoder,
    "mlp": MLPContextEncoder,
    "recurrent": RecurrentContextEncoder,
    "attention": AttentionContextEncoder,
    "transformer": TransformerContextEncoder,
}
"""The kinds of context encoders by name; each is made by ``(hidden_sizes, input_size, output_size)``."""


def make_context_encoder(
    name_or_path: str, *, hidden_sizes: Sequence[int], input_size: int, output_size: int
) -> nn.Module:
    """Makes a context encoder of :data:`CONTEXT_ENCODERS`, or of a file of one's own.

    A file defines ``CustomContextEncoder``, made by ``(hidden_sizes, input_size, output_size)``, with an attribute
    ``output_size``, a method ``reset(num_tasks=1)`` (which rlkit's ``PyTorchModule`` has here), and the ``forward`` of
    :class:`ContextEncoder`. It may be written for rlkit: see
    :func:`~torchrl_mouse.modules.encoder_files.load_encoder`.

    Args:
        name_or_path: a name, or a path that ends in ``.py``; running a file is running a program.
        hidden_sizes: sizes of the hidden layers for each transition.
        input_size: size of a transition.
        output_size: twice that of the latent variable.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file defines no ``CustomContextEncoder``, or asks for too much of rlkit.
        TypeError: the class is no ``torch.nn.Module``, or has no ``reset``.
        ValueError: an unknown name, or the class's ``output_size`` or output is another one.

    Examples:
        >>> make_context_encoder("mlp", hidden_sizes=[200, 200, 200], input_size=5, output_size=10).output_size
        10
    """
    if name_or_path in CONTEXT_ENCODERS:
        return CONTEXT_ENCODERS[name_or_path](hidden_sizes, input_size, output_size)
    if not name_or_path.endswith(".py"):
        raise ValueError(
            f"make_context_encoder: name_or_path must be one of {', '.join(CONTEXT_ENCODERS)}, or a path that ends in "
            f".py, got {name_or_path!r}. Choose one of them."
        )
    return load_encoder(name_or_path, hidden_sizes, input_size, output_size)


class ContextPosterior(TensorDictModuleBase):
    """Infers the belief about the latent variable of a task from the context, the transitions seen in it.

    PEARL's inference (arXiv:1903.08254): the encoder's Gaussians, softplus making their variances, are multiplied; an
    encoder that gives one Gaussian for each task has the last word. Without transitions the belief is the prior
    N(0, 1). A latent variable is drawn from the belief by tensordict's ``ProbabilisticTensorDictModule``, as below.

    What an encoder keeps between calls stays until :meth:`reset`.

    Args:
        encoder: maps ``[tasks, N, input_size]`` to ``[tasks, N, 2 Z]`` or ``[tasks, 2 Z]``, with ``2 Z`` its attribute
            ``output_size``: means, and what softplus makes variances of.
        in_keys: entries of a transition ``[*tasks, N, size]``, in the encoder's order.
        out_keys: entries for mean and standard deviation ``[*tasks, Z]``, named as the arguments of ``Normal``.

    Raises:
        ValueError: the encoder's ``output_size`` is odd or missing, or there are no ``in_keys``, or not two
            ``out_keys``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictSequential
        >>> encoder = make_context_encoder("mlp", hidden_sizes=[200, 200, 200], input_size=5, output_size=10)
        >>> sample = ProbabilisticTensorDictModule(
        ...     in_keys={"loc": "posterior_loc", "scale": "posterior_scale"},
        ...     out_keys=["latent"],
        ...     distribution_class=torch.distributions.Normal,
        ...     default_interaction_type=InteractionType.RANDOM,
        ... )
        >>> infer = TensorDictSequential(ContextPosterior(encoder), sample)
        >>> seen = TensorDict({"observation": torch.zeros(16, 64, 2), "action": torch.zeros(16, 64, 2)}, [16, 64])
        >>> belief = infer(TensorDict({"context": seen.set("reward", torch.zeros(16, 64, 1))}, [16]))
        >>> belief["latent"].shape, round(belief["posterior_scale"].mean().item(), 2)  # sqrt(0.69 / 64)
        (torch.Size([16, 5]), 0.1)
    """

    def __init__(
        self,
        encoder: nn.Module,
        in_keys: Sequence[NestedKey] = (("context", "observation"), ("context", "action"), ("context", "reward")),
        out_keys: Sequence[NestedKey] = ("posterior_loc", "posterior_scale"),
    ) -> None:
        super().__init__()
        size = getattr(encoder, "output_size", None)
        if not isinstance(size, int) or size < 2 or size % 2:
            raise ValueError(
                f"ContextPosterior: output_size of the encoder must be even, means and variances, got {size}. Make it "
                f"twice the size of the latent variable."
            )
        if not in_keys or len(out_keys) != 2:
            raise ValueError(
                f"ContextPosterior: there must be in_keys, and two out_keys, got {list(in_keys)} and {list(out_keys)}. "
                f"Name the entries of a transition, and those for mean and standard deviation."
            )
        self.encoder = encoder
        self.latent_size = size // 2
        self.in_keys = unravel_key_list(list(in_keys))
        self.out_keys = unravel_key_list(list(out_keys))

    def reset(self, num_tasks: int = 1) -> None:
        """Makes the encoder forget what it keeps between calls.

        Args:
            num_tasks: number of tasks in the contexts to come.
        """
        self.encoder.reset(num_tasks)  # type: ignore[operator]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes mean and standard deviation of the belief, ``[*tasks, Z]``.

        Args:
            tensordict: with the entries of transitions ``[*tasks, N, size]``, of batch size ``[*tasks]`` or less.

        Raises:
            KeyError: an entry is missing.
            ValueError: entries are not all of the same tasks and transitions, or the encoder's output is not of one of
                its shapes.
        """
        entries = [require(tensordict, key) for key in self.in_keys]
        shape = entries[0].shape[:-1]
        for key, entry in zip(self.in_keys, entries, strict=True):
            if entry.ndim < 2 or entry.shape[:-1] != shape:
                raise ValueError(
                    f"ContextPosterior: entry {key!r} must be [*tasks, N, size], all of the same tasks and N, got "
                    f"shape {list(entry.shape)} beside {list(entries[0].shape)} of {self.in_keys[0]!r}. Reshape it."
                )
        context = torch.cat(entries, -1)
        if context.shape[-2]:
            parameters = encode_context(self.encoder, context.reshape(-1, *context.shape[-2:]))
        else:  # What was kept between calls is of no context either.
            parameters = context.new_zeros(shape[:-1].numel(), 0, 2 * self.latent_size)
        mean, spread = parameters.chunk(2, -1)
        mean, variance = gaussian_product(mean, F.softplus(spread))
        for key, value in zip(self.out_keys, (mean, variance.sqrt()), strict=True):
            tensordict.set(key, value.reshape(*shape[:-1], self.latent_size))
        return tensordict
