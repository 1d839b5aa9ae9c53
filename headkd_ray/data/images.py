"""Encoded image bytes -> pixels. The one place that decodes, so that prepare checks exactly what training will see.

Pillow, although torchvision decodes too (and gives the same pixels): its decoders are deprecated since 0.29, and importing it
takes several seconds, which every data process would pay, while Pillow costs 0.1 s and decodes a photo 0.3 ms slower. Pillow
releases the GIL while it decodes JPEG and PNG, but not WebP: there, threads do not help; Ray's processes do.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
OTHERS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a git-LFS pointer, not the image itself (git lfs pull fetches it)",
    b"<": "an HTML, XML or SVG text",
}
MAX_PIXELS = 178_956_970
"""The largest image that is read unless another limit is given, as Pillow's own: beyond it may be a decompression bomb."""
# Pillow's own limit is a setting of the whole process, and warns at half of it. Every image here meets ``max_pixels`` instead.
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
"""EXIF orientation -> what makes the image upright. 5 to 8 exchange height and width."""


class OtherFormatError(ValueError):
    """The bytes are not a JPEG, PNG or WebP."""


class TooLargeError(ValueError):
    """The image has more pixels than allowed."""


@dataclass(frozen=True)
class Reading:
    """How the images of a split become pixels, where the files leave it open."""

    upright: bool = True
    """Apply EXIF orientation. Where height and width tell whether the boxes were drawn on the upright image, they decide."""
    value_range: tuple[int, int] = FULL_RANGE
    """Values of 16-bit images that become 0 and 255; those outside are clipped."""


@dataclass(frozen=True)
class ImageFacts:
    """What an image file says about itself."""

    size: tuple[int, int]
    """Height and width as stored, pixels."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 if there is none."""
    values: tuple[int, int] | None
    """Between which values 99.8 % of a 16-bit image's lie; None for other images."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        return self.size if self.orientation < 5 else self.size[::-1]


def decode(
    data: bytes, reading: Reading | None = None, size: tuple[int, int] | None = None, max_pixels: int | None = MAX_PIXELS
) -> Tensor:
    """Pixels of a JPEG, PNG or WebP: uint8 (3, H, W), RGB, a view of interleaved memory (H, W, 3).

    Grey, palette and CMYK images become RGB, alpha is dropped, an animation gives its first frame.

    Args:
        reading: what to do about EXIF orientation and 16-bit values; None = apply it, and keep their high byte.
        size: height and width that the image must have; decides whether it is turned where the two differ.
        max_pixels: the largest image that is read; None = any.

    Raises:
        OtherFormatError: the bytes are not such an image.
        TooLargeError: more than ``max_pixels``.
        ValueError: damaged or cut off, or not of ``size``.
    """
    reading, image = reading or Reading(), _open(data, max_pixels)
    try:
        values = _deep_values(image, data)
        rgb = image if values is None else Image.fromarray(_to_bytes(values, reading.value_range))
        rgb, stored = rgb.convert("RGB"), (image.height, image.width)
        if reading.upright or (size is not None and size != stored):
            rgb = _turned(rgb, _orientation(image, data), size, reading.upright)
        pixels = np.array(rgb)  # a copy: torch wants writable memory
    except (OSError, SyntaxError, ValueError, MemoryError) as error:  # SyntaxError: Pillow's for a broken PNG
        raise ValueError(f"cannot be decoded ({error})") from error
    if size is not None and pixels.shape[:2] != size:
        raise ValueError(f"has {stored[1]} x {stored[0]} pixels, should have {size[1]} x {size[0]}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def inspect(data: bytes, max_pixels: int | None = MAX_PIXELS) -> ImageFacts:
    """What the file says about itself; only 16-bit images are decoded for it. Raises as ``decode`` does."""
    image = _open(data, max_pixels)
    try:
        orientation, values = _orientation(image, data), _deep_values(image, data)
        between = None if values is None else tuple(int(value) for value in np.quantile(values, (0.001, 0.999)))
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    return ImageFacts((image.height, image.width), orientation, cast("tuple[int, int] | None", between))


def _open(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise OtherFormatError(f"not a JPEG, PNG or WebP{_other(data)}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        size = f"{image.width * image.height / 1e6:.1f} megapixels ({image.width} x {image.height})"
        raise TooLargeError(f"has {size}, more than the {max_pixels / 1e6:.1f} that are allowed")
    return image


def _other(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return " but a HEIC, AVIF or video file"
    names = (name for start, name in OTHERS.items() if data.startswith(start))
    return next((f" but {name}" for name in names), "" if data else " but an empty file")


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    # To look for EXIF behind a PNG's pixels, Pillow decodes them, which almost no PNG is worth.
    if image.format == "PNG" and not any(name in data for name in (b"eXIf", b"Raw profile type", b"Orientation")):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, for which Pillow has errors of many kinds; the pixels may be sound
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def _turned(image: Image.Image, orientation: int, size: tuple[int, int] | None, upright: bool) -> Image.Image:
    if size is not None and orientation >= 5 and image.width != image.height:
        upright = size == (image.width, image.height)
    return image.transpose(TURNS[orientation]) if upright and orientation in TURNS else image


def _deep_values(image: ImageFile.ImageFile, data: bytes) -> NDArray[Any] | None:
    """Values of a 16-bit image, (H, W) grey or (H, W, 3) RGB; None if it has fewer bits. Decodes only 16-bit images."""
    if image.mode.startswith("I"):
        return np.asarray(image, dtype=np.uint32)
    kind = image.tile[0][3] if image.tile else None
    if kind in ("RGB;16B", "RGBA;16B"):  # Pillow gives one byte of each value: the other one if told that it comes first
        high, low = (_as_stored(data, kind.replace("16B", which))[..., :3] for which in ("16B", "16L"))
    elif kind == "LA;16B":  # grey and alpha, two bytes each
        both = _as_stored(data, "RGBA")
        high, low = both[..., 0], both[..., 1]
    else:
        return None
    return high.astype(np.uint16) << 8 | low


def _as_stored(data: bytes, kind: str) -> NDArray[np.uint8]:
    """The pixels, unpacked as if they were stored as ``kind``, one of Pillow's raw modes."""
    image = cast(Any, _open(data, None))
    image.tile = [(*image.tile[0][:3], kind)]
    return np.asarray(image)


def _to_bytes(values: NDArray[Any], value_range: tuple[int, int]) -> NDArray[np.uint8]:
    """The range in 256 equal steps: of the full range, the high byte."""
    low, high = value_range
    scaled = (values.astype(np.int64) - low) * 256 // (high - low + 1)
    return scaled.clip(0, 255).astype(np.uint8)
