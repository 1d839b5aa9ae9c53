"""What of the pipeline grows with a data set, as measured parts, and a generator of annotations of any size.

A part is a generator: it yields the name of what it does next, or None for what does not count, such as preparing its inputs.
Images are a byte each, for what is done with their pixels is the same at any size.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from headkd_ray.data.batch_stream import BatchMaker, load_window
from headkd_ray.data.checked_split import CheckedSplit, Images
from headkd_ray.data.checking import checked
from headkd_ray.data.epoch_order import Window, steps_per_epoch, train_rows, train_windows
from headkd_ray.data.images import ImageFacts
from headkd_ray.data.layout import Layout
from headkd_ray.data.meta import Meta, ShardFile
from headkd_ray.data.photos import Photo, PhotoOptions, Photos
from headkd_ray.data.repeats import sampling_of
from headkd_ray.data.shard_writer import pack
from headkd_ray.data.shards import INDEX, META, ShardSet
from headkd_ray.data.sources import SourceOptions, readers
from headkd_ray.engine.coco_metrics import coco_metrics
from headkd_ray.job import DataSpec
from headkd_ray.storage import Folder
from headkd_ray.teacher.cache_codec import Codec
from headkd_ray.teacher.target_cache import Cache

WIDTH, HEIGHT = 1024, 768
WORKERS, BATCH, WINDOW = 8, 2, 256
"""Ranks, images per batch and images per window of the training that is planned."""
EPOCHS = 300
VIEWS = 24
"""Views of each image in the cache."""
DATASET = 4096
"""Windows of one Ray Dataset (``cluster.ray_stream.WINDOWS_PER_DATASET``)."""
SHARD_IMAGES, ROW_GROUP = 512, 16
DETECTIONS = 100
CHUNK = 10_000


@dataclass(frozen=True)
class Size:
    """A data set's size: training images, their boxes, classes, and the validation images and boxes."""

    images: int
    boxes: int
    classes: int
    val_images: int
    val_boxes: int


SIZES = {
    "COCO": Size(118_287, 865_579, 80, 5_000, 36_781),
    "4 x COCO": Size(473_148, 3_462_316, 80, 20_000, 147_124),
    "Objects365": Size(1_700_000, 25_000_000, 365, 80_000, 1_200_000),
}

Part = Callable[[Path, Size], Iterator[str | None]]


def write_json(path: Path, images: int, boxes: int, classes: int) -> None:
    """Write a COCO JSON in the order of Objects365's: images, annotations, categories; in bounded memory."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write('{"images": [')
        for k in range(images):
            name = f"images/v1/patch{k % 50}/photo_{k:08d}.jpg"
            size = f'"width": {WIDTH}, "height": {HEIGHT}' if k % 4 else f'"width": {HEIGHT}, "height": {WIDTH}'
            url = '"license": 5, "url": "http://host.example/photo.jpg"'
            file.write(f'{", " if k else ""}{{"id": {k}, "file_name": "{name}", {size}, {url}}}')
        file.write('], "annotations": [')
        for start in range(0, boxes, CHUNK):
            count = min(CHUNK, boxes - start)
            corners = rng.uniform(0, (500, 500), (count, 2)).round(2)
            sides = rng.uniform(5, 260, (count, 2)).round(2)
            labels = np.minimum(rng.geometric(8 / classes, count), classes).tolist()  # some are rare
            for k, (x, y, w, h), label in zip(range(start, boxes), np.hstack([corners, sides]).tolist(), labels, strict=False):
                flags = '"iscrowd": 0, "isfake": 0, "isreflected": 0'
                keys = f'"id": {k + 1}, "image_id": {k * images // boxes}, "category_id": {label}'
                file.write(f'{", " if k else ""}{{{keys}, "bbox": [{x}, {y}, {w}, {h}], "area": {w * h}, {flags}}}')
        categories = [{"id": k + 1, "name": f"class {k}"} for k in range(classes)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


class OneByteEach(Photos):
    """Image files of a byte, which are not opened."""

    def version(self) -> str:
        return ""

    def check(self, image: int) -> Photo:
        record = self.split.images[image]
        return Photo(b"x", ImageFacts((record.height, record.width), 1, None))


def prepare(folder: Path, size: Size) -> Iterator[str | None]:
    """Read, check and pack both splits; what counts is the training split."""
    yield None
    for name, images, boxes in (("val", size.val_images, size.val_boxes), ("train", size.images, size.boxes)):
        path = folder / f"{name}.json"
        write_json(path, images, boxes, size.classes)
        if name == "train":
            yield "prepare: read and check the JSON"
        found = checked(readers([str(path)], [str(folder)], SourceOptions(None, False, None, None, 1)))
        if name == "train":
            yield "prepare: pack into shards, without pixels"
        with patch("headkd_ray.data.shard_writer.Photos", OneByteEach):
            pack(found, str(folder / name), workers=1)
        yield None
        path.unlink()


def bare(folder: Path, size: Size) -> Iterator[str | None]:
    """Write a training split without content: its index, its meta.json, and shards that are empty files."""
    yield None
    out = Folder.open(str(folder / "train"))
    out.create()
    sizes = np.tile(np.array([[WIDTH, HEIGHT]], dtype=np.int32), (size.images, 1))
    sizes[::4] = HEIGHT, WIDTH
    names = [f"images/v1/patch{k % 50}/photo_{k:08d}.jpg" for k in range(size.images)]
    first = np.arange(size.images + 1) * size.boxes // size.images
    none: Any = np.zeros(size.boxes, np.bool_)
    classes = tuple(f"class {k}" for k in range(size.classes))
    ids = tuple(range(1, size.classes + 1))
    images = Images(np.arange(size.images), names, sizes)
    split = CheckedSplit(images, ids, classes, first, *(none,) * 5)
    layout = Layout(split, SHARD_IMAGES, ROW_GROUP, PhotoOptions())
    out.write(INDEX, layout.index())
    shards = tuple(ShardFile(name, len(members), 0, "") for name, members in layout.shards())
    for shard in shards:
        out.write(shard.name, b"")
    meta = Meta(classes, ids, size.images, size.boxes, 0, ROW_GROUP, shards, "")
    out.write(META, meta.to_json())


def order(folder: Path, size: Size) -> Iterator[str | None]:
    """Plan an epoch for one of eight ranks, and go on late."""
    yield "open the prepared split"
    shards = ShardSet.open(str(folder / "train"))
    rows = train_rows(shards.index, keep_empty=False)
    steps = steps_per_epoch(len(rows), BATCH, WORKERS)
    yield "plan an epoch"
    _exhaust(_windows(shards, epochs=1))
    yield f"resume in the middle of epoch {EPOCHS}"
    next(_windows(shards, start=EPOCHS * steps - steps // 2))
    yield f"the windows of one Ray Dataset ({DATASET})"
    rows_of_dataset = [{"window": pickle.dumps(window)} for window in islice(_windows(shards), DATASET)]
    yield None
    assert len(rows_of_dataset) == DATASET


def epochs(folder: Path, size: Size) -> Iterator[str | None]:
    """Plan all epochs of a long run for one of eight ranks."""
    yield None
    shards = ShardSet.open(str(folder / "train"))
    yield f"plan {EPOCHS} epochs"
    _exhaust(_windows(shards, epochs=EPOCHS))


def read(folder: Path, size: Size) -> Iterator[str | None]:
    """Read windows, with and without mosaics."""
    yield None
    shards = ShardSet.open(str(folder / "train"))
    windows = list(islice(_windows(shards), 20))
    for title, augment in (("read 20 windows", {}), ("read 20 windows of mosaics", {"mosaic": 1.0})):
        maker = BatchMaker(_data(folder, augment=augment), seed=0, train=True)
        yield title
        for window in windows:
            load_window(shards, window, maker)


def sampling(folder: Path, size: Size) -> Iterator[str | None]:
    """Decide how often images are shown."""
    yield None
    shards = ShardSet.open(str(folder / "train"))
    for kind in ("repeat_factor", "class_balanced"):
        yield f"data.sampling {kind}, with an epoch's order"
        threshold = {"repeat_threshold": 0.01} if kind == "repeat_factor" else {}
        sampled = sampling_of(shards, _data(folder, sampling=kind, **threshold))
        assert sampled.repeats is not None
        sampled.repeats.counts(0, 0)


def cache(folder: Path, size: Size) -> Iterator[str | None]:
    """Check that a cache is complete."""
    yield None
    shards = ShardSet.open(str(folder / "train"))
    found = Cache(Folder.open(str(folder / "cache")), {"a": 1}, shards, VIEWS, Codec("fp16", 2, 8), 32)
    found.begin()
    for unit in found.units():
        (folder / "cache" / found.file(*unit)).touch()
    yield f"check that a cache of {VIEWS} views is complete"
    found.check()


def evaluation(folder: Path, size: Size) -> Iterator[str | None]:
    """Score detections of the validation split, as rank 0 does."""
    yield "evaluation: open the split, read the ground truth"
    truth = ShardSet.open(str(folder / "val")).ground_truth()
    yield f"evaluation: hold {DETECTIONS} detections an image"
    found = detections(truth)
    yield "evaluation: score them"
    coco_metrics(truth, found, [image["id"] for image in truth["images"]])


def detections(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Return detections as ``engine.evaluation.predict`` does, half of them near an object."""
    rng = np.random.default_rng(0)
    own: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        own[annotation["image_id"]].append(annotation)
    found = []
    for image_id, objects in own.items():
        boxes = rng.uniform(5, 300, (DETECTIONS, 4))
        labels = rng.integers(1, len(truth["categories"]) + 1, DETECTIONS)
        for place in range(DETECTIONS // 2 if objects else 0):
            near = objects[place % len(objects)]
            boxes[place] = np.array(near["bbox"]) * rng.normal(1, 0.1, 4)
            labels[place] = near["category_id"]
        columns = zip(boxes.tolist(), labels.tolist(), rng.random(DETECTIONS).tolist(), strict=True)
        found += [{"image_id": image_id, "category_id": label, "bbox": box, "score": score} for box, label, score in columns]
    return found


PARTS: dict[str, Part] = {
    "prepare": prepare,
    "bare": bare,
    "order": order,
    "epochs": epochs,
    "read": read,
    "sampling": sampling,
    "cache": cache,
    "evaluation": evaluation,
}
READING = ("prepare", "read", "sampling", "evaluation")
"""Parts that need the content of splits, and so "prepare"; for the others "bare" will do, which takes much less time."""


def _windows(shards: ShardSet, epochs: int = EPOCHS, start: int = 0) -> Iterator[Window]:
    rows = train_rows(shards.index, keep_empty=False)
    keys: dict[str, Any] = {"seed": 0, "rank": 0, "world_size": WORKERS, "batch_size": BATCH, "window": WINDOW}
    return train_windows(shards.index, rows, **keys, epochs=epochs, start_step=start)


def _exhaust(windows: Iterator[Window]) -> None:
    for _ in windows:
        pass


def _data(folder: Path, **keys: Any) -> DataSpec:
    return DataSpec(train=str(folder / "train"), val=str(folder / "val"), **keys)
