"""Acting on a head's output, with TorchRL's own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict.nn import InteractionType, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch.distributions import Categorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import OneHot as OneHotSpec
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueModule

from torchrl_mouse.modules.heads import DQNHead, SwiGLUHead
from torchrl_mouse.schema import ACTION, EPISODE_STEP, PREVIOUS_ACTION, require

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey

LOGITS: NestedKey = "logits"


class _Temperature(torch.nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores / self.temperature


class StickyActions(TensorDictModuleBase):
    """Repeats the previous action with some probability, to get away from where single random steps lead back.

    Actions that are drawn one by one make an agent pace up and down around its start; repeated ones carry it outwards
    (Dabney et al. 2020, arXiv:2006.01782; sticky actions: Machado et al. 2018, arXiv:1709.06009). It comes after an
    actor in a ``TensorDictSequential``, as ``EGreedyModule`` does, and like that one rests where TorchRL's exploration
    type is not random. An episode's first action is never a repetition.

    Args:
        probability: of repeating, in [0, 1).
        action_key: the action, read and written.
        previous_key: the action that led to the frame.
        episode_step_key: int64 ``[*, 1]``, the step inside the episode.

    Raises:
        ValueError: the probability is out of range.

    Examples:
        >>> from tensordict import TensorDict
        >>> _ = torch.manual_seed(0)
        >>> frame = {"action": torch.zeros(1000, dtype=torch.int64), "episode_step": torch.ones(1000, 1)}
        >>> frame["previous"] = {"action": torch.ones(1000, dtype=torch.int64)}
        >>> round(StickyActions(0.3)(TensorDict(frame, [1000]))["action"].float().mean().item(), 1)
        0.3
    """

    def __init__(
        self,
        probability: float,
        *,
        action_key: NestedKey = ACTION,
        previous_key: NestedKey = PREVIOUS_ACTION,
        episode_step_key: NestedKey = EPISODE_STEP,
    ) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"StickyActions: probability must lie in [0, 1), got {probability}.")
        self.probability = probability
        self.in_keys = [action_key, previous_key, episode_step_key]
        self.out_keys = [action_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action, or the previous one again."""
        if exploration_type() not in (ExplorationType.RANDOM, None):
            return tensordict
        action, previous, step = (require(tensordict, key) for key in self.in_keys)
        draw = torch.rand(tensordict.shape, device=action.device)
        repeat = (draw < self.probability) & (step.reshape(tensordict.shape) > 0)
        repeat = repeat.reshape(repeat.shape + (1,) * (action.ndim - repeat.ndim))
        return tensordict.set(self.out_keys[0], torch.where(repeat, previous, action))


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
