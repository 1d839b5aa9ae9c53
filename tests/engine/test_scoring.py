"""A split is scored by class names, and whatever its metrics leave out is reported."""

from __future__ import annotations

import numpy as np
import pytest

from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.scoring import recorded_detections, scoring_of
from headkd_ray.errors import CheckpointError, DataError
from tests.data.coco_files import make_coco


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Return a split with categories 7 ant, 31 moth, 90 zebra; one image has 130 boxes."""
    files = make_coco(tmp_path_factory.mktemp("scoring"))
    extra = {**files.data["annotations"][-1], "iscrowd": 0}
    files.data["annotations"] += [{**extra, "id": 5000 + k} for k in range(128)]
    return prepare_split(files.save().json, files.images, files.out)


def test_classes_are_matched_by_name_in_any_order(shards: ShardSet) -> None:
    scoring = scoring_of(shards, "val", ("zebra", "ant", "moth"), "student", 1000)
    assert scoring.category_ids == (90, 7, 31) and scoring.warnings == ()


def test_classes_that_the_split_does_not_list_are_told_and_left_out(shards: ShardSet) -> None:
    scoring = scoring_of(shards, "val", ("bee", "zebra", "ant", "fly", "moth"), "student", 1000)
    assert scoring.category_ids == (None, 90, 7, None, 31)
    assert scoring.warnings == ("val lists 3 of the 5 classes of student; detections of the others do not count: 'bee', 'fly'",)


def test_classes_that_the_detector_does_not_know_are_refused(shards: ShardSet) -> None:
    with pytest.raises(DataError) as caught:
        scoring_of(shards, "val", ("zebra", "ant", "bee"), "student", 100)
    assert str(caught.value) == (
        "Class lists disagree; give all splits the same COCO categories:\n"
        "  - val has 3 classes, student has 3; only in student: 'bee'; only in val: 'moth'"
    )


def test_images_with_more_objects_than_detections_count_are_told(shards: ShardSet) -> None:
    (warning,) = scoring_of(shards, "val", shards.meta.classes, "student", 100).warnings
    most = int(np.max(shards.index.boxes))
    assert warning == (
        f"val has more than 100 objects in 1 of 12 images (up to {most}), but only the best 100 detections of an image count; "
        f"set eval.max_detections (evaluate: --max-detections) to {most}"
    )
    assert scoring_of(shards, "val", shards.meta.classes, "student", most).warnings == ()


def test_what_a_checkpoint_records_is_checked() -> None:
    assert recorded_detections({}) == 100 and recorded_detections({"max_detections": 7}) == 7
    for wrong in (0, True, "7", None):
        with pytest.raises(CheckpointError, match=r"meta\.max_detections"):
            recorded_detections({"max_detections": wrong})
