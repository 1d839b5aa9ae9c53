"""Pseudo labels: predictions of a teacher that is no network, as boxes of images with the score as their loss weight.

They are added to an image before its views are made, and so move with it through crops, mosaics and flips like ground truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.box_checks import MIN_SIDE, SLACK, plain
from headkd_ray.data.box_forms import misread
from headkd_ray.data.class_lists import difference, listed
from headkd_ray.data.predictions import Key, Predictions, places_of
from headkd_ray.data.problems import Problems
from headkd_ray.data.sample import Sample
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import DataError
from headkd_ray.job import TeacherSpec


@dataclass(frozen=True)
class PseudoLabels:
    """The pseudo labels of a split's images."""

    first: NDArray[np.int64]
    """int64 (images + 1,): those of the image in row i of the index are first[i] : first[i + 1]."""
    boxes: NDArray[np.float32]
    """float32 (n, 4): x1 y1 x2 y2 in pixels, inside the image."""
    labels: NDArray[np.int64]
    """int64 (n,): contiguous classes of the data."""
    weights: NDArray[np.float32]
    """float32 (n,): the score, or 0 for a box that is ignored because its score is too low."""

    def counts(self) -> NDArray[np.int64]:
        """Return how many of each image's pseudo labels are not ignored, int64 (images,)."""
        return np.diff(np.concatenate([[0], np.cumsum(self.weights > 0)])[self.first])

    def added_to(self, sample: Sample, row: int, labelled: bool, iou: float | None) -> Sample:
        """Return the image in ``row`` of the index with its pseudo labels.

        Args:
            labelled: whether the ground truth of the image is used; otherwise its boxes are the pseudo labels alone.
            iou: IoU with a ground-truth box from which on a pseudo label is that object, and is left out.
        """
        mine = slice(self.first[row], self.first[row + 1])
        boxes, labels, weights = self.boxes[mine], self.labels[mine], self.weights[mine]
        if not labelled:
            return replace(sample, boxes=boxes, labels=labels, scores=weights, labelled=False)
        new = ~(_overlaps(boxes, sample.boxes) >= (1.0 if iou is None else iou)).any(axis=1)
        return replace(
            sample,
            boxes=np.concatenate([sample.boxes, boxes[new]]),
            labels=np.concatenate([sample.labels, labels[new]]),
            scores=np.concatenate([sample.weights, weights[new]]),
        )


def _overlaps(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the IoU of each of the boxes (n, 4) with each of the others (m, 4), float64 (n, m)."""
    one, other = boxes.astype(np.float64)[:, None], others.astype(np.float64)[None]
    sides = np.clip(np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]), 0, None)
    shared = sides.prod(-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (one, other)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1e-12)


def pseudo_labels(
    found: Predictions, splits: Mapping[str, ShardSet], classes: Mapping[int, str], spec: TeacherSpec, problems: Problems
) -> tuple[dict[str, PseudoLabels], list[str]]:
    """Return the pseudo labels of each of the ``splits``, and sentences for the log about what was taken and what was not.

    Args:
        splits: the splits whose images get pseudo labels, by what messages call them.
        classes: names of the data's classes by category id, in the order of the labels.
        problems: what is already known to be wrong with the file.

    Raises:
        DataError: there are problems, or the predictions are of other images or classes, or boxes leave their images; all
            problems are listed.
    """
    news: list[str] = []
    label = _labels(found, classes, problems, news)
    rows = {name: places_of(found.image_keys, split.index.image_id, split.file_names()) for name, split in splits.items()}
    _check_images(found, rows, splits, problems)
    made = {}
    for name, split in splits.items():
        row, known = rows[name][found.image], label >= 0
        kept = np.flatnonzero((row >= 0) & known)
        row = row[kept]
        corners, usable = _corners(found, kept, row, split, problems)
        order = np.flatnonzero(usable)[np.argsort(row[usable], kind="stable")]
        score = found.score[kept][order]
        labels = PseudoLabels(
            first=np.concatenate([[0], np.cumsum(np.bincount(row[order], minlength=len(split.index)))]).astype(np.int64),
            boxes=corners[order].astype(np.float32),
            labels=label[kept][order],
            weights=np.where(score >= spec.score_threshold, score, 0.0).astype(np.float32),
        )
        made[name] = labels
        news.append(_summary(found, name, split, labels, rows[name], int((~usable).sum()), spec))
    problems.check(f"{found.place} cannot be used as predictions:")
    if not any((labels.weights > 0).any() for labels in made.values()):
        raise DataError(
            f"teacher.score_threshold: no prediction of {found.place} for these images has a score of at least "
            f"{spec.score_threshold:g} (the highest of all is {found.highest:g}); lower it"
        )
    return made, news


def _labels(found: Predictions, classes: Mapping[int, str], problems: Problems, news: list[str]) -> NDArray[np.int64]:
    """Return the contiguous label of each prediction, int64 (n,); -1 = the data does not have its class."""
    by_key: dict[Key, int] = {name: place for place, name in enumerate(classes.values())}
    by_key |= {id_: place for place, id_ in enumerate(classes)}
    of_key = np.array([by_key.get(key, -1) for key in found.class_keys], dtype=np.int64)
    counts = Counter(found.label.tolist())
    unknown = [(key, counts[place]) for place, key in enumerate(found.class_keys) if of_key[place] < 0]
    for key, count in unknown:
        if isinstance(key, int):
            ids = f"{min(classes)} to {max(classes)}" if len(classes) > 1 else str(min(classes))
            problems.add(
                f"is none of the data's category ids (there are {len(classes)}, {ids}); write the data's ids, or class names "
                "under 'category'",
                f"{found.place}: category_id {key} of {count} predictions",
            )
    names = [key for key, _ in unknown if isinstance(key, str) and not key.startswith("\0")]  # which a problem is about
    if names and (of_key < 0).all():
        own = [key for key in found.class_keys if isinstance(key, str)]
        both = difference("the data", [*classes.values()], "the file", own)
        problems.add(f"none of its classes is the data's: {both}", found.place)
    elif names:
        lost = sum(count for key, count in unknown if isinstance(key, str))
        news.append(f"{found.place}: {lost} predictions of classes that the data does not have are left out: {listed(names)}")
    return of_key[found.label] if len(found.class_keys) else np.zeros(0, dtype=np.int64)


def _check_images(
    found: Predictions, rows: Mapping[str, NDArray[np.int64]], splits: Mapping[str, ShardSet], problems: Problems
) -> None:
    """Record it if none of the file's images is in the splits, if two of them are one image, or one of them is two images."""
    places = " and ".join(splits)
    if not found.image_keys:
        return
    if all((row < 0).all() for row in rows.values()):
        theirs = listed([str(key) for key in found.image_keys], 3)
        index = next(iter(splits.values())).index
        known = listed([str(id_) for id_ in index.image_id.tolist()], 3)
        problems.add(
            f"0 of its {len(found.image_keys)} images are in {places}; is it a file for other images? It has {theirs}; ids "
            f"there are {known}",
            found.place,
        )
    for name, row in rows.items():
        taken = row[row >= 0]
        again = len(taken) - len(np.unique(taken))
        if again:
            problems.add(f"names {again} images of {name} in two ways; write each in one", found.place)
    both = np.sum([row >= 0 for row in rows.values()], axis=0) > 1
    if both.any():
        example = found.image_keys[int(np.argmax(both))]
        problems.add(
            f"{int(both.sum())} of its images are in {places} alike (the first: {example!r}), so that it does not say which is "
            "meant; give the images other ids, or leave out teacher.labelled_iou",
            found.place,
        )


def _corners(
    found: Predictions, kept: NDArray[np.int64], row: NDArray[np.int64], split: ShardSet, problems: Problems
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the boxes of the predictions ``kept``, clipped to their images, (n, 4), and which have an area, (n,)."""
    sizes = np.stack([split.index.width, split.index.height], axis=1)[row].astype(np.float64)
    bbox = found.bbox[kept]

    def where(place: int) -> str:
        image = f"image {split.index.image_id[row[place]]}, {int(sizes[place, 0])} x {int(sizes[place, 1])}"
        return f"{found.place}: prediction {found.number[kept[place]]} ({image}), bbox {plain(bbox[place].tolist())}"

    form = misread(bbox, sizes)
    with np.errstate(over="ignore"):
        corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
    outside = (corners[:, :2] < -SLACK).any(1) | (corners[:, 2:] > sizes + SLACK).any(1)
    if form is not None:
        problems.add(form[0], where(form[1]))
    else:
        kind = (
            f"box leaves its image by more than {SLACK:g} px; is the file for images of another size? Otherwise clip its boxes"
        )
        problems.add_all(kind, np.flatnonzero(outside).tolist(), where)
    corners = np.clip(corners, 0, np.tile(sizes, 2))
    return corners, (corners[:, 2:] - corners[:, :2] >= MIN_SIDE).all(axis=1)


def _summary(
    found: Predictions,
    name: str,
    split: ShardSet,
    labels: PseudoLabels,
    rows: NDArray[np.int64],
    flat: int,
    spec: TeacherSpec,
) -> str:
    taken, ignored = int((labels.weights > 0).sum()), int((labels.weights == 0).sum())
    there = int((rows >= 0).sum())
    return (
        f"{found.place}: {taken} pseudo labels (score from {spec.score_threshold:g}) on {int((labels.counts() > 0).sum())} of "
        f"{len(split.index)} images of {name}, and {ignored} boxes (from {spec.ignore_threshold:g}) that are ignored; "
        f"{there} of the file's {len(rows)} images are there" + (f"; {flat} boxes without area are left out" if flat else "")
    )


def classes_by_id(split: ShardSet) -> dict[int, str]:
    """Return the names of a split's classes by category id, in the order of the labels."""
    return dict(zip(split.meta.category_ids, split.meta.classes, strict=True))
