"""Images in batches are detected in as alone, and come in their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from headkd_ray import export
from headkd_ray.deploy.predictor import Predictor, load
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.errors import DataError
from headkd_ray.job import FasterRCNNSpec, RetinaNetSpec
from headkd_ray.predicting.batching import AHEAD, Shown, detect_in_order
from headkd_ray.predicting.reading import read_ahead
from tests.detectors.micro import liven
from tests.support import MICRO_STUDENT, MICRO_TEACHER

SIZES = [(60, 90), (90, 60), (60, 88), (61, 90), (30, 30), (60, 90), (90, 62), (60, 90), (120, 180), (64, 64)]


@pytest.fixture(scope="module", params=["retinanet", "faster_rcnn", "onnx"])
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    torch.manual_seed(3)
    spec = {
        "retinanet": lambda: RetinaNetSpec.model_validate(MICRO_STUDENT),
        "faster_rcnn": lambda: FasterRCNNSpec.model_validate(MICRO_TEACHER),
    }["retinanet" if request.param == "onnx" else request.param]()
    detector = build_detector(spec, 2)
    liven(detector)
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_detector(folder, detector, ("a", "b"), {"data": {"eval_short_side": 64, "long_side": 96}})
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
        assert export.main([str(folder), "--to", "onnx", "--no-check", "--out", str(folder)]) == 0
        return load(folder / "model.onnx")
    return load(folder, "cpu")


def images() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=random) for size in SIZES]


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_batch_is_detected_in_as_one_image_at_a_time(predictor: Predictor, batch_size: int) -> None:
    shown = list(detect_in_order(predictor, (Shown(i, image) for i, image in enumerate(images())), batch_size))
    assert [each.item for each in shown] == list(range(len(SIZES)))
    for each, image in zip(shown, images(), strict=True):
        alone = predictor.detect(image)
        assert each.found is not None and len(alone) > 0 and each.found.size == alone.size == tuple(image.shape[1:])
        np.testing.assert_allclose(each.found.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(each.found.scores, alone.scores, atol=1e-5)
        np.testing.assert_array_equal(each.found.labels, alone.labels)


def test_batches_are_filled(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    detect = predictor.detect_batch

    def counted(batch):  # type: ignore[no-untyped-def]
        sizes.append(len(batch.images))
        return detect(batch)

    monkeypatch.setattr(predictor, "detect_batch", counted)
    list(detect_in_order(predictor, (Shown(None, images()[0]) for _ in range(8)), 4))
    assert sizes == [4, 4]


def test_few_images_are_in_memory_and_unreadable_ones_keep_their_place(predictor: Predictor) -> None:
    taken = 0

    def coming() -> Iterator[Shown[int]]:
        nonlocal taken
        rare, common = images()[1], images()[0]
        for taken in range(40):
            yield Shown(taken, None if taken == 5 else rare if taken == 0 else common)

    seen = []
    for shown in detect_in_order(predictor, coming(), 2):
        assert taken - shown.item <= AHEAD * 2 + 1
        seen.append((shown.item, shown.found is None))
    assert seen == [(number, number == 5) for number in range(40)]


def test_reading_ahead_keeps_order_and_raises_in_turn() -> None:
    asked: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    def read(number: int) -> int:
        if number == 3:
            raise DataError("no")
        return number

    ahead = read_ahead(read, numbers(), threads=2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError):
        next(ahead)
    assert len(asked) <= 7
