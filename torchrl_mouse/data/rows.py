"""Rows of records, read column by column: data sets in place in their Arrow buffers, appended rows as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from torchrl_mouse.data.arrow import ArrowColumn, Places, check_type, is_list, null_rows, ragged_rows, row_bounds
from torchrl_mouse.data.columns import PADDING, REQUIRED_COLUMNS, UNCHECKED, UNLIMITED, Columns, Records, fit
from torchrl_mouse.data.images import (
    IMAGE,
    EncodedImages,
    UnreadableImageError,
    check_pixels,
    is_encoded,
    null_images,
)
from torchrl_mouse.data.steps import BOTH, OWN, Part

CHUNK = 65_536
"""Rows handled at a time where all are looked at,"""
CHUNK_VALUES = 2**24
"""and values, where a row holds many."""


class TensorRows:
    """Appended rows: one tensor per column, grown by doubling."""

    def __init__(self, records: Records) -> None:
        self.names = tuple(records)
        self._columns = {name: value.clone() for name, value in records.items()}
        self._rows = len(records["action"])

    def __len__(self) -> int:
        return self._rows

    def width(self, name: str) -> int:
        """The length of a list column's rows."""
        return self._columns[name].shape[-1]

    def read(self, rows: torch.Tensor, parts: Mapping[str, Part]) -> Records:
        """Copies ``rows[part]`` of some columns, flat."""
        return {name: self._columns[name].index_select(0, rows[part].reshape(-1)) for name, part in parts.items()}

    def extend(self, records: Records) -> None:
        """Appends rows; the cost per row does not depend on how many there are, nor on which have a teacher."""
        rows = self._rows + len(records["action"])
        tables = (self._columns, records)
        self.names = tuple({name: None for table in tables for name in table})
        for name in self.names:
            column, value = (table[name] if name in table else torch.empty(len(table["action"]), 0) for table in tables)
            if name in PADDING:
                width = max(column.shape[1], value.shape[1])
                column, value = (fit(part, width, PADDING[name]) for part in (column, value))
            if rows > len(column):
                grown = column.new_empty((max(rows, 2 * len(column)), *column.shape[1:]))
                grown[: self._rows] = column[: self._rows]
                column = grown
            column[self._rows : rows] = value
            self._columns[name] = column
        self._rows = rows

    def state(self) -> Records:
        """Copies all rows."""
        return {name: column[: self._rows].clone() for name, column in self._columns.items()}


class ArrowRows:
    """Rows of one data set, read in place.

    Args:
        dataset: the data set.
        names: the columns to read.
        task: the column of task ids, if any.
        where: the caller, for errors.

    Raises:
        TypeError: a column of the wrong type.
        ValueError: a null, or lists that make no row.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        names: tuple[str, ...],
        task: str | None,
        where: str = "DatasetStore.from_dataset",
    ) -> None:
        # The data set keeps the buffers alive, and is what gets pickled.
        self._arguments = (dataset, names, task, where)
        self.names, self._where = names, where
        self._order = _order(dataset)
        columns = list(dict.fromkeys([*names, *filter(None, [task])]))
        batches = [batch for batch in dataset.data.table.select(columns).to_batches() if batch.num_rows]
        table = pa.Table.from_batches(batches)
        sizes = torch.tensor([batch.num_rows for batch in batches])
        files = [Path(file["filename"]) for file in dataset.cache_files]
        self._state = {
            "fingerprint": dataset._fingerprint,
            "rows": len(dataset),
            "files": [(str(file), file.stat().st_size) for file in files if file.exists()],
        }
        self._chunk_ends, starts = sizes.cumsum(0).numpy(), sizes.cumsum(0) - sizes
        # As `datasets` writes them. (The last chunk may be shorter.)
        self._chunk_size = int(sizes[0]) if (sizes[1:-1] == sizes[0]).all() and sizes[-1] <= sizes[0] else None
        self._columns: dict[str, ArrowColumn | EncodedImages] = {}
        alike: dict[bytes, np.ndarray] = {}
        for name in columns:
            arrays = [getattr(array, "storage", array) for array in table[name].chunks]  # Array2D is lists in disguise
            if name == IMAGE and is_encoded(arrays[0].type):
                self._refuse(name, map(null_images, arrays), "be an image", "Fill them, or drop the rows.")
                self._columns[name] = EncodedImages(arrays, starts, getattr(dataset.features[name], "mode", None))
            else:
                check_type(name, arrays[0].type, where)
                self._check_rows(name, arrays)
                self._columns[name] = column = ArrowColumn(name, arrays, starts, self._order)
                # Columns of one type mostly lie alike in every chunk, and then share the arithmetic of a read.
                column.bases = alike.setdefault(column.bases.tobytes(), column.bases)

    def __len__(self) -> int:
        return len(self._arguments[0])

    def __reduce__(self) -> tuple[type[ArrowRows], tuple[Any, ...]]:
        return ArrowRows, self._arguments

    def _check_rows(self, name: str, arrays: Sequence[pa.Array]) -> None:
        nulls = (null_rows(array, name == "metadata_q_star") for array in arrays)
        self._refuse(name, nulls, "hold no nulls", "Fill them, or drop the rows.")
        if name == IMAGE:
            self._refuse(name, map(ragged_rows, arrays), "hold rectangles", "Pad the images, or drop the rows.")
        if name == "observation_discrete" and is_list(arrays[0].type):
            several = (np.diff(row_bounds(array)[1]) != 1 for array in arrays)
            self._refuse(name, several, "hold one id a row", "Fix the data.")

    def _refuse(self, name: str, bad: Iterable[np.ndarray], rule: str, remedy: str) -> None:
        """Raises at rows, marked chunk by chunk, that break a rule, if the data set has them."""
        marks = np.concatenate(list(bad))
        rows = np.flatnonzero(marks if self._order is None else marks[self._order])
        if len(rows):
            got = f"{len(rows)} bad rows, the first is row {rows[0]}"
            raise ValueError(f"{self._where}: column {name!r} must {rule}, got {got}. {remedy}")

    def width(self, name: str) -> int:
        """The length of a list column's longest row; image files have any."""
        column = self._columns[name]
        return column.width if isinstance(column, ArrowColumn) else UNLIMITED

    def read(self, rows: torch.Tensor, parts: Mapping[str, Part]) -> Records:
        """Copies ``rows[part]`` of some columns, flat, in the columns' own types."""
        both, chunk = self._places(rows)
        places = {part: Places(both[part].reshape(-1), chunk[part].reshape(-1)) for part in set(parts.values())}
        try:
            return {name: self._read(name, places[part]) for name, part in parts.items()}
        except UnreadableImageError as error:
            raise self._unreadable(error, "DatasetStore.get") from error

    def _read(self, name: str, places: Places) -> torch.Tensor:
        column = self._columns[name]
        return column.read(places) if isinstance(column, ArrowColumn) else column.read(*places.tensors())

    def _places(self, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Returns the table's rows that are meant, and the chunk of each."""
        meant = rows.numpy() if self._order is None else self._order[rows.numpy()]
        if self._chunk_size is not None:
            return meant, meant // self._chunk_size
        return meant, self._chunk_ends.searchsorted(meant, "right")

    def _unreadable(self, error: UnreadableImageError, where: str) -> ValueError:
        row = error.row if self._order is None else int(np.flatnonzero(self._order == error.row)[0])
        return ValueError(
            f"{where}: column {IMAGE!r} must hold readable images, got {error} in row {row} of "
            f"{self.name}. Replace it, or drop the row."
        )

    @property
    def name(self) -> str:
        """What a user may know the data set by."""
        files = self._arguments[0].cache_files
        return files[0]["filename"] if files else "a data set in memory"

    def check_images(self, columns: Columns) -> None:
        """Raises at the first image that is unreadable, by its header, or too large, or holds what is no pixel."""
        column = self._columns[IMAGE]
        if isinstance(column, EncodedImages):
            for rows in pieces(len(self)):
                try:
                    sizes = column.sizes(*Places(*self._places(rows)).tensors())
                except UnreadableImageError as error:
                    raise self._unreadable(error, self._where) from error
                largest = int(sizes.argmax())
                columns.check_width(IMAGE, int(sizes[largest]), self._where, int(rows[largest]))
            return
        columns.check_width(IMAGE, column.width, self._where)
        if not column.holds_bytes:
            for rows in pieces(len(self), column.width):
                check_pixels(column.read(Places(*self._places(rows))), self._where, int(rows[0]))

    def state(self) -> dict[str, Any]:
        """What tells this data set from another, or from itself after a change on disk.

        Files are known by their sizes: the fingerprint does not follow what is written into them.
        """
        return self._state


def read_columns(
    block: ArrowRows | TensorRows, columns: Columns, rows: torch.Tensor, parts: Mapping[str, Part]
) -> Records:
    """Copies ``rows[part]`` of some columns in the store's dtypes and widths."""
    records = block.read(rows, {name: part for name, part in parts.items() if name in block.names})
    shapes = {part: rows.shape if part is BOTH else rows.shape[1:] for part in parts.values()}
    return {name: columns.convert(name, records.get(name), shapes[part]) for name, part in parts.items()}


def pieces(length: int, width: int = 1) -> Iterator[torch.Tensor]:
    """Splits rows that hold up to ``width`` values in one column, so that no piece takes much memory.

    Examples:
        >>> [piece.tolist() for piece in pieces(5, CHUNK_VALUES // 2)]
        [[0, 1], [2, 3], [4]]
    """
    step = max(1, min(CHUNK, CHUNK_VALUES // max(width, 1)))
    for low in range(0, length, step):
        yield torch.arange(low, min(low + step, length))


def load_rows(
    dataset: datasets.Dataset, columns: Columns, task: str | None, where: str
) -> tuple[ArrowRows, torch.Tensor]:
    """Opens a data set, checks its values in pieces, and finds the first row of each task."""
    if not len(dataset):
        raise ValueError(f"{where}: a data set must have rows, got 0. Drop the empty split.")
    if task == "task" and task not in dataset.column_names:
        task = None
    for name in (*REQUIRED_COLUMNS, *filter(None, [task])):
        if name not in dataset.column_names:
            present = ", ".join(dataset.column_names)
            raise KeyError(f"{where}: column {name!r} must be present, got only {present}. Rename or add the column.")
    # Splits of one data set have the same columns; one that a split has no values for is all null there.
    names = tuple(
        name
        for name in columns.readable
        if name in REQUIRED_COLUMNS or (name in dataset.column_names and _has_values(dataset, name))
    )
    block = ArrowRows(dataset, names, task, where)
    for name in {"metadata_q_star", "action_mask"}.intersection(names):
        columns.check_width(name, block.width(name), where)
    if IMAGE in names:
        block.check_images(columns)
    starts, previous = [], None
    checked = [name for name in names if name not in UNCHECKED]
    for rows in pieces(len(block), columns.row_width(checked)):
        low = int(rows[0])
        values = read_columns(block, columns, rows.unsqueeze(0), dict.fromkeys(checked, OWN))
        columns.check_values(values, where, low)
        if task is not None:
            ids = block.read(rows.unsqueeze(0), {task: OWN})[task].to(torch.int64)
            before = torch.cat([ids[:1] - 1 if previous is None else previous, ids[:-1]])
            starts.append((ids != before).nonzero().squeeze(-1) + low)
            previous = ids[-1:]
    return block, torch.cat(starts) if starts else torch.zeros(1, dtype=torch.int64)


def _order(dataset: datasets.Dataset) -> np.ndarray | None:
    """Returns the rows of a data set's table that are meant, int64; ``None``: all, in order.

    After shuffle, select or filter, the table keeps the old rows and ``_indices`` says which of them are meant.
    """
    indices = dataset._indices
    return None if indices is None else indices.column(0).to_numpy().astype(np.int64)


def _has_values(dataset: datasets.Dataset, name: str) -> bool:
    """Says whether any row that is meant is not null; the values are looked at only where some may not be meant."""
    column, order = dataset.data.column(name), _order(dataset)
    if order is None or not column.null_count:
        return bool(column.null_count < len(column))
    return bool(column.is_valid().to_numpy()[order].any())


def to_arrow(records: Records, features: datasets.Features) -> pa.RecordBatch:
    """Turns columns into Arrow's form, without Python lists."""
    arrays = []
    for name, feature in features.items():
        value, is_list = records[name], isinstance(feature, datasets.List)
        array = pa.array((value[:, : feature.length].reshape(-1) if is_list else value).numpy())
        arrays.append(pa.FixedSizeListArray.from_arrays(array, feature.length) if is_list else array)
    return pa.record_batch(arrays, schema=features.arrow_schema)


def dataset_parts(
    dataset: datasets.Dataset | datasets.DatasetDict,
    splits: str | Sequence[str] | None,
    split_pattern: str | Sequence[str] | None,
) -> list[tuple[datasets.Dataset, str]]:
    """Returns the chosen splits, each with what errors call it; one data set is one part."""
    where = "DatasetStore.from_dataset"
    if splits is not None and split_pattern is not None:
        raise ValueError(f"{where}: splits and split_pattern must not both be given. Use one of them.")
    chosen = split_pattern if splits is None else splits
    if isinstance(dataset, datasets.Dataset):
        if chosen is not None:
            raise ValueError(f"{where}: splits need a DatasetDict, got a Dataset and {chosen!r}. Pass it alone.")
        return [(dataset, where)]
    if not isinstance(dataset, datasets.DatasetDict):
        remedy = "load_dataset(..., streaming=False) gives one."
        raise TypeError(f"{where}: data must be a Dataset or DatasetDict, got {type(dataset).__name__}. {remedy}")
    if not dataset or (chosen is not None and not chosen):
        got = f"{chosen!r} of {', '.join(dataset) or 'an empty DatasetDict'}"
        raise ValueError(f"{where}: splits must be at least one, got {got}. Name one, or give no names for all.")
    if chosen is None:
        return [(part, f"{where}: split {key!r}") for key, part in dataset.items()]
    asked = [chosen] if isinstance(chosen, str) else list(chosen)
    # Exact names are looked up, patterns matched: a name may contain a bracket.
    found = {
        name: [key for key in dataset if (key == name if splits is not None else fnmatch(key, name))] for name in asked
    }
    if missing := [name for name in asked if not found[name]]:
        raise KeyError(f"{where}: a split must match {missing}, got only {', '.join(dataset)}. Choose among these.")
    keys = dict.fromkeys(key for keys in found.values() for key in keys)
    return [(dataset[key], f"{where}: split {key!r}") for key in keys]
