"""Our context encoder, and all kinds by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from torchrl_mouse.functional.gaussians import MIN_VARIANCE
from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.encoder_files import load_encoder
from torchrl_mouse.modules.pearl_encoders import (
    AttentionContextEncoder,
    ContextEncoder,
    LinearContextEncoder,
    MLPContextEncoder,
    RecurrentContextEncoder,
    make_hidden_layers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchrl_mouse.modules.encoder_files import PyTorchModule

_NUM_KNOWN = 256  # beliefs to try out, of the last 16 updates in PEARL
_NUM_CODES = 2**16  # PEARL's contexts hold 40,000 transitions at a time; what is left of earlier ones is noise.
_HASH = 0x9E3779B97F4A7C15  # odd, and its powers have bits everywhere: 2^64 by the golden ratio
_CODE_SCALE = 32.0  # Adam moves a code by a few times its learning rate in an update, 3e-4 in PEARL: too little.


class BayesianContextEncoder(ContextEncoder):
    """Takes each transition for linear measurements of the task, and returns their exact posterior.

    A network reads from each transition ``K`` measurements, of what (``phi``) and how much (``y``), of a vector ``w``
    that the task hides: ``y = phi w + N(0, 1)``, ``w ~ N(0, I)``. The belief is that of Bayesian linear regression,

    .. code-block:: text

        P = I + sum phi phi^T        C = P^-1        w | context ~ N(C sum phi y, C)

    of which the latent variable is a projection with unit rows. In PEARL's product a transition narrows every dimension
    by itself; here it may say that the goal lies on a certain line, and the next one where on it. What nothing has
    measured stays as uncertain as before, however many transitions say the same, in any order; errors count as
    independent, so a transition that comes twice counts twice. (Meta-learned features under a Bayesian last layer:
    arXiv:1807.08912.)

    A reward of zero measures nothing. Where a context has such, an agent's first rewards are few, and from places near
    each other, so what they tell is less than independent: in training mode a random part of them is read, of a size
    about uniform in its logarithm.

    And were the belief of a context without rewards the prior, an actor would learn on the prior's draws what is best
    in all tasks together, and nobody would explore. So in evaluation mode it is, anew at each call, a random one of
    the last 256 beliefs of training mode: who knows nothing tries out what was a task before, as in Thompson sampling.
    In training mode contexts without rewards are learned by heart: each transition has a code, found by hashing it, and
    the belief is the mean of the context's. Where critics learn from dense rewards, as PEARL's do, they teach these
    codes where the task's rewards are before an agent has met one, and it tries that out, too.

    Args:
        hidden_sizes: as for :class:`ContextEncoder`.
        input_size: as for :class:`ContextEncoder`; the last number of a transition is its reward.
        output_size: as for :class:`ContextEncoder`.
        num_measurements: ``K``.
        size: of ``w``, more than the latent variable has: the reward is linear in few things, but in more than these.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1, or ``output_size`` is odd.

    Examples:
        >>> BayesianContextEncoder([200, 200, 200], 5, 10)(torch.ones(16, 64, 5)).shape
        torch.Size([16, 10])
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        *,
        num_measurements: int = 4,
        size: int = 16,
    ) -> None:
        self.save_init_params(locals())
        super().__init__(hidden_sizes, input_size, output_size)
        for name, value in (("num_measurements", num_measurements), ("size", size)):
            check_size("BayesianContextEncoder", name, value)
        if output_size % 2:
            raise ValueError(
                f"BayesianContextEncoder: output_size must be even, means and variances, got {output_size}. Make it "
                "twice the size of the latent variable."
            )
        self.shape = (num_measurements, size + 1)
        self.hidden_layers = make_hidden_layers(input_size, hidden_sizes)
        width = [input_size, *hidden_sizes][-1]
        self.last_fc = nn.Linear(width, num_measurements * (size + 1))
        nn.init.uniform_(self.last_fc.weight, -(width**-0.5), width**-0.5)
        nn.init.zeros_(self.last_fc.bias)
        self.projection = nn.Linear(size, output_size // 2, bias=False)
        self.codes = nn.Parameter(torch.zeros(_NUM_CODES, output_size))
        prior = torch.tensor([0.0, math.log(math.e - 1)]).repeat_interleave(output_size // 2)
        self.known: torch.Tensor
        self.register_buffer("known", prior.repeat(_NUM_KNOWN, 1))

    def infer(self, context: torch.Tensor) -> torch.Tensor:
        """Returns the beliefs, ``[tasks, output_size]``."""
        measured = self.measure(context)
        told = measured.flatten(1).any(1, keepdim=True)
        belief = self.regress(measured)
        if self.training:
            belief = belief if told.all() else torch.where(told, belief, self.recall(context))
            finite = belief.detach()[belief.isfinite().all(1)]
            self.known.copy_(torch.cat((finite.to(self.known), self.known))[:_NUM_KNOWN])
        elif not told.all():
            drawn = self.known[torch.randint(_NUM_KNOWN, [len(belief)], device=belief.device)]
            belief = torch.where(told, belief, drawn.to(belief))
        return belief

    def measure(self, context: torch.Tensor) -> torch.Tensor:
        """Returns the measurements ``[tasks, N, K * (size + 1)]``, zeros where nothing is read."""
        read = context[..., -1:] != 0
        whole = read.all(1, keepdim=True)
        if self.training and not whole.all():
            order = torch.rand_like(context[..., :1]).masked_fill(~read, 2.0)
            share = read.sum(1, keepdim=True).clamp_min(1) ** -torch.rand_like(order[:, :1])
            part = (order <= share) | (order == order.amin(1, keepdim=True))  # one at least
            read = read & (part | whole)
        return torch.mul(self.last_fc(self.hidden_layers(context)), read)

    def regress(self, measured: torch.Tensor) -> torch.Tensor:
        """Returns the posterior after the measurements, ``[tasks, output_size]``."""
        # In float64: a sum over thousands of measurements is inverted.
        tasks, num, _ = measured.shape
        rows = measured.double().reshape(tasks, num * self.shape[0], self.shape[1])
        what, much = rows[..., :-1], rows[..., -1:]  # (tasks, N * K, size), (tasks, N * K, 1)
        precision = torch.eye(what.shape[-1], dtype=what.dtype, device=what.device) + what.mT @ what
        covariance = torch.cholesky_inverse(torch.linalg.cholesky_ex(precision).L)
        project = functional.normalize(self.projection.weight.double(), dim=-1)  # (Z, size)
        mean = (project @ covariance @ what.mT @ much).squeeze(-1)
        variance = ((project @ covariance) * project).sum(-1).clamp_min(MIN_VARIANCE)
        spread = variance + (-torch.expm1(-variance)).log()  # of which softplus is the variance
        return torch.cat((mean, spread), -1).to(measured.dtype)

    def recall(self, context: torch.Tensor) -> torch.Tensor:
        """Returns what the transitions' codes say together, ``[tasks, output_size]``."""
        bits = context.float().contiguous().view(torch.int32).long()
        factors = [pow(_HASH, power + 1, 2**64) - 2**63 for power in range(self.input_size)]
        hashed = (bits * torch.tensor(factors, device=bits.device)).sum(-1) >> 32
        codes: torch.Tensor = functional.embedding_bag(hashed % _NUM_CODES, self.codes, mode="mean")
        return _CODE_SCALE * codes


CONTEXT_ENCODERS: dict[str, type[PyTorchModule]] = {
    "linear": LinearContextEncoder,
    "mlp": MLPContextEncoder,
    "recurrent": RecurrentContextEncoder,
    "attention": AttentionContextEncoder,
    "bayesian": BayesianContextEncoder,
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
