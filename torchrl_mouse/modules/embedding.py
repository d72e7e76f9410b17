"""The step embedder: everything that is seen at one step, as tokens."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from torchrl_mouse.modules.checks import check_size
from torchrl_mouse.modules.specs import embedding_kwargs_from_specs
from torchrl_mouse.schema import NUM_DONE_CODES, check_finite, check_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensordict.utils import NestedKey
    from torchrl.envs import EnvBase


class TokenType(IntEnum):
    """What a token stands for, in MOUSE's numbering.

    Examples:
        >>> TokenType.COMPUTE.value
        8
    """

    PAD = 0
    ACTION = 1
    REWARD = 2
    DONE = 3
    OBS_IMAGE = 4
    OBS_CONTINUOUS = 5
    TIME = 6
    OBS_DISCRETE = 7
    COMPUTE = 8


MODALITIES: dict[str, TokenType] = {
    "time": TokenType.TIME,
    "action": TokenType.ACTION,
    "continuous": TokenType.OBS_CONTINUOUS,
    "discrete": TokenType.OBS_DISCRETE,
    "image": TokenType.OBS_IMAGE,
    "reward": TokenType.REWARD,
    "done": TokenType.DONE,
}
"""The kinds of input, in the order of their tokens."""


class TableEmbedder(nn.Module):
    """One learned vector per id.

    Args:
        num: number of ids.
        width: size of a vector.
        scale: standard deviation of the initial vectors.
        name: the modality, for errors.

    Examples:
        >>> TableEmbedder(3, 4, 0.02, "done")(torch.tensor([[0, 2]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, num: int, width: int, scale: float, name: str) -> None:
        super().__init__()
        self.name = name
        self.embed = nn.Embedding(num, width)
        nn.init.normal_(self.embed.weight, std=scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the vectors ``[*, width]`` of int64 ids ``[*]``."""
        check_ids(ids, self.embed.num_embeddings, self.name)
        vectors: torch.Tensor = self.embed(ids)
        return vectors


class TimeEmbedder(TableEmbedder):
    """A :class:`TableEmbedder` in which id -1 means "absent", a zero vector.

    Examples:
        >>> TimeEmbedder(5, 4, 0.02, "time")(torch.tensor([-1])).tolist()
        [[0.0, 0.0, 0.0, 0.0]]
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the vectors ``[*, width]`` of int64 ids ``[*]``."""
        absent = ids == -1
        return super().forward(ids.masked_fill(absent, 0)).masked_fill(absent.unsqueeze(-1), 0.0)


class _RandomFourierFeatures(nn.Module):
    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, sets: int, width: int, in_min: float, in_max: float, scale: float) -> None:
        super().__init__()
        log_low, log_high = math.log(1 / in_max), math.log(1 / in_min)
        self.weight = nn.Parameter(torch.full((sets, width), scale))
        self.register_buffer("freqs", torch.empty(sets, width).uniform_(log_low, log_high).exp())
        self.register_buffer("phases", torch.empty(sets, width).uniform_(0, 2 * math.pi))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (*, sets) -> (*, width)
        # A phase of hundreds of radians has no precision left in bfloat16.
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        phases = self.freqs.to(exact) * x.to(exact).unsqueeze(-1) + self.phases.to(exact)
        return (self.weight * phases.cos().to(self.weight.dtype)).sum(-2)


class FourierEmbedder(nn.Module):
    """Random Fourier features ``w cos(f x + p)`` of each number, summed over the numbers.

    Fixed random frequencies give every scale between ``in_min`` and ``in_max`` its own features, so a network tells
    close values apart (Rahimi and Recht 2007; Tancik et al. 2020, arXiv:2006.10739).

    Args:
        sets: number of numbers.
        width: size of a vector.
        in_min: smallest difference to resolve, positive; frequencies are log-uniform in [1/in_max, 1/in_min].
        in_max: largest extent to cover, at least ``in_min``.
        std: standard deviation of an output feature at initialisation.

    Examples:
        >>> FourierEmbedder(2, 4, 1e-2, 1e2, 0.02)(torch.zeros(3, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(self, sets: int, width: int, in_min: float, in_max: float, std: float) -> None:
        super().__init__()
        self.rff = _RandomFourierFeatures(sets, width, in_min, in_max, std * math.sqrt(2 / sets))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the features ``[*, width]`` of numbers ``[*, sets]``."""
        features: torch.Tensor = self.rff(x)
        return features


class _Projections(nn.Module):
    def __init__(self, sets: int, width: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sets, width, 1).uniform_(-scale, scale))
        self.bias = nn.Parameter(torch.zeros(sets, width))


class LinearEmbedder(nn.Module):
    """A weight vector and a bias per number, summed over the numbers.

    Args:
        sets: number of numbers.
        width: size of a vector.
        scale: the weights begin uniform in [-scale, scale].
        gain: the numbers are multiplied by it,
        offset: and it is added, before the weights.

    Examples:
        >>> LinearEmbedder(2, 4, 0.1)(torch.zeros(3, 2)).abs().sum().item()
        0.0
    """

    def __init__(self, sets: int, width: int, scale: float, gain: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.gain, self.offset = gain, offset
        self.projs = _Projections(sets, width, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the projections ``[*, width]`` of numbers ``[*, sets]``."""
        weight = self.projs.weight.squeeze(-1)
        x = x.to(weight.dtype) * self.gain + self.offset
        return x @ weight + self.projs.bias.sum(0)


class StepEmbedder(nn.Module):
    """Embeds one step, all its modalities, into tokens.

    Each active modality makes a vector of ``token_data_len * hidden_dim`` numbers, seen as ``token_data_len`` tokens.
    By default the vectors are added; ``concat_modalities`` gives each modality tokens of its own. Compute tokens, the
    same at every step, follow. The last token is the one whose hidden state stands for the step.

    The initial output of every modality has standard deviation ``std``, so that none drowns the others. MOUSE departs
    from that in two: its discrete table begins at ``std / sqrt(max_num_obs_discrete)``, fainter than the rest, and its
    linear encoder's output grows with ``sqrt(C)``. Here the table begins at ``std``, and the linear weights, meant for
    inputs of variance 1, are divided by ``sqrt(C)``.

    Args:
        hidden_dim: size ``D`` of a token.
        max_num_actions: number of action ids,
        max_num_action_continuous: or size of an action that is a vector of numbers; at most one of the two.
        max_num_obs_continuous: size ``C`` of the continuous observation.
        max_num_obs_discrete: number of discrete observation ids.
        max_num_obs_image: number ``P`` of pixels.
        max_num_time_steps: number of episode steps, the terminal frame included.
        include_action_token: embed the previous action. This and the other modalities with a size default to "when
            the size is given".
        include_done_token: embed how the previous transition ended the episode.
        include_reward_token: embed the previous reward.
        include_time_token: embed the step index inside the episode.
        include_obs_continuous: embed the continuous observation.
        include_obs_discrete: embed the discrete observation.
        include_obs_image: embed the image.
        include_type_token: add a learned vector per modality to its tokens.
        token_data_len: tokens per modality (or per step, when modalities are added).
        num_compute_tokens: learned tokens after the data, room to compute before the step is read out.
        concat_modalities: each modality has its own tokens.
        continuous_encoder: of observations and actions; ``"fourier"`` resolves differences over several scales;
            ``"linear"`` suits inputs of about mean 0 and variance 1.
        fourier_in_min: smallest difference of a number to resolve.
        fourier_in_max: largest extent of a number to cover.
        std: standard deviation of a modality's initial output, about the same for all.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size that an active modality needs is missing, both sizes of an action are given, or any option
            is out of range.

    Examples:
        >>> embedder = StepEmbedder(16, max_num_actions=5, max_num_obs_continuous=2, num_compute_tokens=1)
        >>> steps = {"action": torch.tensor([3]), "reward": torch.tensor([1.0]), "done": torch.tensor([0])}
        >>> embedder({**steps, "continuous": torch.zeros(1, 2)}).shape  # one step: a data token, a compute token
        torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        max_num_actions: int = 0,
        max_num_action_continuous: int = 0,
        max_num_obs_continuous: int = 0,
        max_num_obs_discrete: int = 0,
        max_num_obs_image: int = 0,
        max_num_time_steps: int = 0,
        include_action_token: bool | None = None,
        include_done_token: bool = True,
        include_reward_token: bool = True,
        include_time_token: bool | None = None,
        include_obs_continuous: bool | None = None,
        include_obs_discrete: bool | None = None,
        include_obs_image: bool | None = None,
        include_type_token: bool = True,
        token_data_len: int = 1,
        num_compute_tokens: int = 0,
        concat_modalities: bool = False,
        continuous_encoder: Literal["fourier", "linear"] = "fourier",
        fourier_in_min: float = 1e-2,
        fourier_in_max: float = 1e2,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if continuous_encoder not in ("fourier", "linear"):
            raise ValueError(
                f"StepEmbedder: continuous_encoder must be 'fourier' or 'linear', got {continuous_encoder!r}."
            )
        if not 0 < fourier_in_min <= fourier_in_max:
            raise ValueError(
                "StepEmbedder: 0 < fourier_in_min <= fourier_in_max must hold, got "
                f"{fourier_in_min} and {fourier_in_max}."
            )
        for name, value, least in (
            ("hidden_dim", hidden_dim, 1),
            ("max_num_actions", max_num_actions, 0),
            ("max_num_action_continuous", max_num_action_continuous, 0),
            ("max_num_obs_continuous", max_num_obs_continuous, 0),
            ("max_num_obs_discrete", max_num_obs_discrete, 0),
            ("max_num_obs_image", max_num_obs_image, 0),
            ("max_num_time_steps", max_num_time_steps, 0),
            ("token_data_len", token_data_len, 1),
            ("num_compute_tokens", num_compute_tokens, 0),
        ):
            check_size("StepEmbedder", name, value, least)
        if max_num_actions and max_num_action_continuous:
            raise ValueError(
                "StepEmbedder: at most one of max_num_actions and max_num_action_continuous must be given, got "
                f"{max_num_actions} and {max_num_action_continuous}. An action is an id or a vector."
            )
        self.hidden_dim = hidden_dim
        self.token_data_len = token_data_len
        self.concat_modalities = concat_modalities
        self._sizes = {
            "action": max_num_action_continuous,
            "continuous": max_num_obs_continuous,
            "image": max_num_obs_image,
        }
        width = token_data_len * hidden_dim

        def active(name: str, include: bool | None, size: int) -> bool:
            include = size > 0 if include is None else include
            if include and size < 1:
                raise ValueError(f"StepEmbedder: {name} must be at least 1 for an included modality, got {size}.")
            return include

        def encoder(size: int) -> nn.Module:
            if continuous_encoder == "fourier":
                return FourierEmbedder(size, width, fourier_in_min, fourier_in_max, std)
            return LinearEmbedder(size, width, std * math.sqrt(3 / size))

        if active("max_num_time_steps", include_time_token, max_num_time_steps):
            self.time_embedder = TimeEmbedder(max_num_time_steps, width, std, "time")
        action_size = max_num_actions or max_num_action_continuous
        if active("max_num_actions or max_num_action_continuous", include_action_token, action_size):
            self.action_embedder: nn.Module = (
                encoder(max_num_action_continuous)
                if max_num_action_continuous
                else TableEmbedder(max_num_actions, width, std, "action")
            )
        if active("max_num_obs_continuous", include_obs_continuous, max_num_obs_continuous):
            self.obs_continuous_embedder = encoder(max_num_obs_continuous)
        if active("max_num_obs_discrete", include_obs_discrete, max_num_obs_discrete):
            self.obs_discrete_embedder = TableEmbedder(max_num_obs_discrete, width, std, "discrete")
        if active("max_num_obs_image", include_obs_image, max_num_obs_image):
            scale = 3 * std / math.sqrt(max_num_obs_image)  # a pixel's variance is 1/3, a weight's scale^2 / 3
            self.obs_image_embedder = LinearEmbedder(max_num_obs_image, width, scale, gain=1 / 127.5, offset=-1.0)
        if include_reward_token:
            self.reward_embedder = FourierEmbedder(1, width, fourier_in_min, fourier_in_max, std)
        if include_done_token:
            self.done_embedder = TableEmbedder(NUM_DONE_CODES, width, std, "done")
        prefixes = {"continuous": "obs_continuous", "discrete": "obs_discrete", "image": "obs_image"}
        attributes = {name: f"{prefixes.get(name, name)}_embedder" for name in MODALITIES}
        self._attributes = {name: attribute for name, attribute in attributes.items() if hasattr(self, attribute)}
        if not self._attributes:
            raise ValueError("StepEmbedder: at least one modality must be included, got none.")
        if include_type_token:
            self.type_embedder = TableEmbedder(TokenType.COMPUTE, width, std, "token type")
        if num_compute_tokens:
            self.compute_embed = nn.Parameter(torch.empty(num_compute_tokens, hidden_dim).normal_(std=std))

    @classmethod
    def from_specs(
        cls, env: EnvBase, hidden_dim: int, *, keys: Mapping[str, NestedKey] | None = None, **options: Any
    ) -> StepEmbedder:
        """Builds an embedder for what an environment writes.

        Args:
            env: the environment; its sizes are read by
                :func:`~torchrl_mouse.modules.specs.embedding_kwargs_from_specs`, which says what it raises.
            hidden_dim: size ``D`` of a token.
            keys: the entries that modalities read, where not the default ones; a ``Trunk`` needs the same.
            options: further options of the class; they override what is read.

        Examples:
            >>> from torchrl.envs import GymEnv
            >>> from torchrl_mouse.envs import TaskEnv
            >>> env = TaskEnv(GymEnv("CartPole-v1"), steps_per_task=100)
            >>> list(StepEmbedder.from_specs(env, 16, max_num_time_steps=101).modalities)
            ['time', 'action', 'continuous', 'reward', 'done']
        """
        return cls(hidden_dim, **{**embedding_kwargs_from_specs(env, keys=keys), **options})

    @property
    def modalities(self) -> dict[str, nn.Module]:
        """The active modalities' embedders, in the order of their tokens."""
        return {name: getattr(self, attribute) for name, attribute in self._attributes.items()}

    def num_ids(self, modality: str) -> int:
        """Number of ids of a modality that has a table (``time``, ``discrete``, ``done``, ``action`` if discrete)."""
        return int(self.get_parameter(f"{self._attributes[modality]}.embed.weight").shape[0])

    @property
    def token_types(self) -> list[TokenType]:
        """The type of each token of a step; added modalities count as actions, as in MOUSE."""
        kinds = [MODALITIES[name] for name in self.modalities] if self.concat_modalities else [TokenType.ACTION]
        data = [kind for kind in kinds for _ in range(self.token_data_len)]
        return data + [TokenType.COMPUTE] * self.num_compute_tokens

    @property
    def num_compute_tokens(self) -> int:
        """Number of compute tokens a step ends with."""
        return len(self.compute_embed) if hasattr(self, "compute_embed") else 0

    @property
    def tokens_per_step(self) -> int:
        """Number ``N`` of tokens of one step."""
        kinds = len(self._attributes) if self.concat_modalities else 1
        return kinds * self.token_data_len + self.num_compute_tokens

    def forward(self, steps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embeds steps.

        Args:
            steps: by modality: ``time``, ``action``, ``discrete`` int64 ``[*]``; ``done`` int64 ``[*]`` in {0, 1, 2};
                ``reward`` ``[*]``; ``continuous`` ``[*, C]``; a continuous ``action`` ``[*, size]``; ``image``
                ``[*, P]`` in 0..255. Others are ignored.

        Returns:
            ``[*, N, D]``.

        Raises:
            KeyError: an active modality is missing.
            ValueError: a size does not fit, an id is out of range, or a reward not finite (looked at on the CPU alone).
        """
        vectors = []
        for name, embedder in self.modalities.items():
            if name not in steps:
                raise KeyError(f"StepEmbedder: modality {name!r} must be given, got only {', '.join(sorted(steps))}.")
            value = steps[name]
            if name == "reward":
                check_finite(value, name, "StepEmbedder", "Fix the environment or the data.")
                value = value.unsqueeze(-1)
            size = self._sizes.get(name, 0)
            if size and value.shape[-1:] != (size,):
                raise ValueError(
                    f"StepEmbedder: modality {name!r} must be [*, {size}], got {tuple(value.shape)}. "
                    "Build the embedder with its size."
                )
            vector = embedder(value)
            if hasattr(self, "type_embedder"):
                vector = vector + self.type_embedder.embed.weight[MODALITIES[name]]
            vectors.append(vector)
        if not self.concat_modalities:
            vectors = [sum(vectors[1:], start=vectors[0])]
        stacked = torch.stack(vectors, -2)  # (*, kinds, t * D)
        tokens = stacked.reshape(*stacked.shape[:-2], -1, self.hidden_dim)
        if hasattr(self, "compute_embed"):
            compute = self.compute_embed.expand(*tokens.shape[:-2], *self.compute_embed.shape)
            tokens = torch.cat([tokens, compute.to(tokens.dtype)], -2)
        return tokens
