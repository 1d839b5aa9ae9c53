"""Evaluation returns boxes in the stored image's pixels and each image once. test_ranks.py covers several processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headkd_ray.data.batch import Batch, idle_batch
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import Detections, Detector, build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import coco_results, evaluate, predict
from headkd_ray.engine.scoring import Scoring
from headkd_ray.evaluate import evaluate_checkpoint
from tests.support import MICRO_STUDENT, micro_job

ALONE = Distributed(0, 1, torch.device("cpu"))
CATEGORY_IDS = (3, 90)


def blank(original: list[tuple[int, int]], shown: list[tuple[int, int]], first_id: int = 1) -> Batch:
    """Return black images of given stored and shown sizes (h, w)."""
    height, width = (max(side) for side in zip(*shown, strict=True))
    return Batch(
        images=torch.zeros(len(shown), 3, height, width, dtype=torch.uint8),
        sizes=torch.tensor(shown),
        boxes=torch.zeros(len(shown), 1, 4),
        labels=torch.full((len(shown), 1), -1),
        weights=torch.ones(len(shown), 1),
        background=torch.ones(len(shown), dtype=torch.bool),
        image_ids=torch.arange(first_id, first_id + len(shown)),
        original_sizes=torch.tensor(original),
        views=torch.full((len(shown),), -1),
        step=0,
    )


def test_boxes_go_back_to_the_stored_image() -> None:
    """Each axis has its own scale because sides are rounded; boxes end at the border, padding rows vanish, ids are the
    data's."""
    batch = blank(original=[(100, 400), (60, 30)], shown=[(50, 100), (120, 90)])
    found = Detections(
        boxes=torch.tensor([[[10.0, 20, 30, 40], [-5, -5, 101, 51]], [[9, 12, 18, 24], [0, 0, 0, 0]]]),
        scores=torch.tensor([[0.75, 0.5], [0.25, 0.0]]),
        labels=torch.tensor([[1, 0], [0, -1]]),
    )
    first, second = coco_results(found, batch, CATEGORY_IDS)
    assert first == [
        {"image_id": 1, "category_id": 90, "bbox": [40.0, 40.0, 80.0, 40.0], "score": 0.75},
        {"image_id": 1, "category_id": 3, "bbox": [0.0, 0.0, 400.0, 100.0], "score": 0.5},
    ]
    (entry,) = second
    assert entry["image_id"] == 2 and entry["bbox"] == pytest.approx([3.0, 6.0, 3.0, 6.0])
    assert coco_results(found, batch, (None, 90)) == [first[:1], []], "the data have no category for class 0"


def micro_detector(classes: int) -> Detector:
    """Return a random detector that finds something everywhere."""
    head = {**MICRO_STUDENT["head"], "prior": 0.3, "tower_std": None, "postprocess": {"score": 0.0, "max_detections": 10}}
    job = micro_job(Path("unused"), {"train": "unused", "val": "unused"}, student={**MICRO_STUDENT, "head": head})
    torch.manual_seed(3)
    return build_detector(job.student, classes).eval()


def test_predict_leaves_idle_batches_out_and_the_mode_as_it_was() -> None:
    detector = micro_detector(2).train()
    batches = [blank([(64, 64)] * 2, [(64, 64)] * 2), idle_batch(1, 64, 32)]
    found = predict(detector, batches, ALONE.device, CATEGORY_IDS)
    assert list(found) == [1, 2] and all(found.values()) and detector.training


def test_an_image_that_comes_twice_is_an_error() -> None:
    batch = blank([(64, 64)], [(64, 64)])
    with pytest.raises(AssertionError, match="image 1 was evaluated twice"):
        predict(micro_detector(2), [batch, replace(batch, step=1)], ALONE.device, CATEGORY_IDS)


def test_a_missing_image_is_an_error() -> None:
    truth = {"images": [{"id": 1}, {"id": 2}], "annotations": [], "categories": []}
    with pytest.raises(AssertionError, match="ranks overlap or miss images"):
        evaluate(micro_detector(2), [blank([(64, 64)], [(64, 64)])], ALONE, truth, Scoring(CATEGORY_IDS, 100, ()))


def test_outputs_of_unused_classes_are_left_out(drawn_splits: dict[str, str], tmp_path: Path) -> None:
    """torchvision's COCO models name ten outputs "N/A", which belong neither in a COCO table nor in a picture."""
    classes = ShardSet.open(drawn_splits["val"]).meta.classes
    detector = micro_detector(len(classes) + 2)
    save_detector(tmp_path, detector, ("N/A", *classes, "N/A"))
    loaded = fetch_detector(str(tmp_path))
    assert (loaded.classes, loaded.detector.num_classes) == (classes, len(classes))
    assert fetch_detector(str(tmp_path), all_outputs=True).detector.num_classes == len(classes) + 2
    evaluate_checkpoint(str(tmp_path), drawn_splits["val"], out=str(tmp_path / "found.json"))
    known = set(ShardSet.open(drawn_splits["val"]).meta.category_ids)
    assert {entry["category_id"] for entry in json.loads((tmp_path / "found.json").read_text())} <= known
