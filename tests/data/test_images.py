"""Decoding gives the pixels of torchvision's decoders, and refuses anything that is not a complete image."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from headkd_ray.data.images import TURNS, OtherFormatError, Reading, TooLargeError, decode, inspect, measure
from tests.data.coco_files import encoded, oriented, pixels, png16

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
    tv = pytest.importorskip("torchvision.io")
    expected = tv.decode_image(torch.frombuffer(bytearray(FILES[name]), dtype=torch.uint8), tv.ImageReadMode.RGB)
    image = decode(FILES[name])
    assert image.dtype == torch.uint8 and torch.equal(image, expected)


def pillow(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True, "quality": 30}, {"keep_rgb": True}],
    ids=lambda options: "-".join(options),
)
def test_every_kind_of_jpeg_has_pillow_s_pixels(mode: str, options: dict[str, int]) -> None:
    """Caches and resumed runs rely on it: which decoder reads a file must not matter."""
    for size in ((50, 37), (1, 1), (16, 9)):
        data = encoded(pixels(2, *size).convert(mode), **options)
        assert torch.equal(decode(data), pillow(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"trailing bytes",
        lambda data: data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 :],
        lambda data: data[:-40] + bytes(8) + data[-32:],
    ],
    ids=["trailing bytes", "early end", "overwritten"],
)
def test_damage_that_pillow_forgives_is_forgiven(damage: Callable[[bytes], bytes]) -> None:
    data = damage(FILES["jpeg"])
    assert torch.equal(decode(data), pillow(data))


def test_16_bit_png_keeps_its_high_byte() -> None:
    grey = (np.arange(12 * 10, dtype=np.uint16) * 500).reshape(10, 12)
    image = decode(encoded(Image.fromarray(grey), "PNG"))
    assert torch.equal(image, torch.from_numpy((grey >> 8).astype(np.uint8)).expand(3, 10, 12))


@pytest.mark.parametrize("channels", [1, 2, 3, 4], ids=["grey", "grey alpha", "rgb", "rgb alpha"])
def test_16_bit_values_in_a_range(channels: int) -> None:
    values = np.random.default_rng(0).integers(900, 3500, (50, 40, channels), dtype=np.uint16)
    rgb = values[..., :1].repeat(3, 2) if channels < 3 else values[..., :3]
    data = png16(values)
    assert np.array_equal(decode(data).permute(1, 2, 0), rgb >> 8)
    assert np.array_equal(decode(data, Reading(value_range=(0, 4095))).permute(1, 2, 0), rgb >> 4)
    scaled = np.floor((rgb.astype(float) - 1000) * 256 / 2001).clip(0, 255)  # 1000 to 3000, clipped
    assert np.array_equal(decode(data, Reading(value_range=(1000, 3000))).permute(1, 2, 0), scaled)
    low, high = inspect(data).values or (0, 0)
    assert 900 <= low < 950 and 3450 < high < 3500


def test_values_of_8_bit_images_are_not_touched_by_a_range() -> None:
    for name in FILES:
        assert inspect(FILES[name]).values is None
        assert torch.equal(decode(FILES[name], Reading(value_range=(0, 4095))), decode(FILES[name]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int) -> None:
    data = oriented(RGB, orientation, kind)
    upright = torch.from_numpy(np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).permute(2, 0, 1)
    stored = decode(encoded(RGB, kind))
    facts = inspect(data)
    assert facts.orientation == orientation and facts.size == stored.shape[1:] and facts.upright_size == upright.shape[1:]
    assert torch.equal(decode(data, Reading(upright=False)), stored)
    assert torch.equal(decode(data), upright)
    assert torch.equal(decode(data, Reading(), facts.upright_size), upright)
    if facts.upright_size != facts.size:  # the wanted size decides
        assert torch.equal(decode(data, Reading(upright=False), facts.upright_size), upright)
        assert torch.equal(decode(data, Reading(), facts.size), stored)


LOSSLESS = {
    f"{kind} {mode} {options.get('compression', '')}": (mode, encoded(RGB.convert(mode), kind, **options))
    for kind, modes, options in (
        ("TIFF", ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK"), {}),
        ("TIFF", ("L", "P", "RGB"), {"compression": "tiff_lzw"}),
        ("TIFF", ("RGB",), {"compression": "tiff_adobe_deflate"}),
        ("BMP", ("1", "L", "P", "RGB"), {}),
    )
    for mode in modes
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_tiff_and_bmp_have_the_pixels_that_were_written(name: str) -> None:
    mode, data = LOSSLESS[name]
    assert np.array_equal(decode(data).permute(1, 2, 0), np.array(RGB.convert(mode).convert("RGB")))
    facts = inspect(data)
    assert (facts.size, facts.orientation, facts.values, facts.pages) == ((37, 50), 1, None, 1)
    assert measure(data) == ((37, 50), (37, 50))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_always_upright(orientation: int) -> None:
    """Its orientation is part of its own header, not of EXIF, and Pillow applies it."""
    data = oriented(RGB, orientation, "TIFF")
    shown = {1: RGB, **{number: RGB.transpose(turn) for number, turn in TURNS.items()}}[orientation]
    expected = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
    assert torch.equal(decode(data), expected) and torch.equal(decode(data, Reading(upright=False)), expected)
    assert inspect(data).size == inspect(data).upright_size == measure(data)[0] == measure(data)[1] == expected.shape[1:]


def test_a_16_bit_tiff_is_read_as_a_png_is_and_deeper_ones_are_refused() -> None:
    grey = np.random.default_rng(0).integers(0, 4096, (10, 12), dtype=np.uint16)
    data = encoded(Image.fromarray(grey), "TIFF")
    assert np.array_equal(decode(data, Reading(value_range=(0, 4095)))[0], grey >> 4)
    assert inspect(data).values is not None
    for mode in ("I", "F"):
        with pytest.raises(OtherFormatError, match="a TIFF whose values are not 8-bit, or 16-bit grey"):
            decode(encoded(Image.fromarray(grey).convert(mode), "TIFF"))


def test_pages_of_a_tiff_are_counted_and_the_first_is_read() -> None:
    data = encoded(RGB, "TIFF", save_all=True, append_images=[RGB.rotate(180)] * 2)
    assert inspect(data).pages == 3 and np.array_equal(decode(data).permute(1, 2, 0), np.array(RGB))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_sizes_are_measured_without_decoding(kind: str) -> None:
    data = oriented(RGB, 6, kind)
    assert measure(data) == ((37, 50), (50, 37))
    if kind == "JPEG":  # its header alone
        assert measure(data[: data.index(b"\xff\xda") + 20]) == ((37, 50), (50, 37))


def test_orientation_of_a_16_bit_png() -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) << 8
    exif = Image.Exif()
    exif[0x112] = 6
    image = decode(encoded(Image.fromarray(values), "PNG", exif=exif.tobytes()), Reading())
    assert image[0].tolist() == np.rot90(values >> 8, -1).tolist()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"", *map(oriented, [RGB] * 2, [0, 9])])
def test_damaged_or_meaningless_exif_is_no_orientation(exif: bytes) -> None:
    data = exif if exif.startswith(b"\xff\xd8") else encoded(RGB, exif=exif)
    assert inspect(data).orientation == 1
    assert torch.equal(decode(data, Reading()), decode(FILES["jpeg"]))


def test_another_size_than_wanted() -> None:
    with pytest.raises(ValueError, match="has 50 x 37 pixels, should have 37 x 50"):
        decode(FILES["jpeg"], Reading(), (50, 37))


def test_large_images_are_a_matter_of_the_limit() -> None:
    large = encoded(Image.new("1", (15_000, 12_000)), "PNG")  # 180 megapixels, more than Pillow reads
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warning of a decompression bomb
        for read in (inspect, decode):
            with pytest.raises(TooLargeError, match=r"has 180\.0 megapixels \(15000 x 12000\)"):
                read(large)
        assert inspect(large, max_pixels=None).size == inspect(large, max_pixels=180_000_000).size == (12_000, 15_000)
    with pytest.raises(TooLargeError):
        decode(FILES["webp"], max_pixels=50 * 37 - 1)
    assert decode(FILES["webp"], max_pixels=50 * 37).shape == (3, 37, 50)


@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.98])
def test_cut_off_files_are_refused(name: str, share: float) -> None:
    with pytest.raises(ValueError, match=r"cannot be decoded|not a JPEG"):
        decode(FILES[name][: int(share * len(FILES[name]))])


@pytest.mark.parametrize("data", [b"", b"hello", encoded(RGB, "GIF"), b"BM" + bytes(60), b"\xff\xd8\xff" + bytes(50)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"cannot be decoded|not a JPEG, PNG, WebP, BMP or TIFF"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "an empty file"),
        (encoded(RGB, "GIF"), "a GIF"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "a TIFF of a kind that cannot be read"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "a HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer"),
        (b"<!DOCTYPE html>", "an HTML"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(data: bytes, name: str) -> None:
    with pytest.raises(ValueError, match=f"not a JPEG, PNG, WebP, BMP or TIFF but {name}"):
        decode(data)


def test_a_damaged_png_chunk_is_refused(tmp_path: Path) -> None:
    data = bytearray(FILES["png"])
    data[60] ^= 0xFF
    with pytest.raises(ValueError, match=r"cannot be decoded"):
        decode(bytes(data))
