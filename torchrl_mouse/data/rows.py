"""Rows of records, read column by column: data sets in place in their Arrow buffers, appended rows as tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from torchrl_mouse.data.columns import COLUMNS, INTEGER_COLUMNS, PADDING, REQUIRED_COLUMNS, Columns, Records, fit

CHUNK = 65_536
"""Rows handled at a time where all are looked at."""

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


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

    def read(self, names: Sequence[str], rows: torch.Tensor) -> Records:
        """Copies rows of some columns."""
        return {name: self._columns[name].index_select(0, rows) for name in names}

    def extend(self, records: Records) -> None:
        """Appends rows; the cost per row does not depend on how many there are."""
        rows = self._rows + len(records["action"])
        for name, value in records.items():
            column = self._columns[name]
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
    """Rows of one data set, read in place."""

    def __init__(self, dataset: datasets.Dataset, names: tuple[str, ...], task: str | None) -> None:
        self._arguments = (dataset, names, task)  # the data set keeps the buffers alive, and is what gets pickled
        self.names = names
        # After shuffle or select, the table keeps the old order and `_indices` says which of its rows are meant.
        order = dataset._indices
        self._order = None if order is None else torch.from_numpy(order.column(0).to_numpy().astype(np.int64))
        columns = [*names, *filter(None, [task])]
        batches = [batch for batch in dataset.data.table.select(columns).to_batches() if batch.num_rows]
        sizes = torch.tensor([batch.num_rows for batch in batches])
        self._chunk_ends, starts = sizes.cumsum(0), sizes.cumsum(0) - sizes
        self._columns = {name: _ArrowColumn(name, [batch[name] for batch in batches], starts) for name in columns}

    def __len__(self) -> int:
        return len(self._arguments[0])

    def __reduce__(self) -> tuple[type[ArrowRows], tuple[Any, ...]]:
        return ArrowRows, self._arguments

    def width(self, name: str) -> int:
        """The length of a list column's longest row."""
        return self._columns[name].width

    def read(self, names: Sequence[str], rows: torch.Tensor) -> Records:
        """Copies rows of some columns, in the columns' own types."""
        if self._order is not None:
            rows = self._order[rows]
        chunk = torch.searchsorted(self._chunk_ends, rows, right=True)
        return {name: self._columns[name].read(rows, chunk) for name in names}


class _ArrowColumn:
    """One column over all its chunks, as a single view of memory and the place of each chunk in it.

    The view spans from the lowest to the highest buffer, whatever lies between; only elements of the chunks are ever
    indexed. A read is then one gather, however many chunks there are.
    """

    def __init__(self, name: str, arrays: list[pa.Array], starts: torch.Tensor) -> None:
        kind, integers = arrays[0].type, name not in COLUMNS or name in INTEGER_COLUMNS
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        element = kind.value_type if lists else kind
        may_be_list = name in PADDING or name == "observation_discrete"
        number = pa.types.is_integer(element) or (pa.types.is_floating(element) and not integers)
        if not number or (lists and not may_be_list):
            rule = ("lists of " if name in PADDING else "") + ("integers" if integers else "numbers")
            remedy = f"ds.cast_column({name!r}, ...) converts a column."
            raise TypeError(f"DatasetStore.from_dataset: column {name!r} must hold {rule}, got {kind}. {remedy}")
        values = [_list_values(array) for array in arrays] if lists else arrays
        nulls = sum(array.null_count for array in values)
        if lists and (name != "metadata_q_star" or pa.types.is_fixed_size_list(kind)):  # else a null is an empty list
            nulls += sum(array.null_count for array in arrays)
        if nulls:
            remedy = "Fill them, or drop the rows and call flatten_indices()."
            raise ValueError(f"DatasetStore.from_dataset: column {name!r} must hold no nulls, got {nulls}. {remedy}")

        self._is_list, self._firsts, self._padding = lists, None, PADDING.get(name, 0)
        self._view, bases = _memory(values)
        self.width, shortest = _list_widths(arrays) if lists else (1, 1)
        if self.width == shortest:
            self._bases = bases - starts * self.width  # row r of chunk c begins at element bases[c] + r * width
        else:  # rows of several lengths: 12 bytes a row say where each begins and how long it is
            rows = [_list_rows(array) for array in arrays]
            self._firsts = torch.cat([first + base for (first, _), base in zip(rows, bases, strict=True)])
            self._lengths = torch.cat([lengths for _, lengths in rows])
        if name == "observation_discrete" and not self.width == shortest == 1:
            got = f"lists of {shortest} to {self.width}"
            raise ValueError(
                f"DatasetStore.from_dataset: column {name!r} must hold one id a row, got {got}. Fix the data."
            )

    def read(self, rows: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        if self._firsts is not None:
            column = torch.arange(self.width)
            inside = column < self._lengths[rows].unsqueeze(-1)
            # Element 0 of the view always exists; what lies behind a chunk's last row may not.
            index = torch.where(inside, self._firsts[rows].unsqueeze(-1) + column, 0)
            value = self._gather(self._view, index.reshape(-1)).reshape(inside.shape)
            return torch.where(inside, value.to(torch.float32), self._padding)
        if not self.width:
            return torch.empty(len(rows), 0)
        # Rows of equal length are overlapping windows of the view, one of which starts at each element.
        windows = self._view.as_strided((self._view.numel() - self.width + 1, self.width), (1, 1))
        view = windows if self._is_list else self._view
        return self._gather(view, torch.add(self._bases.index_select(0, chunk), rows, alpha=self.width))

    @staticmethod
    def _gather(view: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        signed = _SIGNED.get(view.dtype)  # torch does not index the larger unsigned types
        return (
            view.index_select(0, index) if signed is None else view.view(signed).index_select(0, index).view(view.dtype)
        )


def _list_widths(arrays: list[pa.Array]) -> tuple[int, int]:
    """Returns the longest and the shortest row, from the offsets alone."""
    if pa.types.is_fixed_size_list(arrays[0].type):
        return arrays[0].type.list_size, arrays[0].type.list_size
    lengths = [np.diff(array.offsets.to_numpy()) for array in arrays]
    return max(int(length.max()) for length in lengths), min(int(length.min()) for length in lengths)


def _list_rows(array: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where each row begins in the chunk's values, and its length; a null is an empty list."""
    offsets = array.offsets.to_numpy()
    lengths = np.where(array.is_null().to_numpy(zero_copy_only=False), 0, np.diff(offsets))
    return torch.from_numpy(offsets[:-1].astype(np.int64) - offsets[0]), torch.from_numpy(lengths.astype(np.int32))


def _list_values(array: pa.Array) -> pa.Array:
    """The values of a list array's own rows, without a copy (``flatten`` copies where there are nulls)."""
    if pa.types.is_fixed_size_list(array.type):
        return array.values.slice(array.offset * array.type.list_size, len(array) * array.type.list_size)
    first, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
    return array.values.slice(first, end - first)


def _memory(arrays: list[pa.Array]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns one view that spans all the arrays, and the element at which each begins."""
    dtype = np.dtype(arrays[0].type.to_pandas_dtype())
    # An empty array may have no buffer; its place is never read.
    addresses = [array.buffers()[1].address + array.offset * dtype.itemsize if len(array) else 0 for array in arrays]
    filled = [(address, len(array)) for address, array in zip(addresses, arrays, strict=True) if address]
    if not filled:
        return torch.zeros(1), torch.zeros(len(arrays), dtype=torch.int64)
    lowest = min(address for address, _ in filled)
    if any((address - lowest) % dtype.itemsize for address, _ in filled):
        raise ValueError("DatasetStore.from_dataset: Arrow buffers must be aligned. Write the data set anew.")
    size = max(address + rows * dtype.itemsize for address, rows in filled) - lowest
    view = torch.frombuffer(
        (ctypes.c_char * size).from_address(lowest), dtype=torch.from_numpy(np.empty(0, dtype)).dtype
    )
    return view, torch.tensor([max(address - lowest, 0) // dtype.itemsize for address in addresses])


def read_columns(
    block: ArrowRows | TensorRows, columns: Columns, rows: torch.Tensor, names: Collection[str]
) -> Records:
    """Copies rows of some columns in the store's dtypes and widths."""
    records = block.read([name for name in names if name in block.names], rows)
    return columns.convert(records, names, len(rows))


def load_rows(dataset: datasets.Dataset, columns: Columns, task: str | None) -> tuple[ArrowRows, torch.Tensor]:
    """Opens a data set, checks its values in pieces, and finds the first row of each task."""
    where = "DatasetStore.from_dataset"
    if not len(dataset):
        raise ValueError(f"{where}: a data set must have rows, got 0. Drop the empty split.")
    if task == "task" and task not in dataset.column_names:
        task = None
    for name in (*REQUIRED_COLUMNS, *filter(None, [task])):
        if name not in dataset.column_names:
            present = ", ".join(dataset.column_names)
            raise KeyError(f"{where}: column {name!r} must be present, got only {present}. Rename or add the column.")
    names = tuple(name for name in columns.readable if name in dataset.column_names)
    block = ArrowRows(dataset, names, task)
    if "metadata_q_star" in names:
        columns.check_width("metadata_q_star", block.width("metadata_q_star"), where)
    starts, previous = [], None
    checked = [name for name in names if name != "metadata_q_star"]
    for low in range(0, len(block), CHUNK):
        rows = torch.arange(low, min(low + CHUNK, len(block)))
        columns.check_values(read_columns(block, columns, rows, checked), where, low)
        if task is not None:
            ids = block.read([task], rows)[task].to(torch.int64)
            before = torch.cat([ids[:1] - 1 if previous is None else previous, ids[:-1]])
            starts.append((ids != before).nonzero().squeeze(-1) + low)
            previous = ids[-1:]
    return block, torch.cat(starts) if starts else torch.zeros(1, dtype=torch.int64)


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
) -> list[datasets.Dataset]:
    """Returns the chosen splits; one data set is one part."""
    where = "DatasetStore.from_dataset"
    if splits is not None and split_pattern is not None:
        raise ValueError(f"{where}: splits and split_pattern must not both be given. Use one of them.")
    chosen = split_pattern if splits is None else splits
    if isinstance(dataset, datasets.Dataset):
        if chosen is not None:
            raise ValueError(f"{where}: splits need a DatasetDict, got a Dataset and {chosen!r}. Pass it alone.")
        return [dataset]
    if not isinstance(dataset, datasets.DatasetDict):
        remedy = "load_dataset(..., streaming=False) gives one."
        raise TypeError(f"{where}: data must be a Dataset or DatasetDict, got {type(dataset).__name__}. {remedy}")
    if chosen is None:
        return list(dataset.values())
    asked = [chosen] if isinstance(chosen, str) else list(chosen)
    # Exact names are looked up, patterns matched: a name may contain a bracket.
    found = {
        name: [key for key in dataset if (key == name if splits is not None else fnmatch(key, name))] for name in asked
    }
    if missing := [name for name in asked if not found[name]]:
        raise KeyError(f"{where}: a split must match {missing}, got only {', '.join(dataset)}. Choose among these.")
    return [dataset[key] for key in dict.fromkeys(key for keys in found.values() for key in keys)]
