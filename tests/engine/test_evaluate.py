"""Evaluation: boxes back in the stored image's pixels, and the same figures however many processes share the images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headkd_ray.data.batch import Batch, idle_batch
from headkd_ray.data.plan import eval_windows
from headkd_ray.data.prepare import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.stream import BatchMaker, local_stream
from headkd_ray.detectors import Detections, Detector, build_detector
from headkd_ray.engine.evaluate import coco_results, evaluate, predict
from headkd_ray.engine.world import World
from headkd_ray.job import Job
from tests.engine.ranks import on_ranks
from tests.support import MICRO_STUDENT, micro_job

ALONE = World(0, 1, torch.device("cpu"))
CATEGORY_IDS = (3, 90)


def blank(original: list[tuple[int, int]], shown: list[tuple[int, int]], first_id: int = 1) -> Batch:
    """Black images of given stored and shown (h, w)."""
    height, width = (max(side) for side in zip(*shown, strict=True))
    return Batch(
        images=torch.zeros(len(shown), 3, height, width, dtype=torch.uint8),
        sizes=torch.tensor(shown),
        boxes=torch.zeros(len(shown), 1, 4),
        labels=torch.full((len(shown), 1), -1),
        image_ids=torch.arange(first_id, first_id + len(shown)),
        original_sizes=torch.tensor(original),
        step=0,
    )


def test_boxes_go_back_to_the_stored_image() -> None:
    """Each axis has its own scale (sides are rounded), boxes end at the border, padding rows vanish, ids are the data's."""
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


def micro_detector(classes: int) -> Detector:
    """A random detector that finds something everywhere."""
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
        evaluate(micro_detector(2), [blank([(64, 64)], [(64, 64)])], ALONE, truth, CATEGORY_IDS)


def shared_evaluation(world: World, job: Job) -> dict[str, Any]:
    """Metrics of the micro detector on the job's validation split, shared over the ranks."""
    shards = ShardSet.open(job.data.val)
    windows = eval_windows(shards.index, rank=world.rank, world=world.size, batch_size=1)
    batches = local_stream(shards, windows, BatchMaker(job.data, seed=0, train=False))
    truth = shards.ground_truth() if world.rank == 0 else None
    detector = micro_detector(len(shards.meta.classes))
    return evaluate(detector, batches, world, truth, shards.meta.category_ids).as_dict()


@pytest.fixture
def kind_split(tmp_path: Path, drawn_splits: dict[str, str]) -> dict[str, str]:
    """Nine validation images (odd, for two ranks) whose ground truth is every third box that the micro detector finds."""
    shards = ShardSet.open(drawn_splits["val"])
    job = micro_job(tmp_path, drawn_splits)
    windows = eval_windows(shards.index, rank=0, world=1, batch_size=1)
    batches = local_stream(shards, windows, BatchMaker(job.data, seed=0, train=False))
    found = predict(micro_detector(len(shards.meta.classes)), batches, ALONE.device, shards.meta.category_ids)
    truth = shards.ground_truth()
    truth["images"] = truth["images"][:9]
    kept = [entry for image in truth["images"] for entry in found[image["id"]][::3] if min(entry["bbox"][2:]) > 1]
    truth["annotations"] = [
        {**entry, "id": i, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0} for i, entry in enumerate(kept, start=1)
    ]
    (tmp_path / "kind.json").write_text(json.dumps(truth))
    prepare_split(str(tmp_path / "kind.json"), str(Path(drawn_splits["val"]).parent / "images"), str(tmp_path / "kind"))
    return {**drawn_splits, "val": str(tmp_path / "kind")}


def test_two_processes_report_what_one_does(tmp_path: Path, kind_split: dict[str, str]) -> None:
    job = micro_job(tmp_path, kind_split)
    alone = shared_evaluation(ALONE, job)
    assert 0 < alone["AP"] < 100 and alone["images"] == 9
    assert on_ranks(2, shared_evaluation, job) == [alone, alone]
