"""Decode image bytes to pixels. This is the only decoder, so that prepare checks exactly what training will see.

simplejpeg decodes sound JPEGs, and Pillow all the rest. Pillow gives the same pixels, but takes twice as long: it reads headers
in Python, and its pixels have a long way to an array. torchvision gives the same pixels too, but its decoders are deprecated
since 0.29, and its import takes several seconds in every data process. All release the GIL while they decode, but Pillow not
for WebP; there, Ray's processes help and threads do not.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
KINDS = "JPEG, PNG, WebP, BMP or TIFF"
"""Names of the formats, for messages."""
OTHERS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP of a kind that cannot be read",
    b"II*\0": "a TIFF of a kind that cannot be read (write it as 8-bit RGB)",
    b"MM\0*": "a TIFF of a kind that cannot be read (write it as 8-bit RGB)",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a git-LFS pointer, not the image itself (git lfs pull fetches it)",
    b"<": "an HTML, XML or SVG text",
}
MAX_PIXELS = 178_956_970
"""Default limit of an image's pixels, which is Pillow's own: larger images may be decompression bombs."""
# Pillow's own limit applies to the whole process, and warns at half of it. ``max_pixels`` is checked for every image instead.
Image.MAX_IMAGE_PIXELS = None
FULL_RANGE = (0, 65535)
TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transpose that makes the image upright. 5 to 8 swap height and width."""


class OtherFormatError(ValueError):
    """The bytes are not an image of a kind that is read."""


class TooLargeError(ValueError):
    """The image has more pixels than allowed."""


@dataclass(frozen=True)
class Reading:
    """How the images of a split become pixels, where the files themselves do not determine it."""

    upright: bool = True
    """Apply EXIF orientation, unless height and width show whether the boxes were drawn on the upright image."""
    value_range: tuple[int, int] = FULL_RANGE
    """The values of 16-bit images that become 0 and 255; values outside are clipped."""


@dataclass(frozen=True)
class ImageFacts:
    """The properties of an image file that matter for reading it."""

    size: tuple[int, int]
    """Height and width as stored, in pixels."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 if there is none."""
    values: tuple[int, int] | None
    """The range that holds 99.8 % of a 16-bit image's values; None for other images."""
    pages: int = 1
    """Pages of a TIFF, of which the first is read."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the upright image, in pixels."""
        return _upright(self.size, self.orientation)


def decode(
    data: bytes,
    reading: Reading | None = None,
    size: tuple[int, int] | None = None,
    max_pixels: int | None = MAX_PIXELS,
    least: tuple[int, int] | None = None,
) -> Tensor:
    """Decode an image file to uint8 (3, H, W), RGB, a view of interleaved memory with 3 or 4 bytes a pixel.

    Grey, palette and CMYK images become RGB, alpha is dropped, and only the first frame or page is read. The orientation of a
    TIFF belongs to its own header and is always applied.

    Args:
        reading: how to treat EXIF orientation and 16-bit values; None = apply the orientation and keep the high byte.
        size: height and width that the image must have; if they differ, they decide whether it is turned upright.
        max_pixels: the largest image that is read; None = any.
        least: height and width that are enough: a sound JPEG of twice that size or more, which is not to be turned, is decoded
            to half of its size or less, but no less than this. None = whole images.

    Raises:
        OtherFormatError: the bytes are not such an image.
        TooLargeError: the image has more than ``max_pixels``.
        ValueError: the image is damaged or truncated, or does not have ``size``.
    """
    reading = reading or Reading()
    pixels = _sound_jpeg(data, reading, size, max_pixels, least)
    if pixels is None:
        pixels = _any_image(data, reading, size, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)[:3]


def _sound_jpeg(
    data: bytes, reading: Reading, size: tuple[int, int] | None, max_pixels: int | None, least: tuple[int, int] | None
) -> NDArray[np.uint8] | None:
    """Return the pixels of a JPEG, (H, W, 4); None if Pillow has to decode the image: another format, to be turned, damaged.

    The fourth byte has no meaning. It costs nothing here, and makes resizing faster.
    """
    if not data.startswith(b"\xff\xd8") or (reading.upright and _has_orientation(data)):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        as_wanted = size in (None, (height, width)) and (max_pixels is None or height * width <= max_pixels)
        if not as_wanted or colours not in ("YCbCr", "RGB", "Gray"):
            return None
        if least is None or height < 2 * least[0] or width < 2 * least[1]:
            return simplejpeg.decode_jpeg(data, "RGBX")
        return simplejpeg.decode_jpeg(data, "RGBX", min_height=least[0], min_width=least[1], min_factor=2)
    except (ValueError, MemoryError):  # Pillow forgives some damage, and says more about the rest
        return None


def _any_image(data: bytes, reading: Reading, size: tuple[int, int] | None, max_pixels: int | None) -> NDArray[np.uint8]:
    """Return the pixels of an image of any kind, (H, W, 3), decoded by Pillow. Raises the errors of ``decode``."""
    image = _open(data, max_pixels)
    try:
        values = _deep_values(image, data)
        rgb = image if values is None else Image.fromarray(_to_bytes(values, reading.value_range))
        rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")  # which copies even an RGB image
        stored = (image.height, image.width)
        if reading.upright or (size is not None and size != stored):
            rgb = _turned(rgb, _orientation(image, data), size, reading.upright)
        pixels = np.array(rgb)  # a copy, because torch needs writable memory
    except (OSError, SyntaxError, ValueError, MemoryError) as error:  # SyntaxError: raised by Pillow for a broken PNG
        raise ValueError(f"cannot be decoded ({error})") from error
    if size is not None and pixels.shape[:2] != size:
        raise ValueError(f"has {stored[1]} x {stored[0]} pixels, should have {size[1]} x {size[0]}")
    return pixels


def inspect(data: bytes, max_pixels: int | None = MAX_PIXELS) -> ImageFacts:
    """Return the properties of an image file; only 16-bit images are decoded for them. Raises the same errors as ``decode``."""
    image = _open(data, max_pixels)
    try:
        orientation, values = _orientation(image, data), _deep_values(image, data)
        between = None if values is None else tuple(int(value) for value in np.quantile(values, (0.001, 0.999)))
        pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    return ImageFacts((image.height, image.width), orientation, cast("tuple[int, int] | None", between), pages)


def measure(data: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return height and width as stored, and of the upright image, from a file's header. Raises the same errors as ``decode``.

    ``data`` may end after the header if the file is a JPEG.
    """
    image = _open(data, None)
    stored = image.height, image.width
    return stored, _upright(stored, _orientation(image, data))


def thumbnail(data: bytes, side: int) -> NDArray[np.uint8]:
    """Return the image as stored, in grey and scaled to ``side`` x ``side`` pixels. Raises the same errors as ``decode``."""
    image = _open(data, None)
    try:
        image.draft("L", (8 * side, 8 * side))  # a JPEG is decoded at a fraction of its size
        values = _deep_values(image, data)
        grey = (image if values is None else Image.fromarray(_to_bytes(values, FULL_RANGE))).convert("L")
        return np.asarray(grey.resize((side, side), Image.Resampling.BOX))
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size if orientation < 5 else size[::-1]


def _open(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise OtherFormatError(f"not a {KINDS}{_other(data)}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        size = f"{image.width * image.height / 1e6:.1f} megapixels ({image.width} x {image.height})"
        raise TooLargeError(f"has {size}, more than the {max_pixels / 1e6:.1f} that are allowed")
    image.decodermaxblock = len(data)  # Pillow would decode pieces of 64 KB, copying the rest each time
    if image.format == "TIFF":
        _prepare_tiff(image)
    return image


def _prepare_tiff(image: ImageFile.ImageFile) -> None:
    """Refuse values that have no one meaning as 8 bits, and let Pillow turn the image, as it does whenever it reads a TIFF."""
    arguments = image.tile[0][3] if image.tile else ""
    raw = str(arguments[0]) if isinstance(arguments, tuple) else str(arguments)
    if image.mode in ("I", "F") or (";16" in raw and not image.mode.startswith("I")):
        raise OtherFormatError(f"a TIFF whose values are not 8-bit, or 16-bit grey, but {raw!r} in Pillow's terms")
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if turned:
            image.load()
    except Exception as error:  # a damaged directory, for which Pillow raises many kinds of errors
        raise ValueError(f"cannot be decoded ({error})") from error


def _other(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return " but a HEIC, AVIF or video file"
    names = (name for start, name in OTHERS.items() if data.startswith(start))
    return next((f" but {name}" for name in names), "" if data else " but an empty file")


def _has_orientation(data: bytes) -> bool:
    header = _jpeg_header(data)
    return any(name in header for name in (b"Exif", b"Orientation")) and _orientation(_open(data, None), data) != 1


def _jpeg_header(data: bytes) -> bytes:
    """Return a JPEG's segments before its pixels, which are most of the file; all of the file if they are damaged."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data[:place] if data[place : place + 2] == b"\xff\xda" else data


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    # Pillow decodes a whole PNG to look for EXIF after its pixels, but almost no PNG has any.
    if image.format == "TIFF":  # Pillow has turned it
        return 1
    if image.format == "PNG" and not any(name in data for name in (b"eXIf", b"Raw profile type", b"Orientation")):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, for which Pillow raises many kinds of errors; the pixels may be intact
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def _turned(image: Image.Image, orientation: int, size: tuple[int, int] | None, upright: bool) -> Image.Image:
    if size is not None and orientation >= 5 and image.width != image.height:
        upright = size == (image.width, image.height)
    return image.transpose(TURNS[orientation]) if upright and orientation in TURNS else image


def _deep_values(image: ImageFile.ImageFile, data: bytes) -> NDArray[Any] | None:
    """Return the values of a 16-bit image, (H, W) grey or (H, W, 3) RGB; None, without decoding, if it has fewer bits."""
    if image.mode.startswith("I"):
        return np.asarray(image, dtype=np.uint32)
    kind = image.tile[0][3] if image.tile else None
    if kind in ("RGB;16B", "RGBA;16B"):  # Pillow keeps one byte of each value: the high one as 16B, the low one as 16L
        high, low = (_as_stored(data, kind.replace("16B", which))[..., :3] for which in ("16B", "16L"))
    elif kind == "LA;16B":  # grey and alpha, two bytes each
        both = _as_stored(data, "RGBA")
        high, low = both[..., 0], both[..., 1]
    else:
        return None
    return high.astype(np.uint16) << 8 | low


def _as_stored(data: bytes, kind: str) -> NDArray[np.uint8]:
    """Return the pixels unpacked as if they were stored as ``kind``, one of Pillow's raw modes."""
    image = cast(Any, _open(data, None))
    image.tile = [(*image.tile[0][:3], kind)]
    return np.asarray(image)


def _to_bytes(values: NDArray[Any], value_range: tuple[int, int]) -> NDArray[np.uint8]:
    """Map the range to 0..255 in 256 equal steps; for the full range this is the high byte."""
    low, high = value_range
    scaled = (values.astype(np.int64) - low) * 256 // (high - low + 1)
    return scaled.clip(0, 255).astype(np.uint8)
