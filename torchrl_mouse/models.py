"""The MOUSE model: embedder, backbone and heads; configuration and files."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, dispatch

from torchrl_mouse import schema
from torchrl_mouse.modules.actors import make_actor
from torchrl_mouse.modules.backbone import FAMILIES, CausalBackbone
from torchrl_mouse.modules.embedding import StepEmbedder
from torchrl_mouse.modules.heads import DQNHead, SwiGLUHead
from torchrl_mouse.modules.trunk import Trunk

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDictBase, TensorDictParams
    from torchrl.data import TensorSpec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

HEADS: dict[str, type[DQNHead | SwiGLUHead]] = {"dqn": DQNHead, "sp": SwiGLUHead}
"""The kinds of head, in the order in which one is chosen to act."""

_TYPES: dict[str, tuple[type, ...]] = {
    "hidden_dim": (int,),
    "window": (int,),
    "embedding_kwargs": (dict,),
    "backbone": (str, type(None)),
    "backbone_kwargs": (dict,),
    "dqn_head_kwargs": (dict, type(None)),
    "sp_head_kwargs": (dict, type(None)),
    "action_head": (str, type(None)),
    "trunk_kwargs": (dict,),
}

# Where a weight is in a file (MOUSE's names), and where it is in the model.
_FILE_PREFIXES = {"embedder.": "trunk.embedder.", "backbone.": "trunk.backbone.model."}


@dataclass(frozen=True)
class MouseConfig:
    """What a :class:`MouseModel` is built from; the content of ``config.json``.

    Args:
        hidden_dim: size ``D`` of a token.
        window: steps that a context holds while acting.
        embedding_kwargs: options of :class:`~torchrl_mouse.modules.StepEmbedder`; ``max_num_actions`` also sizes the
            heads.
        backbone: decoder family, or ``None`` to read out each step by itself.
        backbone_kwargs: options of :class:`~torchrl_mouse.modules.CausalBackbone`.
        dqn_head_kwargs: options of the Q-value head; absent when ``None``.
        sp_head_kwargs: options of the policy head; absent when ``None``.
        action_head: the head to act with; by default the first present.
        trunk_kwargs: further options of :class:`~torchrl_mouse.modules.Trunk` (``keys``, ``overflow``,
            ``on_weight_update``, ``max_streams``); a nested key in ``keys`` may be a list, as JSON has it.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an unknown backbone or head, or a missing size.

    Examples:
        >>> MouseConfig.from_dict({"hidden_dim": 16, "hiden_dim": 16})
        Traceback (most recent call last):
            ...
        ValueError: MouseConfig: unknown option 'hiden_dim'. The options are hidden_dim, window, ...
    """

    hidden_dim: int = 64
    window: int = 128
    embedding_kwargs: dict[str, Any] = field(default_factory=dict)
    backbone: Literal["llama", "qwen3"] | None = "llama"
    backbone_kwargs: dict[str, Any] = field(default_factory=lambda: {"num_layers": 4, "num_heads": 4})
    dqn_head_kwargs: dict[str, Any] | None = None
    sp_head_kwargs: dict[str, Any] | None = None
    action_head: str | None = None
    trunk_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, types in _TYPES.items():
            _check_type(name, getattr(self, name), types)
        if (keys := self.trunk_kwargs.get("keys")) is not None:
            _check_type("keys", keys, (dict,))
            keys = {name: tuple(key) if isinstance(key, list) else key for name, key in keys.items()}
            object.__setattr__(self, "trunk_kwargs", {**self.trunk_kwargs, "keys": keys})
        if self.backbone is not None and self.backbone not in FAMILIES:
            raise ValueError(
                f"MouseConfig: backbone must be {', '.join(map(repr, FAMILIES))} or None, got {self.backbone!r}."
            )
        num_actions = self.embedding_kwargs.get("max_num_actions", 0)
        _check_type("max_num_actions", num_actions, (int,))
        if self.heads and num_actions < 1:
            raise ValueError(
                f"MouseConfig: embedding_kwargs must hold max_num_actions >= 1 for the heads, got {num_actions}."
            )
        if self.action_head is not None and self.action_head not in self.heads:
            raise ValueError(
                f"MouseConfig: action_head must be one of the model's heads ({', '.join(self.heads) or 'none'}), got "
                f"{self.action_head!r}. Give {self.action_head}_head_kwargs."
            )

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        """The options of each head that is present."""
        options = {name: getattr(self, f"{name}_head_kwargs") for name in HEADS}
        return {name: kwargs for name, kwargs in options.items() if kwargs is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MouseConfig:
        """Builds a configuration from the content of ``config.json``.

        Raises:
            TypeError: the content is no JSON object, or an option has the wrong type.
            ValueError: an option that does not exist.
        """
        if not isinstance(values, dict):
            raise TypeError(f"MouseConfig: the configuration must be a JSON object, got {type(values).__name__}.")
        names = [entry.name for entry in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"MouseConfig: unknown option {name!r}. The options are {', '.join(names)}.")
        return cls(**values)


class MouseModel(TensorDictModuleBase):
    """A transformer that learns inside its context: trunk and heads.

    Args:
        config: what to build.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import set_recurrent_mode
        >>> from torchrl_mouse.schema import from_mouse_records
        >>> embedding = {"max_num_actions": 3, "max_num_obs_continuous": 2}
        >>> model = MouseModel(MouseConfig(hidden_dim=16, embedding_kwargs=embedding, dqn_head_kwargs={}))
        >>> records = {"action": [[0, 2]], "reward": [[0.0, 1.0]], "done": [[0, 0]], "time": [[0, 1]]}
        >>> records["obs_continuous"] = torch.zeros(1, 2, 2)
        >>> with set_recurrent_mode(True):
        ...     steps = model(from_mouse_records(TensorDict(records, [1, 2])))
        >>> steps["dqn"].shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, config: MouseConfig) -> None:
        super().__init__()
        self.config = config
        embedder = StepEmbedder(config.hidden_dim, **config.embedding_kwargs)
        backbone = None
        if config.backbone is not None:
            backbone = CausalBackbone(config.hidden_dim, config.backbone, **config.backbone_kwargs)
        self.trunk = Trunk(embedder, backbone, window=config.window, **config.trunk_kwargs)
        for name, kwargs in config.heads.items():
            head = HEADS[name](config.hidden_dim, config.embedding_kwargs["max_num_actions"], **kwargs)
            self.add_module(f"{name}_head", head)
        self.in_keys = list(self.trunk.in_keys)
        self.out_keys = [schema.HIDDEN, *config.heads]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``hidden`` and every head's output; ``[*, T]`` in recurrent, ``[*]`` in sequential mode."""
        self.trunk(tensordict)
        for name in self.config.heads:
            self.head(name)(tensordict)
        return tensordict

    def head(self, name: str) -> TensorDictModule:
        """Returns a head (its online network) as a module that reads ``hidden`` and writes the head's name.

        Raises:
            KeyError: the model has no such head.
        """
        if name not in self.config.heads:
            present = ", ".join(self.config.heads) or "none"
            raise KeyError(f"MouseModel: head must be one of the model's ({present}), got {name!r}.")
        head = getattr(self, f"{name}_head")
        return TensorDictModule(getattr(head, "online", head), in_keys=[schema.HIDDEN], out_keys=[name])

    def set_target(self, name: str, parameters: TensorDictParams) -> None:
        """Copies a loss's target of a head into the model, so that it is in the file, where MOUSE has it.

        The model itself does not use it, and a new loss starts its target from the online head.

        Args:
            name: the head's.
            parameters: the ``target_head_params`` of a loss with ``delay_value=True``.

        Raises:
            KeyError: the model has no such head, or the head has no target.
            ValueError: the loss has no target of its own.

        Examples:
            >>> from torchrl.objectives import SoftUpdate
            >>> from torchrl_mouse.objectives import MouseDQNLoss
            >>> config = MouseConfig(hidden_dim=16, embedding_kwargs={"max_num_actions": 3}, dqn_head_kwargs={})
            >>> model = MouseModel(config)
            >>> loss = MouseDQNLoss(model.head("dqn"), trunk=model.trunk)
            >>> updater = SoftUpdate(loss, tau=0.01)  # its `step` follows each of the optimiser's
            >>> model.set_target("dqn", loss.target_head_params)
        """
        self.head(name)  # Refuses a head that the model does not have.
        head = getattr(self, f"{name}_head")
        if not isinstance(head, DQNHead):
            raise KeyError(f"MouseModel: head must be one with a target, got {name!r}.")
        online = {weight.data_ptr() for weight in head.online.parameters()}
        if any(weight.data_ptr() in online for weight in parameters.values(True, True)):
            raise ValueError(
                "MouseModel: parameters must be a loss's own target, got those of the online head. "
                "Build the loss with delay_value=True."
            )
        TensorDict.from_module(head.target).data.update_(parameters.data["module"])

    def actor(self, spec: TensorSpec, *, head: str | None = None, temperature: float = 0.0) -> TensorDictSequential:
        """Returns a policy for collectors; see :func:`~torchrl_mouse.modules.actors.make_actor`.

        Args:
            spec: the action spec of one environment row, ``env.action_spec_unbatched``.
            head: the head to act with; by default the configuration's, else the first present.
            temperature: 0 takes the best action, above it actions are drawn.

        Raises:
            KeyError: the model has no such head.
            TypeError: the action space is not discrete.
            ValueError: the space has another number of actions than the head, or the temperature is negative.
        """
        chosen = head or self.config.action_head or next(iter(self.config.heads), "")
        return make_actor(self.trunk, self.head(chosen), spec, temperature=temperature)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``; when that fails, the old files stay."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {_file_name(name): weight.contiguous() for name, weight in self._weights().items()}
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
            text = json.dumps(dataclasses.asdict(self.config), indent=2)
            # The weights name their configuration: a kill between the two moves below leaves a pair that is refused.
            save_file(weights, Path(temporary, WEIGHTS_FILE), metadata={"config": text})
            Path(temporary, CONFIG_FILE).write_text(text, encoding="utf-8")
            config = directory / CONFIG_FILE
            old = config.read_bytes() if config.exists() else None
            os.replace(Path(temporary, CONFIG_FILE), config)
            try:
                os.replace(Path(temporary, WEIGHTS_FILE), directory / WEIGHTS_FILE)
            except BaseException:  # The two belong together.
                config.unlink() if old is None else config.write_bytes(old)
                raise

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> MouseModel:
        """Builds a model from the files that :meth:`save_pretrained` writes.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: an option of the configuration has the wrong type.
            ValueError: the configuration or the weights cannot be read, or do not fit each other.
        """
        directory = Path(directory)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / file).is_file():
                raise FileNotFoundError(
                    f"MouseModel: {directory} must hold {CONFIG_FILE} and {WEIGHTS_FILE}, got no {file}."
                )
        try:
            values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
            weights = load_file(directory / WEIGHTS_FILE)
            with safe_open(directory / WEIGHTS_FILE, "pt") as file:
                own = json.loads((file.metadata() or {}).get("config", "null"))
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise ValueError(f"MouseModel: the files in {directory} must be readable, got: {error}") from error
        config = MouseConfig.from_dict(values)
        if own not in (None, values):
            raise ValueError(
                f"MouseModel: {CONFIG_FILE} in {directory} must be the one that {WEIGHTS_FILE} was saved with, got "
                "another. A save was interrupted, or the file was changed: save the model again."
            )
        model = cls(config)
        model._load(weights)
        return model

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.state_dict().items() if name != "trunk.weight_version"}

    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        expected = {_file_name(name): weight for name, weight in self._weights().items()}
        problems = [f"missing {name}" for name in expected if name not in weights]
        problems += [f"unexpected {name}" for name in weights if name not in expected]
        problems += [
            f"{name} has shape {tuple(weight.shape)} instead of {tuple(expected[name].shape)}"
            for name, weight in weights.items()
            if name in expected and weight.shape != expected[name].shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"MouseModel: weights must fit the configuration, got {'; '.join(problems[:3])}{more}.")
        for name, weight in expected.items():
            weight.copy_(weights[name])  # `state_dict` shares its tensors with the model.
        self.trunk.mark_weight_update()


def _check_type(name: str, value: Any, types: tuple[type, ...]) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
        raise TypeError(f"MouseConfig: {name} must be {expected}, got {value!r}.")


def _file_name(name: str) -> str:
    for file_prefix, prefix in _FILE_PREFIXES.items():
        if name.startswith(prefix):
            return file_prefix + name.removeprefix(prefix)
    return name
