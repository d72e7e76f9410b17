"""Images in data sets and records: files, PIL images and arrays, all read as one row of pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE = "observation_image"
"""The column that holds images."""

_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
"""Pillow's modes that are read as they are."""


class UnreadableImageError(ValueError):
    """Says which row of a table holds the image, for whoever knows what the user calls that row."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


class EncodedImages:
    """A column of image files, inside the table or beside it; each is decoded when it is read.

    Args:
        arrays: the chunks of the column, structs of ``bytes``, ``path`` or both.
        starts: the first row of each chunk, int64.
        mode: Pillow's mode that all are converted to; by default grey, RGB and RGBA images stay what they are.

    Examples:
        >>> file = BytesIO()
        >>> pillow().new("RGB", (4, 2), (1, 2, 3)).save(file, "png")
        >>> column = EncodedImages([pa.array([{"bytes": file.getvalue()}])], torch.tensor([0]))
        >>> column.read(torch.tensor([0]), torch.tensor([0]))[:, :6].tolist()
        [[1, 2, 3, 1, 2, 3]]
    """

    def __init__(self, arrays: list[pa.StructArray], starts: torch.Tensor, mode: str | None = None) -> None:
        present = {field.name for field in arrays[0].type if not pa.types.is_null(field.type)}
        self._bytes, self._paths = (
            {chunk: array.field(name) for chunk, array in enumerate(arrays) if name in present}
            for name in ("bytes", "path")
        )
        self._starts, self._mode = starts.tolist(), mode

    def read(self, rows: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """Decodes rows ``[n]`` of chunks ``[n]``: uint8 ``[n, widest]``, each image once however often it is asked for.

        Raises:
            UnreadableImageError: an image cannot be decoded, or has more than 8 bits a channel.
        """
        images, inverse = self._each(rows, chunk, lambda image: pixels(image, self._mode))
        decoded = torch.zeros(len(images), max(map(len, images), default=0), dtype=torch.uint8)
        for row, image in zip(decoded, images, strict=True):
            row[: len(image)] = image
        return decoded[inverse]

    def sizes(self, rows: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """Reads the number of values of images from their headers alone, int64 ``[n]``; raises as :meth:`read`."""
        sizes, inverse = self._each(
            rows, chunk, lambda image: image.width * image.height * _CHANNELS[_eight_bits(self._mode or image.mode)]
        )
        return torch.tensor(sizes, dtype=torch.int64)[inverse]

    def _each(
        self, rows: torch.Tensor, chunk: torch.Tensor, read: Callable[[Image], Any]
    ) -> tuple[list[Any], torch.Tensor]:
        """Opens each different row once; returns the results and the place of each row among them."""
        # A step and the next one ask for the same image.
        rows_once, first, inverse = np.unique(rows.numpy(), return_index=True, return_inverse=True)
        results = []
        for row, at in zip(rows_once.tolist(), chunk.numpy()[first].tolist(), strict=True):
            place = row - self._starts[at]
            encoded = self._bytes[at][place].as_buffer() if at in self._bytes else None
            results.append(_open(self._paths[at][place].as_py() if encoded is None else BytesIO(encoded), read, row))
        return results, torch.from_numpy(inverse)


def null_images(array: pa.StructArray) -> np.ndarray:
    """Marks the rows that have neither bytes nor path, bool ``[rows]``."""
    empty = array.is_null()
    fields = [array.field(field.name) for field in array.type if field.name in ("bytes", "path")]
    without = fields[0].is_null() if len(fields) == 1 else pc.and_(*(field.is_null() for field in fields))
    return np.asarray(pc.or_(empty, without))


def is_encoded(kind: pa.DataType) -> bool:
    """Says whether a column's type is that of image files: a struct of ``bytes``, ``path`` or both.

    Examples:
        >>> is_encoded(pa.struct({"path": pa.string()})), is_encoded(pa.list_(pa.uint8()))
        (True, False)
    """
    return pa.types.is_struct(kind) and bool({"bytes", "path"} & {field.name for field in kind})


def read_image(given: Any, where: str, row: int) -> torch.Tensor:
    """Turns what a record holds into pixels.

    Args:
        given: a PIL image, ``{"bytes": ...}`` or ``{"path": ...}`` of a file, or an array or nested list of integers in
            0..255 or floats in 0..1.
        where: the caller, for errors.
        row: the record's row, for errors.

    Returns:
        uint8 ``[P]``, in the order of the array's elements (for a PIL image: height, width, channel).

    Raises:
        TypeError: none of these.
        ValueError: an image that cannot be decoded, rows of several lengths, or a number out of range.

    Examples:
        >>> read_image([[0.0, 1.0], [0.5, 0.25]], "here", 0).tolist()
        [0, 255, 128, 64]
    """
    rule = f"{where}: column {IMAGE!r} must hold"
    try:
        if isinstance(given, Mapping):
            encoded, path = given.get("bytes"), given.get("path")
            if encoded is None and path is None:
                raise ValueError(f"neither bytes nor path but {sorted(given)}")
            image: torch.Tensor = _open(path if encoded is None else BytesIO(encoded), pixels, row)
            return image
        if hasattr(given, "getbands"):  # a PIL image, without an import of Pillow
            return pixels(given)
    except ValueError as error:
        raise ValueError(f"{rule} readable images, got {error} in row {row}. Replace it.") from error
    try:
        # Lists go through NumPy, which says what is ragged, and keeps integers and floats apart as torch does.
        value = torch.as_tensor(np.asarray(given) if isinstance(given, list | tuple) else given)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(given).__name__} ({error})"
        raise TypeError(f"{rule} images or arrays of numbers, got {got} in row {row}. Convert it.") from error
    if value.is_complex() or value.dtype == torch.bool or not value.ndim:
        got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise TypeError(f"{rule} images or arrays of numbers, got {got} in row {row}. Convert it.")
    value = value.reshape(1, -1)
    check_pixels(value, where, row)
    return to_pixels(value).squeeze(0)


def check_pixels(value: torch.Tensor, where: str, first_row: int = 0, part: str = "") -> None:
    """Raises at the first row of ``[rows, P]`` with a number that is no pixel: integers in 0..255, floats in 0..1."""
    if value.dtype == torch.uint8 or not value.numel():
        return
    value = value.float() if value.is_floating_point() else value.long()
    most = 1 if value.is_floating_point() else 255
    inside = (value >= 0) & (value <= most)
    if not inside.all():
        row, column = (~inside).nonzero()[0].tolist()
        kind, remedy = ("float", "Scale it, or cast it to uint8") if most == 1 else ("integer", "Fix the data")
        raise ValueError(
            f"{where}: column {IMAGE!r} must lie in [0, {most}] where its numbers are {kind}s, got "
            f"{value[row, column].item()} in row {first_row + row}{part}. {remedy}."
        )


def to_pixels(value: torch.Tensor) -> torch.Tensor:
    """Brings checked numbers of any type to uint8: floats in 0..1 are scaled to 0..255 and rounded.

    Examples:
        >>> to_pixels(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [0, 128, 255]
    """
    return ((value.float() * 255).round() if value.is_floating_point() else value).to(torch.uint8)


def pixels(image: Image, mode: str | None = None) -> torch.Tensor:
    """Reads a PIL image, turned upright, as uint8 ``[height * width * channels]``.

    Args:
        image: of any mode of at most 8 bits a channel; palettes and colour spaces other than grey become RGB.
        mode: Pillow's mode to convert it to.

    Raises:
        ValueError: it has more than 8 bits a channel.

    Examples:
        >>> pixels(pillow().new("L", (2, 1), 7)).tolist()
        [7, 7]
    """
    from PIL import ExifTags, ImageOps

    target = _eight_bits(mode or image.mode)
    if image.getexif().get(ExifTags.Base.Orientation) is not None:
        image = ImageOps.exif_transpose(image)
    return torch.from_numpy(np.array(image if image.mode == target else image.convert(target)).reshape(-1))


def pillow() -> ModuleType:
    """Returns ``PIL.Image``.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            "DatasetStore: image files must be read by Pillow, which is not installed. Run `pip install "
            '"torchrl-mouse[images]"`, or store images as arrays.'
        ) from error
    return PIL.Image


def _open(file: Any, read: Callable[[Image], Any], row: int) -> Any:
    opener = pillow()
    try:
        with opener.open(file) as image:
            return read(image)
    except Exception as error:  # Pillow's readers raise errors of many kinds.
        raise UnreadableImageError(row, f"{type(error).__name__}: {error}") from error


def _eight_bits(mode: str) -> str:
    """The mode that an image of this mode is read in."""
    if mode.startswith(("I", "F")):
        raise ValueError(f"mode {mode!r}, which has more than 8 bits a channel")
    return mode if mode in _CHANNELS else "L" if mode == "1" else "RGB"
