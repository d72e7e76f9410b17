"""Stores written as data sets: joined, with the same columns and list widths, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import torch
from tensordict import TensorDict

from torchrl_mouse.data.columns import COLUMNS, PADDING, RECORD_NAMES, TASK, UNCHECKED, fit
from torchrl_mouse.data.images import IMAGE
from torchrl_mouse.data.rows import ArrowRows, pieces, read_columns, to_arrow
from torchrl_mouse.data.steps import OWN
from torchrl_mouse.data.store import DatasetStore


def merge_stores_to_dataset(stores: Sequence[DatasetStore]) -> datasets.Dataset:
    """Joins stores into one data set, in memory, whose ``task`` ids stay distinct over the stores.

    Lists become as wide as the widest: observations are padded with 0, teacher values with -inf, also in the rows of
    stores without a teacher. The other columns must be the same in all stores, as in one store.

    Args:
        stores: at least one, each with rows; their order is that of the rows.

    Raises:
        KeyError: the stores have different columns.
        RuntimeError: a store has no rows.
        TypeError: not a list of stores.
        ValueError: no stores.

    Examples:
        >>> stores = [DatasetStore(), DatasetStore()]
        >>> for store in stores:
        ...     store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0})
        ...     store.append({"action": 4, "reward": 1.0, "done": 1, "episode_step": 1})
        >>> merge_stores_to_dataset(stores)["task"][:]
        [0, 0, 1, 1]
    """
    check_stores("merge_stores_to_dataset", stores)
    features = align(store_features(store) for store in stores)
    table = pa.Table.from_batches(list(read_batches(stores, features)))
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def encode_hf_rows(store: DatasetStore, rows: Mapping[str, Sequence[Any]]) -> TensorDict:
    """Turns rows as ``dataset[:8]`` gives them into a batch of MOUSE's records, in a store's types and widths.

    Args:
        store: gives the sizes; it is not read.
        rows: ``N`` values by column name; columns that the store does not read are left out, so are all-null ones.

    Returns:
        ``[N]``: ``action``, ``done``, ``time`` and ``obs_discrete`` int64, ``reward`` and ``xformed_reward`` float32,
        ``obs_continuous`` float32 ``[N, C]``, ``obs_image`` uint8 ``[N, P]``, ``q_star`` float32 and ``action_mask``
        bool ``[N, A]``; those whose column is there.
        :func:`~torchrl_mouse.schema.from_mouse_records` turns them into steps.

    Raises:
        TypeError: values of the wrong type.
        ValueError: no rows, columns of several lengths, a null, NaN, or a value out of range.

    Examples:
        >>> rows = {"action": [0, 3], "episode_step": [0, 1], "metadata_q_star": [[0.5, 1.0], None]}
        >>> encode_hf_rows(DatasetStore(max_action_dim=4), rows)["q_star"]
        tensor([[0.5000, 1.0000,   -inf,   -inf],
                [  -inf,   -inf,   -inf,   -inf]])
    """
    where, columns = "encode_hf_rows", store._columns
    names = [name for name in columns.readable if any(value is not None for value in rows.get(name, ()))]
    lengths = {name: len(rows[name]) for name in names}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"{where}: rows must hold columns of one length, got {lengths or 'no values'}. A data set's rows are "
            "ds[:8], for instance."
        )
    try:
        dataset = datasets.Dataset.from_dict({name: rows[name] for name in names})
    except (pa.ArrowException, OverflowError) as error:
        raise TypeError(f"{where}: the values of a column must be of one type, got: {error}. Convert them.") from error
    block = ArrowRows(dataset, tuple(names), None, where)
    if IMAGE in names:
        block.check_images(columns)
    for name in {"metadata_q_star", "action_mask"}.intersection(names):
        columns.check_width(name, block.width(name), where)
    records = read_columns(block, columns, torch.arange(len(block)).unsqueeze(0), dict.fromkeys(names, OWN))
    columns.check_values({name: value for name, value in records.items() if name not in UNCHECKED}, where)
    return TensorDict({RECORD_NAMES.get(name, name): records[name] for name in names}, [len(block)])


def check_stores(where: str, stores: Sequence[DatasetStore]) -> None:
    """Raises where stores cannot be joined; a teacher may be absent in some."""
    if not isinstance(stores, Sequence) or not all(isinstance(store, DatasetStore) for store in stores):
        remedy = "Write [store]." if isinstance(stores, DatasetStore) else "Give DatasetStores."
        raise TypeError(f"{where}: stores must be a list of DatasetStore, got {type(stores).__name__}. {remedy}")
    if not stores:
        raise ValueError(f"{where}: stores must be at least one, got none. Give [store].")
    first = set(stores[0]._names)
    for number, store in enumerate(stores):
        if not len(store):
            raise RuntimeError(
                f"{where}: a store must have rows, got 0 and {len(store._unfinished.open)} unfinished tasks in store "
                f"{number}. Fill it, or leave it out."
            )
        if differ := first.symmetric_difference(store._names) - {"metadata_q_star"}:
            raise KeyError(
                f"{where}: stores must have the same columns, got a difference in {', '.join(sorted(differ))} between "
                f"stores 0 and {number}. Add or remove the column, or make them two splits."
            )


def store_features(store: DatasetStore) -> datasets.Features:
    """Returns the types on disk of a store's columns."""
    return store._columns.features(store._names, store._blocks)


def align(parts: Iterable[datasets.Features]) -> datasets.Features:
    """Returns all columns of the parts, in the order of a store; lists as wide as the widest."""
    aligned: dict[str, Any] = {}
    for features in parts:
        for name, feature in features.items():
            if name in PADDING and isinstance(feature, datasets.List):
                width = max(feature.length, getattr(aligned.get(name), "length", 1))
                aligned[name] = datasets.List(feature.feature, length=width)
            else:
                aligned.setdefault(name, feature)
    ours = [name for name in (*COLUMNS, TASK) if name in aligned]
    return datasets.Features({name: aligned[name] for name in (*ours, *(aligned.keys() - set(ours)))})


def read_batches(stores: Sequence[DatasetStore], features: datasets.Features) -> Iterator[pa.RecordBatch]:
    """Reads stores one after the other in pieces; columns that none of them has are null."""
    schema, names = features.arrow_schema, {name for store in stores for name in store._names}
    filled = datasets.Features({name: feature for name, feature in features.items() if name in names | {TASK}})
    first_task = 0
    for store in stores:
        for rows in pieces(len(store), store._columns.row_width(names)):
            records = store._read(rows, names)
            for name in PADDING.keys() & names:
                value = records[name] if name in records else torch.empty(len(rows), 0)
                records[name] = fit(value, max(value.shape[1], features[name].length), PADDING[name])
            records[TASK] = torch.searchsorted(store.task_starts, rows, right=True) - 1 + first_task
            batch = to_arrow(records, filled)
            arrays = [
                batch[field.name] if field.name in filled else pa.nulls(len(rows), field.type) for field in schema
            ]
            yield pa.record_batch(arrays, schema=schema)
        first_task += store.num_tasks
