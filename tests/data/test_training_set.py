"""Unlabelled images and pseudo labels are part of one training set, in the same order and views everywhere."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headkd_ray.data.batch_stream import BatchMaker, load_samples, load_window, local_stream
from headkd_ray.data.epoch_order import Window, train_rows, train_windows
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import TrainingSet, split_fingerprints, training_set
from headkd_ray.errors import DataError
from headkd_ray.job import Job
from tests.data.coco_files import make_coco
from tests.data.test_batch_stream import assert_equal
from tests.support import micro_job, micro_predictions

MOSAICS = {"mosaic": 0.5, "crop": 0.5, "zoom_out": 0.5, "min_visible": 0.3}


@pytest.fixture
def job_with(tmp_path: Path, drawn_splits: dict[str, str]) -> Callable[..., Job]:
    """Return a function that makes a job whose unlabelled images are those of val, with predictions unless told otherwise."""

    def make(content: Any = None, data: dict[str, Any] | None = None, taught: bool = True, **teacher: Any) -> Job:
        file = tmp_path / "predictions.json"
        content = micro_predictions(drawn_splits["val"]) if content is None else content
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        splits = {**drawn_splits, "unlabelled": drawn_splits["val"], **(data or {})}
        if not taught:
            network = {"checkpoint": "none", **teacher}
            return micro_job(tmp_path, splits, method="akd", teacher=network)
        return micro_job(tmp_path, splits, teacher={"kind": "predictions", "predictions": str(file), **teacher})

    return make


def windows_of(job: Job, shards: ShardSet, rank: int = 0, world_size: int = 1, start_step: int = 0) -> list[Window]:
    sampling = sampling_of(shards, job.data)
    return list(
        train_windows(
            shards.index,
            sampling.rows,
            seed=1,
            rank=rank,
            world_size=world_size,
            batch_size=3,
            window=6,
            epochs=2,
            start_step=start_step,
            draws=sampling.repeats,
        )
    )


def test_predictions_are_boxes_of_unlabelled_images(job_with: Callable[..., Job], drawn_splits: dict[str, str]) -> None:
    shards, truth = training_set(job_with()), ShardSet.open(drawn_splits["val"])
    assert isinstance(shards, TrainingSet)
    train = ShardSet.open(drawn_splits["train"])
    own = list(shards.samples())
    for sample, before in zip(own, train.samples(), strict=False):
        assert np.array_equal(sample.boxes, before.boxes) and sample.labelled and (sample.weights == 1).all()
    numbers = np.arange(truth.meta.boxes)
    scores = iter(np.array([0.9, 0.4, 0.1])[numbers % 3])
    records = truth.ground_truth()["annotations"]
    for sample, before in zip(own[len(train.index) :], truth.samples(), strict=True):
        assert (sample.image_id, sample.size, sample.labelled) == (before.image_id, before.size, False)
    by_image: dict[int, list[tuple[float, list[float]]]] = {}
    for record, score in zip(records, scores, strict=True):
        by_image.setdefault(record["image_id"], []).append((score, record["bbox"]))
    for sample in own[len(train.index) :]:
        kept = [(score, box) for score, box in by_image.get(sample.image_id, []) if score >= 0.3]
        assert sample.weights.tolist() == pytest.approx([score if score >= 0.5 else 0 for score, _ in kept])
        assert np.allclose(sample.boxes, [[x, y, x + w, y + h] for _, (x, y, w, h) in kept] or np.zeros((0, 4)), atol=1e-3)
    trained = {own[row].image_id for row in train_rows(shards.index, False)[(train.index.boxes > 0).sum() :]}
    assert trained == {image for image, found in by_image.items() if max(found)[0] >= 0.5}, "others have nothing to teach"
    (note,) = shards.notes
    assert f"{(numbers % 3 == 0).sum()} pseudo labels (score from 0.5) on {len(trained)} of {len(truth.index)} images" in note
    assert f"{(numbers % 3 == 1).sum()} boxes (from 0.3) that are ignored" in note
    assert set(split_fingerprints(shards)) == {"data.train", "data.unlabelled"}


def test_views_move_pseudo_labels_as_ground_truth(job_with: Callable[..., Job], drawn_splits: dict[str, str]) -> None:
    job = job_with(micro_predictions(drawn_splits["val"], scores=(1.0,)), {"augment": MOSAICS})
    shards, truth = training_set(job), ShardSet.open(drawn_splits["val"])
    maker, start = BatchMaker(job.data, 3, train=True), len(shards.index) - len(truth.index)
    rows = [int(row) for row in train_rows(truth.index, False)]
    partners = 0
    for number in range(4):
        places = [start + row for row in rows]
        pairs = (load_samples(*source, [number] * len(rows), maker) for source in ((shards, places), (truth, rows)))
        for taught, labelled in zip(*pairs, strict=True):
            view = maker.view(labelled.image_id, number)
            partners += len(taught.partners)
            assert not any(other.labelled for other in taught.partners)
            if taught.partners:
                continue  # other ones, because the row groups are others
            one, other = maker.example(taught, number, view), maker.example(labelled, number, view)
            assert np.array_equal(one.image, other.image) and np.array_equal(one.labels, other.labels)
            assert np.array_equal(one.boxes, other.boxes) and one.weights is not None and (one.weights == 1).all()
            assert one.background == bool(len(one.boxes))
    assert partners


@pytest.mark.parametrize("taught", [True, False], ids=["predictions", "network"])
def test_an_epoch_is_the_same_for_any_workers_and_after_a_resume(taught: bool, job_with: Callable[..., Job]) -> None:
    job = job_with(data={"unlabelled_share": 0.5, "augment": MOSAICS}, taught=taught)
    shards = training_set(job)
    shards = pickle.loads(pickle.dumps(shards))
    maker = BatchMaker(job.data, 1, train=True)
    planned = windows_of(job, shards)
    plain = [batch for window in planned for batch in map(maker, load_window(shards, window, maker))]
    for one, other in zip(plain[5:], local_stream(shards, windows_of(job, shards, start_step=5), maker), strict=True):
        assert_equal(one, other)
    rows = train_rows(shards.index, False)
    labelled, others = (set(rows[shards.index.has_truth[rows] == wanted].tolist()) for wanted in (True, False))
    shown = []
    for epoch in range(2):
        parts = [windows_of(job, shards, rank, 3) for rank in range(3)]
        seen = Counter(row for part in parts for window in part if window.epoch == epoch for row in window.rows.tolist())
        assert seen == Counter(row for window in planned if window.epoch == epoch for row in window.rows.tolist())
        assert {row for row in seen if row in labelled} == labelled and set(seen.values()) == {1}
        shown.append(set(seen) & others)
        assert len(shown[-1]) == -(-len(others) // 2)
    assert shown[0] != shown[1]
    unknown = [~batch.background for batch in plain]
    assert sum(int(images.sum()) for images in unknown) == (0 if taught else sum(map(len, shown)))
    for batch, images in zip(plain, unknown, strict=True):
        assert (batch.labels[images] == -1).all()


def test_labelled_images_get_what_their_ground_truth_lacks(job_with: Callable[..., Job], drawn_splits: dict[str, str]) -> None:
    """Only if asked, and not what overlaps a ground-truth box; the background of a labelled image stays known."""
    train = ShardSet.open(drawn_splits["train"])
    sample = next(sample for sample in train.samples() if len(sample.boxes))
    x1, y1, x2, y2 = sample.boxes[0].tolist()
    same = {"image_id": sample.image_id, "category_id": train.meta.category_ids[0], "bbox": [x1, y1, x2 - x1, y2 - y1]}
    content = [{**same, "score": 0.9}, {**same, "bbox": [0, 0, 6, 5], "score": 0.8}]
    job = job_with(content, {"unlabelled": None}, labelled_iou=0.5)
    found = next(each for each in training_set(job).samples() if each.image_id == sample.image_id)
    assert np.array_equal(found.boxes[:-1], sample.boxes) and found.boxes[-1].tolist() == [0, 0, 6, 5] and found.labelled
    assert found.weights.tolist() == pytest.approx([1.0] * len(sample.boxes) + [0.8])
    assert found.labels.tolist() == [*sample.labels.tolist(), 0]


def test_what_predict_writes_is_found_by_names(job_with: Callable[..., Job], drawn_splits: dict[str, str]) -> None:
    """Ids of images and categories are the file's own there; vectors of scores name the best class."""
    truth = ShardSet.open(drawn_splits["val"])
    names, classes = dict(zip(truth.index.image_id.tolist(), truth.file_names(), strict=True)), truth.meta.classes
    results = micro_predictions(drawn_splits["val"])
    label = {id_: place for place, id_ in enumerate(truth.meta.category_ids)}
    content = {
        "annotations": [
            {
                **{key: record[key] for key in ("bbox", "image_id")},
                "scores": [0.0] * (len(classes) - 1 - label[record["category_id"]])
                + [record["score"]]
                + [0.0] * (label[record["category_id"]] + 1),
                "image_id": 1000 - record["image_id"],
            }
            for record in results
        ],
        "images": [{"id": 1000 - id_, "file_name": f"photos/{name}"} for id_, name in names.items()],
        "categories": [{"id": place, "name": name} for place, name in enumerate([*reversed(classes), "zebra"])],
    }
    expected, found = (list(training_set(job_with(each)).samples()) for each in (None, content))
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.boxes, other.boxes) and np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.weights, other.weights)


def test_images_without_labels_are_prepared(tmp_path: Path) -> None:
    """From a folder, or with the ids of a JSON whose annotations are not read."""
    files = make_coco(tmp_path, images=5)
    folder = prepare_split(files.images, None, str(tmp_path / "folder"), unlabelled=True)
    listed = prepare_split(files.json, files.images, str(tmp_path / "listed"), unlabelled=True)
    names = dict(zip(listed.index.image_id.tolist(), listed.file_names(), strict=True))
    assert sorted(folder.index.image_id.tolist()) == [1, 2, 3, 4, 5] and sorted(folder.file_names()) == sorted(names.values())
    assert names == {image["id"]: image["file_name"] for image in json.loads(Path(files.json).read_text())["images"]}
    assert folder.meta.classes == listed.meta.classes == () and listed.meta.boxes == 0
    assert "annotations are not used" in listed.meta.warnings[0]
    assert [sample.boxes.shape for sample in listed.samples()] == [(0, 4)] * 5
    with pytest.raises(DataError, match=r"prepared with --unlabelled and can only be used as data\.unlabelled"):
        ShardSet.open(str(tmp_path / "folder"))


RECORD = {"image_id": "ID", "category_id": "CATEGORY", "bbox": [1, 2, 10, 12], "score": 0.9}
BAD: dict[str, tuple[Any, str]] = {
    "empty": ([], r"predictions\.json: holds no prediction; give COCO results"),
    "no file": ("", r"not JSON \(Expecting .*give COCO results"),
    "not records": ([3], r"prediction 0: is int, not a prediction"),
    "score above 1": ([{**RECORD, "score": 93}], r"prediction 0 \(image ID\), score 93: 'score' must be a number from 0"),
    "score NaN": ([{**RECORD, "score": float("nan")}], r"score nan: 'score' must be a number from 0 to 1"),
    "no score": ([{**RECORD, "score": None}], r"score None: 'score' must be"),
    "box NaN": ([{**RECORD, "bbox": [1, 2, float("nan"), 4]}], r"'bbox' must be four finite numbers"),
    "vector": ([{**RECORD, "scores": [0.5, 0.4]}], r"'scores' has 2 numbers, but the data has 8 classes"),
    "vector NaN": ([{**RECORD, "scores": [float("nan")] * 8}], r"'scores' must be numbers from 0 to 1, one for each class"),
    "outside": ([RECORD, {**RECORD, "bbox": [5, 5, 500, 9]}], r"bbox \[5, 5, 500, 9\]: box leaves its image by more"),
    "fractions": ([{**RECORD, "bbox": [0.1, 0.2, 0.3, 0.4]}] * 6, r"bbox \[0\.1, 0\.2, 0\.3, 0\.4\]: .*fractions"),
    "other images": ([{**RECORD, "image_id": 10**9 + n} for n in range(2)], r"0 of its 2 images are in data\.unlabelled"),
    "other ids": ([{**RECORD, "category_id": 99999}], r"category_id 99999 of 1 predictions: is none of the data's"),
    "other names": (
        [{"image_id": "ID", "category": "zebra", "bbox": [1, 2, 3, 4], "score": 1}],
        r"none of its classes is the data's: only in the data: .*; only in the file: 'zebra'",
    ),
    "not listed": (
        {"annotations": [RECORD], "images": [], "categories": [{"id": -5, "name": "zebra"}]},
        r"category_id CATEGORY: is none that the file itself lists",
    ),
    "low scores": ([{**RECORD, "score": 0.4}], r"score_threshold: no prediction .* at least 0\.5 \(the highest of all is 0\.4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_predictions_are_told(case: str, job_with: Callable[..., Job], drawn_splits: dict[str, str]) -> None:
    split = ShardSet.open(drawn_splits["val"])
    ids = {"ID": int(split.index.image_id[0]), "CATEGORY": split.meta.category_ids[0]}
    content, message = BAD[case]
    if not isinstance(content, str):
        content = json.loads(json.dumps(content).replace('"ID"', str(ids["ID"])).replace('"CATEGORY"', str(ids["CATEGORY"])))
    with pytest.raises(DataError, match=re.sub("ID|CATEGORY", lambda name: str(ids[name.group()]), message)):
        training_set(job_with(content))


def test_all_problems_of_a_file_are_told_at_once(job_with: Callable[..., Job], drawn_splits: dict[str, str]) -> None:
    id_ = int(ShardSet.open(drawn_splits["val"]).index.image_id[0])
    wrong = [{"image_id": id_, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 2}] * 30 + [
        {"score": 0.5, "bbox": [1, 2, 3, 4]}
    ]
    with pytest.raises(DataError) as caught:
        training_set(job_with(wrong))
    lines = caught.value.problems
    assert len(lines) == 22 and "… and 10 more (30 in all)" in lines[20]
    assert "prediction 30: needs an integer 'image_id'" in lines[21]
    far = {"image_id": id_, "category_id": 99999, "bbox": [1, 2, 3000, 4], "score": 0.9}
    with pytest.raises(DataError) as caught:
        training_set(job_with([far, {**far, "score": -1}]))
    single, category = (line.partition(": ")[2] for line in caught.value.problems)
    assert single.startswith(f"prediction 1 (image {id_}), score -1: 'score' must be")
    assert category.startswith("category_id 99999 of 1 predictions: is none of the data's category ids")


def test_splits_that_cannot_be_one_set_are_told(
    job_with: Callable[..., Job], drawn_splits: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"has shards of data\.train .*; give other images"):
        training_set(job_with(data={"unlabelled": drawn_splits["train"]}))
    files = make_coco(tmp_path / "coco", images=4)
    other = prepare_split(files.images, None, str(tmp_path / "other"), unlabelled=True, row_group=3)
    with pytest.raises(DataError, match=r"prepared with --row-group 3, data\.train with 4; prepare one of them again"):
        training_set(job_with(data={"unlabelled": other.folder.uri}))
    labelled = prepare_split(files.json, files.images, str(tmp_path / "labelled"))
    same = prepare_split(files.json, files.images, str(tmp_path / "same"), unlabelled=True)
    data = {"train": labelled.folder.uri, "unlabelled": same.folder.uri}
    content = [{"image_id": int(same.index.image_id[0]), "category_id": 7, "bbox": [1, 1, 5, 5], "score": 0.9}]
    assert isinstance(training_set(job_with(content, data)), TrainingSet)
    with pytest.raises(
        DataError, match=r"1 of its images are in data\.unlabelled and data\.train alike .*; give the images other"
    ):
        training_set(job_with(content, data, labelled_iou=0.5))
