"""Acting on a head's output, with TorchRL's own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict.nn import InteractionType, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import OneHot as OneHotSpec
from torchrl.data import TensorSpec
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueModule

from torchrl_mouse.modules.heads import DQNHead, SwiGLUHead
from torchrl_mouse.schema import ACTION

if TYPE_CHECKING:
    from tensordict.utils import NestedKey

LOGITS: NestedKey = "logits"


class _Temperature(torch.nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores / self.temperature


def make_actor(
    trunk: TensorDictModuleBase,
    head: TensorDictModule,
    spec: TensorSpec,
    *,
    temperature: float = 0.0,
    action_key: NestedKey = ACTION,
) -> TensorDictSequential:
    """Composes a policy that acts on the scores of one head.

    Args:
        trunk: writes ``hidden``.
        head: reads ``hidden`` and writes scores ``[*, A]``; ``A`` is compared with the space where it wraps a
            :class:`SwiGLUHead` or :class:`DQNHead`.
        spec: the action spec of one environment row (``env.action_spec_unbatched``), ``OneHot`` or ``Categorical``.
        temperature: 0 takes the best action (a ``QValueModule``, which also writes ``chosen_action_value``); above it,
            actions are drawn from ``softmax(scores / temperature)`` (a ``ProbabilisticActor``: the best action where
            TorchRL's exploration type is deterministic).
        action_key: where the action is written.

    Returns:
        A ``TensorDictSequential``; append TorchRL's ``EGreedyModule`` to explore.

    Raises:
        TypeError: the action space is not discrete.
        ValueError: a negative temperature or none at all (NaN), or another number of actions than the head's.

    Examples:
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> config = MouseConfig(hidden_dim=16, embedding_kwargs={"max_num_actions": 3}, dqn_head_kwargs={})
        >>> model = MouseModel(config)
        >>> type(make_actor(model.trunk, model.head("dqn"), CategoricalSpec(3))[-1]).__name__
        'QValueModule'
    """
    if type(spec) not in (CategoricalSpec, OneHotSpec):  # TorchRL's spaces of several choices are their subclasses
        raise TypeError(f"make_actor: the action spec must be Categorical or OneHot, got {type(spec).__name__}.")
    module = getattr(head, "module", None)
    module = module.online if isinstance(module, DQNHead) else module
    if isinstance(module, SwiGLUHead) and module.out_dim != spec.space.n:
        raise ValueError(
            f"make_actor: the action space must have the head's {module.out_dim} actions, got {spec.space.n}. "
            "Build the model with max_num_actions set to it."
        )
    if not temperature >= 0:
        raise ValueError(f"make_actor: temperature must be at least 0, got {temperature}.")
    scores = head.out_keys[0]
    if temperature == 0:
        choose = QValueModule(action_value_key=scores, out_keys=[action_key, scores, "chosen_action_value"], spec=spec)
        return TensorDictSequential(trunk, head, choose)
    one_hot = isinstance(spec, OneHotSpec)
    return ProbabilisticActor(
        TensorDictSequential(trunk, head, TensorDictModule(_Temperature(temperature), [scores], [LOGITS])),
        in_keys=[LOGITS],
        out_keys=[action_key],
        spec=spec,
        distribution_class=OneHotCategorical if one_hot else Categorical,
        default_interaction_type=InteractionType.RANDOM,
    )
