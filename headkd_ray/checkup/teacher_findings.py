"""Whether the teacher knows the data's classes, how well it detects them, and what its cached answers would take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from headkd_ray.checkup.findings import Finding, Level, gravest, skipped
from headkd_ray.checkup.subject import Subject
from headkd_ray.data.batch import Batch
from headkd_ray.data.batch_stream import BatchMaker, PendingBatch, load_samples
from headkd_ray.data.class_lists import difference, differing_in_case, listed
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights.fetch import fetch_named
from headkd_ray.detectors.weights.loaded import UNUSED, LoadedDetector
from headkd_ray.engine.coco_metrics import coco_metrics
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import predict
from headkd_ray.engine.inference import view_spec
from headkd_ray.engine.scoring import recorded_detections
from headkd_ray.errors import DataError, UserError
from headkd_ray.memory import enough_memory
from headkd_ray.profiling.cost_model import cache_bytes
from headkd_ray.storage import Folder
from headkd_ray.teacher import codec_of, open_cache
from headkd_ray.teacher.cache_recipe import views_of
from headkd_ray.teacher.loading import teacher_of

BATCH = 2
"""Images of a forward pass."""
NOTHING = 1.0
"""AP below which a detector detects nothing of the data."""
NO_TEACHER = "the job has no teacher"
ROOM = 1.2
"""Free bytes for each byte that will be written, below which a disk is called out."""


def check_class_lists(subject: Subject) -> Finding:
    """Compare the class lists of teacher, train and val, by name."""
    lists: dict[str, tuple[str, ...]] = {name: subject.split(name).meta.classes for name in subject.splits}
    told = [f"{len(names)} in {name}" for name, names in lists.items()]
    levels, mends = list[Level](["green"]), list[str]()
    if len(lists) == 2 and set(lists["train"]) != set(lists["val"]):
        levels.append("yellow" if set(lists["val"]) <= set(lists["train"]) else "red")
        told.append(difference("train", lists["train"], "val", lists["val"]))
        mends.append("Give both splits the same categories (prepare --classes takes those of a prepared split).")
    if subject.teacher is not None and "train" in lists:
        try:
            loaded = fetch_named("teacher", subject.teacher.source[1], subject.teacher.classes)
        except UserError as error:
            told.append(f"the teacher's are not known: {error.problems[0]}")
        else:
            known = lists["teacher"] = tuple(name for name in loaded.classes or () if name != UNUSED)
            unknown = [name for name in lists["train"] if name not in known]
            told.append(f"the teacher knows {len(lists['train']) - len(unknown)} of train's")
            alike = differing_in_case("the teacher", known, lists["train"])
            if unknown:
                levels.append("red" if len(unknown) == len(lists["train"]) else "yellow")
                told.append(f"it does not know {listed(unknown, 5)}")
                mends.append(
                    f"Spell them as the teacher does: {', '.join(alike)}."
                    if alike
                    else "Its head starts with new weights for these, and its features have not learned them: train a teacher "
                    "on your classes (jobs/teacher.yaml), or name its outputs with teacher.classes."
                )
    figures: dict[str, Any] = {name: list(names) for name, names in lists.items()}
    return Finding("class lists", gravest(levels), "; ".join(told), " ".join(mends) or None, figures)


def check_teacher(subject: Subject) -> Finding:
    """Evaluate the teacher on some validation images, and the baseline if there is one."""
    teacher, options = subject.teacher, subject.options
    if teacher is None:
        return skipped("teacher", NO_TEACHER)
    val = subject.split("val")
    count = min(options.val_images, len(val.index))
    figures: dict[str, Any] = {"images": count, "least_ap": options.least_ap}
    _, place = teacher.source
    theirs = sample_ap(fetch_named("teacher", place, teacher.classes), val, count, place)
    figures["ap"] = theirs
    told = f"AP {theirs:.1f} on {count} of {len(val.index):,} images of val (--val-images)"
    level: Level = "green"
    mend = None
    if theirs < options.least_ap:
        level = "red" if theirs < NOTHING else "yellow"
        told += f", below {options.least_ap:g} (--least-ap)"
        mend = (
            "Train the teacher on these classes, or longer; an AP of almost 0 means other classes, another order of them "
            "(teacher.classes), or another kind of photos."
        )
    if options.baseline is not None:
        ours = sample_ap(fetch_named("student", options.baseline, None), val, count, options.baseline)
        figures["baseline_ap"] = ours
        told += f"; the baseline has {ours:.1f} there"
        if theirs <= ours:
            level, mend = "red", "A teacher that is no better than the student alone teaches it little: use a better one."
    return Finding("teacher", level, told, mend, figures)


def sample_ap(loaded: LoadedDetector, val: ShardSet, count: int, who: str) -> float:
    """Return the AP in percent of a detector on the first ``count`` images of a split, over the classes that it knows.

    Raises:
        DataError: it knows none of the classes that these images have, or the split cannot be read.
        DeviceMemoryError: a batch needs more memory than is available.
    """
    ids = dict(zip(val.meta.classes, val.meta.category_ids, strict=True))
    known = [ids.get(name) for name in loaded.classes or ()]
    rows = range(count)
    device = Distributed.alone().device
    maker = BatchMaker(view_spec(loaded.meta), seed=0, train=False)
    with enough_memory(f"evaluating {who}", "leave the check out (--skip teacher)"):
        found = predict(loaded.detector.to(device), _batches(val, rows, maker), device, known)
    truth = val.ground_truth()
    shown = set(found)
    truth = {
        "images": [image for image in truth["images"] if image["id"] in shown],
        "annotations": [each for each in truth["annotations"] if each["image_id"] in shown and each["category_id"] in known],
        "categories": [category for category in truth["categories"] if category["id"] in known],
    }
    if not any(not each["iscrowd"] for each in truth["annotations"]):
        raise DataError(f"{who} knows no class that the {count} images have; raise --val-images, or see class lists")
    results = [entry for entries in found.values() for entry in entries]
    metrics = coco_metrics(truth, results, list(found), recorded_detections(loaded.meta))
    return 0.0 if math.isnan(metrics.AP) else round(metrics.AP, 3)


def _batches(shards: ShardSet, rows: Sequence[int], maker: BatchMaker) -> Iterator[Batch]:
    """Yield the images at ``rows``, a few at a time, those of one aspect together."""
    order = sorted(rows, key=lambda row: bool(shards.index.portrait[row]))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        numbers = (0,) * len(some)
        yield maker(PendingBatch(start // BATCH, tuple(load_samples(shards, some, numbers, maker)), numbers))


def check_cache(subject: Subject) -> Finding:
    """Work out the size of a cache of soft targets, and whether its disk has room."""
    job, teacher = subject.job, subject.teacher
    if teacher is None:
        return skipped("cache", NO_TEACHER)
    if job.distill.rois == "student":
        return skipped("cache", "distill.rois: student: the teacher answers in the step, and its answers cannot be cached")
    shards, views = subject.split("train"), views_of(job)
    network = teacher_of(job, shards.meta.classes)
    images = len(shards.index) if job.data.keep_empty else int((shards.index.boxes > 0).sum())
    size = cache_bytes(images, views, job.distill.roi_budget, codec_of(job, network))
    cache = open_cache(job, shards, network)
    built = sum(each or 0 for each in cache.folder.sizes([cache.file(*unit) for unit in cache.units()]))
    room = free_bytes(cache.folder)
    figures = {"bytes": size, "views": views, "images": images, "built_bytes": built, "free_bytes": room}
    found = f"at most {gigabytes(size)} for {views} views of {images:,} images, {gigabytes(built)} of it built"
    found += "" if room is None else f"; the disk of {cache.folder.uri} has {gigabytes(room)} left"
    if teacher.placement != "cache":
        return Finding("cache", "green", f"{found} (teacher.placement: {teacher.placement} does without)", None, figures)
    if room is None or room >= ROOM * (size - built):
        return Finding("cache", "green", found, None, figures)
    mend = (
        "Make room, lower data.views or distill.roi_budget, use teacher.cache.dtype: int8, or name another teacher.cache.path."
    )
    return Finding("cache", "red" if room < (size - built) / 2 else "yellow", found, mend, figures)


def free_bytes(folder: Folder) -> int | None:
    """Return the free bytes of the local disk that holds the folder, or will hold it; None for remote storage."""
    return existing(folder).room()


def existing(folder: Folder) -> Folder:
    """Return the folder or, if it is local and does not exist, the nearest one above it that does, on the same disk."""
    while not folder.remote and not folder.exists:
        folder = Folder.of_file(folder.address)[0]
    return folder


def gigabytes(size: int) -> str:
    """Return a size for people: 1.3 GB, 20 MB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
