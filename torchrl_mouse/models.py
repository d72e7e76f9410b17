"""The MOUSE model: embedder, backbone and heads, and its files."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, dispatch

from torchrl_mouse import checkpoints, schema
from torchrl_mouse.config import HEADS, MouseConfig
from torchrl_mouse.modules.actors import make_actor
from torchrl_mouse.modules.backbone import FAMILIES, CausalBackbone
from torchrl_mouse.modules.embedding import StepEmbedder
from torchrl_mouse.modules.pretrained import backbone_kwargs_from_pretrained, load_pretrained_layers
from torchrl_mouse.modules.specs import embedding_kwargs_from_specs
from torchrl_mouse.modules.trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from huggingface_hub import CommitInfo
    from tensordict import TensorDictBase, TensorDictParams
    from tensordict.utils import NestedKey
    from torchrl.data import TensorSpec
    from torchrl.envs import EnvBase

__all__ = [
    "HEADS",
    "MouseConfig",
    "MouseModel",
    "init_from_pretrained_backbone",
    "load_model",
    "push_model_to_hub",
    "save_model",
]

# Where a weight is in a file (MOUSE's names), and where it is in the model.
_FILE_PREFIXES = {"embedder.": "trunk.embedder.", "backbone.": "trunk.backbone.model."}

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

# MOUSE writes this table also where types are not embedded.
_UNUSED_WEIGHT = "embedder.type_embedder.embed.weight"


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
        build, options = config.backbone_class, config.backbone_kwargs or {}
        backbone = None if build is None else build(config.hidden_dim, **options)
        self.trunk = Trunk(embedder, backbone, window=config.window, **config.trunk_kwargs)
        for name, kwargs in config.heads.items():
            self.add_module(f"{name}_head", HEADS[name](config.hidden_dim, config.action_dim(name), **kwargs))
        self.in_keys = list(self.trunk.in_keys)
        self.out_keys = [schema.HIDDEN, *config.heads]

    @classmethod
    def from_specs(
        cls,
        env: EnvBase,
        *,
        keys: Mapping[str, NestedKey] | None = None,
        embedding_kwargs: Mapping[str, Any] | None = None,
        trunk_kwargs: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> MouseModel:
        """Builds a model with the sizes that :func:`~torchrl_mouse.modules.embedding_kwargs_from_specs` reads.

        Args:
            env: the environment.
            keys: by modality, the entry that it reads, where not the usual one.
            embedding_kwargs: override what the specs say.
            trunk_kwargs: as in :class:`~torchrl_mouse.config.MouseConfig`, without ``keys``.
            config: the other options of :class:`~torchrl_mouse.config.MouseConfig`.

        Raises:
            TypeError: an entry's space is of a kind that cannot be embedded.
            ValueError: the environment has nothing to embed.

        Examples:
            >>> from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
            >>> env = TaskEnv(DarkRoomEnv([0]), episodes_per_task=2)
            >>> model = MouseModel.from_specs(env, hidden_dim=16, dqn_head_kwargs={})
            >>> env.rollout(3, model.actor(env.action_spec_unbatched))["dqn"].shape
            torch.Size([1, 3, 5])
        """
        if "keys" in (trunk_kwargs or {}):
            raise TypeError("MouseModel: keys must be given as keys=, got them in trunk_kwargs. Move them.")
        keys = {name: tuple(key) if isinstance(key, list) else key for name, key in (keys or {}).items()}
        sizes = embedding_kwargs_from_specs(env, keys=keys)
        trunk = {**(trunk_kwargs or {}), **({"keys": keys} if keys else {})}
        return cls(MouseConfig(embedding_kwargs={**sizes, **(embedding_kwargs or {})}, trunk_kwargs=trunk, **config))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``hidden`` and every head's output; ``[*, T]`` in recurrent, ``[*]`` in sequential mode."""
        self.trunk(tensordict)
        for name in self.config.heads:
            tensordict.set(name, self._network(name)(tensordict.get(schema.HIDDEN)))
        return tensordict

    def _network(self, head: str) -> torch.nn.Module:
        module = getattr(self, f"{head}_head")
        network: torch.nn.Module = getattr(module, "online", module)
        return network

    def head(self, name: str) -> TensorDictModule:
        """Returns a head (its online network) as a module that reads ``hidden`` and writes the head's name.

        Raises:
            KeyError: the model has no such head.
        """
        if name not in self.config.heads:
            present = ", ".join(self.config.heads) or "none"
            raise KeyError(f"MouseModel: head must be one of the model's ({present}), got {name!r}.")
        return TensorDictModule(self._network(name), in_keys=[schema.HIDDEN], out_keys=[name])

    def set_target(self, name: str, parameters: TensorDictParams) -> None:
        """Copies a loss's target of a head into the model, so that it is in the file, where MOUSE has it.

        The model itself does not use it, and a new loss starts its target from the online head.

        Args:
            name: the head's.
            parameters: the ``target_head_params`` of a loss with ``delay_value=True``.

        Raises:
            KeyError: the model has no such head, or the head has no target.
            ValueError: the loss has no target of its own, or is on another head.

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
        if not hasattr(head, "target"):
            raise KeyError(f"MouseModel: head must be one with a target, got {name!r}.")
        online = {weight.data_ptr() for weight in head.online.parameters()}
        if any(weight.data_ptr() in online for weight in parameters.values(True, True)):
            raise ValueError(
                "MouseModel: parameters must be a loss's own target, got those of the online head. "
                "Build the loss with delay_value=True."
            )
        target, given = TensorDict.from_module(head.target).data, parameters.data["module"]
        shapes, theirs = ({key: value.shape for key, value in of.items(True, True)} for of in (target, given))
        if shapes != theirs:
            raise ValueError(
                f"MouseModel: parameters must be the target of a loss on this model's {name!r} head, got weights of "
                "other names or shapes."
            )
        target.update_(given)

    def actor(
        self,
        spec: TensorSpec,
        *,
        head: str | None = None,
        temperature: float = 0.0,
        num_actions: int | None = None,
        action_mask_key: NestedKey | None = None,
    ) -> TensorDictSequential:
        """Returns a policy for collectors; see :func:`~torchrl_mouse.modules.make_actor`.

        Args:
            spec: the action spec of one environment row, ``env.action_spec_unbatched``.
            head: the head to act with; by default the configuration's, else the first present of ``vec_dqn``, ``dqn``,
                ``sp``, ``sv``, ``gaussian``.
            temperature: 0 takes the best action, above it actions are drawn.
            num_actions: act with that many of the head's actions, the first ones.
            action_mask_key: entry bool ``[*, A]``, true where an action is allowed.

        Raises:
            KeyError: the model has no such head.
            TypeError: the action space is not of the head's kind.
            ValueError: the space has another number of actions than the head, or the temperature is negative.
        """
        chosen = head or self.config.action_head or next(iter(self.config.heads), "")
        return make_actor(
            self.trunk,
            self.head(chosen),
            spec,
            temperature=temperature,
            num_actions=num_actions,
            action_mask_key=action_mask_key,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``; when that fails, the old files stay."""
        weights = {_file_name(name): weight for name, weight in self._weights().items()}
        checkpoints.write_checkpoint(directory, dataclasses.asdict(self.config), weights)

    @classmethod
    def from_pretrained(
        cls,
        repo_id_or_path: str | Path,
        force_download: bool = False,
        local_dir: str | Path | None = None,
        *,
        map_location: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> MouseModel:
        """Builds a model from its files, ours or MOUSE's, in a folder or on the Hub.

        The files may be anybody's: nothing in them is run, and they are compared before memory is taken.

        Args:
            repo_id_or_path: a folder, or a Hub repository ``"owner/name"``.
            force_download: download also what is in the cache.
            local_dir: where downloads go, instead of the cache.
            map_location: the device of the model.
            revision: branch, tag or commit of the repository.
            token: of the Hub.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: an option of the configuration has the wrong type.
            ValueError: the configuration or the weights cannot be read, or do not fit each other.
        """
        directory = checkpoints.fetch_checkpoint(
            repo_id_or_path, revision=revision, token=token, force_download=force_download, local_dir=local_dir
        )
        values, weights = checkpoints.read_checkpoint(directory)
        config = MouseConfig.from_dict(values)
        if "window" not in values:
            config = _with_window_that_fits(config)
        if not config.embedding_kwargs.get("include_type_token", True):
            weights.pop(_UNUSED_WEIGHT, None)
        _check_weights(config, weights)
        model = cls(config)
        model.to(next(iter(weights.values())).dtype)
        for name, weight in model._weights().items():
            weight.copy_(weights[_file_name(name)])  # `state_dict` shares its tensors with the model.
        model.trunk.mark_weight_update()
        return model if map_location is None else model.to(map_location)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        results: Mapping[str, Mapping[str, float]] | None = None,
    ) -> CommitInfo:
        """Uploads configuration, weights and a model card in one commit: it lands whole, or the old version stays.

        Args:
            repo_id: ``"owner/name"``; is made where there is none.
            private: whether a new repository is private; ``None`` follows the owner's default.
            token: of the Hub; the stored one by default.
            revision: branch to commit to, made where there is none.
            commit_message: of the commit.
            results: for the card, by where they were measured and metric: ``{"held-out goals": {"nauc": 0.9}}``.

        Raises:
            ValueError: a private repository is asked for, and there is a public one.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            card = self.card(repo_id, revision=revision, results=results)
            Path(directory, checkpoints.CARD_FILE).write_text(card, encoding="utf-8")
            return checkpoints.push_checkpoint(
                directory, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )

    def card(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        results: Mapping[str, Mapping[str, float]] | None = None,
    ) -> str:
        """Returns the model card: what the model sees and holds, and how to load it and act with it."""
        backbone = self.trunk.backbone
        act = "# The model has no head to act with: `model` writes `hidden`."
        if self.config.heads:
            discrete = (self.config.action_head or next(iter(self.config.heads))) != "gaussian"
            space = "Categorical(n={})" if discrete else "Bounded(-1, 1, shape=({},))"
            size = self.config.action_dim("dqn" if discrete else "gaussian")
            act = (
                f"\nfrom torchrl.data import {space.partition('(')[0]}\n\n"
                f"actor = model.actor({space.format(size)})  # your environment's `action_spec_unbatched`"
            )
        return checkpoints.render_card(
            repo_id,
            results=results,
            modalities=", ".join(self.trunk.embedder.modalities),
            backbone="none"
            if backbone is None
            else f"{backbone.kind}, {backbone.num_layers} layers of width {backbone.hidden_dim}",
            heads=", ".join(self.config.heads) or "none",
            window=str(self.config.window),
            parameters=f"{sum(weight.numel() for weight in self.parameters()):,}",
            revision="" if revision is None else f', revision="{revision}"',
            act=act,
        )

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.state_dict().items() if name != "trunk.weight_version"}


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # Sizes whose product overflows.
        raise ValueError(f"MouseModel: the configuration must describe a model that can exist, got {error}") from error


def _with_window_that_fits(config: MouseConfig) -> MouseConfig:
    """Returns the configuration of a file that does not say a window, as MOUSE's do not, with one that fits."""
    kwargs = config.backbone_kwargs
    if kwargs is None or config.backbone_class is not CausalBackbone:
        return config
    positions = kwargs.get("max_position_embeddings") or FAMILIES[kwargs["kind"]].max_position_embeddings
    with _clear_errors(), torch.device("meta"):
        tokens = StepEmbedder(config.hidden_dim, **config.embedding_kwargs).tokens_per_step
    return dataclasses.replace(config, window=max(1, min(config.window, positions // tokens)))


def _check_weights(config: MouseConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Compares weights with what a configuration says, before a model of it takes memory."""
    layers = [config.backbone_kwargs or {}, *config.heads.values()]
    spellings = ("num_layers", "num_hidden_layers")
    deepest = max(kwargs.get(name) or 0 for kwargs in layers for name in spellings)
    if deepest > len(weights):  # Layers are objects, also without memory.
        raise ValueError(
            f"MouseModel: weights must fit the configuration, got {len(weights)} weights for {deepest} layers."
        )
    with _clear_errors(), torch.device("meta"):
        expected = {_file_name(name): weight.shape for name, weight in MouseModel(config)._weights().items()}
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weight.shape)} instead of {tuple(expected[name])}"
        for name, weight in weights.items()
        if name in expected and weight.shape != expected[name]
    ]
    kinds = {weight.dtype for weight in weights.values()}
    if len(kinds) != 1 or not kinds <= _DTYPES:
        problems.append(f"numbers of type {', '.join(sorted(map(str, kinds)))} instead of one floating type")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"MouseModel: weights must fit the configuration, got {'; '.join(problems[:3])}{more}.")


def _file_name(name: str) -> str:
    for file_prefix, prefix in _FILE_PREFIXES.items():
        if name.startswith(prefix):
            return file_prefix + name.removeprefix(prefix)
    return name


def init_from_pretrained_backbone(
    repo_or_path: str | Path,
    *,
    backbone_kwargs_overrides: Mapping[str, Any] | None = None,
    load_weights: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    **config: Any,
) -> MouseModel:
    """Builds a model around the decoder layers of a language model (Llama or Qwen3).

    Args:
        repo_or_path: a folder or Hub repository with a `transformers` checkpoint.
        backbone_kwargs_overrides: replace what the checkpoint says, such as ``num_layers`` for its first layers only.
        load_weights: copy the layers' weights; its token embedding and final norm have no use here.
        revision: branch, tag or commit of the repository.
        token: of the Hub.
        config: further options of :class:`~torchrl_mouse.config.MouseConfig`; the width is the checkpoint's.

    Raises:
        ValueError: another family than the two, or weights that do not fit.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> language_model = LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes))
        >>> options = {"embedding_kwargs": {"max_num_actions": 3}, "sp_head_kwargs": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     language_model.save_pretrained(folder)
        ...     model = init_from_pretrained_backbone(folder, backbone_kwargs_overrides={"num_layers": 2}, **options)
        >>> model.trunk.backbone.num_layers, model.config.hidden_dim
        (2, 16)
    """
    if taken := {"hidden_dim", "backbone_kwargs"} & set(config):
        raise TypeError(
            f"init_from_pretrained_backbone: {sorted(taken)[0]} must be the checkpoint's, got it as an option. Give "
            "backbone_kwargs_overrides to change what can be changed."
        )
    kwargs, hidden_dim = backbone_kwargs_from_pretrained(
        repo_or_path, revision=revision, token=token, **(backbone_kwargs_overrides or {})
    )
    model = MouseModel(MouseConfig(hidden_dim=hidden_dim, backbone_kwargs=kwargs, **config))
    if load_weights and isinstance(backbone := model.trunk.backbone, CausalBackbone):
        load_pretrained_layers(backbone, repo_or_path, revision=revision, token=token)
    return model


# MOUSE's names for its users to find.
load_model = MouseModel.from_pretrained
save_model = MouseModel.save_pretrained
push_model_to_hub = MouseModel.push_to_hub
