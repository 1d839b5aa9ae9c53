"""Decoding: the same pixels as torchvision's decoders, and nothing that is not a whole image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headkd_ray.data.images import decode
from tests.data.coco_files import encoded, pixels

RGB = pixels(1, 50, 37)
FILES = {
    "jpeg": encoded(RGB),
    "jpeg grey": encoded(RGB.convert("L")),
    "jpeg cmyk": encoded(RGB.convert("CMYK")),
    "png": encoded(RGB, "PNG"),
    "png grey": encoded(RGB.convert("L"), "PNG"),
    "png grey alpha": encoded(RGB.convert("LA"), "PNG"),
    "png palette": encoded(RGB.convert("P"), "PNG"),
    "png palette transparent": encoded(RGB.convert("P"), "PNG", transparency=0),
    "png alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "png black and white": encoded(RGB.convert("1"), "PNG"),
    "webp": encoded(RGB, "WEBP"),
    "webp lossless": encoded(RGB, "WEBP", lossless=True),
    "webp alpha": encoded(RGB.convert("RGBA"), "WEBP"),
}


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("name", FILES)
def test_same_pixels_as_torchvision(name: str) -> None:
    io = pytest.importorskip("torchvision.io")
    expected = io.decode_image(torch.frombuffer(bytearray(FILES[name]), dtype=torch.uint8), io.ImageReadMode.RGB)
    image = decode(FILES[name])
    assert image.dtype == torch.uint8 and torch.equal(image, expected)


def test_16_bit_png_keeps_its_high_byte() -> None:
    grey = (np.arange(12 * 10, dtype=np.uint16) * 500).reshape(10, 12)
    image = decode(encoded(Image.fromarray(grey), "PNG"))
    assert torch.equal(image, torch.from_numpy((grey >> 8).astype(np.uint8)).expand(3, 10, 12))


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.98])
def test_cut_off_files_are_refused(name: str, share: float) -> None:
    with pytest.raises(ValueError, match=r"cannot be decoded|not a JPEG"):
        decode(FILES[name][: int(share * len(FILES[name]))])


@pytest.mark.parametrize(
    "data", [b"", b"hello", encoded(RGB, "GIF"), encoded(RGB, "BMP"), encoded(RGB, "TIFF"), b"\xff\xd8\xff" + bytes(50)]
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"cannot be decoded|not a JPEG, PNG or WebP"):
        decode(data)


def test_a_damaged_png_chunk_is_refused(tmp_path: Path) -> None:
    data = bytearray(FILES["png"])
    data[60] ^= 0xFF
    with pytest.raises(ValueError, match=r"cannot be decoded"):
        decode(bytes(data))
