"""What is odd about the boxes of the data, whatever the job."""

from __future__ import annotations

from typing import Any

import numpy as np

from headkd_ray.checkup.box_statistics import SAME, TINY, WHOLE, BoxStatistics, Marked, edges
from headkd_ray.checkup.findings import Example, Finding, Level, SplitName, gravest, share
from headkd_ray.checkup.subject import Subject
from headkd_ray.data.class_lists import listed
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import DataError

MANY_TINY, MANY_WHOLE, MANY_DOUBLE = 0.005, 0.01, 0.001
"""Shares of the boxes from which an oddity is called out."""
MANY_EMPTY = 0.2
"""Share of the images from which those without boxes are called out."""
FEW = 20
"""Boxes of a class below which it is called out."""
OTHER_SIZES = 2.0
"""Ratio of the splits' median sides from which their images are called of other sizes."""
SHOWN = 4
"""Most examples of a finding in each split."""


def check_files(subject: Subject) -> Finding:
    """Read all annotations and the first images of both splits, and pass on what ``prepare`` said."""
    told, problems, notes = [], [], list[str]()
    figures: dict[str, Any] = {}
    for name, shards in subject.splits.items():
        try:
            boxes, seen = subject.statistics(name).boxes, subject.fingerprints(name)
        except DataError as error:
            problems += error.problems
            continue
        told.append(f"{name}: {len(shards.index):,} images, {boxes:,} boxes, {len(seen.rows):,} images opened")
        problems += [f"{shards.folder.uri}: image {shards.index.image_id[row]} {reason}" for row, reason in seen.unreadable]
        notes += [*shards.meta.warnings, *shards.meta.fixes]
        figures[name] = {
            "images": len(shards.index),
            "boxes": boxes,
            "crowds": shards.meta.crowds,
            "opened": len(seen.rows) + len(seen.unreadable),
            "unreadable": len(seen.unreadable),
            "notes": [*shards.meta.warnings, *shards.meta.fixes],
        }
    if problems:
        mend = "Replace the files and prepare the split again, with --overwrite."
        return Finding("files", "red", "; ".join(problems[:3]) + _more(problems, 3), mend, figures)
    if notes:
        found = f"{'; '.join(told)}; prepare noted: {'; '.join(notes[:2])}{_more(notes, 2)}"
        mend = "Read all of it in meta.json (warnings, fixes), and correct the annotations where it is not what you mean."
        return Finding("files", "yellow", found, mend, figures)
    return Finding("files", "green", "; ".join(told), None, figures)


def check_tiny(subject: Subject) -> Finding:
    """Count boxes that are hardly those of objects."""
    return _oddity(
        subject,
        "tiny boxes",
        "tiny",
        MANY_TINY,
        f"narrower or lower than {TINY:g} px in the stored image",
        "Look at the pictures; remove boxes that come from a slip of the mouse, and prepare the split again.",
    )


def check_whole(subject: Subject) -> Finding:
    """Count boxes of whole images."""
    return _oddity(
        subject,
        "whole-image boxes",
        "whole",
        MANY_WHOLE,
        f"cover {100 * WHOLE:.0f} % of their image or more",
        "Look at the pictures; such boxes often come from labels of whole images, which teach a detector little.",
    )


def check_double(subject: Subject) -> Finding:
    """Count objects that are marked twice."""
    return _oddity(
        subject,
        "double boxes",
        "double",
        MANY_DOUBLE,
        f"pairs of one class with an IoU of {SAME:g} or more",
        "Remove one box of each pair: in evaluation the second one can never be found.",
    )


def check_double_class(subject: Subject) -> Finding:
    """Count objects that are marked as two classes."""
    return _oddity(
        subject,
        "boxes of two classes",
        "double_class",
        MANY_DOUBLE,
        f"pairs of two classes with an IoU of {SAME:g} or more",
        "Decide for one class: the losses of the two pull the student apart.",
    )


def _oddity(subject: Subject, check: str, kind: str, many: float, what: str, mend: str) -> Finding:
    """Return how many boxes of each split are odd in one way; it is called out from a share of ``many``."""
    told, levels, figures, examples = [], list[Level](), dict[str, Any](), list[Example]()
    for name, shards in subject.splits.items():
        found = subject.statistics(name)
        odd, total = found.odd[kind], found.boxes
        levels.append("yellow" if odd.count and odd.count >= many * total else "green")
        told.append(f"{name}: {share(odd.count, total)}")
        figures[name] = {"count": odd.count, "boxes": total}
        examples += [_example(name, shards, marked) for marked in odd.examples[:SHOWN]]
    level = gravest(levels)
    return Finding(check, level, f"{what}: {'; '.join(told)}", mend if level != "green" else None, figures, tuple(examples))


def _example(split: SplitName, shards: ShardSet, marked: Marked) -> Example:
    sizes = [f"{x2 - x1:.0f} x {y2 - y1:.0f} px" for x1, y1, x2, y2 in marked.boxes]
    classes = [shards.meta.classes[label] for label in marked.labels]
    told = " and ".join(f"{name} {size}" for name, size in zip(classes, sizes, strict=True))
    return Example(
        split, marked.row, f"{split}, image {shards.index.image_id[marked.row]}: {told}", marked.boxes, marked.labels
    )


def check_empty(subject: Subject) -> Finding:
    """Count images without boxes."""
    told, levels, figures, examples = [], list[Level](), dict[str, Any](), list[Example]()
    for name, shards in subject.splits.items():
        rows = np.flatnonzero(shards.index.boxes == 0)
        levels.append("yellow" if len(rows) >= MANY_EMPTY * len(shards.index) else "green")
        told.append(f"{name}: {share(len(rows), len(shards.index))}")
        figures[name] = {"count": len(rows), "images": len(shards.index)}
        for row in rows[:SHOWN].tolist():
            examples.append(Example(name, row, f"{name}, image {shards.index.image_id[row]}: no boxes"))
    level = gravest(levels)
    kept = subject.job.data.keep_empty
    what = "they are trained on" if kept else "training leaves them out"
    found = f"{'; '.join(told)}; {what} (data.keep_empty: {str(kept).lower()})"
    mend = (
        "Look at the pictures: if their objects were not marked, mark them or leave the images out; if they show background, "
        "data.keep_empty: true trains on them."
    )
    return Finding("images without boxes", level, found, mend if level != "green" else None, figures, tuple(examples))


def check_classes(subject: Subject) -> Finding:
    """Compare how often the splits have each class."""
    counts = {name: subject.statistics(name).boxes_of_class for name in subject.splits}
    by_name = {
        split: dict(zip(subject.split(split).meta.classes, each.tolist(), strict=True)) for split, each in counts.items()
    }
    figures: dict[str, Any] = {
        split: {
            label: {"boxes": boxes, "images": int(subject.statistics(split).images_of_class[place])}
            for place, (label, boxes) in enumerate(by_name[split].items())
        }
        for split in by_name
    }
    train, val = by_name.get("train", {}), by_name.get("val", {})
    told, mends, levels = [], list[str](), list[Level](["green"])

    def tell(level: Level, what: str, names: list[str], mend: str) -> None:
        if names:
            levels.append(level)
            told.append(f"{what}: {listed(names, 5)}")
            mends.append(mend)

    if train and val:
        never = [name for name, boxes in val.items() if boxes and not train.get(name)]
        tell(
            "red",
            "in val, without a box in train",
            never,
            "Divide the images again (prepare --split), or add images of what train lacks.",
        )
        unmeasured = [name for name, boxes in train.items() if boxes and not val.get(name)]
        tell("yellow", "in train, without a box in val", unmeasured, "AP does not see what val lacks: divide the images again.")
    unused = [name for name, boxes in train.items() if not boxes and not val.get(name)]
    tell("yellow", "in no image", unused, "Remove these categories, or the student keeps outputs that nothing trains.")
    few = [name for name, boxes in train.items() if 0 < boxes < FEW]
    mend = "Add examples, or show what there is more often: data.sampling: repeat_factor with a data.repeat_threshold."
    tell("yellow", f"fewer than {FEW} boxes in train", few, mend)
    some = [boxes for boxes in train.values() if boxes]
    span = f"{len(some)} classes with {min(some):,} to {max(some):,} boxes in train" if some else "no class has boxes in train"
    return Finding("classes", gravest(levels), "; ".join([span, *told]), " ".join(mends) or None, figures)


def check_images(subject: Subject) -> Finding:
    """Describe sizes and aspects of images and boxes, and whether the splits resemble each other."""
    told, figures, medians = [], dict[str, Any](), dict[str, float]()
    most, crowded = subject.job.eval.max_detections, list[str]()
    for name, shards in subject.splits.items():
        index, found = shards.index, subject.statistics(name)
        side = np.sqrt(index.width.astype(np.float64) * index.height)
        medians[name] = float(np.median(side))
        per_image = index.boxes
        figures[name] = {
            "width": [int(value) for value in np.quantile(index.width, (0, 0.5, 1))],
            "height": [int(value) for value in np.quantile(index.height, (0, 0.5, 1))],
            "portrait": int(index.portrait.sum()),
            "boxes_per_image": [float(value) for value in np.quantile(per_image, (0, 0.5, 1))],
            "box_side": _quantiles(found, "sides"),
            "box_aspect": _quantiles(found, "aspects"),
        }
        told.append(
            f"{name}: {index.width.min()} x {index.height.min()} to {index.width.max()} x {index.height.max()} px, "
            f"{per_image.mean():.1f} boxes an image, at most {per_image.max()}"
        )
        if name == "val" and per_image.max() > most:
            crowded.append(f"{int((per_image > most).sum())} images of val have more than eval.max_detections ({most}) boxes")
    if crowded:
        mend = f"Set eval.max_detections to {figures['val']['boxes_per_image'][-1]:.0f}, and the student's max_detections too."
        return Finding("images", "yellow", "; ".join([*told, *crowded]), mend, figures)
    if len(medians) == 2 and max(medians.values()) > OTHER_SIZES * min(medians.values()):
        sizes = f"the images of train and val are of other sizes (median {medians['train']:.0f} and {medians['val']:.0f} px)"
        mend = "Check that both splits come from the same source: AP on other photos says little about training."
        return Finding("images", "yellow", "; ".join([*told, sizes]), mend, figures)
    return Finding("images", "green", "; ".join(told), None, figures)


def _quantiles(found: BoxStatistics, name: str) -> list[float]:
    """Return the 5 %, 50 % and 95 % quantiles of a histogram, to the width of a bin."""
    counts = getattr(found, name)
    places = np.searchsorted(np.cumsum(counts), np.array([0.05, 0.5, 0.95]) * counts.sum())
    return [round(float(value), 2) for value in edges()[np.minimum(places, len(counts) - 1)]]


def _more(lines: list[str], shown: int) -> str:
    return f"; … and {len(lines) - shown} more" if len(lines) > shown else ""
