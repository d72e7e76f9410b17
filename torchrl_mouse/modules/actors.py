"""Acting on a head's output, with TorchRL's own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch.distributions import Categorical
from torch.nn import functional as F
from torchrl.data import Bounded, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import OneHot as OneHotSpec
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import IndependentNormal, OneHotCategorical, ProbabilisticActor, QValueModule, TanhNormal

from torchrl_mouse.functional import vec_dqn_scores
from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.heads import DQNHead, GaussianHead, MultiDiscountHead, SwiGLUHead, VecDQNHead, VectorHead
from torchrl_mouse.schema import ACTION, EPISODE_STEP, PREVIOUS_ACTION, require, to_ids

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey
    from torchrl.data import TensorSpec

VEC_DQN_SCORES: NestedKey = "vec_dqn_scores"
ACTION_VALUE: NestedKey = "action_value"
LOGITS: NestedKey = "logits"
LOC: NestedKey = "loc"
SCALE: NestedKey = "scale"


class _ActionScores(TensorDictModuleBase):
    """Writes scores ``[*, num_actions]``: those of the first actions in what a head writes.

    That is scores ``[*, A]``, vectors ``[*, A, V]``, or scores ``[*, D, A]`` of several discounts, of which the first
    counts.

    The mask ``[*, num_actions]`` is always checked here, but only vectors' scores depend on it: the choice applies it.
    """

    def __init__(
        self,
        network: torch.nn.Module | None,
        source: NestedKey,
        scores: NestedKey,
        num_actions: int,
        action_mask_key: NestedKey | None,
    ) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.vectors = isinstance(network, VectorHead)
        self.several_discounts = isinstance(network, MultiDiscountHead)
        self.action_mask_key = action_mask_key
        self.in_keys = [source] if action_mask_key is None else [source, action_mask_key]
        self.out_keys = [scores]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        output = require(tensordict, self.in_keys[0])
        mask = None if self.action_mask_key is None else require(tensordict, self.action_mask_key, "bool")
        if mask is not None and mask.shape[-1:] != (self.num_actions,):
            raise ValueError(
                f"make_actor: entry {self.action_mask_key!r} must hold a flag for each of the space's "
                f"{self.num_actions} actions, got shape {tuple(mask.shape)}. Cut or pad it in the environment."
            )
        if self.vectors:
            if mask is not None:  # The head's further actions are none of the space's.
                mask = F.pad(mask, (0, output.shape[-2] - self.num_actions))
            output = vec_dqn_scores(output, mask)
        if self.several_discounts:
            output = output[..., 0, :]
        return tensordict.set(self.out_keys[0], output[..., : self.num_actions])


class _GaussianParameters(NormalParamExtractor):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, scale = super().forward(output.to(self.dtype))
        return loc, scale


class _Logits(torch.nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, scores: torch.Tensor, action_mask: torch.Tensor | None = None) -> torch.Tensor:
        logits = (scores - scores.amax(-1, keepdim=True)) / self.temperature  # no overflow at low temperatures
        # Not -inf: where nothing is allowed, as may be at an episode's end, any action will do, and none must fail.
        return logits if action_mask is None else torch.where(action_mask, logits, torch.finfo(logits.dtype).min)


class StickyActions(TensorDictModuleBase):
    """Repeats the previous action with some probability, to get away from where single random steps lead back.

    Actions that are drawn one by one make an agent pace up and down around its start; repeated ones carry it outwards
    (Dabney et al. 2020, arXiv:2006.01782; sticky actions: Machado et al. 2018, arXiv:1709.06009). It comes after an
    actor in a ``TensorDictSequential``, as ``EGreedyModule`` does, and like that one rests where TorchRL's exploration
    type is not random. An episode's first action is never a repetition.

    Args:
        probability: of repeating, in [0, 1).
        action_mask_key: bool ``[*, A]``, the actions that are allowed; others are not repeated. ``None``: all are.

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

    def __init__(self, probability: float, *, action_mask_key: NestedKey | None = None) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"StickyActions: probability must lie in [0, 1), got {probability}.")
        self.probability = probability
        self.action_mask_key = action_mask_key
        masks = () if action_mask_key is None else (action_mask_key,)
        self.in_keys = [ACTION, PREVIOUS_ACTION, EPISODE_STEP, *masks]
        self.out_keys = [ACTION]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action, or the previous one again."""
        if exploration_type() not in (ExplorationType.RANDOM, None):
            return tensordict
        action, previous, step = (require(tensordict, key) for key in (ACTION, PREVIOUS_ACTION, EPISODE_STEP))
        draw = torch.rand(tensordict.shape, device=action.device)
        repeat = (draw < self.probability) & (step.reshape(tensordict.shape) > 0)
        if self.action_mask_key is not None:
            allowed = require(tensordict, self.action_mask_key)
            ids = to_ids(previous, allowed.shape[-1], tensordict.ndim, PREVIOUS_ACTION)
            repeat &= allowed.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        repeat = repeat.reshape(repeat.shape + (1,) * (action.ndim - repeat.ndim))
        return tensordict.set(ACTION, torch.where(repeat, previous, action))


def make_actor(
    trunk: TensorDictModuleBase,
    head: TensorDictModule,
    spec: TensorSpec,
    *,
    temperature: float = 0.0,
    num_actions: int | None = None,
    action_mask_key: NestedKey | None = None,
    action_key: NestedKey = ACTION,
) -> TensorDictSequential:
    """Composes a policy that acts on the output of one head.

    Besides the head's output it writes what it chose by: the scores of a vector head to ``vec_dqn_scores``, and those
    that were cut or masked to ``action_value`` (greedily, forbidden actions have the type's least number there).

    Args:
        trunk: writes ``hidden``.
        head: reads ``hidden`` and writes scores ``[*, A]``, for a :class:`VectorHead` or :class:`VecDQNHead` vectors
            ``[*, A, V]``, for a :class:`MultiDiscountHead` scores ``[*, D, A]``, of which the first counts; ``A`` is
            compared with the space where it wraps one of our heads. In a continuous space it wraps a
            :class:`GaussianHead`, see :func:`gaussian_policy`.
        spec: the action spec of one environment row (``env.action_spec_unbatched``), ``OneHot`` or ``Categorical``; for
            a :class:`GaussianHead` continuous, ``Bounded`` or ``Unbounded``.
        temperature: 0 takes the best action (a ``QValueModule``, which also writes ``chosen_action_value``); above it,
            actions are drawn from ``softmax(scores / temperature)`` (a ``ProbabilisticActor``: the best action where
            TorchRL's exploration type is ``DETERMINISTIC`` or ``MODE``; actions have no ``MEAN`` or ``MEDIAN``).
        num_actions: act with that many of the head's actions, the first ones; the space must have as many. All by
            default. Vectors are compared with those of all the head's actions, as in MOUSE, unless there is a mask.
        action_mask_key: entry bool ``[*, A]`` over the space's actions, true where one is allowed
            (:data:`~torchrl_mouse.schema.ACTION_MASK` by convention); vectors are compared among these only. All are
            allowed by default.
        action_key: where the action is written.

    Returns:
        A ``TensorDictSequential``; append TorchRL's ``EGreedyModule`` to explore (with the same ``action_mask_key``).

    Raises:
        TypeError: the action space is not of the head's kind.
        ValueError: a negative temperature or none at all (NaN), another number of actions than the head's, or an option
            that a continuous space has no use for. When acting: the mask's number of flags is not the space's.

    Examples:
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> config = MouseConfig(hidden_dim=16, embedding_kwargs={"max_num_actions": 3}, dqn_head_kwargs={})
        >>> model = MouseModel(config)
        >>> type(make_actor(model.trunk, model.head("dqn"), CategoricalSpec(3))[-1]).__name__
        'QValueModule'
    """
    if not temperature >= 0:
        raise ValueError(f"make_actor: temperature must be at least 0, got {temperature}.")
    network = _network(head)
    if isinstance(network, GaussianHead):
        if temperature != 0 or num_actions is not None or action_mask_key is not None:
            raise ValueError(
                "make_actor: temperature, num_actions and action_mask_key must be left out for a GaussianHead, got "
                f"{temperature}, {num_actions} and {action_mask_key!r}. It draws with a spread that it learns: use "
                "set_exploration_type to act without chance."
            )
        return ProbabilisticTensorDictSequential(trunk, *gaussian_policy(head, spec, action_key=action_key))
    _check_discrete("make_actor", spec, network, num_actions)
    modules, scores = [trunk, head], head.out_keys[0]
    if isinstance(network, VectorHead | MultiDiscountHead) or num_actions is not None or action_mask_key is not None:
        source, scores = scores, VEC_DQN_SCORES if isinstance(network, VectorHead) else ACTION_VALUE
        modules.append(_ActionScores(network, source, scores, spec.space.n, action_mask_key))
    if temperature == 0:
        out_keys = [action_key, scores, "chosen_action_value"]
        return TensorDictSequential(*modules, QValueModule(None, scores, action_mask_key, out_keys, spec=spec))
    read = [scores] if action_mask_key is None else [scores, action_mask_key]
    return ProbabilisticActor(
        TensorDictSequential(*modules, TensorDictModule(_Logits(temperature), read, [LOGITS])),
        in_keys=[LOGITS],
        out_keys=[action_key],
        spec=spec,
        distribution_class=_distribution(spec),
        default_interaction_type=InteractionType.RANDOM,
    )


def gaussian_policy(head: TensorDictModule, spec: TensorSpec, *, action_key: NestedKey = ACTION) -> ProbabilisticActor:
    """Composes the policy over continuous actions that TorchRL's losses take as actor network; it reads ``hidden``.

    It writes ``loc`` and ``scale``, draws the action and writes its log-probability. Without chance (deterministic
    exploration) the action is the location, squashed into the bounds.

    Args:
        head: reads ``hidden`` and wraps a :class:`GaussianHead`.
        spec: the action spec ``[action_dim]`` of one environment row (``env.action_spec_unbatched``), continuous:
            ``Bounded`` gives a ``TanhNormal`` inside its bounds, ``Unbounded`` an ``IndependentNormal``.
        action_key: where the action is written.

    Raises:
        TypeError: another head, or a space that is not continuous.
        ValueError: another size of action than the head's, or an infinite bound.

    Examples:
        >>> from tensordict import TensorDict
        >>> head = TensorDictModule(GaussianHead(16, 2, hidden_dim=8), ["hidden"], ["gaussian"])
        >>> policy = gaussian_policy(head, Bounded(-1.0, 1.0, shape=(2,)))
        >>> out = policy(TensorDict({"hidden": torch.zeros(3, 16)}, [3]))
        >>> out["action"].shape, out["action_log_prob"].shape
        (torch.Size([3, 2]), torch.Size([3]))
    """
    network = _network(head)
    if not isinstance(network, GaussianHead):
        raise TypeError(
            f"gaussian_policy: the head must be a GaussianHead, got {type(network).__name__} for "
            f"{type(spec).__name__}. Use make_actor for heads of scores and discrete spaces."
        )
    bounded = isinstance(spec, Bounded)
    if not (bounded or isinstance(spec, Unbounded)) or not spec.dtype.is_floating_point:
        raise TypeError(
            "gaussian_policy: the action spec of a GaussianHead must be Bounded or Unbounded and continuous, got "
            f"{type(spec).__name__}. Act with a head of scores, such as DQNHead, in a discrete space."
        )
    if spec.shape != (network.action_dim,):
        raise ValueError(
            f"gaussian_policy: the action spec must have the head's shape {(network.action_dim,)}, got "
            f"{tuple(spec.shape)}. Give env.action_spec_unbatched, and a head with its size as action_dim."
        )
    bounds = {"low": spec.space.low, "high": spec.space.high} if bounded else {}
    if not all(bound.isfinite().all() for bound in bounds.values()):
        raise ValueError(
            f"gaussian_policy: the bounds of the action spec must be finite, got {spec.space.low.tolist()} to "
            f"{spec.space.high.tolist()}. Use an Unbounded spec, or wide finite bounds."
        )
    # In the space's type: log-probabilities of a bfloat16 model would be too coarse for the ratios of PPO.
    parameters = TensorDictModule(_GaussianParameters(spec.dtype), head.out_keys, [LOC, SCALE])
    return ProbabilisticActor(
        TensorDictSequential(head, parameters),
        in_keys=[LOC, SCALE],
        out_keys=[action_key],
        spec=spec,
        distribution_class=TanhNormal if bounded else IndependentNormal,
        distribution_kwargs=bounds,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )


def categorical_policy(
    head: TensorDictModule, spec: TensorSpec, *, action_key: NestedKey = ACTION
) -> ProbabilisticActor:
    """Composes the policy over discrete actions that TorchRL's losses take as actor network; it reads ``hidden``.

    It writes the head's logits, draws the action and writes its log-probability.

    Args:
        head: reads ``hidden`` and writes logits ``[*, A]``, as a model's ``sp`` head does.
        spec: the action spec of one environment row (``env.action_spec_unbatched``), ``OneHot`` or ``Categorical``.
        action_key: where the action is written.

    Raises:
        TypeError: a space that is not discrete, or a head of another kind.
        ValueError: another number of actions than the head's.

    Examples:
        >>> from tensordict import TensorDict
        >>> head = TensorDictModule(SwiGLUHead(16, 5), ["hidden"], ["sp"])
        >>> out = categorical_policy(head, CategoricalSpec(5))(TensorDict({"hidden": torch.zeros(3, 16)}, [3]))
        >>> out["action"].shape, out["action_log_prob"].shape
        (torch.Size([3]), torch.Size([3]))
    """
    network = _network(head)
    if isinstance(network, VectorHead | MultiDiscountHead | GaussianHead):
        raise TypeError(
            f"categorical_policy: the head must write logits [*, A], got {type(network).__name__}. Use a SwiGLUHead."
        )
    _check_discrete("categorical_policy", spec, network, None)
    return ProbabilisticActor(
        TensorDictSequential(head),
        in_keys={"logits": head.out_keys[0]},
        out_keys=[action_key],
        spec=spec,
        distribution_class=_distribution(spec),
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )


def _distribution(spec: TensorSpec) -> type:
    return OneHotCategorical if isinstance(spec, OneHotSpec) else Categorical


def _network(head: TensorDictModule) -> torch.nn.Module | None:
    module: torch.nn.Module | None = getattr(head, "module", None)
    return module.online if isinstance(module, DQNHead | VecDQNHead) else module


def _check_discrete(where: str, spec: TensorSpec, network: torch.nn.Module | None, num_actions: int | None) -> None:
    if type(spec) not in (CategoricalSpec, OneHotSpec):  # TorchRL's spaces of several choices are their subclasses
        raise TypeError(
            f"{where}: the action spec must be Categorical or OneHot, got {type(spec).__name__} for a head of type "
            f"{type(network).__name__}. Continuous spaces need a GaussianHead; encode others as one choice."
        )
    limit = None  # The actions of a network that is not ours are not known.
    if isinstance(network, SwiGLUHead):
        limit = getattr(network, "num_actions", network.out_dim)
    if num_actions is None:
        if limit not in (None, spec.space.n):
            raise ValueError(
                f"{where}: the action space must have the head's {limit} actions, got {spec.space.n}. "
                "Build the model with max_num_actions set to it, or give num_actions to act with the first of them."
            )
        return
    check_size(where, "num_actions", num_actions, most=limit)
    if num_actions != spec.space.n:
        raise ValueError(f"{where}: num_actions must be the action space's {spec.space.n}, got {num_actions}.")
