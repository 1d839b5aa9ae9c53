"""Which boxes are drawn unless --score says it: those from each class's best threshold on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headkd_ray.deploy.description import describe, read_metadata
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import load_checkpoint
from headkd_ray.detectors.weights.native import save_detector
from headkd_ray.job import RetinaNetSpec
from headkd_ray.predict import predict
from headkd_ray.report.draw import jpeg
from tests.support import MICRO_STUDENT, liven


def student(folder: Path, thresholds: dict[str, float | None] | None) -> Path:
    """Save a student with random weights, whose training found these thresholds (None: an earlier version's)."""
    torch.manual_seed(0)
    detector = build_detector(RetinaNetSpec.model_validate(MICRO_STUDENT), 2)
    liven(detector)
    metrics = {"AP": 0.0} if thresholds is None else {"AP": 0.0, "thresholds": thresholds}
    save_detector(
        folder, detector, ("cat", "dog"), {"metrics": metrics, "data": {"eval_short_side": 64, "long_side": 96, "pad": 32}}
    )
    return folder


def test_pictures_show_each_class_from_its_threshold_on(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    noise = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    photo.write_bytes(jpeg(noise))

    def picture(name: str, score: float | None = None, **thresholds: float | None) -> bytes:
        checkpoint = student(tmp_path / f"student_{name}", thresholds or None)
        predict(checkpoint, photo, tmp_path / name, score=score)
        (drawn,) = (tmp_path / name).glob("*.jpg")
        return drawn.read_bytes()

    none, from_03 = picture("none", score=1.0), picture("all", score=0.3)
    assert none != from_03, "nothing is found: nothing is tested"
    assert picture("unknown") == from_03
    assert picture("neither", cat=1.0, dog=1.0) == none
    assert picture("low", cat=0.3, dog=None) == from_03, "a class that was never right is shown from 0.3 on"
    assert picture("one", cat=1.0, dog=0.3) not in (none, from_03)


def test_exports_carry_the_thresholds(tmp_path: Path) -> None:
    loaded = load_checkpoint(student(tmp_path / "student", {"dog": 0.25, "cat": None}))
    description = describe(loaded, "student")
    assert description.thresholds == (None, 0.25)
    assert read_metadata(description.as_metadata(), "file") == description
    older = {key: value for key, value in description.as_metadata().items() if key != "thresholds"}
    assert read_metadata(older, "file").thresholds is None


@pytest.mark.parametrize("metrics", [None, {"AP": 1.0}])
def test_checkpoints_without_thresholds(tmp_path: Path, metrics: dict | None) -> None:
    loaded = load_checkpoint(student(tmp_path / "student", None))
    assert describe(replace(loaded, meta={**loaded.meta, "metrics": metrics}), "student").thresholds is None
