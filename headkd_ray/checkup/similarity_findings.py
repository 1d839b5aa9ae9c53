"""Images that are there twice, and images of the validation split that training has seen."""

from __future__ import annotations

import numpy as np

from headkd_ray.checkup.box_findings import SHOWN
from headkd_ray.checkup.findings import Example, Finding, Level, SplitName, share
from headkd_ray.checkup.similar_images import nearest_pair, similar_groups
from headkd_ray.checkup.subject import Subject

MANY_TWICE = 0.05
"""Share of near-duplicates within the training images from which they are called out."""
LEAK = 0.01
"""Share of the validation images that resemble a training image from which the validation is worthless."""


def check_near_duplicates(subject: Subject) -> Finding:
    """Look for training images that differ hardly or not at all."""
    shards, seen = subject.split("train"), subject.fingerprints("train")
    found = similar_groups(seen.prints)
    extra = sum(len(group) - 1 for group in found)
    many = extra >= MANY_TWICE * max(1, len(seen.rows))
    figures = {"looked_at": len(seen.rows), "images": len(shards.index), "repeated": extra, "groups": len(found)}
    told = f"images of train that repeat another one: {share(extra, len(seen.rows))}, {_looked(subject, 'train')}"
    mend = "Leave out copies and frames in which little moves: they cost time, and weigh what they show."
    examples = [_pair(subject, "train", int(seen.rows[group[0]]), "train", int(seen.rows[group[1]])) for group in found[:SHOWN]]
    return Finding("near-duplicates", "yellow" if many else "green", told, mend if many else None, figures, tuple(examples))


def check_leaks(subject: Subject) -> Finding:
    """Look for validation images that resemble training images."""
    train, val = subject.fingerprints("train"), subject.fingerprints("val")
    prints, border = np.concatenate([train.prints, val.prints]), len(train.prints)
    leaking, examples = 0, list[Example]()
    for group in similar_groups(prints):
        ours, theirs = group[group < border], group[group >= border]
        if len(ours) and len(theirs):
            leaking += len(theirs)
            if len(examples) < SHOWN:
                one, other = nearest_pair(prints, ours, theirs)
                examples.append(_pair(subject, "val", int(val.rows[other - border]), "train", int(train.rows[one])))
    figures = {
        "looked_at": {"train": border, "val": len(val.rows)},
        "images": {name: len(subject.split(name).index) for name in subject.splits},
        "leaking": leaking,
    }
    told = (
        f"images of val that resemble one of train: {share(leaking, len(val.rows))}, {_looked(subject, 'train')} and "
        f"{_looked(subject, 'val')}"
    )
    if not leaking:
        return Finding("leaks", "green", told, None, figures)
    level: Level = "red" if leaking >= LEAK * len(val.rows) else "yellow"
    mend = (
        "Look at the pictures; if they show the same scenes, AP on val is too high: divide the images again, prepare "
        "--split keeps near-duplicates in one part."
    )
    return Finding("leaks", level, told, mend, figures, tuple(examples))


def _looked(subject: Subject, name: SplitName) -> str:
    """Say how many images of a split were looked at."""
    seen, images = len(subject.fingerprints(name).rows), len(subject.split(name).index)
    return f"all {images:,} of {name} looked at" if seen == images else f"{seen:,} of {images:,} of {name} looked at (--images)"


def _pair(subject: Subject, split: SplitName, row: int, other_split: SplitName, other_row: int) -> Example:
    places: tuple[tuple[SplitName, int], ...] = ((split, row), (other_split, other_row))
    names = [f"{each}, image {subject.split(each).index.image_id[at]}" for each, at in places]
    return Example(split, row, " beside ".join(names), beside=Example(other_split, other_row, names[1]))
