"""Backbones from language models: what a `transformers` checkpoint says, and its decoder layers' weights.

A checkpoint may come from anybody: its code is never run, nothing is unpickled, and no file outside it is opened.
"""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

from torchrl_mouse.checkpoints import CONFIG_FILE, WEIGHTS_FILE, abbreviate, local_folder
from torchrl_mouse.modules.backbone import FAMILIES, clear_errors
from torchrl_mouse.modules.checks import check_size

if TYPE_CHECKING:
    from torchrl_mouse.modules.backbone import CausalBackbone

INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 2**24

# How a checkpoint calls the options of a backbone; the options that are called the same follow.
_NAMES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
_SAME_NAMES = (
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
)
_ROPE = ("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")

# Others are quantised: their numbers mean something else.
_NUMBERS = ("F64", "F32", "F16", "BF16")


class _Files:
    """The files of a checkpoint, in a folder or on the Hub."""

    def __init__(
        self,
        where: str,
        repo_or_path: str | Path,
        revision: str | None,
        token: str | bool | None,
        force_download: bool = False,
    ) -> None:
        self.where = where
        self.name = str(repo_or_path)
        self.folder = local_folder(where, "the checkpoint", repo_or_path)
        self._revision, self._token, self._force_download = revision, token, force_download

    def path(self, name: str) -> Path:
        """Returns a file, downloaded if need be; raises ``FileNotFoundError`` or ``EntryNotFoundError``."""
        if self.folder is not None:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.where}: {self.folder} must hold {name}, got {self.listing()}.")
            return self.folder / name
        file = hf_hub_download(
            self.name, name, revision=self._revision, token=self._token, force_download=self._force_download
        )
        self._revision = Path(file).parent.name  # The commit, so that all files are of one.
        return Path(file)

    def names(self) -> list[str]:
        if self.folder is not None:
            return [file.name for file in self.folder.iterdir()]
        return HfApi(token=self._token).list_repo_files(self.name, revision=self._revision)

    def listing(self) -> str:
        return abbreviate(self.names()) or "no files"

    def read_json(self, name: str) -> dict[str, Any]:
        file = self.path(name)
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{self.where}: {name} must have at most {MAX_JSON_BYTES} bytes, got {size}.")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where}: {name} of {self.name} must be JSON, got: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.where}: {name} must be a JSON object, got {type(content).__name__}.")
        return content


def backbone_kwargs_from_pretrained(
    repo_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    **overrides: Any,
) -> tuple[dict[str, Any], int]:
    """Reads what makes a :class:`CausalBackbone` like the decoder of a Llama or Qwen3 language model.

    Args:
        repo_or_path: a folder with a `transformers` checkpoint, or a Hub repository ``"owner/name"``.
        revision: branch, tag or commit of the repository.
        token: of the Hub; the stored one by default.
        force_download: download the configuration also if it is in the cache.
        overrides: options of :class:`CausalBackbone` that win over the checkpoint's, such as ``num_layers`` for its
            first layers only.

    Returns:
        The options, of types that JSON has, and ``hidden_dim``: ``CausalBackbone(hidden_dim, **options)``. The
        positions' base and scaling are in ``rope_parameters``.

    Raises:
        FileNotFoundError: neither a folder nor the form of a repository id, or a folder without ``config.json``.
        ValueError: a model of another family, or a file that is no configuration.
        huggingface_hub.errors.HfHubHTTPError: the repository, revision or file does not exist, or may not be read.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaConfig(**sizes).save_pretrained(folder)
        ...     kwargs, hidden_dim = backbone_kwargs_from_pretrained(folder, num_layers=2)
        >>> hidden_dim, kwargs["kind"], kwargs["num_layers"], kwargs["rope_parameters"]["rope_theta"]
        (16, 'llama', 2, 10000.0)
    """
    where = "backbone_kwargs_from_pretrained"
    files = _Files(where, repo_or_path, revision, token, force_download)
    kwargs, hidden_dim = _read_config(files)
    if overrides.get("kind", kwargs["kind"]) != kwargs["kind"]:
        raise ValueError(f"{where}: kind must be the checkpoint's {kwargs['kind']!r}, got {overrides['kind']!r}.")
    for name, replaced in (*_NAMES.items(), ("intermediate_size", "expand")):
        if replaced in overrides and name not in overrides:
            kwargs.pop(name)
    return {**kwargs, **overrides}, hidden_dim


def _read_config(files: _Files) -> tuple[dict[str, Any], int]:
    content = files.read_json(CONFIG_FILE)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{files.where}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}. Choose a checkpoint of one "
            "of these families."
        )
    family = FAMILIES[kind]
    with clear_errors(files.where):  # `transformers` converts the older spellings of rotary positions.
        rope = family.config(**{name: content[name] for name in _ROPE if name in content}).rope_parameters
    values = {entry.name: content.get(entry.name, entry.default) for entry in dataclasses.fields(family.config)}
    for name in ("hidden_size", *_NAMES.values()):
        check_size(files.where, name, values[name])
    kwargs = {"kind": kind, **{name: values[theirs] for name, theirs in _NAMES.items()}}
    kwargs |= {name: values[name] for name in _SAME_NAMES if values.get(name) is not None}
    if values.get("use_sliding_window"):
        kwargs["use_sliding_window"] = True  # Refused by the backbone, unless an override says false.
    return {**kwargs, "rope_parameters": rope}, values["hidden_size"]


def load_pretrained_layers(
    backbone: CausalBackbone,
    repo_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Copies the decoder layers' weights of a Llama or Qwen3 language model into a backbone.

    A backbone with fewer layers gets the first ones. The token embedding, the final norm and the output layer are not
    loaded. Only the files that hold these layers are downloaded; everything is checked before the first weight changes.

    .. note:: Contexts that the backbone has encoded are outdated then: call ``mark_weight_update`` of its
        :class:`~torchrl_mouse.modules.Trunk`.

    Args:
        backbone: with the sizes of the checkpoint, as :func:`backbone_kwargs_from_pretrained` reads them; its weights
            keep their type and device.
        repo_or_path: a folder with a `transformers` checkpoint, or a Hub repository ``"owner/name"``.
        revision: branch, tag or commit of the repository.
        token: of the Hub; the stored one by default.

    Raises:
        FileNotFoundError: neither a folder nor the form of a repository id, or a file is missing.
        ValueError: a model of another family or size, weights that are missing, damaged, quantised or pickled.
        huggingface_hub.errors.HfHubHTTPError: the repository, revision or file does not exist, or may not be read.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaModel
        >>> from torchrl_mouse.modules import CausalBackbone
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        >>> language_model = LlamaModel(LlamaConfig(vocab_size=10, **sizes))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     language_model.save_pretrained(folder)
        ...     kwargs, hidden_dim = backbone_kwargs_from_pretrained(folder)
        ...     backbone = CausalBackbone(hidden_dim, **kwargs)
        ...     load_pretrained_layers(backbone, folder)
        >>> weights = [model.layers[1].mlp.up_proj.weight for model in (backbone.model, language_model)]
        >>> torch.equal(*weights)
        True
    """
    files = _Files("load_pretrained_layers", repo_or_path, revision, token)
    _check_heads_and_depth(backbone, files)
    weights = dict(backbone.model.layers.named_parameters(prefix="layers"))
    places = _places(files, backbone.num_layers)
    problems = [f"missing {name}" for name in weights if name not in places]
    problems += [f"unexpected {name}" for name in places if name not in weights]
    _refuse(files, problems)
    with ExitStack() as stack, torch.no_grad():
        shards = {file: stack.enter_context(_open(files, file)) for file in {file for _, file in places.values()}}
        stored = {}
        for name, (their_name, file) in places.items():
            if their_name not in shards[file].keys():  # noqa: SIM118 - a file is no mapping
                problems.append(f"no {their_name} in {file}")
                continue
            stored[name] = shards[file].get_slice(their_name)
            shape, kind = tuple(stored[name].get_shape()), stored[name].get_dtype()
            if shape != weights[name].shape:
                problems.append(f"{name} has shape {shape} instead of {tuple(weights[name].shape)}")
            if kind not in _NUMBERS:
                problems.append(f"{name} is of type {kind}, none of {', '.join(_NUMBERS)}")
        _refuse(files, problems)
        for name, weight in weights.items():
            weight.copy_(stored[name][:])


def _refuse(files: _Files, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{files.where}: the weights in {files.name} must be those of the backbone's layers, got "
            f"{'; '.join(problems[:3])}{more}. Build the backbone with backbone_kwargs_from_pretrained."
        )


def _check_heads_and_depth(backbone: CausalBackbone, files: _Files) -> None:
    """Raises where the weights' shapes may not tell that a backbone is of other make."""
    kwargs, hidden_dim = _read_config(files)
    head_dim = kwargs.get("head_dim", hidden_dim // kwargs["num_heads"])
    theirs = {"kind": kwargs["kind"], "num_heads": kwargs["num_heads"], "head_dim": head_dim}
    for name, value in theirs.items():
        if (own := getattr(backbone, name)) != value:
            raise ValueError(
                f"{files.where}: the backbone must have the checkpoint's {name}={value!r}, got {own!r}. "
                "Build it with backbone_kwargs_from_pretrained."
            )
    if backbone.num_layers > kwargs["num_layers"]:
        raise ValueError(
            f"{files.where}: the backbone must have at most the checkpoint's num_layers={kwargs['num_layers']}, got "
            f"{backbone.num_layers}. Build it with fewer."
        )


def _places(files: _Files, num_layers: int) -> dict[str, tuple[str, str]]:
    """Returns, by the backbone's names of weights, the checkpoint's and the files that they are in."""
    places = {}
    for name, file in _weight_map(files).items():
        match = re.fullmatch(r"(?:model\.)?(layers\.(\d{1,6})\..+)", name)
        if match and int(match[2]) < num_layers and not name.endswith(".rotary_emb.inv_freq"):  # once kept in files
            places[match[1]] = (name, file)
    return places


def _weight_map(files: _Files) -> dict[str, str]:
    """Returns the file that each weight of a checkpoint is in."""
    try:
        with _open(files, WEIGHTS_FILE) as single:
            return dict.fromkeys(single.keys(), WEIGHTS_FILE)
    except (EntryNotFoundError, FileNotFoundError):
        pass
    try:
        weight_map = files.read_json(INDEX_FILE).get("weight_map")
    except (EntryNotFoundError, FileNotFoundError) as error:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in files.names()):
            raise ValueError(
                f"{files.where}: {files.name} must have its weights in {WEIGHTS_FILE}, got pickled ones only, which "
                f"can run code ({files.listing()}). If you trust them, convert them: "
                "AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)."
            ) from error
        raise FileNotFoundError(
            f"{files.where}: {files.name} must have {WEIGHTS_FILE} or {INDEX_FILE}, got {files.listing()}."
        ) from error
    if not isinstance(weight_map, dict):
        raise ValueError(f"{files.where}: {INDEX_FILE} must hold a weight_map, got {type(weight_map).__name__}.")
    for file in weight_map.values():
        # A name from a stranger must not lead out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise ValueError(
                f"{files.where}: {INDEX_FILE} must name plain .safetensors files of its own folder, got {file!r}."
            )
    return weight_map


def _open(files: _Files, name: str) -> Any:
    file = files.path(name)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{files.where}: {name} must be a whole safetensors file, got: {error}.") from error
