"""Images as predict reads them: upright, and with 16-bit values as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headkd_ray import predict
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.job import FasterRCNNSpec
from tests.data.coco_files import encoded, oriented, pixels, png16
from tests.detectors.micro import liven
from tests.support import MICRO_TEACHER


def checkpoint(folder: Path, **meta: Any) -> str:
    torch.manual_seed(3)
    detector = build_detector(FasterRCNNSpec.model_validate(MICRO_TEACHER), 2)
    liven(detector)
    save_detector(folder, detector, ("a", "b"), {"data": {"eval_short_side": 64, "long_side": 96}, **meta})
    return str(folder)


def found(student: str, photo: bytes, folder: Path) -> tuple[list[int], list[list[float]]]:
    """Return width and height of the photo, and the boxes."""
    folder.mkdir()
    (folder / "photo.png").write_bytes(photo)
    assert predict.main([student, str(folder / "photo.png"), "--out", str(folder / "out")]) == 0
    result = json.loads((folder / "out" / "detections.json").read_text())
    with Image.open(next((folder / "out").glob("*.jpg"))) as drawn:
        size = [result["images"][0]["width"], result["images"][0]["height"]]
        assert list(drawn.size) == size
    boxes = [entry["bbox"] for entry in result["annotations"]]
    assert boxes
    return size, boxes


@pytest.mark.parametrize("orientation", [3, 6])
def test_predict_sees_photos_upright(tmp_path: Path, orientation: int) -> None:
    student, upright = checkpoint(tmp_path / "student"), pixels(5, 90, 60)
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    photo = oriented(upright.transpose(back), orientation, "PNG")
    assert found(student, photo, tmp_path / "turned") == found(student, encoded(upright, "PNG"), tmp_path / "upright")


def test_predict_reads_16_bit_images_as_in_training(tmp_path: Path) -> None:
    values = np.array(pixels(5, 90, 60).convert("L"), dtype=np.uint16)[..., None] << 4  # 12 bits
    student = checkpoint(tmp_path / "student", value_range=[0, 4095])
    bright = encoded(Image.fromarray((values[..., 0] >> 4).astype(np.uint8)), "PNG")
    assert found(student, png16(values), tmp_path / "deep") == found(student, bright, tmp_path / "bright")


def test_a_range_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(pixels(5, 90, 60), "PNG"))
    student = checkpoint(tmp_path / "student", value_range=[9, 3])
    with pytest.raises(SystemExit):
        predict.main([student, str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")])
    assert "meta.value_range [9, 3] is not a range of 16-bit values" in capsys.readouterr().err
