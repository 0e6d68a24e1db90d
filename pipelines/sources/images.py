"""What the readers of pictures share: label tables, splits by hash, exact decoding and resizing."""

from __future__ import annotations

import csv
import hashlib
import io
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dmtg_core.tasks import InputSpec
from pipelines.errors import UserError
from pipelines.sources import BadSampleError
from pipelines.storage import Location

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {**{name: name for name in SPLITS}, "valid": "val", "validation": "val", "dev": "val"}

# mean and standard deviation of ImageNet's photographs, a channel, in the 0..255 units that are stored
_IMAGE_MEAN = (123.675, 116.28, 103.53)
_IMAGE_STD = (58.395, 57.12, 57.375)

# what Pillow raises for a damaged file differs by format and by where the damage is
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Row:
    """One row of a table: the line it ends on, and its cells by column, stripped of surrounding space."""

    line: int
    cells: dict[str, str]


def image_input(size: int) -> InputSpec:
    """The input of a network that reads RGB images of `size` × `size`."""
    return InputSpec("image", (size, size, 3), "uint8", _IMAGE_MEAN, _IMAGE_STD)


def check_root(root: Location, layout: str) -> None:
    """Stop where there is no folder.

    Args:
        root: The folder.
        layout: What it should hold, for the message.

    Raises:
        UserError: With the layout that is expected.
    """
    if not root.is_dir():
        raise UserError(
            "the folder of the data set does not exist",
            where=str(root),
            remedy=f"correct source.root; expected there: {layout}",
        )


def read_table(location: Location, columns: Sequence[str]) -> list[Row]:
    r"""A CSV file with a header. Lines may end with `\n`, `\r\n` or `\r` alone.

    Args:
        location: The file.
        columns: Columns that must be there.

    Raises:
        UserError: When the file is missing, empty, not CSV in UTF-8, or lacks a column.
    """
    try:
        text = location.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except FileNotFoundError as error:
        raise UserError(
            "the table of labels does not exist", where=str(location), remedy="correct its path"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"not a CSV file in UTF-8: {error}", where=str(location), remedy="save it as UTF-8 CSV"
        ) from error
    if len(lines) < 2:
        raise UserError(
            "the table of labels has no rows", where=str(location), remedy="give a header line and rows"
        )
    header = [name.strip() for name in lines[0][1]]
    _check_header(header, columns, location)
    return [_row(header, line, cells, location) for line, cells in lines[1:]]


def _check_header(header: list[str], columns: Sequence[str], location: Location) -> None:
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(
            f"no column {', '.join(missing)}",
            where=str(location),
            remedy=f"use the columns there are: {', '.join(header)}",
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"column {', '.join(twice)} is there more than once", where=str(location), remedy="rename one"
        )


def _row(header: list[str], line: int, cells: list[str], location: Location) -> Row:
    if len(cells) != len(header):
        raise UserError(
            f"line {line} has {len(cells)} cells, expected {len(header)}",
            where=str(location),
            remedy="correct the line; a cell with a comma needs quotes",
        )
    return Row(line, dict(zip(header, (cell.strip() for cell in cells), strict=True)))


def check_unique(ids: Sequence[str], where: str) -> None:
    """Stop where an id occurs twice.

    Raises:
        UserError: With up to five of the ids.
    """
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise UserError(
            f"{len(twice)} ids occur more than once: {', '.join(twice[:5])}{more}",
            where=where,
            remedy="keep one row an id",
        )


def split_name(value: str) -> str | None:
    """The split that a usual spelling stands for ("valid", "dev", …), None for any other word."""
    return _SPLIT_NAMES.get(value.lower())


def hash_split(sample_id: str) -> str:
    """70 % train, 15 % val, 15 % test, by the hash of the id alone: adding samples moves none of the others."""
    u = int(hashlib.sha256(sample_id.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if u < 0.70 else "val" if u < 0.85 else "test"


def read_image(location: Location) -> Image.Image:
    """A picture with all of its pixels decoded.

    Raises:
        BadSampleError: When the file is missing or cannot be decoded to its end. A storage that fails is no
            fault of the sample, so other errors pass through.
    """
    try:
        data = location.read_bytes()
    except (FileNotFoundError, PermissionError) as error:
        raise BadSampleError(f"cannot open the file {location}: {_reason(error)}") from error
    return decode_image(data, str(location))


def decode_image(data: bytes, name: str) -> Image.Image:
    """`read_image` of bytes that are there already; `name` is for the message."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()  # `open` reads the header alone: a file that is cut off shows here
        ImageOps.exif_transpose(image, in_place=True)  # a camera writes how it was held beside the pixels
    except UnidentifiedImageError as error:
        raise BadSampleError(f"not an image: {name}") from error
    except _DAMAGE as error:
        raise BadSampleError(f"damaged image {name}: {error}") from error
    return image


def _reason(error: OSError) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else "not allowed"


def rgb(image: Image.Image, name: str) -> Image.Image:
    """The picture as 8-bit RGB; transparent parts are laid over white.

    Raises:
        BadSampleError: For pixels of more than 8 bits, which a conversion would clip to white.
    """
    if image.mode.startswith(("I", "F")):
        raise BadSampleError(f"{_bits(image)} file, expected an 8-bit image: {name}")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def sixteen_bit(image: Image.Image, name: str) -> np.ndarray:
    """The values of a 16-bit single-channel picture, unchanged: uint16 (H, W).

    Raises:
        BadSampleError: For any other depth or number of channels.
    """
    if image.mode != "I;16":
        raise BadSampleError(f"{_bits(image)} file, expected 16-bit with one channel: {name}")
    return np.asarray(image).astype(np.uint16)


def _bits(image: Image.Image) -> str:
    depth = "16-bit" if image.mode.startswith("I;16") else "32-bit" if image.mode in ("I", "F") else "8-bit"
    return f"{depth} {image.mode}" if len(image.getbands()) > 1 else depth


def resize_ids(values: np.ndarray, size: int) -> np.ndarray:
    """Nearest neighbour at pixel centres: no value arises that was not there.

    Args:
        values: (H, W) or (H, W, C).
        size: Height and width of the result.

    Returns:
        (size, size) or (size, size, C) in the dtype of `values`.
    """
    rows, columns = (
        np.minimum((np.arange(size) + 0.5) * n / size, n - 1).astype(np.intp) for n in values.shape[:2]
    )
    return np.ascontiguousarray(values[rows[:, None], columns])


def resize_numbers(values: np.ndarray, size: int) -> np.ndarray:
    """Area averaging to fewer pixels, bilinear to more, in floating point.

    Args:
        values: (H, W) or (H, W, C) of any dtype; 16-bit values keep their 16 bits.
        size: Height and width of the result.

    Returns:
        float32 (size, size) or (size, size, C).
    """
    if values.ndim == 3:
        return np.stack([resize_numbers(values[..., c], size) for c in range(values.shape[2])], axis=2)
    # Pillow averages 8-bit and 32-bit float pictures; its 16-bit mode it would clip
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((size, size), _smooth(picture, size)))


def resize_rgb(image: Image.Image, size: int) -> np.ndarray:
    """An RGB picture as uint8 (size, size, 3): area averaging to fewer pixels, bilinear to more."""
    return np.asarray(image.resize((size, size), _smooth(image, size)))


def _smooth(image: Image.Image, size: int) -> Image.Resampling:
    return Image.Resampling.BOX if size < min(image.size) else Image.Resampling.BILINEAR


def to_integers(values: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Round to the nearest integer and stop at the ends of the type instead of wrapping round."""
    limits = np.iinfo(dtype)
    return np.rint(values).clip(limits.min, limits.max).astype(dtype)
