"""The belief about a task that a context encoder infers from its transitions, and draws from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import unravel_key_list
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModuleBase, dispatch
from torch.nn import functional

from torchrl_mouse.functional import gaussian_product
from torchrl_mouse.modules.encoder_files import encode_context
from torchrl_mouse.schema import LATENT, POSTERIOR_LOC, POSTERIOR_SCALE, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey
    from torch import nn


class ContextPosterior(TensorDictModuleBase):
    """Infers the belief about the latent variable of a task from the context, the transitions seen in it.

    PEARL's inference (arXiv:1903.08254): the encoder's Gaussians, softplus making their variances, are multiplied; an
    encoder that gives one Gaussian for each task has the last word. Without transitions the belief is the prior
    N(0, 1). A latent variable is drawn from the belief by :func:`sample_latent`.

    What an encoder keeps between calls stays until :meth:`reset`. One may be random itself, as
    :class:`~torchrl_mouse.modules.BayesianContextEncoder` is where no reward has been met.

    Args:
        encoder: maps ``[tasks, N, input_size]`` to ``[tasks, N, 2 Z]`` or ``[tasks, 2 Z]``, with ``2 Z`` its attribute
            ``output_size``: means, and what softplus makes variances of. Its method ``reset(num_tasks)`` forgets what
            is kept between calls.
        in_keys: entries of a transition ``[*tasks, N, size]``, in the encoder's order.
        out_keys: entries for mean and standard deviation ``[*tasks, Z]``, named as the arguments of ``Normal``.

    Raises:
        TypeError: the encoder has no ``reset``.
        ValueError: the encoder's ``output_size`` is odd or missing, or there are no ``in_keys``, or not two
            ``out_keys``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictSequential
        >>> from torchrl_mouse.modules import make_context_encoder
        >>> encoder = make_context_encoder("mlp", hidden_sizes=[200, 200, 200], input_size=5, output_size=10)
        >>> infer = TensorDictSequential(ContextPosterior(encoder), sample_latent())
        >>> seen = TensorDict({"observation": torch.zeros(16, 64, 2), "action": torch.zeros(16, 64, 2)}, [16, 64])
        >>> belief = infer(TensorDict({"context": seen.set("reward", torch.zeros(16, 64, 1))}, [16]))
        >>> belief["latent"].shape, round(belief["posterior_scale"].mean().item(), 2)  # sqrt(0.69 / 64)
        (torch.Size([16, 5]), 0.1)
    """

    def __init__(
        self,
        encoder: nn.Module,
        in_keys: Sequence[NestedKey] = (("context", "observation"), ("context", "action"), ("context", "reward")),
        out_keys: Sequence[NestedKey] = (POSTERIOR_LOC, POSTERIOR_SCALE),
    ) -> None:
        super().__init__()
        size = getattr(encoder, "output_size", None)
        if not isinstance(size, int) or size < 2 or size % 2:
            raise ValueError(
                f"ContextPosterior: output_size of the encoder must be even, means and variances, got {size}. Make it "
                f"twice the size of the latent variable."
            )
        if not callable(getattr(encoder, "reset", None)):
            raise TypeError(
                f"ContextPosterior: the encoder must have a method reset, got a {type(encoder).__name__} without. "
                "Define reset(self, num_tasks=1), empty if nothing is kept between calls."
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
        if context.shape[:-1].numel():
            parameters = encode_context(self.encoder, context.reshape(-1, *context.shape[-2:]))
        else:  # What was kept between calls is of no context either.
            parameters = context.new_zeros(shape[:-1].numel(), 0, 2 * self.latent_size)
        # Half precision, as autocast has it, is not enough to sum evidence in.
        parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        mean, spread = parameters.chunk(2, -1)
        mean, variance = gaussian_product(mean, functional.softplus(spread))
        for key, value in zip(self.out_keys, (mean, variance.sqrt()), strict=True):
            tensordict.set(key, value.reshape(*shape[:-1], self.latent_size))
        return tensordict


def sample_latent() -> ProbabilisticTensorDictModule:
    """Makes what draws ``latent`` ``[*tasks, Z]`` from the belief that a :class:`ContextPosterior` has written.

    Without chance (deterministic exploration) it is the belief's mean.

    Examples:
        >>> sample_latent().in_keys
        ['posterior_loc', 'posterior_scale']
    """
    return ProbabilisticTensorDictModule(
        in_keys={"loc": POSTERIOR_LOC, "scale": POSTERIOR_SCALE},
        out_keys=[LATENT],
        distribution_class=torch.distributions.Normal,
        default_interaction_type=InteractionType.RANDOM,
    )
