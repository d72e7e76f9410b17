"""MOUSE's augmentation of what the model sees: values scaled and shifted, ids permuted, whole fields masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict.utils import unravel_key

from torchrl_mouse import schema
from torchrl_mouse.data.augmentation import _root_and_next, _WindowTransform
from torchrl_mouse.data.token_augmentation_config import SCALARS, AugmentScalarSpec, AugmentTokensConfig

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey

EPISODE_END_TERMINATED: NestedKey = ("episode_end", "terminated")
EPISODE_END_TRUNCATED: NestedKey = ("episode_end", "truncated")

_ABSENT_TIME = -1  # the embedder's word for "no time", a zero vector
_ENDS = (schema.PREVIOUS_TERMINATED, schema.PREVIOUS_TRUNCATED)
_KEPT_ENDS = (EPISODE_END_TERMINATED, EPISODE_END_TRUNCATED)
_OF_ACTIONS = (schema.Q_STAR, schema.ACTION_MASK)  # entries with a column per action


class TokenAugmenter(_WindowTransform):
    """Changes what the model sees of sampled windows at random, in MOUSE's ways; by default not what losses learn from.

    A model that can remember its training tasks has no need to learn from its context. When ids, signs and sizes mean
    something else in every window, what they mean has to be found out inside it (Kirsch et al. 2022, arXiv:2212.04458).

    It works on the frame entries, at the root and under ``"next"`` alike, so that a step's next frame stays the next
    step's own: ``observation``, ``observation_discrete``, ``pixels``, ``episode_step`` and ``("previous", "action" |
    "reward" | "terminated" | "truncated")``. Each goes through the same order: mask, then permute, then scale, then
    shift; a masked value is then changed like any other of its kind. What losses read beside them, ``action``,
    ``("next", "reward")``, ``("next", "done")``, ``q_star``, ``action_mask``, changes only where ``permute_action`` is
    ``"target"`` or ``"both"``: column ``new`` takes the value of the action that became ``new``.

    - A factor or an offset is drawn once per batch, a permutation once per sequence; a mask per frame and kind of
      input, anew at every call.
    - Only ids that the task has are permuted among themselves: those that ``action_mask``, or else a finite ``q_star``,
      allows at any step of the window; all of them where there is neither entry. A window whose teacher is silent
      tells nothing: its actions stay. So do ids out of range.
    - An episode's first frame has no previous action and no previous reward: what stands there is neither permuted nor
      shifted. ``episode_step`` tells.
    - **Episode ends** are read from the same flags by the embedder and by losses. Where ``permute_done`` or
      ``mask_prob.done`` changes them, the true ones are kept, ``("episode_end", "terminated" | "truncated")`` at the
      root and under ``"next"``, and a loss has to be pointed there: ``loss.set_keys(**augmenter.loss_keys)``, for each
      loss of a :class:`~torchrl_mouse.objectives.CombinedLoss`. Without that it takes the changed flags for ends. Where
      the flags are left alone, ``loss_keys`` is empty and the line does nothing.

    It is a transform of a replay buffer, and draws anew at each sample. MOUSE's two steps are there too: after
    :meth:`update_augmentations` every call uses that draw. The input is left as it was; with nothing to change it is
    returned itself. ``in_keys`` are the entries it reads, for :meth:`~torchrl_mouse.data.DatasetStore.select`.

    Args:
        augment: what to change.
        max_num_actions: number ``A`` of action ids, the model's; at least 1 to permute them.
        max_num_obs_discrete: number ``N`` of discrete observation ids; at least 1 to permute them.
        device: where the numbers are drawn; windows may be anywhere.
        generator: draws the numbers, on that device; its state is saved with the buffer. By default torch's global
            one: with the buffer's seed alone, draws do not reproduce, with :func:`torch.manual_seed` they do.

    Raises:
        TypeError: ``augment`` is no :class:`AugmentTokensConfig`, or a number of ids no integer.
        ValueError: a number of ids is too small, or the generator is on another device.

    Examples:
        >>> from tensordict import TensorDict
        >>> config = AugmentTokensConfig(scale_reward=AugmentScalarSpec(-1.0), permute_action="target")
        >>> augmenter = TokenAugmenter(config, 3, 0, "cpu", torch.Generator().manual_seed(1))
        >>> steps = {"previous": {"reward": torch.tensor([[[0.0], [2.0]]])}, "action": torch.tensor([[0, 2]])}
        >>> changed = augmenter(TensorDict(steps, [1, 2]))
        >>> changed["previous", "reward"].flatten().tolist()
        [-0.0, -2.0]
        >>> new = augmenter.snapshot["permute_action"][0]
        >>> changed["action"].tolist() == [[new[0].item(), new[2].item()]]
        True
    """

    def __init__(
        self,
        augment: AugmentTokensConfig,
        max_num_actions: int,
        max_num_obs_discrete: int,
        device: torch.device | str,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(augment, AugmentTokensConfig):
            raise TypeError(f"TokenAugmenter: augment must be an AugmentTokensConfig, got {type(augment).__name__}.")
        for name, size, option in (
            ("max_num_actions", max_num_actions, "permute_action"),
            ("max_num_obs_discrete", max_num_obs_discrete, "permute_obs_discrete"),
        ):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"TokenAugmenter: {name} must be an integer, got {size!r}.")
            least = int(augment.enabled and getattr(augment, option) is not False)
            if size < least:
                for_what = f" for {option}" if least else ""
                raise ValueError(f"TokenAugmenter: {name} must be at least {least}{for_what}, got {size}.")
        self._device = torch.device(device)
        if generator is not None and generator.device.type != self._device.type:
            raise ValueError(
                f"TokenAugmenter: generator must be on the device {self._device}, got one on {generator.device}. "
                "Build it with torch.Generator(device)."
            )
        self.augment = augment
        self._generator = generator
        self._held: dict[str, torch.Tensor] | None = None
        self._latest: dict[str, torch.Tensor] | None = None
        self._mask_prob = {name: p for name, p in vars(augment.mask_prob).items() if p > 0 and augment.enabled}
        self._scalars: dict[str, AugmentScalarSpec] = {
            name: getattr(augment, name)
            for name, neutral in SCALARS.items()
            if augment.enabled and not getattr(augment, name).is_always(neutral)
        }
        self._sizes = {
            "permute_action": max_num_actions,
            "permute_obs_discrete": max_num_obs_discrete,
            "permute_done": schema.NUM_DONE_CODES,
        }
        self._sizes = {name: n for name, n in self._sizes.items() if augment.enabled and getattr(augment, name)}
        self._permutes_input = "permute_action" in self._sizes and augment.permute_action in ("input", "both")
        self._permutes_target = "permute_action" in self._sizes and augment.permute_action in ("target", "both")
        self._frame_keys = self._read_frame_keys()
        of_targets = (schema.ACTION, *(place for key in _OF_ACTIONS for place in _root_and_next(key)))
        super().__init__(
            in_keys=[
                *(place for key in self._frame_keys for place in _root_and_next(key)),
                *(of_targets if self._permutes_target else _OF_ACTIONS if self._permutes_input else ()),
            ]
        )

    def _read_frame_keys(self) -> list[NestedKey]:
        """The frame entries that the active options change or need."""
        by_option: dict[str, tuple[NestedKey, ...]] = {
            "action": (schema.PREVIOUS_ACTION,),
            "reward": (schema.PREVIOUS_REWARD,),
            "done": _ENDS,
            "time": (schema.EPISODE_STEP,),
            "obs_continuous": (schema.OBSERVATION,),
            "obs_discrete": (schema.OBSERVATION_DISCRETE,),
            "obs_image": (schema.PIXELS,),
            "permute_obs_discrete": (schema.OBSERVATION_DISCRETE,),
            "permute_done": _ENDS,
            "scale_reward": (schema.PREVIOUS_REWARD,),
            "shift_reward": (schema.PREVIOUS_REWARD, schema.EPISODE_STEP),
            "scale_obs": (schema.OBSERVATION,),
            "shift_obs": (schema.OBSERVATION,),
            "scale_obs_image": (schema.PIXELS,),
            "shift_obs_image": (schema.PIXELS,),
            "permute_action": (schema.PREVIOUS_ACTION, schema.EPISODE_STEP) if self._permutes_input else (),
        }
        active = (*self._mask_prob, *self._scalars, *self._sizes)
        return list(dict.fromkeys(key for name in active for key in by_option[name]))

    @property
    def loss_keys(self) -> dict[str, NestedKey]:
        """Where losses find the true episode ends, for their ``set_keys``; empty where the flags are left alone."""
        changed = "permute_done" in self._sizes or "done" in self._mask_prob
        return dict(zip(("terminated", "truncated"), _KEPT_ENDS, strict=True)) if changed else {}

    @property
    def snapshot(self) -> dict[str, torch.Tensor]:
        """The latest draw by option: factors and offsets ``[]``, permutations int64 ``[B, n]``, ``old`` to ``new``.

        Raises:
            RuntimeError: nothing was drawn yet.
        """
        if self._latest is None:
            raise RuntimeError("TokenAugmenter: snapshot must follow a draw, got none yet. Call the augmenter first.")
        return dict(self._latest)

    def update_augmentations(self, steps: TensorDictBase | None) -> None:
        """Draws factors, offsets and permutations for a batch, which all further calls use.

        Args:
            steps: steps ``[B, T]``, for their number and for the ids that they allow; ``None`` goes back to a draw of
                its own at every call.

        Raises:
            ValueError: other shapes.
        """
        if steps is not None:
            _check_shape(steps)
        self._held = self._latest = None if steps is None else self._draw(steps)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Returns changed steps; the input is left as it was, and returned itself where no option is active.

        Args:
            tensordict: steps ``[B, T]``; entries may be ids ``[B, T]`` or ``[B, T, 1]``, or one-hot ``[B, T, n]``.

        Raises:
            KeyError: an entry that an active option changes or needs is missing at the root.
            TypeError: an entry's type is of another kind.
            ValueError: other shapes, or another number of sequences than :meth:`update_augmentations` drew for.
        """
        if not (self._mask_prob or self._scalars or self._sizes):
            return tensordict
        _check_shape(tensordict)
        for key in self._frame_keys:
            schema.require(tensordict, key)
        self._latest = draw = self._draw(tensordict) if self._held is None else self._held
        batch, num = tensordict.shape
        for name in self._sizes:
            if len(draw[name]) != batch:
                raise ValueError(
                    f"TokenAugmenter: the steps must have the {len(draw[name])} sequences that were drawn for, got "
                    f"{batch}. Call update_augmentations with each batch."
                )
        # One mask per frame, one frame more than steps: a step's next frame is masked like the next step's own.
        masks = {name: self._uniform(batch, num + 1) < p for name, p in self._mask_prob.items()}
        steps = tensordict.copy()
        self._change_frames(steps, (), {name: mask[:, :-1] for name, mask in masks.items()}, draw)
        self._change_frames(steps, ("next",), {name: mask[:, 1:] for name, mask in masks.items()}, draw)
        if self._permutes_target:
            self._change_targets(steps, draw["permute_action"])
        return steps

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator, device=self._device)

    def _draw(self, steps: TensorDictBase) -> dict[str, torch.Tensor]:
        draw = {}
        for name, n in self._sizes.items():
            valid = torch.ones(len(steps), n, dtype=torch.bool, device=self._device)
            if name == "permute_action":
                valid &= self._valid_actions(steps, n)
            draw[name] = _permutation(valid, self._uniform(len(steps), n))
        for name, spec in self._scalars.items():
            if spec.low is not None and spec.high is not None:
                draw[name] = spec.low + (spec.high - spec.low) * self._uniform()
            else:
                draw[name] = spec.mean + spec.std * torch.randn((), generator=self._generator, device=self._device)
        return draw

    def _valid_actions(self, steps: TensorDictBase, num: int) -> torch.Tensor:
        """Which action ids the task of each sequence has, as far as its window tells; bool ``[B, A]`` or ``[]``."""
        for key in (schema.ACTION_MASK, schema.Q_STAR):
            if steps.get(key, None) is not None:
                value = schema.require(steps, key, "bool" if key == schema.ACTION_MASK else "float")
                _check_columns(key, value, num)
                allowed = value if value.dtype == torch.bool else value.isfinite()
                return allowed.any(1).to(self._device)
        return torch.ones((), dtype=torch.bool, device=self._device)

    def _change_frames(
        self, steps: TensorDictBase, at: tuple[str, ...], masks: dict[str, torch.Tensor], draw: dict[str, torch.Tensor]
    ) -> None:
        """Changes the frames at the root (``at=()``) or under ``("next",)``, what is there of them."""

        def place(key: NestedKey) -> NestedKey:
            return unravel_key((*at, key))

        def read(key: NestedKey, field: str, kind: Any = None, neutral: int = 0) -> torch.Tensor | None:
            if key not in self._frame_keys or steps.get(place(key), None) is None:
                return None
            value = schema.require(steps, place(key), kind)
            return value.masked_fill(_over(masks[field], value), neutral) if field in masks else value

        def write(key: NestedKey, value: torch.Tensor) -> None:
            steps.set(place(key), value)

        def unless_first(key: NestedKey, value: torch.Tensor, changed: torch.Tensor) -> None:
            step = schema.require(steps, place(schema.EPISODE_STEP), "integer").reshape(steps.shape)
            write(key, torch.where(_over(step == 0, value), value, changed))

        if (action := read(schema.PREVIOUS_ACTION, "action")) is not None:
            write(schema.PREVIOUS_ACTION, action)
            if self._permutes_input:
                renamed = _rename(schema.PREVIOUS_ACTION, action, draw["permute_action"])
                unless_first(schema.PREVIOUS_ACTION, action, renamed)
        ends = [read(key, "done", "bool") for key in _ENDS]
        if ends[0] is not None and ends[1] is not None:
            for kept, key in zip(_KEPT_ENDS, _ENDS, strict=True):
                write(kept, steps.get(place(key)))
            done = schema.done_code(ends[0], ends[1])
            if "permute_done" in draw:
                done = _rename("done", done, draw["permute_done"])
            write(schema.PREVIOUS_TERMINATED, done == schema.TERMINATED)
            write(schema.PREVIOUS_TRUNCATED, done == schema.TRUNCATED)
        if (ids := read(schema.OBSERVATION_DISCRETE, "obs_discrete")) is not None:
            if "permute_obs_discrete" in draw:
                ids = _rename(schema.OBSERVATION_DISCRETE, ids, draw["permute_obs_discrete"])
            write(schema.OBSERVATION_DISCRETE, ids)
        if (reward := read(schema.PREVIOUS_REWARD, "reward", "float")) is not None:
            write(schema.PREVIOUS_REWARD, reward := _times(reward, draw.get("scale_reward")))
            if "shift_reward" in draw:
                unless_first(schema.PREVIOUS_REWARD, reward, _plus(reward, draw["shift_reward"]))
        if (observation := read(schema.OBSERVATION, "obs_continuous", "float")) is not None:
            scaled = _times(observation, draw.get("scale_obs"))
            write(schema.OBSERVATION, _plus(scaled, draw.get("shift_obs")))
        if (image := read(schema.PIXELS, "obs_image")) is not None:
            if {"scale_obs_image", "shift_obs_image"} & draw.keys():
                exact = _plus(_times(image, draw.get("scale_obs_image")), draw.get("shift_obs_image"))
                image = exact.round().clamp(0, 255).to(image.dtype)
            write(schema.PIXELS, image)
        # Last: what an episode's first frame is, the steps above look up.
        if (time := read(schema.EPISODE_STEP, "time", "integer", _ABSENT_TIME)) is not None:
            write(schema.EPISODE_STEP, time)

    @staticmethod
    def _change_targets(steps: TensorDictBase, permutation: torch.Tensor) -> None:
        """Renames the actions in what losses read."""
        if all(steps.get(key, None) is None for key in (schema.ACTION, *_OF_ACTIONS)):
            schema.require(steps, schema.ACTION)
        if (action := steps.get(schema.ACTION, None)) is not None:
            steps.set(schema.ACTION, _rename(schema.ACTION, action, permutation))
        for place in (place for key in _OF_ACTIONS for place in _root_and_next(key)):
            if (value := steps.get(place, None)) is not None:
                _check_columns(place, value, permutation.shape[-1])
                steps.set(place, _move_columns(value, permutation))

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Returns the generator's state, where there is one, so that a resumed run goes on exactly."""
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restores the generator."""
        if self._generator is not None and "generator" in state:
            self._generator.set_state(state["generator"])


def _check_shape(steps: TensorDictBase) -> None:
    if steps.ndim != 2:
        raise ValueError(f"TokenAugmenter: steps must be [B, T], got {tuple(steps.shape)}.")


def _over(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Shapes a mask ``[B, T]`` to spread over a value ``[B, T, *]``."""
    return mask.reshape(mask.shape + (1,) * (value.ndim - 2)).to(value.device)


def _times(value: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return value if factor is None else value * factor.to(value.device)


def _plus(value: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    return value if offset is None else value + offset.to(value.device)


def _permutation(valid: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Permutes the valid ids among themselves at random; bool and uniform ``[B, n]`` to int64 ``[B, n]``."""
    ids = torch.arange(valid.shape[-1], device=valid.device)
    in_order = torch.where(valid, ids, ids + len(ids)).argsort(-1)  # The valid ones first,
    at_random = torch.where(valid, noise, ids + 1.0).argsort(-1)  # and after them the others, in order in both.
    return in_order.scatter(-1, in_order, at_random)


def _check_columns(place: NestedKey, value: torch.Tensor, num: int) -> None:
    if value.ndim != 3 or value.shape[-1] != num:
        raise ValueError(
            f"TokenAugmenter: entry {place!r} must be [B, T, {num}], got {tuple(value.shape)}. Give max_num_actions "
            "and the store's max_action_dim the model's number of actions."
        )


def _move_columns(value: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Moves columns ``[B, T, n]``: column ``permutation[b, i]`` takes the value of column ``i``."""
    return value.gather(-1, permutation.to(value.device).argsort(-1).unsqueeze(1).expand_as(value))


def _rename(place: NestedKey, value: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Renames ids ``[B, T]`` or ``[B, T, 1]``, or one-hot vectors ``[B, T, n]``; ids out of range stay."""
    num = permutation.shape[-1]
    if value.shape[2:] == (num,) and num > 1:
        return _move_columns(value, permutation)
    ids = schema.to_ids(value, num, 2, place)
    renamed = permutation.to(ids.device).gather(1, ids.clamp(0, num - 1))
    return torch.where((ids >= 0) & (ids < num), renamed, ids).to(value.dtype).reshape(value.shape)
