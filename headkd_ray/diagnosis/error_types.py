"""What each kind of error costs, in the manner of TIDE (Bolya et al., ECCV 2020): AP50 gained if it were mended alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headkd_ray.diagnosis.curves import curve
from headkd_ray.diagnosis.overlaps import LEAST_IOU, Boxes, Flags, Floats, Ints, Matches, Overlaps

WELL = 0.5
"""IoU from which an object is covered well."""
KINDS = {
    "class": "an object of another class is covered well",
    "location": "an object of the class is covered, but not well",
    "both": "an object of another class is covered, but not well",
    "duplicate": "an object that a surer detection has found is found again",
    "background": "there is nothing",
    "missed": "an object is not found, nor is there a class or location error for it",
}
"""The kinds of errors. Below an IoU of ``LEAST_IOU`` nothing is covered."""
SIZES = {"small": 0, "medium": 32**2, "large": 96**2}
"""COCO's sizes, with the least area of each in square pixels of the stored image."""


@dataclass(frozen=True)
class ErrorTypes:
    """The errors of a detector on a split."""

    ap50: float
    """AP at IoU 0.5, in [0, 1]."""
    count: Mapping[str, int]
    """How often each kind occurs."""
    by_size: Mapping[str, Mapping[str, int]]
    """The same by size (``SIZES``) of the object's box, or of the detection's where there is no object."""
    gain: Mapping[str, float]
    """By how much ``ap50`` rises if errors of this kind alone are mended, by kind. They do not add up to what is missing."""


def error_types(pairs: Overlaps, matches: Matches) -> ErrorTypes:
    """Sort the wrong detections and the missed objects into ``KINDS``.

    Mending gives a detection with a class error the object's class, and one with a location error its place; if that object is
    found already, only the surest of them stays. Other wrong detections disappear, and missed objects do not count.

    Args:
        matches: what ``matched`` returns at an IoU of ``WELL``.
    """
    objects, ignored = matches
    wrong = (objects < 0) & ~ignored
    same, same_iou = _closest(pairs, pairs.same_label & ~pairs.crowd[pairs.pair_object])
    other, other_iou = _closest(pairs, ~pairs.same_label & ~pairs.crowd[pairs.pair_object])
    left = wrong.copy()
    kinds: dict[str, Flags] = {}
    for kind, holds in {
        "location": (same_iou >= LEAST_IOU) & (same_iou < WELL),
        "class": other_iou >= WELL,
        "duplicate": same_iou >= WELL,
        "both": other_iou >= LEAST_IOU,
        "background": np.ones(len(wrong), dtype=bool),
    }.items():
        kinds[kind] = left & holds
        left &= ~holds
    missed = ~pairs.crowd
    missed[objects[objects >= 0]] = False
    missed[same[kinds["location"]]] = False
    missed[other[kinds["class"]]] = False

    counts = np.bincount(pairs.objects.label[~pairs.crowd], minlength=len(pairs.classes))
    label, right, kept = pairs.found.label, objects >= 0, ~ignored
    plain = _ap50(pairs.score, label, right, kept, counts)
    gain = {}
    for kind in KINDS:
        if kind == "missed":
            fewer = counts - np.bincount(pairs.objects.label[missed], minlength=len(pairs.classes))
            mended = _ap50(pairs.score, label, right, kept, fewer)
        elif kind in ("class", "location"):
            claimed = np.where(kinds[kind], other if kind == "class" else same, objects)
            mended_label = np.append(pairs.objects.label, -1)[claimed]
            relabelled = np.where(kinds[kind], mended_label, label)
            mended = _ap50(pairs.score, relabelled, right | kinds[kind], kept & _surest(claimed), counts)
        else:
            mended = _ap50(pairs.score, label, right, kept & ~kinds[kind], counts)
        gain[kind] = mended - plain
    count = {kind: int((missed if kind == "missed" else kinds[kind]).sum()) for kind in KINDS}
    of_objects, of_found = _sizes(pairs.objects), _sizes(pairs.found)
    sizes = {"background": of_found[kinds["background"]], "missed": of_objects[missed]}
    sizes |= {kind: of_objects[same[kinds[kind]]] for kind in ("location", "duplicate")}
    sizes |= {kind: of_objects[other[kinds[kind]]] for kind in ("class", "both")}
    counts_of = {kind: np.bincount(sizes[kind], minlength=len(SIZES)).tolist() for kind in KINDS}
    by_size = {kind: dict(zip(SIZES, each, strict=True)) for kind, each in counts_of.items()}
    return ErrorTypes(plain, count, by_size, gain)


def _sizes(boxes: Boxes) -> Ints:
    """Return which of ``SIZES`` each box has (N,)."""
    return np.digitize(boxes.xywh[:, 2:].prod(axis=1), [*SIZES.values()][1:])


def _closest(pairs: Overlaps, eligible: Flags) -> tuple[Ints, Floats]:
    """Return each detection's object in the eligible pair with the highest IoU (D,), -1 = none, and that IoU (D,)."""
    objects, iou = np.full(len(pairs.found), -1, dtype=np.int64), np.zeros(len(pairs.found))
    chosen = np.flatnonzero(eligible)
    chosen = chosen[np.argsort(pairs.iou[chosen], kind="stable")]  # the last one written stays
    objects[pairs.pair_found[chosen]] = pairs.pair_object[chosen]
    iou[pairs.pair_found[chosen]] = pairs.iou[chosen]
    return objects, iou


def _surest(objects: Ints) -> Flags:
    """Return which detections, given best first, are the first with their object; those without one (-1) are."""
    first = np.zeros(len(objects), dtype=bool)
    first[np.unique(objects, return_index=True)[1]] = True
    return first | (objects < 0)


def _ap50(score: Floats, label: Ints, right: Flags, kept: Flags, objects: Ints) -> float:
    """Return the mean over classes that have objects; NaN if none has."""
    values = [
        curve("", int(count), score[mine], right[mine]).ap50
        for index, count in enumerate(objects)
        if count
        for mine in [np.flatnonzero(kept & (label == index))]
    ]
    return float(np.mean(values)) if values else float("nan")
