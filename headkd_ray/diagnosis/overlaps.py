"""The overlaps of a split's detections with its ground truth, which all other analyses start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

LEAST_IOU = 0.1
"""Pairs that overlap less are not recorded: no analysis takes them for an attempt at the same object."""


@dataclass(frozen=True)
class Boxes:
    """Objects or detections of a split. One index counts them all."""

    image: Ints
    """(N,) index into the split's images."""
    label: Ints
    """(N,) index into the split's categories."""
    xywh: Floats
    """(N, 4) x, y, width, height in pixels of the stored image."""

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class Overlaps:
    """A split's objects, the detections that count, and the pairs of them that overlap."""

    classes: tuple[str, ...]
    image_ids: tuple[int, ...]
    objects: Boxes
    crowd: Flags
    """(G,) whether an object is a crowd, which detections may cover at no gain and no cost."""
    found: Boxes
    """(D,) the detections, best first."""
    score: Floats
    """(D,)"""
    pair_found: Ints
    """(P,) the detection of each pair whose IoU is at least ``LEAST_IOU``, in ascending order."""
    pair_object: Ints
    """(P,) its object."""
    iou: Floats
    """(P,) its IoU; with a crowd, the share of the detection that is covered, as COCO defines it."""

    @property
    def same_label(self) -> Flags:
        """(P,) whether both are of one class."""
        return self.found.label[self.pair_found] == self.objects.label[self.pair_object]


def overlaps(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], max_detections: int = 100) -> Overlaps:
    """Find the pairs of a detection and an object of one image that overlap.

    Args:
        ground_truth: COCO dictionary (images, annotations, categories), without regard to annotations of other images.
        results: COCO results (image_id, category_id, bbox xywh in pixels of the stored image, score); those of images or
            categories that the ground truth does not have are left out.
        max_detections: how many of an image's best detections count in each class, as in COCO's AP.
    """
    images = {image["id"]: index for index, image in enumerate(ground_truth["images"])}
    labels = {category["id"]: index for index, category in enumerate(ground_truth["categories"])}
    annotations = [each for each in ground_truth["annotations"] if each["image_id"] in images]
    objects = _boxes(annotations, images, labels)
    crowd = np.array([bool(each.get("iscrowd", 0)) for each in annotations], dtype=bool)

    results = [each for each in results if each["image_id"] in images and each["category_id"] in labels]
    score = np.array([each["score"] for each in results], dtype=np.float64)
    found = _boxes(results, images, labels)
    best_first = np.argsort(-score, kind="stable")
    best_first = best_first[_place_in_group(found.image[best_first], found.label[best_first]) < max_detections]
    found = Boxes(found.image[best_first], found.label[best_first], found.xywh[best_first])

    pairs = [_pairs(*members, objects, crowd, found) for members in _by_image(objects.image, found.image, len(images))]
    of_found, of_object, iou = (np.concatenate([each[part] for each in pairs] or [np.empty(0)]) for part in range(3))
    order = np.argsort(of_found, kind="stable")
    return Overlaps(
        tuple(category["name"] for category in ground_truth["categories"]),
        tuple(images),
        objects,
        crowd,
        found,
        score[best_first],
        of_found[order].astype(np.int64),
        of_object[order].astype(np.int64),
        iou[order],
    )


Matches = tuple[Ints, Flags]
"""What ``matched`` returns."""


def matched(pairs: Overlaps, iou: float = 0.5) -> Matches:
    """Match detections with objects of their class as COCO does: the best first, each to the object that it overlaps most.

    Returns:
        (D,) the object of each detection, -1 = none, and (D,) whether the detection is ignored, because it matches a crowd.
    """
    objects = np.full(len(pairs.found), -1, dtype=np.int64)
    ignored = np.zeros(len(pairs.found), dtype=bool)
    taken = np.zeros(len(pairs.objects), dtype=bool)
    chosen = np.flatnonzero(pairs.same_label & (pairs.iou >= min(iou, 1 - 1e-10)))
    crowd = pairs.crowd[pairs.pair_object[chosen]]
    # Of equal IoUs COCO takes the last, and crowds only if there is nothing else.
    order = np.lexsort((-pairs.pair_object[chosen], -pairs.iou[chosen], crowd, pairs.pair_found[chosen]))
    for pair in chosen[order].tolist():
        one, other = pairs.pair_found[pair], pairs.pair_object[pair]
        if objects[one] >= 0 or taken[other]:
            continue
        objects[one] = other
        ignored[one] = pairs.crowd[other]
        taken[other] = not pairs.crowd[other]
    return objects, ignored


def _boxes(records: Sequence[Mapping[str, Any]], images: Mapping[int, int], labels: Mapping[int, int]) -> Boxes:
    return Boxes(
        np.array([images[each["image_id"]] for each in records], dtype=np.int64),
        np.array([labels[each["category_id"]] for each in records], dtype=np.int64),
        np.array([each["bbox"] for each in records], dtype=np.float64).reshape(-1, 4),
    )


def _place_in_group(*keys: Ints) -> Ints:
    """Return, for each element, how many elements with the same keys come before it."""
    order = np.lexsort(keys[::-1])  # stable
    changed = np.zeros(len(order), dtype=bool)
    for key in keys:
        changed[1:] |= key[order][1:] != key[order][:-1]
    starts = np.flatnonzero(changed | (np.arange(len(order)) == 0))
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return places


def _by_image(one: Ints, other: Ints, images: int) -> list[tuple[Ints, Ints]]:
    """Return the members of both groups for each image that has some of both."""
    sides = []
    for group in (one, other):
        order = np.argsort(group, kind="stable")
        sides.append(np.split(order, np.searchsorted(group[order], np.arange(1, images))))
    return [(left, right) for left, right in zip(*sides, strict=True) if len(left) and len(right)]


def _pairs(of_image: Ints, found_in_image: Ints, objects: Boxes, crowd: Flags, found: Boxes) -> tuple[Ints, Ints, Floats]:
    truth, boxes = objects.xywh[of_image], found.xywh[found_in_image]
    corner = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    extent = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], truth[None, :, :2] + truth[None, :, 2:]) - corner
    shared = np.prod(np.maximum(extent, 0), axis=-1)
    area = np.prod(boxes[:, 2:], axis=-1)[:, None]
    union = np.where(crowd[of_image][None], area, area + np.prod(truth[:, 2:], axis=-1)[None] - shared)
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    rows, columns = np.nonzero(iou >= LEAST_IOU)
    return found_in_image[rows], of_image[columns], iou[rows, columns]
