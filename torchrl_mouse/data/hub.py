"""Stores as data sets on the Hugging Face Hub: parquet shards and a card, in one commit that lands whole or not."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import pyarrow.parquet as pq
import torch
from datasets.utils import tqdm
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi, HfFileSystem

from torchrl_mouse.checkpoints import CARD_FILE, CARD_TAGS, hub_errors, prepare_repository
from torchrl_mouse.data.columns import TASK
from torchrl_mouse.data.merging import align, check_stores, read_batches, store_features
from torchrl_mouse.data.rows import pieces

if TYPE_CHECKING:
    import pyarrow as pa
    from huggingface_hub import CommitInfo

    from torchrl_mouse.data.store import DatasetStore

CARD_TEMPLATE = Path(__file__).parents[1] / "dataset_card.md"
SHARD_BYTES = 500 * 10**6
"""Size of a file on the Hub from which on rows go to the next one."""
STATISTICS = b"torchrl_mouse"
"""Where a shard's own metadata hold the statistics and sizes of its split, for the cards of later pushes."""

# The columns, as the card explains them.
MEANINGS = {
    "action": "the action that led here",
    "reward": "the reward that led here",
    "done": "the end that led here: 0 none, 1 terminated, 2 truncated",
    "episode_step": "steps since the episode's first frame",
    "xformed_reward": "the reward that led here, transformed",
    "observation_discrete": "the observation, an id",
    "observation": "the observation, a vector; shorter ones are padded with 0",
    "observation_image": "the observation, an image's values in 0..255, flattened",
    "metadata_q_star": "a teacher's value of each action; -inf where there is none",
    "action_mask": "whether each action is allowed",
    TASK: "which task the row belongs to; counts from 0 in each split",
}


def push_to_hub(
    splits: Mapping[str, Sequence[DatasetStore]],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload data set",
) -> CommitInfo:
    """Uploads stores as the whole data set of a Hub repository: what it held before is replaced, in one commit.

    The commit lands whole, or what was there before stays: also where the connection or this process dies in between,
    or somebody else commits. ``datasets.load_dataset(repo_id, split=...)`` loads a split, and
    :meth:`~torchrl_mouse.data.DatasetStore.from_dataset` its steps.

    All splits get the same columns with the same types. Where no store of a split has a column that another split has,
    it is null in each of its rows, which is read back as a column that is not there.

    Args:
        splits: stores by the name of their split; they are joined as by
            :func:`~torchrl_mouse.data.merging.merge_stores_to_dataset`.
        repo_id: ``"owner/name"``; is made where there is none.
        private: whether a new repository is private; ``None`` follows the owner's default.
        token: of the Hub; the stored one by default.
        revision: branch to commit to, made where there is none.
        commit_message: of the commit.

    Returns:
        The commit.

    Raises:
        ConnectionError: the Hub cannot be reached.
        KeyError: stores of one split have different columns.
        PermissionError: the Hub does not accept the token, or its user may not write there.
        RuntimeError: a store has no rows, or the Hub did not take a file.
        TypeError: ``splits`` is not a mapping, or a split not a list of stores.
        ValueError: no splits, a split's name or ``repo_id`` that the Hub would refuse, or a private repository is asked
            for, and there is a public one.

    .. note::
        The files are written to a temporary folder first (``TMPDIR`` says where), piece by piece: memory does not grow
        with the number of rows. Unfinished collected tasks are not in them. The card is written anew by each push.
    """
    return _push("push_to_hub", splits, repo_id, False, private, token, revision, commit_message)


def push_stores_to_hub(
    stores: Sequence[DatasetStore],
    repo_id: str,
    split: str = "train",
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload data set",
) -> CommitInfo:
    """Uploads stores as one split of a data set on the Hub; its other splits stay, in the same one commit.

    Args:
        stores: of the split; they get the columns and list widths of the splits that stay.
        repo_id: ``"owner/name"``; is made where there is none.
        split: its name.
        private: see :func:`push_to_hub`, also for the other arguments, errors and costs.
        token: see there.
        revision: see there.
        commit_message: see there.

    Raises:
        ValueError: also where the splits that stay lack a column of the stores, or have narrower lists.
    """
    return _push("push_stores_to_hub", {split: stores}, repo_id, True, private, token, revision, commit_message)


def _push(
    where: str,
    splits: Mapping[str, Sequence[DatasetStore]],
    repo_id: str,
    keep_others: bool,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> CommitInfo:
    if not isinstance(splits, Mapping):
        got = type(splits).__name__
        raise TypeError(f"{where}: splits must be a mapping of names to stores, got {got}. Give {{'train': [store]}}.")
    if not splits:
        raise ValueError(f"{where}: splits must be at least one, got none. Give {{'train': [store]}}.")
    for split, stores in splits.items():
        # The rule of `datasets`, to which "all" means every split.
        if not isinstance(split, str) or not re.fullmatch(r"\w+(\.\w+)*", split) or split == "all":
            raise ValueError(
                f"{where}: a split's name must be words of letters, digits and '_', joined by '.', and not 'all', got "
                f"{split!r}. Rename it."
            )
        check_stores(f"{where}: split {split!r}", stores)

    api = HfApi(token=token)
    with hub_errors(where), tempfile.TemporaryDirectory() as folder:
        repo_id = prepare_repository(where, api, repo_id, repo_type="dataset", private=private, revision=revision)
        # The commit is refused if the repository changes from here on: it deletes and keeps what is there now.
        parent = api.repo_info(repo_id, repo_type="dataset", revision=revision).sha
        shards = _shards(api.list_repo_files(repo_id, repo_type="dataset", revision=parent))
        kept = {
            split: _read_schema(f"datasets/{repo_id}@{parent}/{shards[split][0]}", token)
            for split in sorted(shards.keys() - splits.keys())
            if keep_others
        }
        features = align(store_features(store) for stores in splits.values() for store in stores)
        features = align([features, *map(datasets.Features.from_arrow_schema, kept.values())])
        for split, schema in kept.items():
            _check_kept(where, split, datasets.Features.from_arrow_schema(schema), features)

        statistics = {split: _statistics(stores) | _sizes(stores) for split, stores in splits.items()}
        additions = []
        for split, stores in splits.items():
            files = _write(Path(folder, split), split, stores, features, statistics[split])
            additions += [
                CommitOperationAdd(f"data/{split}-{number:05}-of-{len(files):05}.parquet", file)
                for number, file in enumerate(files)
            ]
        statistics |= {
            split: json.loads((schema.metadata or {}).get(STATISTICS, "{}")) for split, schema in kept.items()
        }
        card = _card(repo_id, next(iter(splits)), statistics, features, revision).encode()
        replaced = {path for split in shards.keys() - kept.keys() for path in shards[split]}
        stale = sorted(replaced - {addition.path_in_repo for addition in additions})
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(CARD_FILE, card), *additions, *map(CommitOperationDelete, stale)],
            commit_message=commit_message,
            repo_type="dataset",
            revision=revision,
            parent_commit=parent,
        )


def _shards(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns the parquet files of each split that a repository has; a split's name has no dash."""
    shards: dict[str, list[str]] = {}
    for path in sorted(paths):
        if found := re.fullmatch(r"data/(\w+(?:\.\w+)*)-[^/]*\.parquet", path):
            shards.setdefault(found[1], []).append(path)
    return shards


def _read_schema(path: str, token: str | bool | None) -> pa.Schema:
    """Reads what a shard on the Hub says of itself, without its rows."""
    with HfFileSystem(token=token).open(path, "rb") as file:
        return pq.read_schema(file)


def _check_kept(where: str, split: str, kept: datasets.Features, features: datasets.Features) -> None:
    """Raises where a split that stays would not have the columns of the new one."""
    if differ := sorted(name for name in features if name not in MEANINGS or kept.get(name) != features[name]):
        theirs, ours = ({name: part.get(name) for name in differ} for part in (kept, features))
        raise ValueError(
            f"{where}: the splits that stay must have the columns of the new one, got {theirs} instead of {ours} in "
            f"split {split!r}. Push all splits together with push_to_hub."
        )


def _write(
    folder: Path,
    split: str,
    stores: Sequence[DatasetStore],
    features: datasets.Features,
    statistics: Mapping[str, float],
) -> list[Path]:
    """Writes the shards of a split, and returns them in order."""
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, STATISTICS: json.dumps(statistics)})
    batches = read_batches(stores, features)
    folder.mkdir()
    files: list[Path] = []
    with tqdm(total=sum(map(len, stores)), unit=" rows", desc=f"Writing split {split}") as bar:
        for batch in batches:
            file = folder / f"{len(files)}.parquet"
            files.append(file)
            with pq.ParquetWriter(file, schema) as writer:
                more: pa.RecordBatch | None = batch
                while more is not None:
                    writer.write_batch(more)
                    bar.update(len(more))
                    more = next(batches, None) if file.stat().st_size < SHARD_BYTES else None
    return files


def _sizes(stores: Sequence[DatasetStore]) -> dict[str, float]:
    """Returns the sizes of the stores' spaces that the columns do not show: at most so many ids were possible."""
    columns = [store._columns for store in stores]
    return {
        "max_action_dim": max(part.widths["metadata_q_star"] for part in columns),
        "max_obs_discrete_dim": max(part._bounds["observation_discrete"][1] for part in columns),
    }


def _statistics(stores: Sequence[DatasetStore]) -> dict[str, float]:
    """Counts tasks, finished episodes, steps and rows, and describes the episodes' returns, where there are any."""
    parts = [part for store in stores for part in _returns(store)]
    returns = torch.cat([part for part, _ in parts])
    found: dict[str, float] = {
        "tasks": sum(store.num_tasks for store in stores),
        "episodes": len(returns),
        "steps": sum(steps for _, steps in parts),
        "rows": sum(map(len, stores)),
    }
    if len(returns):
        of = {"mean": returns.mean(), "std": returns.std(correction=0), "min": returns.min(), "max": returns.max()}
        found |= {name: float(value) for name, value in of.items()}
    return found


def _returns(store: DatasetStore) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields, for each piece of a store, the returns of the episodes that end in it, and the number of decisions."""
    starts = torch.cat([store.task_starts, torch.tensor([len(store)])])
    running, ended = 0.0, True  # the return of the episode that the last piece left open, or that it left none
    for rows in pieces(len(store)):
        records = store._read(rows, {"reward", "done"})
        ends = records["done"] != 0
        is_first, is_last = (starts[torch.searchsorted(starts, row)] == row for row in (rows, rows + 1))
        begins = is_first | torch.cat([torch.tensor([ended]), ends[:-1]])
        episode = begins.cumsum(0)  # 0: the one that was open
        returns = torch.zeros(int(episode[-1]) + 1, dtype=torch.float64)
        returns[0] = running
        returns.index_add_(0, episode, records["reward"].to(torch.float64))
        running, ended = float(returns[-1]), bool(ends[-1])
        yield returns[episode[ends]], int((~ends & ~is_last).sum())


def _card(
    repo_id: str,
    split: str,
    statistics: Mapping[str, Mapping[str, float]],
    features: datasets.Features,
    revision: str | None,
) -> str:
    """Fills the template ``dataset_card.md``, whose snippet loads ``split`` with sizes that fit all splits."""
    lengths = {name: getattr(feature, "length", 0) for name, feature in features.items()}
    sizes = {
        "max_action_dim": max(
            *(of.get("max_action_dim", 1) for of in statistics.values()),
            *(lengths.get(name, 1) for name in ("metadata_q_star", "action_mask")),
        ),
        "max_obs_continuous_dim": lengths.get("observation"),
        "max_obs_discrete_dim": max(of.get("max_obs_discrete_dim", 0) for of in statistics.values()),
        "max_obs_image_pixels": lengths.get("observation_image"),
    }
    data = DatasetCardData(
        pretty_name=repo_id.rpartition("/")[2],
        task_categories=["reinforcement-learning"],
        tags=CARD_TAGS,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in statistics],
            }
        ],
    )
    columns = {}
    for name, feature in features.items():
        is_list = isinstance(feature, datasets.List)
        kind = f"{feature.feature.dtype} [{feature.length}]" if is_list else feature.dtype
        columns[name] = (kind, MEANINGS[name])
    card = DatasetCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        repo_id=repo_id,
        statistics=statistics,
        columns=columns,
        split=split,
        revision="" if revision is None else f', revision="{revision}"',
        sizes=", ".join(f"{name}={size}" for name, size in sizes.items() if size),
    )
    return str(card)
