"""Compute the weights that a job gives to the classes in its classification losses (``losses.class_weights``)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import numpy as np

from headkd_ray.data.class_lists import listed
from headkd_ray.data.shards import ShardSet
from headkd_ray.errors import JobError
from headkd_ray.job import Job


def class_weights_of(job: Job, shards: ShardSet) -> tuple[float, ...] | None:
    """Return the weight of each class of the training split ``shards``, or None if all are alike.

    Reads the labels of all images if the weights follow from the numbers of boxes; crowds do not count.

    Raises:
        JobError: a weight is for a class that the split does not have (all are named).
        DataError: a shard cannot be read.
    """
    asked, classes = job.losses.class_weights, shards.meta.classes
    if asked is None:
        return None
    if isinstance(asked, Mapping):
        unknown = [name for name in asked if name not in classes]
        if unknown:
            raise JobError([_unknown(name, job.data.train, classes) for name in unknown])
        return tuple(asked.get(name, 1.0) for name in classes)
    boxes = np.bincount(shards.labels()[1], minlength=len(classes)).astype(np.float64)
    if not boxes.any():
        return None
    seen = boxes > 0
    if asked == "effective_number":
        counts = (1 - job.losses.effective_beta**boxes) / (1 - job.losses.effective_beta)
    else:
        counts = boxes
    weights = np.ones(len(classes))  # a class without boxes has no row that could be weighed
    weights[seen] = 1 / counts[seen]
    weights[seen] *= boxes.sum() / (boxes[seen] * weights[seen]).sum()
    return tuple(weights.tolist())


def described(weights: tuple[float, ...], classes: tuple[str, ...]) -> str:
    """Return a sentence on the smallest and the largest of the weights."""
    low, high = int(np.argmin(weights)), int(np.argmax(weights))
    return (
        f"losses.class_weights: from {weights[low]:.3g} ({classes[low]!r}) to {weights[high]:.3g} ({classes[high]!r}), "
        "background 1"
    )


def _unknown(name: str, split: str, classes: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, classes, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {listed(classes)}"
    return f"losses.class_weights: {name!r} is not a class of data.train ({split}); {hint}"
