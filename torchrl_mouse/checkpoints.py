"""The files of a model, in a folder and on the Hub. Nothing is unpickled: what is read may come from anybody."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch
    from huggingface_hub import CommitInfo

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
CARD_TEMPLATE = Path(__file__).with_name("model_card.md")
CARD_TAGS = ["reinforcement-learning", "in-context-learning", "mouse"]

MAX_CONFIG_BYTES = 2**20

ACTING = ("window", "action_head", "trunk_kwargs")
"""Options that may be changed in a file: they do not touch what the weights mean."""


def write_checkpoint(directory: str | Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Writes ``config.json`` and ``model.safetensors``; when that fails, the old files stay.

    Args:
        directory: is made where there is none.
        config: what JSON can hold.
        weights: by name.

    Examples:
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_checkpoint(folder, {"hidden_dim": 2}, {"bias": torch.zeros(2)})
        ...     read_checkpoint(folder)
        ({'hidden_dim': 2}, {'bias': tensor([0., 0.])})
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        text = json.dumps(config, indent=2)
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        # The weights name their configuration: a kill between the two moves below leaves a pair that is refused.
        save_file(contiguous, Path(temporary, WEIGHTS_FILE), metadata={"config": text})
        Path(temporary, CONFIG_FILE).write_text(text, encoding="utf-8")
        file = directory / CONFIG_FILE
        old = file.read_bytes() if file.exists() else None
        os.replace(Path(temporary, CONFIG_FILE), file)
        try:
            os.replace(Path(temporary, WEIGHTS_FILE), directory / WEIGHTS_FILE)
        except BaseException:  # The two belong together.
            file.unlink() if old is None else file.write_bytes(old)
            raise


def read_checkpoint(directory: str | Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Reads the configuration, as JSON has it, and the weights by name.

    Args:
        directory: with ``config.json`` and ``model.safetensors``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or the two are not of one save.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            found = abbreviate(file.name for file in directory.iterdir()) if directory.is_dir() else "no folder"
            raise FileNotFoundError(
                f"MouseModel: {directory} must hold {CONFIG_FILE} and {WEIGHTS_FILE}, got no {name} "
                f"({found or 'empty'}). Weights are read from safetensors alone: pickled ones can run code."
            )
    file = directory / CONFIG_FILE
    if (size := file.stat().st_size) > MAX_CONFIG_BYTES:
        raise ValueError(f"MouseModel: {file} must have at most {MAX_CONFIG_BYTES} bytes, got {size}.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        weights = load_file(directory / WEIGHTS_FILE)
        with safe_open(directory / WEIGHTS_FILE, "pt") as opened:
            own = json.loads((opened.metadata() or {}).get("config", "null"))
    except (ValueError, RecursionError, SafetensorError) as error:  # ValueError: also what JSON cannot decode
        raise ValueError(f"MouseModel: the files in {directory} must be readable, got: {error}") from error
    if own is not None and _shaping(own) != _shaping(values):
        raise ValueError(
            f"MouseModel: {CONFIG_FILE} in {directory} must be the one that {WEIGHTS_FILE} was saved with, got "
            "another. A save was interrupted, or the file was changed: save the model again."
        )
    return values, weights


def _shaping(config: Any) -> Any:
    """Returns what makes the weights' meaning; how to act with them may be changed by hand."""
    return {k: v for k, v in config.items() if k not in ACTING} if isinstance(config, dict) else config


def local_folder(where: str, what: str, repo_id_or_path: str | Path) -> Path | None:
    """Returns a folder that is there, or ``None`` for what has the form of a Hub repository ``"owner/name"``.

    Args:
        where: whose argument it is, for the error.
        what: what should be there, for the error.
        repo_id_or_path: either of the two.

    Raises:
        FileNotFoundError: neither of the two.

    Examples:
        >>> local_folder("load_model", "the model", "owner/name") is None
        True
    """
    folder = Path(repo_id_or_path)
    if folder.is_dir():
        return folder
    parts = str(repo_id_or_path).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise FileNotFoundError(
            f"{where}: {what} must be in a folder or a Hub repository 'owner/name', got {str(repo_id_or_path)!r}, "
            "where there is no folder."
        )
    return None


def abbreviate(names: Iterable[str]) -> str:
    """Lists the first names in order, and counts the rest.

    Examples:
        >>> abbreviate("jihgfedcba")
        'a, b, c, d, e, f, g, h and 2 more'
    """
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def fetch_checkpoint(
    repo_id_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_dir: str | Path | None = None,
) -> Path:
    """Returns the folder with a model's files, downloaded from the Hub (both of one commit) where it is not local.

    Args:
        repo_id_or_path: a folder, or a Hub repository ``"owner/name"``.
        revision: branch, tag or commit of the repository.
        token: of the Hub; the stored one by default.
        force_download: download also what is in the cache.
        local_dir: put the files there, instead of into the cache.

    Raises:
        FileNotFoundError: neither a folder nor the form of a repository id.
        huggingface_hub.errors.RepositoryNotFoundError: no such repository, or no right to read it.
        huggingface_hub.errors.RevisionNotFoundError: the repository has no such revision.
    """
    if (folder := local_folder("MouseModel", "the model", repo_id_or_path)) is not None:
        return folder
    downloaded = snapshot_download(
        str(repo_id_or_path),
        revision=revision,
        token=token,
        force_download=force_download,
        local_dir=local_dir,
        allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
    )
    return Path(downloaded)


def push_checkpoint(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Uploads the files of a folder to a Hub repository in one commit: it lands whole, or the old version stays.

    Args:
        directory: with the files.
        repo_id: ``"owner/name"``; is made where there is none.
        private: whether a new repository is private; ``None`` follows the owner's default.
        token: of the Hub; the stored one by default.
        revision: branch to commit to, made where there is none.
        commit_message: of the commit.

    Raises:
        ConnectionError: the Hub cannot be reached.
        PermissionError: the Hub does not accept the token, or its user may not write there.
        ValueError: a private repository is asked for, and there is a public one.
    """
    api = HfApi(token=token)
    with hub_errors("MouseModel"):
        repo_id = prepare_repository("MouseModel", api, repo_id, private=private, revision=revision)
        # Not `upload_folder`, which may take several commits.
        files = [CommitOperationAdd(file.name, file) for file in sorted(Path(directory).iterdir())]
        return api.create_commit(repo_id, files, commit_message=commit_message, revision=revision)


def prepare_repository(
    where: str,
    api: HfApi,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Makes a Hub repository and its branch where there are none.

    Args:
        where: who asks, for the error.
        api: with the token.
        repo_id: ``"owner/name"``, or a name alone for the token's own user.
        repo_type: ``"model"`` or ``"dataset"``.
        private: whether a new repository is private; ``None`` follows the owner's default.
        revision: the branch.

    Returns:
        The repository's full id.

    Raises:
        ValueError: not the form of an id, or a private repository is asked for, and there is a public one.
    """
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(
            f"{where}: repository {repo_id} must be private, got one that is public already. Make it private on the "
            "Hub, or choose another name."
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    return repo_id


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Says what to do where a push fails for want of a connection or of a right; other errors pass as they are."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"{where}: the Hub must let the token's user write there, got {error.response.status_code}: "
            f"{error.server_message or error}. Log in with `hf auth login`, or give the `token` of a user who may."
        ) from error
    except HTTPError as error:  # The client library's own: no answer at all.
        raise ConnectionError(
            f"{where}: the Hub at {constants.ENDPOINT} must be reachable, got: {error}. Check the connection, then "
            "push again; a push lands whole or not at all."
        ) from error


def render_card(
    repo_id: str,
    *,
    results: Mapping[str, Mapping[str, float]] | None = None,
    **content: str,
) -> str:
    """Fills the template ``model_card.md``.

    Args:
        repo_id: the repository, also the model's name.
        results: by where they were measured, and metric; for the card's ``model-index``.
        content: what else the template asks for.

    Examples:
        >>> content = dict.fromkeys(["modalities", "backbone", "heads", "window", "parameters", "revision", "act"], "")
        >>> render_card("me/agent", **content).splitlines()[1:3]
        ['library_name: torchrl_mouse', 'model_name: agent']
    """
    measured = {
        task: {metric: float(value) for metric, value in metrics.items()} for task, metrics in (results or {}).items()
    }
    data = ModelCardData(
        library_name="torchrl_mouse",
        model_name=repo_id.rpartition("/")[2],
        pipeline_tag="reinforcement-learning",
        tags=CARD_TAGS,
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                dataset_type=task.lower().replace(" ", "-"),
                dataset_name=task,
                metric_type=metric,
                metric_value=value,
            )
            for task, metrics in measured.items()
            for metric, value in metrics.items()
        ]
        or None,
    )
    card = ModelCard.from_template(data, template_path=str(CARD_TEMPLATE), repo_id=repo_id, results=measured, **content)
    return str(card)
