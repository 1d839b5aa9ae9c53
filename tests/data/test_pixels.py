"""How a split's images become pixels: EXIF orientation, 16-bit values, the size limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from headkd_ray.data import photos
from headkd_ray.data.meta import check_same_range
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import DataError
from headkd_ray.prepare import main
from tests.data.coco_files import CocoFiles, encoded, exif_photo, make_coco, png16


@pytest.fixture
def files(tmp_path: Path) -> CocoFiles:
    return make_coco(tmp_path)


def shown(shards: ShardSet, number: int) -> Tensor:
    """Return the pixels of image ``number`` of ``make_coco`` as training sees them."""
    (position,) = np.flatnonzero(shards.index.image_id == 500 - 7 * number)
    row = int(shards.index.row[position])
    (sample,) = shards.read_group(int(shards.index.shard[position]), row // shards.index.row_group, [row])
    pixels = sample.pixels()
    assert sample.size == tuple(pixels.shape[1:]) == (shards.index.height[position], shards.index.width[position])
    return pixels


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def prepared(files: CocoFiles, **options: object) -> ShardSet:
    return prepare_split(files.json, files.images, files.out, **options)


def test_sizes_of_the_upright_images_in_the_json_turn_all_images(files: CocoFiles) -> None:
    """Some are turned by 90 degrees, which their size shows; for half turns, mirrored and square ones only the others do."""
    wanted = {
        0: exif_photo(files, 0, 6, upright=True),
        1: exif_photo(files, 1, 8, upright=True),
        3: exif_photo(files, 3, 3),
        4: exif_photo(files, 4, 2),
        5: exif_photo(files, 5, 6),
    }
    shards = prepared(files)
    for number, image in wanted.items():
        assert torch.equal(shown(shards, number), tensor(image))
    assert shards.meta.warnings == (
        "EXIF orientation: 5 images are turned upright (the JSON's sizes are those of the upright images)",
    )


def test_sizes_as_stored_in_the_json_turn_none_and_it_is_told(files: CocoFiles) -> None:
    stored = {number: tensor(exif_photo(files, number, 1)) for number in (0, 3)}
    exif_photo(files, 0, 6)
    exif_photo(files, 3, 3)
    shards = prepared(files)
    assert all(torch.equal(shown(shards, number), image) for number, image in stored.items())
    assert shards.meta.warnings == (
        "EXIF orientation: 2 images are used as stored, the orientation is ignored (the JSON has the stored size of 1 of them)",
    )


def test_where_no_size_tells_the_user_is_told_what_to_do(files: CocoFiles, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tensor(exif_photo(files, 3, 1))
    upright = tensor(exif_photo(files, 3, 3))
    assert main([files.json, files.images, "--out", files.out]) == 0
    message = capsys.readouterr().err
    assert message.strip() == (
        "warning: EXIF orientation: 1 image is used as stored, the orientation is ignored (the JSON does not say; "
        "if the boxes were drawn on the upright images, prepare with --exif apply)"
    )
    assert torch.equal(shown(ShardSet.open(files.out), 3), stored)
    assert main([files.json, files.images, "--out", files.out]) == 0
    assert capsys.readouterr().err.strip() == message.strip(), "again"
    with pytest.raises(DataError, match="other options"):
        prepared(files, exif="apply")
    assert main([files.json, files.images, "--out", files.out, "--exif", "apply", "--overwrite"]) == 0
    assert torch.equal(shown(ShardSet.open(files.out), 3), upright)
    assert "1 image is turned upright (--exif apply)" in capsys.readouterr().err
    assert main([files.json, files.images, "--out", files.out, "--exif", "ignore", "--overwrite"]) == 0
    assert torch.equal(shown(ShardSet.open(files.out), 3), stored)
    assert "1 image is used as stored, the orientation is ignored (--exif ignore)" in capsys.readouterr().err


def test_images_that_disagree_are_each_as_their_size_says(files: CocoFiles) -> None:
    upright = tensor(exif_photo(files, 0, 6, upright=True))
    stored, half = tensor(exif_photo(files, 1, 1)), tensor(exif_photo(files, 3, 1))
    exif_photo(files, 1, 6)
    exif_photo(files, 3, 3)
    shards = prepared(files)
    assert torch.equal(shown(shards, 0), upright)
    assert torch.equal(shown(shards, 1), stored) and torch.equal(shown(shards, 3), half)
    assert len(shards.meta.warnings) == 2


def test_orientation_survives_an_interruption(files: CocoFiles) -> None:
    """The evidence may lie in shards that were finished before the interruption."""
    exif_photo(files, 0, 6, upright=True)
    exif_photo(files, 3, 3)
    whole = prepared(files, shard_images=1)
    (Path(files.out) / "meta.json").unlink()
    (Path(files.out) / "shard-00011.parquet").unlink()
    assert prepared(files, shard_images=1).meta == whole.meta and whole.meta.upright


def test_options_that_contradict_the_json(files: CocoFiles) -> None:
    exif_photo(files, 0, 6, upright=True)
    exif_photo(files, 1, 6)
    with pytest.raises(DataError, match=r"0.jpg .*upright 30 x 40 \(EXIF orientation 6\), JSON 30 x 40: .* --exif ignore"):
        prepared(files, exif="ignore")
    with pytest.raises(DataError, match=r"1.png .*stored 24 x 36, upright 36 x 24 .*JSON 24 x 36: .*contradicts --exif apply"):
        prepared(files, exif="apply")


def dark(files: CocoFiles, low: int, high: int) -> np.ndarray:
    """Make image 1 a 16-bit PNG with values in this range, and return the values."""
    record = files.data["images"][1]
    values = np.linspace(low, high, record["width"] * record["height"]).astype(np.uint16)
    values = values.reshape(record["height"], record["width"], 1)
    (Path(files.images) / record["file_name"]).write_bytes(png16(values))
    return values[..., 0]


@pytest.mark.parametrize(
    ("low", "high", "advice"),
    [
        (0, 4095, "16 of 256 grey levels; prepare with --range 0 4095"),
        (300, 16000, "62 of 256 grey levels; prepare with --range 0 16383"),
        (27000, 31000, "17 of 256 grey levels; prepare with --range 27"),
        (0, 65535, None),
    ],
)
def test_16_bit_images_that_become_dark_or_flat(files: CocoFiles, low: int, high: int, advice: str | None) -> None:
    dark(files, low, high)
    found = prepared(files).meta.warnings
    assert found == () if advice is None else (len(found) == 1 and advice in found[0])


def test_a_range_makes_16_bit_images_bright(files: CocoFiles, capsys: pytest.CaptureFixture[str]) -> None:
    values = dark(files, 0, 4095)
    assert main([files.json, files.images, "--out", files.out, "--range", "0", "4095"]) == 0
    assert "warning" not in capsys.readouterr().err
    shards = ShardSet.open(files.out)
    assert np.array_equal(shown(shards, 1)[0], values >> 4) and shards.meta.value_range == (0, 4095)


def test_a_range_that_clips_or_is_not_used_is_told(files: CocoFiles) -> None:
    assert "there are none, so --range is not used" in prepared(files, value_range=(0, 4095)).meta.warnings[0]
    dark(files, 0, 4095)
    (warning,) = prepared(files, value_range=(0, 1023), overwrite=True).meta.warnings
    assert warning.endswith("and 4090; what is outside --range is clipped")


def test_ranges_that_are_none(files: CocoFiles) -> None:
    for wrong in ((5, 5), (9, 3), (-1, 5), (0, 65536)):
        with pytest.raises(DataError, match="two ascending values"):
            prepared(files, value_range=wrong)


def test_splits_with_different_ranges_do_not_go_together() -> None:
    check_same_range({"data.train": (0, 4095), "data.val": (0, 4095), "teacher": None})
    with pytest.raises(DataError, match=r"data.train from 0 to 4095, data.val from 0 to 65535; prepare all"):
        check_same_range({"data.train": (0, 4095), "data.val": (0, 65535)})


def test_too_large_images_are_not_called_damaged(files: CocoFiles, capsys: pytest.CaptureFixture[str]) -> None:
    files.data["images"][0].update(width=15_000, height=12_000)
    files.save()
    (Path(files.images) / "0.jpg").write_bytes(encoded(Image.new("1", (15_000, 12_000)), "PNG"))
    with pytest.raises(SystemExit):
        main([files.json, files.images, "--out", files.out])
    message = capsys.readouterr().err
    assert "0.jpg (image 500), has 180.0 megapixels (15000 x 12000), more than the 179.0 that are allowed: " in message
    assert photos.TOO_LARGE in message and "damaged" not in message


def test_the_limit_of_size_is_a_switch(files: CocoFiles) -> None:
    with pytest.raises(DataError, match=r"(?s)has 0.0 megapixels.*--max-megapixels"):
        prepared(files, max_pixels=1100)
    assert prepared(files, max_pixels=1200).meta.images == 12
