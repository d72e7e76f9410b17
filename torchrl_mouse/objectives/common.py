"""What in-context losses share, and the loss that runs several of them on one trunk."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import unravel_key, unravel_key_list
from torch import nn
from torchrl.objectives import LossModule

from torchrl_mouse import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensordict.utils import NestedKey

REDUCTIONS = ("none", "mean", "sum")


class InContextLoss(LossModule):
    """Base of the losses on a head that reads the trunk's hidden states.

    The trunk runs once, over the root sequence, whose windows begin a context at index 0; a loss shifts inside the
    window for what comes next. Losses that share a trunk are built without one and combined by :class:`CombinedLoss`.

    Steps at terminal frames, where nothing is decided, are left out, and those that a mask excludes, as everywhere in
    TorchRL: ``("collector", "mask")`` where it is there, or the entry that ``loss.loss_mask_key`` names.
    A batch in which no step is left costs zero, with a warning. A step that is masked still is the next frame of the
    one before it: pad windows by repeating the last frame, as :class:`~torchrl_mouse.data.WindowSampler` does.

    Where actions are not always allowed, ``loss.set_keys(action_mask="action_mask")`` names the entry, bool
    ``[*, T, A]``, that is true where one is. It is read at every frame; where it allows none, as may be at an episode's
    end, all count.

    Args:
        head: reads ``hidden`` and writes the head's output, as its only entry.
        trunk: writes ``hidden``; ``None`` where the input holds it already. It has no target: a slowly moving copy of
            the head alone steadies bootstrapping, at no cost in memory.
        delay_value: keep a target copy of the head, moved by ``SoftUpdate`` or ``HardUpdate``.
        reduction: ``"mean"`` over the valid steps, ``"sum"`` or ``"none"`` (invalid steps are zero).

    Raises:
        ValueError: an unknown reduction, or a head that writes several entries.
    """

    @dataclass
    class _AcceptedKeys:
        terminated: NestedKey = schema.PREVIOUS_TERMINATED
        truncated: NestedKey = schema.PREVIOUS_TRUNCATED
        priority_weight: NestedKey = "priority_weight"
        action_mask: NestedKey | None = None

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    heads: tuple[str, ...] = ("head",)
    output_dims: tuple[str, ...] = ("A",)  # of a head's output at a step
    min_steps = 1
    head: TensorDictModule
    head_params: TensorDictParams
    target_head_params: TensorDictParams
    trunk: TensorDictModuleBase
    trunk_params: TensorDictParams
    target_trunk_params: TensorDictParams

    def __init__(
        self,
        head: TensorDictModule,
        *,
        trunk: TensorDictModuleBase | None = None,
        delay_value: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"{type(self).__name__}: reduction must be one of {REDUCTIONS}, got {reduction!r}.")
        self.reduction = reduction
        self.use_prioritized_weights: bool | str = "auto"
        self.has_trunk = trunk is not None
        if trunk is not None:
            self.convert_to_functional(trunk, "trunk", create_target_params=False)
        self._add_head("head", head, create_target_params=delay_value)

    def _add_head(self, name: str, head: TensorDictModule, *, create_target_params: bool = False) -> None:
        if len(head.out_keys) != 1:
            raise ValueError(
                f"{type(self).__name__}: {name} must write one entry, got {head.out_keys}. "
                "Give the network alone, without what acts on it."
            )
        self.convert_to_functional(head, name, create_target_params=create_target_params)

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that the loss reads."""
        read: list[Any] = [key for key in self.trunk.in_keys if key != schema.STREAM] if self.has_trunk else []
        written = self.trunk.out_keys if self.has_trunk else ()
        read += [key for name in self.heads for key in getattr(self, name).in_keys if key not in written]
        named = [key for key in (self.tensor_keys.action_mask, self.loss_mask_key) if key not in (None, "auto")]
        return list(dict.fromkeys(unravel_key_list([*read, *self._loss_keys(), *named])))

    def _loss_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.terminated, self.tensor_keys.truncated]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Has nothing to forward, as there is no value estimator."""

    def _with_hidden(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Returns the steps with what the trunk writes; the input is left as it was."""
        if tensordict.ndim == 0:
            raise ValueError(f"{type(self).__name__}: steps must be [*, T], got no time dimension.")
        if tensordict.shape[-1] < self.min_steps:
            raise ValueError(
                f"{type(self).__name__}: windows must have at least {self.min_steps} steps, as each is compared with "
                f"the next one, got {tuple(tensordict.shape)}. Sample longer windows."
            )
        steps = tensordict.copy()
        if self.has_trunk:
            with self.trunk_params.to_module(self.trunk, preserve_module_state=False):
                self.trunk(steps)
        return steps

    def _output(self, steps: TensorDictBase, name: str = "head", *, target: bool = False) -> torch.Tensor:
        """Returns a head's output, in float32 at least: sums of a narrower type lose what losses are about."""
        head: TensorDictModule = getattr(self, name)
        params: TensorDictParams = getattr(self, f"target_{name}_params" if target else f"{name}_params")
        for key in head.in_keys:
            schema.require(steps, key)
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not target),
            params.to_module(head, preserve_module_state=False),
        ):
            output: torch.Tensor = head(steps.select(*head.in_keys)).get(head.out_keys[0])
        if output.ndim != steps.ndim + len(self.output_dims):
            shape = ", ".join(self.output_dims)
            raise ValueError(
                f"{type(self).__name__}: the {name} must write [*, T, {shape}], got {tuple(output.shape)} for steps "
                f"{tuple(steps.shape)}. Take the head that the loss is for."
            )
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def _decisions(self, steps: TensorDictBase) -> torch.Tensor:
        """Returns the steps at which something was decided that no mask excludes; bool ``[*, T]``."""
        keys, masks = self.tensor_keys, self._loss_mask_keys()
        if self.loss_mask_key != "auto":
            for key in masks:
                schema.require(steps, key)
        return schema.decision_mask(steps, terminated=keys.terminated, truncated=keys.truncated, masks=masks)

    def _action_mask(self, steps: TensorDictBase, num_actions: int) -> torch.Tensor | None:
        """Returns which actions are allowed, bool ``[*, T, A]``, one at least; ``None`` where all are."""
        key = self.tensor_keys.action_mask
        if key is None:
            return None
        mask = schema.require(steps, key, "bool")
        if mask.shape != (*steps.shape, num_actions):
            raise ValueError(
                f"{type(self).__name__}: entry {key!r} must hold a flag for each of the head's {num_actions} actions, "
                f"got {tuple(mask.shape)} for steps {tuple(steps.shape)}. Give both the same number of actions."
            )
        return mask | ~mask.any(-1, keepdim=True)

    def _warn_of_nothing(self, valid: torch.Tensor) -> None:
        if schema.can_look_at(valid) and not valid.any():
            warnings.warn(
                f"{type(self).__name__}: a batch must hold a step to learn from, got none in {tuple(valid.shape)}: its "
                "loss is zero. Look at its masks, ends of episodes, and windows' lengths.",
                stacklevel=2,
            )

    def _reduce(self, loss: torch.Tensor, valid: torch.Tensor, tensordict: TensorDictBase) -> torch.Tensor:
        """Reduces a loss ``[*, T]`` over the valid steps; a batch without any costs zero."""
        loss, count = torch.where(valid, loss, 0.0), valid.to(loss.dtype)
        key = self.tensor_keys.priority_weight
        if self.use_prioritized_weights and tensordict.get(key, None) is not None:
            weights = schema.per_step(tensordict, key).to(loss.dtype)
            loss, count = loss * weights, count * weights
        if self.reduction == "none":
            return loss
        if self.reduction == "sum":
            return loss.sum()
        return loss.sum() / count.sum().clamp_min(torch.finfo(loss.dtype).tiny)


class CombinedLoss(LossModule):
    """Runs a trunk once and several losses on it.

    TorchRL's own losses (PPO, SAC, ...) ride on it with networks that read ``hidden``. They evaluate what comes next in
    its own place, so for them the trunk runs over one frame more, the last step's next one (which has to fit the
    backbone's positions too), and ``("next", "hidden")`` holds the hidden states shifted by one: the next frame, seen
    after all that came before it. Gradients flow through both. An actor that climbs an action value, as in SAC, should
    not move the trunk: it would learn to flatter the values (Yarats et al. 2021, arXiv:1910.01741).

    .. note:: Where a task ends inside a window, ``("next", "hidden")`` is that of the next task's first frame. Losses
        do not bootstrap from it where ``("next", "terminated")`` is set; where a task was cut by a limit, point them to
        its end: ``loss.set_keys(terminated="done")``. They bootstrap over the ends of episodes inside a task, unless
        both ``terminated`` and ``done`` are pointed there, as ``("previous", "terminated")``.

    .. note:: A critic learns nothing at steps that ``("collector", "mask")`` leaves out, such as terminal frames; where
        it bootstraps over the ends of episodes, it bootstraps from those. Leave the mask off there, or let returns end
        with the episode. ``normalize_advantage=True`` of PPO takes the mean of all steps, whatever the mask.

    Each parameter appears once, so ``loss.parameters()`` is what an optimiser wants; target updaters take the part
    that has targets: ``SoftUpdate(loss.losses["dqn"], tau=0.01)``.

    Args:
        trunk: writes ``hidden``.
        losses: by name, losses built without a trunk, on heads that read ``hidden``.
        weights: factor of each loss's terms; 1 where not given.

    Keys are those of the losses: ``loss.losses["dqn"].set_keys(...)``; a ``loss_mask_key`` is set for all of them.

    Raises:
        ValueError: no losses, one with a trunk of its own, a weight that names none or is not finite, or two losses
            that write the same entry.

    Examples:
        >>> from torchrl_mouse.models import MouseConfig, MouseModel
        >>> from torchrl_mouse.objectives import SupervisedPolicyLoss
        >>> heads = {"embedding_kwargs": {"max_num_actions": 3}, "sp_head_kwargs": {}}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, backbone_kwargs=None, **heads))
        >>> CombinedLoss(model.trunk, {"sp": SupervisedPolicyLoss(model.head("sp"))}, weights={"sp": 0.5}).out_keys
        ['loss_sp']
    """

    trunk: TensorDictModuleBase
    trunk_params: TensorDictParams
    target_trunk_params: TensorDictParams
    _loss_mask_key: NestedKey | None

    def __init__(
        self,
        trunk: TensorDictModuleBase,
        losses: Mapping[str, LossModule],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        weights = dict(weights or {})
        if not losses:
            raise ValueError("CombinedLoss: losses must be at least one, got none. Give them by name.")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"CombinedLoss: weights must be finite, got {weight} for {name!r}.")
        if unknown := set(weights) - set(losses):
            raise ValueError(f"CombinedLoss: weights must name losses ({', '.join(losses)}), got {sorted(unknown)}.")
        self.out_keys: list[str] = []
        for name, loss in losses.items():
            if getattr(loss, "has_trunk", False):
                raise ValueError(
                    f"CombinedLoss: loss {name!r} must be built without trunk=, got one. The trunk runs once, here."
                )
            if twice := set(self.out_keys) & set(loss.out_keys):
                raise ValueError(f"CombinedLoss: losses must write distinct entries, got {sorted(twice)} twice.")
            self.out_keys += loss.out_keys
        self.weights = {name: weights.get(name, 1.0) for name in losses}
        self.convert_to_functional(trunk, "trunk", create_target_params=False)
        self.losses = nn.ModuleDict(losses)
        self.looks_ahead = not all(isinstance(loss, InContextLoss) for loss in losses.values())

    def set_keys(self, **kwargs: Any) -> None:
        """Refuses: keys are those of the losses.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"CombinedLoss: keys must be set on one of the losses ({', '.join(self.losses)}), got {sorted(kwargs)}. "
            "Use loss.losses[name].set_keys(...)."
        )

    @property
    def loss_mask_key(self) -> NestedKey | None:
        """The entry that marks the steps that count; setting it sets it for each of the losses."""
        return self._loss_mask_key

    @loss_mask_key.setter
    def loss_mask_key(self, key: NestedKey | None) -> None:
        self._loss_mask_key = key
        for loss in self.losses.values():
            setattr(loss, "loss_mask_key", key)  # noqa: B010 - as a module, it has no such attribute for type checkers

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that the trunk and the losses read."""
        parts: list[Any] = list(self.losses.values())
        keys = [key for key in self.trunk.in_keys if key != schema.STREAM]
        if self.looks_ahead:
            keys += [unravel_key(("next", key)) for key in keys if key != schema.IS_INIT]
            keys.append(schema.IS_INIT)
        written = (schema.HIDDEN, ("next", schema.HIDDEN))
        keys += [key for loss in parts for key in loss.in_keys if key not in written]
        return list(dict.fromkeys(keys))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Returns every loss's entries; those that begin with ``loss`` are weighted.

        Args:
            tensordict: steps ``[*, T]``.
        """
        steps = tensordict.copy()
        frames = self._with_next_frame(steps) if self.looks_ahead else steps
        with self.trunk_params.to_module(self.trunk, preserve_module_state=False):
            self.trunk(frames)
        if self.looks_ahead:
            hidden = frames.get(schema.HIDDEN)
            steps.set(schema.HIDDEN, hidden[..., :-1, :]).set(("next", schema.HIDDEN), hidden[..., 1:, :])
        out: dict[str, torch.Tensor] = {}
        prioritized: dict[NestedKey, str] = {}
        for name, loss in self.losses.items():
            own = steps.copy()  # What a loss leaves in its input is not the next one's.
            for key, value in loss(own).items():
                out[key] = value * self.weights[name] if key.startswith("loss") else value
            priority = getattr(loss.tensor_keys, "priority", None)
            if priority is not None and (error := own.get(priority, None)) is not None:
                if (other := prioritized.setdefault(priority, name)) != name:
                    raise ValueError(
                        f"CombinedLoss: losses must write priorities to distinct entries, got {priority!r} of both "
                        f"{other!r} and {name!r}. Move one: loss.losses[{name!r}].set_keys(priority=...)."
                    )
                tensordict.set(priority, error)
        return TensorDict(out)

    def _with_next_frame(self, steps: TensorDictBase) -> TensorDictBase:
        """Returns what the trunk reads ``[*, T + 1]``: the window's frames, and the one after its last step."""
        if steps.ndim == 0:
            raise ValueError("CombinedLoss: steps must be [*, T], got no time dimension.")
        read = [key for key in self.trunk.in_keys if key not in (schema.STREAM, schema.IS_INIT)]
        for key in read:
            schema.require(steps, key)
            schema.require(steps, unravel_key(("next", key)))
        last = steps.get("next").select(*read)[..., -1:]
        frames: TensorDictBase = torch.cat([steps.select(*read), last], -1)
        is_init = schema.require(steps, schema.IS_INIT, "bool")
        frames[schema.IS_INIT] = torch.cat([is_init, torch.zeros_like(is_init[..., -1:, :])], -2)
        return frames
