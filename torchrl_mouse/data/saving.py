"""Saving a store and what belongs to it: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torchrl.data.replay_buffers.storages import Storage


class StoreCheckpointer(StorageCheckpointerBase):
    """Saves a store's state for ``rb.dumps`` and ``store.dumps``; TorchRL's default saves nothing, and says nothing.

    A dump replaces the earlier one at the same path in one step, so a full disk, an error or a kill leaves that one as
    it was.

    .. note::
        ``rb.dumps`` writes the buffer's other parts as files of their own, which TorchRL does not replace in one step.
        Where those matter too, dump into a new folder and rename it.
    """

    def dumps(self, storage: Storage, path: str | Path) -> None:
        """Writes the state below a folder.

        Raises:
            OSError: it cannot be written; what was there before stays.
        """
        target = Path(path) / "store.pt"
        try:
            with replacing(target) as partial, partial.open("wb") as file:
                torch.save(storage.state_dict(), file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError
            raise OSError(
                f"DatasetStore.dumps: {target} must be writable, got {error}. An earlier dump there is as it was: make "
                "room, or choose another folder, and dump again."
            ) from error

    def loads(self, storage: Storage, path: str | Path) -> None:
        """Reads the state.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged; see :meth:`DatasetStore.load_state_dict` for what else it raises.
        """
        source = Path(path) / "store.pt"
        try:
            state = torch.load(source, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch's reader raises errors of many kinds.
            raise ValueError(
                f"DatasetStore.loads: {source} must be a store's dump, got a damaged or other file "
                f"({type(error).__name__}: {error}). Load another dump."
            ) from error
        storage.load_state_dict(state)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives a path to write to, of what then takes a file's place; a full disk or a kill leaves the earlier one.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "notes.txt")) as partial:
        ...         _ = partial.write_text("all of it")
        ...     Path(folder, "notes.txt").read_text()
        'all of it'
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def replace_json(file: Path, state: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_json(Path(folder, "state.json"), {"position": 3})
        ...     json.loads(Path(folder, "state.json").read_text())
        {'position': 3}
    """
    with replacing(file) as partial:
        partial.write_text(json.dumps(state, indent=2), encoding="utf-8")


def check_datasets(saved: Sequence[dict[str, Any]], loaded: Sequence[dict[str, Any]]) -> None:
    """Raises where the loaded data sets are not those of a saved store, one by one in order.

    Files may have moved; their contents, known by fingerprint, rows and sizes, may not have changed.

    Args:
        saved: states of :class:`~torchrl_mouse.data.rows.ArrowRows` at the time of saving.
        loaded: the same now.

    Examples:
        >>> state = {"fingerprint": "e5", "rows": 3, "files": []}
        >>> check_datasets([state], [{**state, "rows": 4}])
        Traceback (most recent call last):
            ...
        ValueError: DatasetStore.load_state_dict: data set 0 must be the saved one (3 rows in memory, fingerprint e5),
        got 4 rows in memory, fingerprint e5. It changed on disk, or is another: load the same ones in the same order.
    """
    where = "DatasetStore.load_state_dict"
    if len(saved) != len(loaded):
        wanted = "; ".join(map(_describe, saved)) or "none"
        raise ValueError(
            f"{where}: the store must have loaded {len(saved)} data sets ({wanted}), got {len(loaded)}. "
            "Call from_dataset with the same data sets first."
        )
    for number, (then, now) in enumerate(zip(saved, loaded, strict=True)):
        if _contents(then) != _contents(now):
            raise ValueError(
                f"{where}: data set {number} must be the saved one ({_describe(then)}), got {_describe(now)}. "
                "It changed on disk, or is another: load the same ones in the same order."
            )


def _contents(state: dict[str, Any]) -> tuple[Any, ...]:
    return state["fingerprint"], state["rows"], [size for _, size in state["files"]]


def _describe(state: dict[str, Any]) -> str:
    files = state["files"]
    place = f"{files[0][0]} ({sum(size for _, size in files)} bytes)" if files else "memory"
    return f"{state['rows']} rows in {place}, fingerprint {state['fingerprint']}"
