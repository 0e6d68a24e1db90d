"""Images: exact decoding and resizing for all readers of images."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dmtg_core.input_spec import InputSpec
from pipelines.data.sources.base import BadSampleError
from pipelines.storage import Location

# mean and standard deviation of ImageNet's photographs for each channel, in the stored units 0..255
_IMAGE_MEAN = (123.675, 116.28, 103.53)
_IMAGE_STD = (58.395, 57.12, 57.375)
_GREY = (127, 127, 127)

# the error of Pillow for a damaged file depends on the format and the position of the damage
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


def image_input(
    size: int | tuple[int, int], mean: tuple[float, ...] = _IMAGE_MEAN, std: tuple[float, ...] = _IMAGE_STD
) -> InputSpec:
    """The input of a network that reads RGB images, with mean and std of values 0 to 255.

    Args:
        size: Height and width; a number if they are the same.
        mean, std: One value for each channel.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return InputSpec("image", (height, width, 3), "uint8", mean, std)


def read_image(location: Location) -> Image.Image:
    """An image with all pixels decoded.

    Raises:
        BadSampleError: When the file is missing or cannot be decoded completely. Errors of the storage are not
            errors of the sample and are passed on.
    """
    try:
        data = location.read_bytes()
    except (FileNotFoundError, PermissionError) as error:
        raise BadSampleError(f"cannot open the file {location}: {read_problem(error)}") from error
    return decode_image(data, str(location))


def decode_image(data: bytes, name: str) -> Image.Image:
    """`read_image` of bytes; `name` is for the message."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()  # `open` reads only the header; a truncated file raises here
        ImageOps.exif_transpose(image, in_place=True)  # a camera stores its orientation as metadata
    except UnidentifiedImageError as error:
        raise BadSampleError(f"not an image: {name}") from error
    except _DAMAGE as error:
        raise BadSampleError(f"damaged image {name}: {error}") from error
    return image


def fitted(
    image: Image.Image, size: int, how: str, *, interpolation: str = "bilinear", share: float = 1.0
) -> np.ndarray:
    """An RGB image as uint8 (size, size, 3).

    Args:
        image: The image.
        size: Height and width.
        how: "pad", "crop" or "stretch"; see `ImageOptions`.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        share: Side of the part that "crop" keeps ÷ the shorter side of the image.
    """
    box, smooth = (size, size), Image.Resampling[interpolation.upper()]
    if how == "pad":
        image = ImageOps.pad(image, box, smooth, color=_GREY)
    elif how == "crop":
        image = ImageOps.fit(image, box, smooth, bleed=(1 - share) / 2)
    else:
        image = image.resize(box, smooth)
    return np.asarray(image)


def read_problem(error: OSError) -> str:
    """Why a file cannot be opened."""
    return "no such file" if isinstance(error, FileNotFoundError) else "permission denied"


def rgb(image: Image.Image, name: str) -> Image.Image:
    """The image as 8-bit RGB; transparent parts are shown on white.

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
    """The values of a 16-bit image with one channel, unchanged: uint16 (H, W).

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
    """Nearest neighbour at pixel centres: the result has only values of the input.

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
    """Area averaging for fewer pixels, bilinear interpolation for more, in floating point.

    Args:
        values: (H, W) or (H, W, C) of any dtype; 16-bit values keep their 16 bits.
        size: Height and width of the result.

    Returns:
        float32 (size, size) or (size, size, C).
    """
    if values.ndim == 3:
        return np.stack([resize_numbers(values[..., c], size) for c in range(values.shape[2])], axis=2)
    # Pillow averages 8-bit and 32-bit float images, but clips 16-bit images
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((size, size), _smooth(picture, size)))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """1 where `resize_numbers` uses only marked pixels and no part of an unmarked pixel.

    Args:
        mask: Bool (H, W).
        size: Height and width of the result.

    Returns:
        uint8 (size, size).
    """
    return (resize_numbers(mask, size) > 0.9999).astype(np.uint8)


def resize_rgb(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image as uint8 (size, size, 3): area averaging for fewer pixels, bilinear interpolation for more."""
    return np.asarray(image.resize((size, size), _smooth(image, size)))


def _smooth(image: Image.Image, size: int) -> Image.Resampling:
    return Image.Resampling.BOX if size < min(image.size) else Image.Resampling.BILINEAR


def to_integers(values: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Round to the nearest integer, and clip to the range of the type."""
    limits = np.iinfo(dtype)
    return np.rint(values).clip(limits.min, limits.max).astype(dtype)
