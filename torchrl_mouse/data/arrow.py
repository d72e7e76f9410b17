"""Columns of Arrow tables, read in place: one gather over the buffers, whatever the number of rows and chunks."""

from __future__ import annotations

import ctypes

import numpy as np
import pyarrow as pa
import torch

from torchrl_mouse.data.columns import DTYPES, PADDING
from torchrl_mouse.data.images import IMAGE

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def check_type(name: str, kind: pa.DataType, where: str) -> None:
    """Raises where a column's type does not fit its name; columns that no store knows hold task ids.

    Raises:
        TypeError: always that.

    Examples:
        >>> check_type("reward", pa.string(), "Here")
        Traceback (most recent call last):
            ...
        TypeError: Here: column 'reward' must hold numbers, got string. ds.cast_column('reward', ...) converts a column.
    """
    element, depth = kind, 0
    while is_list(element):
        element, depth = element.value_type, depth + 1
    dtype = DTYPES.get(name, torch.int64)
    integers = pa.types.is_integer(element)
    if dtype == torch.bool:
        noun, fits = "booleans", pa.types.is_boolean(element)
    elif dtype == torch.int64:
        noun, fits = "integers", integers
    else:
        noun, fits = "numbers", integers or pa.types.is_floating(element)
    if name == IMAGE:
        noun, fits = "images or " + noun, fits and depth > 0
    elif name in PADDING:
        noun, fits = "lists of " + noun, fits and depth <= 1
    else:
        fits = fits and depth <= (name == "observation_discrete")
    if not fits:
        remedy = f"ds.cast_column({name!r}, ...) converts a column."
        raise TypeError(f"{where}: column {name!r} must hold {noun}, got {kind}. {remedy}")


class Places:
    """Rows of a table and the chunk of each, from which follows where they begin in memory.

    Args:
        rows: int64 ``[n]``.
        chunk: int64 ``[n]``.

    Examples:
        >>> Places(np.array([0, 3]), np.array([0, 1])).firsts(np.array([0, 100]), 2).tolist()
        [0, 106]
    """

    def __init__(self, rows: np.ndarray, chunk: np.ndarray) -> None:
        self.rows, self._chunk = rows, chunk
        self._firsts: dict[tuple[int, int], torch.Tensor] = {}

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows and the chunk of each."""
        return torch.from_numpy(self.rows), torch.from_numpy(self._chunk)

    def firsts(self, bases: np.ndarray, width: int) -> torch.Tensor:
        """Returns ``bases[chunk] + rows * width``, int64 ``[n]``, worked out once for columns that share ``bases``."""
        key = id(bases), width
        if key not in self._firsts:
            offsets = self.rows if width == 1 else self.rows * width
            self._firsts[key] = torch.from_numpy(bases.take(self._chunk) + offsets)
        return self._firsts[key]


class ArrowColumn:
    """One column over all its chunks, as a single view of memory and the place of each chunk in it.

    The view spans from the lowest to the highest buffer, whatever lies between; only elements of the chunks are ever
    indexed. A read is then one gather, however many chunks there are.

    Args:
        name: the column's name, which says what fills shorter rows.
        arrays: the chunks of the column, of a type that :func:`check_type` lets pass.
        starts: the first row of each chunk, int64.
        order: the rows that will be read, int64; ``None``: all. Longer lists of other rows do not widen these.

    Examples:
        >>> column = ArrowColumn("observation", [pa.array([[1.0, 2.0], [3.0]])], torch.tensor([0]))
        >>> column.read(Places(np.array([1, 0]), np.array([0, 0]))).tolist()
        [[3.0, 0.0], [1.0, 2.0]]
    """

    def __init__(
        self, name: str, arrays: list[pa.Array], starts: torch.Tensor, order: np.ndarray | None = None
    ) -> None:
        self._is_list, self._firsts, self._padding = is_list(arrays[0].type), None, PADDING.get(name, 0)
        values, widths = arrays, {1}
        if self._is_list:
            # One chunk at a time: the bounds of all take 8 bytes a row.
            values, widths = [], set()
            for array in arrays:
                leaves, bounds = row_bounds(array)
                values.append(leaves)
                lengths = _lengths(array, bounds)
                widths |= {int(lengths.min()), int(lengths.max())}
        self.width = max(widths)
        self._values = values  # which keep the buffers alive
        self._bits = bool(pa.types.is_boolean(values[0].type))
        self._view, bases = _memory(values)
        if len(widths) > 1:
            # Rows of several lengths: 12 bytes a row say where each begins and how long it is.
            firsts, lengths = (np.empty(sum(map(len, arrays)), dtype) for dtype in (np.int64, np.int32))
            for array, start, base in zip(arrays, starts.tolist(), bases.tolist(), strict=True):
                rows, (_, bounds) = slice(start, start + len(array)), row_bounds(array)
                firsts[rows], lengths[rows] = bounds[:-1] + base, _lengths(array, bounds)
            self._firsts, self._lengths = torch.from_numpy(firsts), torch.from_numpy(lengths)
            if order is not None:
                self.width = int(self._lengths[order].max())
        # Row r of chunk c begins at element bases[c] + r * width.
        self.bases = (bases - starts * self.width).numpy()
        if self._is_list and self._firsts is None and self.width and not self._bits:
            # Rows of equal length are overlapping windows of memory, one of which starts at each element.
            self._view = self._view.as_strided((self._view.numel() - self.width + 1, self.width), (1, 1))

    @property
    def holds_bytes(self) -> bool:
        """Whether its values are bytes: any of them is a pixel."""
        return not self._bits and self._view.dtype == torch.uint8

    def read(self, places: Places) -> torch.Tensor:
        """Copies the rows at places ``[n]``: ``[n]``, or ``[n, width]`` of lists."""
        if self._firsts is not None:
            rows, column = places.tensors()[0], torch.arange(self.width)
            inside = column < self._lengths[rows].unsqueeze(-1)
            # Element 0 of the view always exists; what lies behind a chunk's last row may not.
            index = torch.where(inside, self._firsts[rows].unsqueeze(-1) + column, 0)
            value = self._gather(self._view, index.reshape(-1)).reshape(inside.shape)
            if value.dtype in _SIGNED:  # for which torch.where is not written
                value = value.long()
            return torch.where(inside, value, self._padding)
        if not self.width:
            return torch.empty(len(places.rows), 0)
        firsts = places.firsts(self.bases, self.width)
        if self._is_list and self._bits:
            firsts = firsts.unsqueeze(-1) + torch.arange(self.width)
        return self._gather(self._view, firsts)

    def _gather(self, view: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if self._bits:
            return (view[index >> 3] >> (index & 7) & 1).bool()
        signed = _SIGNED.get(view.dtype)  # torch does not index the larger unsigned types
        return (
            view.index_select(0, index) if signed is None else view.view(signed).index_select(0, index).view(view.dtype)
        )


def is_list(kind: pa.DataType) -> bool:
    """Says whether a type is one of Arrow's list types."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def row_bounds(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Opens lists, nested ones to the bottom.

    Returns:
        The values of the array's own rows, without a copy (``flatten`` copies where there are nulls), and the bounds of
        each row in them, int64 ``[rows + 1]``.

    Examples:
        >>> values, bounds = row_bounds(pa.array([[[1, 2], [3]], [[4]]]))
        >>> values.tolist(), bounds.tolist()
        ([1, 2, 3, 4], [0, 3, 4])
    """
    values, bounds = _open_lists(array)
    if is_list(values.type):
        values, inner = row_bounds(values)
        bounds = inner[bounds]
    return values, bounds


def null_rows(array: pa.Array, empty_lists: bool = False) -> np.ndarray:
    """Marks the rows that are null or hold a null, bool ``[rows]``.

    Args:
        array: a column's chunk.
        empty_lists: a list that is null counts as an empty one. (One of a fixed length cannot be empty.)

    Examples:
        >>> null_rows(pa.array([[1, None], None, [2]])).tolist(), null_rows(pa.array([[1, None], [2]])).tolist()
        ([True, True, False], [True, False])
    """
    if not _may_hold_nulls(array):
        return np.zeros(len(array), bool)
    nulls = np.zeros(len(array), bool) if empty_lists and not _is_fixed(array.type) else ~_valid(array)
    if is_list(array.type):
        values, bounds = _open_lists(array)
        inner = np.concatenate([[0], null_rows(values).cumsum()])
        nulls |= inner[bounds[1:]] > inner[bounds[:-1]]
    return nulls


def ragged_rows(array: pa.Array) -> np.ndarray:
    """Marks the rows of nested lists that are no rectangle, bool ``[rows]``; rows may differ from one another.

    Examples:
        >>> ragged_rows(pa.array([[[1, 2], [3]], [[4]]])).tolist()
        [True, False]
    """
    ragged = np.zeros(len(array), bool)
    values, bounds = _open_lists(array)
    while is_list(values.type):
        inside, inner = _open_lists(values)
        lengths = np.diff(inner)
        changes = np.flatnonzero(lengths[1:] != lengths[:-1]) + 1  # list k has another length than list k - 1
        row = np.searchsorted(bounds, changes, side="right") - 1
        ragged[row[bounds[row] != changes]] = True  # and both are in one row
        values, bounds = inside, inner[bounds]
    return ragged


def _open_lists(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    if _is_fixed(array.type):
        size, rows = array.type.list_size, len(array)
        return array.values.slice(array.offset * size, rows * size), np.arange(rows + 1) * size
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]


def _may_hold_nulls(array: pa.Array) -> bool:
    """Says so from Arrow's counts, without a look at the values; a list's count covers those of other rows too."""
    while not array.null_count and is_list(array.type):
        array = array.values
    return bool(array.null_count)


def _lengths(array: pa.Array, bounds: np.ndarray) -> np.ndarray:
    """Returns the length of each list; a null is an empty one, whatever stands in its place.

    Examples:
        >>> lists = pa.ListArray.from_arrays([0, 2, 3], [1, 2, 3], mask=pa.array([True, False]))
        >>> _lengths(lists, row_bounds(lists)[1]).tolist()
        [0, 1]
    """
    return np.diff(bounds) * _valid(array) if array.null_count else np.diff(bounds)


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))


def _valid(array: pa.Array) -> np.ndarray:
    return np.asarray(array.is_valid()) if array.null_count else np.ones(len(array), bool)


def _memory(arrays: list[pa.Array]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns one view that spans all the arrays, and the element at which each begins (of booleans, the bit)."""
    bits = pa.types.is_boolean(arrays[0].type)
    dtype = np.dtype(np.uint8 if bits else arrays[0].type.to_pandas_dtype())
    # In eighths of an element for booleans; an empty array may have no buffer, and its place is never read.
    per_item = 8 if bits else 1
    filled = [
        (array.buffers()[1].address, array.offset, array.offset + len(array)) if len(array) else None
        for array in arrays
    ]
    begins = [address + first // per_item * dtype.itemsize for address, first, _ in filter(None, filled)]
    if not begins:
        return torch.zeros(1), torch.zeros(len(arrays), dtype=torch.int64)
    lowest = min(begins)
    if any((address - lowest) % dtype.itemsize for address in begins):
        raise ValueError("DatasetStore.from_dataset: Arrow buffers must be aligned. Write the data set anew.")
    size = max(address + -(-end // per_item) * dtype.itemsize for address, _, end in filter(None, filled)) - lowest
    view = torch.frombuffer(
        (ctypes.c_char * size).from_address(lowest), dtype=torch.from_numpy(np.empty(0, dtype)).dtype
    )
    bases = [0 if item is None else (item[0] - lowest) // dtype.itemsize * per_item + item[1] for item in filled]
    return view, torch.tensor(bases)
