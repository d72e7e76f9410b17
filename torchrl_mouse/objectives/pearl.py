"""PEARL's loss: soft actor-critic on a latent that a context encoder infers, with an information bottleneck."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import unravel_key_list
from torchrl.modules import TanhNormal
from torchrl.objectives import LossModule

from torchrl_mouse import schema
from torchrl_mouse.functional import standard_normal_kl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensordict.utils import NestedKey

_SQUASH_EPS = 1e-6  # PEARL's: it bounds the density of an action at the border


class PEARLLoss(LossModule):
    """Trains context encoder, actor and critics together (PEARL, arXiv 1903.08254).

    The critic is that of the first soft actor-critic (arXiv 1801.01290): two action values, a state value and its
    target, a fixed temperature of 1. The encoder learns from the critic's error and from the KL divergence to the prior
    alone; actor and state value see its latent without gradient.

    .. code-block:: text

        z        ~ q(z | context), one for each task
        loss_kl      = kl_weight * sum over tasks and dimensions of KL(q(z | context) || N(0, 1))
        loss_qvalue  = sum over both Q of mean (Q(s, a, z) - reward_scale * r - gamma * (1 - terminated) * V'(s', z))^2
        a', log pi   ~ actor(s, z)
        m            = min over both Q(s, a', z)
        loss_value   = mean (V(s, z) - (m - log pi))^2
        loss_actor   = mean (log pi - m) + regularization * (mean loc^2 + mean log_scale^2)

    All four can be summed, and one optimizer step taken, as TorchRL's trainers do: no parameter gets a gradient from
    a term that is not its own. PEARL steps twice, so that the actor sees critics that have moved already::

        critic = loss.critic_loss(batch)  # writes "latent" to the batch
        (critic["loss_kl"] + critic["loss_qvalue"]).backward()
        optimizer.step()
        actor = loss.actor_loss(batch)
        (actor["loss_value"] + actor["loss_actor"]).backward()
        optimizer.step()
        SoftUpdate(loss, tau=0.005).step()

    The batch has one row for each task: ``("context", ...)`` ``[tasks, N, *]`` as the encoder reads it, and transitions
    ``observation``, ``action``, ``("next", "observation")``, ``("next", "reward")``, ``("next", "terminated")``
    ``[tasks, rows, *]``. An episode that a step limit cuts is not an end.

    Args:
        posterior: reads the context and writes location and scale of the belief, ``[tasks, Z]``, as
            :class:`~torchrl_mouse.modules.ContextPosterior` does; TensorDictModules in it that have
            ``reset(num_tasks)`` are reset before.
        actor_network: reads ``observation`` and ``latent`` and draws from a ``TanhNormal`` inside [-1, 1].
        qvalue_networks: two networks (or more) that read ``observation``, ``action`` and ``latent``.
        value_network: reads ``observation`` and ``latent``; its target moves by ``SoftUpdate``.
        gamma: discount per step, in [0, 1].
        reward_scale: factor of the reward, positive: the higher it is, the less entropy counts.
        kl_weight: of the bottleneck, not negative. The KL divergence is summed, the errors are averaged.
        regularization: of the actor's location and scale, not negative.

    Raises:
        ValueError: an argument is out of range, or the actor draws from another distribution.

    Examples:
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_mouse.modules import ContextPosterior, latent_actor, latent_qvalue, latent_value
        >>> from torchrl_mouse.modules import make_context_encoder
        >>> encoder = make_context_encoder("mlp", hidden_sizes=(8,), input_size=5, output_size=6)
        >>> qvalues = [latent_qvalue(2, 2, 3, hidden_sizes=(8,)) for _ in range(2)]
        >>> actor, value = latent_actor(2, 2, 3, hidden_sizes=(8,)), latent_value(2, 3, hidden_sizes=(8,))
        >>> loss = PEARLLoss(ContextPosterior(encoder), actor, qvalues, value)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> frames = {"observation": torch.zeros(4, 6, 2), "action": torch.zeros(4, 6, 2)}
        >>> context = TensorDict({**frames, "reward": torch.zeros(4, 6, 1)}, [4, 6])
        >>> ends = torch.zeros(4, 6, 1, dtype=torch.bool)
        >>> next = {"observation": torch.zeros(4, 6, 2), "reward": torch.zeros(4, 6, 1), "terminated": ends}
        >>> batch = TensorDict({**frames, "next": next, "context": context}, [4])
        >>> [key for key in loss(batch).keys() if key.startswith("loss")]
        ['loss_kl', 'loss_qvalue', 'loss_value', 'loss_actor']
    """

    @dataclass
    class _AcceptedKeys:
        observation: NestedKey = schema.OBSERVATION
        action: NestedKey = schema.ACTION
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        posterior_loc: NestedKey = schema.POSTERIOR_LOC
        posterior_scale: NestedKey = schema.POSTERIOR_SCALE
        latent: NestedKey = schema.LATENT
        state_value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    out_keys = ("loss_kl", "loss_qvalue", "loss_value", "loss_actor", "kl", "entropy")
    actor_network: ProbabilisticTensorDictSequential
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        posterior: TensorDictModuleBase,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_networks: Sequence[TensorDictModule],
        value_network: TensorDictModule,
        *,
        gamma: float = 0.99,
        reward_scale: float = 1.0,
        kl_weight: float = 0.1,
        regularization: float = 1e-3,
    ) -> None:
        super().__init__()
        for name, valid, rule, value in (
            ("gamma", 0 <= gamma <= 1, "lie in [0, 1]", gamma),
            ("reward_scale", 0 < reward_scale < math.inf, "be positive and finite", reward_scale),
            ("kl_weight", 0 <= kl_weight < math.inf, "be finite and not negative", kl_weight),
            ("regularization", 0 <= regularization < math.inf, "be finite and not negative", regularization),
            ("qvalue_networks", len(qvalue_networks) >= 2, "be at least two", len(qvalue_networks)),
        ):
            if not valid:
                raise ValueError(f"PEARLLoss: {name} must {rule}, got {value}. Change it.")
        _check_squashed(actor_network)
        self.posterior = posterior
        self.convert_to_functional(actor_network, "actor_network")
        self.convert_to_functional(list(qvalue_networks), "qvalue_network", expand_dim=len(qvalue_networks))
        self.convert_to_functional(value_network, "value_network", create_target_params=True)
        self.gamma, self.reward_scale, self.kl_weight = gamma, reward_scale, kl_weight
        self.regularization = regularization

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Has nothing to forward, as there is no value estimator."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that the loss reads."""
        keys = self.tensor_keys
        following = [("next", key) for key in (keys.observation, keys.reward, keys.terminated)]
        read: list[NestedKey] = [*self.posterior.in_keys, keys.observation, keys.action, *following]
        return list(unravel_key_list(read))

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes all losses with the weights as they are; ``kl`` and ``entropy`` are in nats, per task and step."""
        batch = tensordict.copy()
        return self.critic_loss(batch).update(self.actor_loss(batch))

    def critic_loss(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes ``loss_kl`` and ``loss_qvalue``, and writes the latents that it drew to the input.

        Raises:
            KeyError: an entry is missing.
            ValueError: there are no tasks or rows; an entry, or the belief, is of other tasks or rows than the
                observation; reward or end of an episode is not ``[tasks, rows, 1]``; a reward or a belief is not finite
                (looked at on the CPU alone).
        """
        keys = self.tensor_keys
        shape = schema.require(tensordict, keys.observation).shape
        if len(shape) < 3 or not shape[:2].numel():
            raise ValueError(
                f"PEARLLoss: entry {keys.observation!r} must have shape [tasks, rows, *] with at least one of each, "
                f"got {list(shape)}. Draw the same number of transitions of each task."
            )
        num_tasks = shape[0]
        for module in self.posterior.modules():  # What has a state may be one of a sequence.
            if isinstance(module, TensorDictModuleBase) and hasattr(module, "reset"):
                module.reset(num_tasks)
        belief = self.posterior(tensordict.select(*self.posterior.in_keys))
        loc, scale = schema.require(belief, keys.posterior_loc), schema.require(belief, keys.posterior_scale)
        if len(loc) != num_tasks:  # Latents would go to other tasks' rows.
            raise ValueError(
                f"PEARLLoss: entry {keys.posterior_loc!r} must be of {num_tasks} tasks, as {keys.observation!r} is, "
                f"got {len(loc)}. Give a context for each."
            )
        remedy = "The first index is the task. Fix the context or the learning rate."
        schema.check_finite(loc, keys.posterior_loc, "PEARLLoss", remedy)
        latent = loc + scale * torch.randn_like(scale)
        tensordict.set(keys.latent, latent)
        kl = standard_normal_kl(loc, scale.square()).sum()

        reward, terminated = (
            self._rows(tensordict, ("next", key), scalar=True) for key in (keys.reward, keys.terminated)
        )
        remedy = "The first index is the task. Fix the environment or the data."
        schema.check_finite(reward.view(num_tasks, -1, 1), ("next", keys.reward), "PEARLLoss", remedy)
        with torch.no_grad():
            following = self._frames(tensordict, latent, "next")
            value = self._value(following, self.target_value_network_params)
            running = 1 - terminated.to(value.dtype)
            target = self.reward_scale * reward + self.gamma * running * value
        steps = self._frames(tensordict, latent).set(keys.action, self._rows(tensordict, keys.action))
        error = self._qvalues(steps, self.qvalue_network_params) - target
        losses = {
            "loss_kl": self.kl_weight * kl,
            "loss_qvalue": error.square().mean((-2, -1)).sum(),
            "kl": kl.detach() / num_tasks,
        }
        return TensorDict(losses)

    def actor_loss(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes ``loss_value`` and ``loss_actor`` with the latents that :meth:`critic_loss` has written.

        Raises:
            KeyError: an entry is missing.
        """
        keys = self.tensor_keys
        steps = self._frames(tensordict, schema.require(tensordict, keys.latent).detach())
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            distribution = self.actor_network.get_dist(steps.copy())
        loc, scale = distribution.loc, distribution.scale
        noise = torch.randn(scale.shape, dtype=scale.dtype, device=scale.device)  # in an order that no layout changes
        # The density is computed before the squash: a saturated action has lost where it came from.
        action = torch.tanh(loc + scale * noise)
        log_prob = -(noise.square() / 2 + scale.log() + math.log(2 * math.pi) / 2)
        log_prob = (log_prob - (1 - action.square() + _SQUASH_EPS).log()).sum(-1, keepdim=True)

        # Without gradients of the critic's own weights, which nobody needs.
        least = self._qvalues(steps.copy().set(keys.action, action), self.qvalue_network_params.data).amin(0)
        value = self._value(steps, self.value_network_params)
        penalty = loc.square().mean() + scale.log().square().mean()
        losses = {
            "loss_value": (value - (least - log_prob).detach()).square().mean(),
            "loss_actor": (log_prob - least).mean() + self.regularization * penalty,
            "entropy": -log_prob.detach().mean(),
        }
        return TensorDict(losses)

    def _rows(self, tensordict: TensorDictBase, key: NestedKey, *, scalar: bool = False) -> torch.Tensor:
        """Returns an entry of the transitions, ``[tasks, rows, *]``, as ``[tasks * rows, *]``."""
        value = schema.require(tensordict, key)
        first = schema.require(tensordict, self.tensor_keys.observation).shape[:2]
        want = [*first, *([1] if scalar else value.shape[2:])]
        if list(value.shape) != want:  # Without the 1, or of fewer rows, it would broadcast.
            raise ValueError(f"PEARLLoss: entry {key!r} must have shape {want}, got {list(value.shape)}. Reshape it.")
        return value.flatten(0, 1)

    def _frames(self, tensordict: TensorDictBase, latent: torch.Tensor, *prefix: str) -> TensorDict:
        """Returns observations ``[tasks * rows, *]``, each with its task's latent."""
        key = self.tensor_keys.observation
        observation = self._rows(tensordict, (*prefix, key) if prefix else key)
        latent = latent.repeat_interleave(len(observation) // len(latent), 0)
        return TensorDict({key: observation, self.tensor_keys.latent: latent}, [len(observation)])

    def _value(self, steps: TensorDict, params: TensorDictParams) -> torch.Tensor:
        with params.to_module(self.value_network, preserve_module_state=False):
            return schema.require(self.value_network(steps.copy()), self.tensor_keys.state_value)

    def _qvalues(self, steps: TensorDict, params: TensorDictBase) -> torch.Tensor:
        """Returns all networks' values, ``[networks, steps, 1]``; one after the other, which beats vmap on a CPU."""
        values = []
        for one in params.unbind(0):
            with one.to_module(self.qvalue_network, preserve_module_state=False):
                values.append(schema.require(self.qvalue_network(steps.copy()), self.tensor_keys.state_action_value))
        return torch.stack(values)


def _check_squashed(actor: ProbabilisticTensorDictSequential) -> None:
    draw: Any = actor[-1]
    kind, options = draw.distribution_class, draw.distribution_kwargs
    bounds = [torch.as_tensor(options.get(name, default)) for name, default in (("low", -1), ("high", 1))]
    tanh = isinstance(kind, type) and issubclass(kind, TanhNormal)
    if not tanh or (bounds[0] != -1).any() or (bounds[1] != 1).any():
        got = f"one inside {[bound.tolist() for bound in bounds]}" if tanh else kind
        raise ValueError(
            f"PEARLLoss: actor_network must draw from a TanhNormal inside [-1, 1], got {got}. Make it with "
            "latent_actor, and let a transform of the environment scale actions."
        )
