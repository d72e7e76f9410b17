"""Networks of an agent that is told which task it is in by a latent: actor, action value and state value."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.encoder_files import fanin_init
from torchrl_mouse.schema import ACTION, LATENT, OBSERVATION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HIDDEN_SIZES = (300, 300, 300)
_HIDDEN_BIAS = 0.1


class LatentMLP(nn.Module):
    """A ReLU network over the concatenation of its inputs, initialised as PEARL's (rlkit's) are.

    Hidden weights are uniform by the number of *outputs* of their layer, hidden biases 0.1. The result is that of
    ``torch.nn.Linear`` layers, but activations are kept in columns, each unit's values side by side: rows of 200 or 300
    units are no multiple of a cache line, which slows matrix products down; columns are as long as the batch
    (``python tests/benchmarks/bench_pearl.py`` measures it).

    Args:
        in_features: size of all inputs together.
        out_features: size of the output.
        hidden_sizes: widths of the hidden layers.
        last: weights and biases of the last layer are uniform in [-last, last].

    Raises:
        ValueError: the inputs of a call have another size.

    Examples:
        >>> LatentMLP(5, 3, (8, 8), last=1e-3)(torch.zeros(4, 2), torch.zeros(4, 3)).shape
        torch.Size([4, 3])
    """

    def __init__(self, in_features: int, out_features: int, hidden_sizes: Sequence[int], *, last: float) -> None:
        super().__init__()
        sizes = pairwise((in_features, *hidden_sizes))
        layers = [nn.Linear(size, following) for size, following in sizes]
        for layer in layers:
            fanin_init(layer.weight)
            nn.init.constant_(layer.bias, _HIDDEN_BIAS)
        self.in_features = in_features
        self.hidden_layers: Iterable[Any] = nn.ModuleList(layers)
        self.head = nn.Linear([in_features, *hidden_sizes][-1], out_features)
        for parameter in self.head.parameters():
            nn.init.uniform_(parameter, -last, last)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Computes ``[*, out_features]`` from inputs ``[*, .]``."""
        rows = torch.cat(inputs, -1)
        if rows.shape[-1] != self.in_features:
            sizes = " + ".join(str(value.shape[-1]) for value in inputs)
            raise ValueError(
                f"LatentMLP: inputs must have {self.in_features} numbers together, got {sizes}. Make it for the sizes "
                "of observation, action and latent."
            )
        columns = rows.reshape(-1, rows.shape[-1]).t()
        for layer in self.hidden_layers:
            columns = torch.addmm(layer.bias.unsqueeze(-1), layer.weight, columns).relu_()
        # Under autocast the output stays precise: in bfloat16, values of hundreds would be whole numbers.
        with torch.autocast(columns.device.type, enabled=False):
            columns = columns.to(self.head.weight.dtype)
            columns = torch.addmm(self.head.bias.unsqueeze(-1), self.head.weight, columns)
        return columns.t().reshape(*rows.shape[:-1], -1)


class _SquashedParameters(nn.Module):
    """Splits an output into location and scale; the logarithm of the scale is clamped to [-20, 2], as in PEARL."""

    def forward(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, log_scale = output.chunk(2, -1)
        return loc, log_scale.clamp(-20, 2).exp()


def latent_actor(
    observation_dim: int, action_dim: int, latent_dim: int, *, hidden_sizes: Sequence[int] = HIDDEN_SIZES
) -> ProbabilisticActor:
    """Makes the policy ``pi(a | s, z)`` of PEARL (arXiv 1903.08254): a ``TanhNormal`` inside [-1, 1].

    It reads ``observation`` ``[*, observation_dim]`` and ``latent`` ``[*, latent_dim]``, writes ``loc`` and ``scale``
    and draws ``action`` ``[*, action_dim]``; without chance (deterministic exploration) it is the squashed location.

    Args:
        observation_dim: size of the observation.
        action_dim: size of the action.
        latent_dim: size of the latent.
        hidden_sizes: widths of the hidden layers; PEARL's by default.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is below 1.

    Examples:
        >>> from tensordict import TensorDict
        >>> actor = latent_actor(2, 3, 5, hidden_sizes=(8,))
        >>> actor(TensorDict({"observation": torch.zeros(4, 2), "latent": torch.zeros(4, 5)}, [4]))["action"].shape
        torch.Size([4, 3])
    """
    _check("latent_actor", observation_dim=observation_dim, action_dim=action_dim, latent_dim=latent_dim)
    network = LatentMLP(observation_dim + latent_dim, 2 * action_dim, hidden_sizes, last=1e-3)
    return ProbabilisticActor(
        TensorDictSequential(
            TensorDictModule(network, [OBSERVATION, LATENT], ["parameters"]),
            TensorDictModule(_SquashedParameters(), ["parameters"], ["loc", "scale"]),
            selected_out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        out_keys=[ACTION],
        distribution_class=TanhNormal,
        default_interaction_type=InteractionType.RANDOM,
    )


def latent_qvalue(
    observation_dim: int, action_dim: int, latent_dim: int, *, hidden_sizes: Sequence[int] = HIDDEN_SIZES
) -> ValueOperator:
    """Makes the network of ``Q(s, a, z)``, which writes ``state_action_value`` ``[*, 1]``.

    It reads ``observation`` ``[*, observation_dim]``, ``action`` ``[*, action_dim]`` and ``latent``
    ``[*, latent_dim]``. Arguments and errors are those of :func:`latent_actor`.

    Examples:
        >>> latent_qvalue(2, 3, 5, hidden_sizes=(8,)).in_keys
        ['observation', 'action', 'latent']
    """
    _check("latent_qvalue", observation_dim=observation_dim, action_dim=action_dim, latent_dim=latent_dim)
    network = LatentMLP(observation_dim + action_dim + latent_dim, 1, hidden_sizes, last=3e-3)
    return ValueOperator(network, in_keys=[OBSERVATION, ACTION, LATENT])


def latent_value(observation_dim: int, latent_dim: int, *, hidden_sizes: Sequence[int] = HIDDEN_SIZES) -> ValueOperator:
    """Makes the network of ``V(s, z)``, which writes ``state_value`` ``[*, 1]``.

    It reads ``observation`` ``[*, observation_dim]`` and ``latent`` ``[*, latent_dim]``. Arguments and errors are those
    of :func:`latent_actor`.

    Examples:
        >>> latent_value(2, 5, hidden_sizes=(8,)).out_keys
        ['state_value']
    """
    _check("latent_value", observation_dim=observation_dim, latent_dim=latent_dim)
    network = LatentMLP(observation_dim + latent_dim, 1, hidden_sizes, last=3e-3)
    return ValueOperator(network, in_keys=[OBSERVATION, LATENT])


def _check(where: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        check_size(where, name, size)
