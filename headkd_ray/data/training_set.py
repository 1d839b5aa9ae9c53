"""The images that a job trains on: its labelled split, and with ``data.unlabelled`` those of a second split without labels.

Both are one set of shards to everything that reads, orders, shows or caches images. Of unlabelled images only what a teacher
says is known: its predictions as pseudo labels, or its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from headkd_ray.data.meta import check_same_range
from headkd_ray.data.predictions import read_predictions
from headkd_ray.data.problems import Problems
from headkd_ray.data.pseudo_labels import PseudoLabels, classes_by_id, pseudo_labels
from headkd_ray.data.sample import Sample
from headkd_ray.data.shards import ShardIndex, ShardSet, Unlabelled
from headkd_ray.errors import DataError
from headkd_ray.job import Job, TeacherSpec


@dataclass(frozen=True)
class Part:
    """A split of a training set."""

    shards: ShardSet
    labelled: bool
    """Whether its ground truth is used."""
    pseudo: PseudoLabels | None
    """Its pseudo labels; None = it has none."""


@dataclass(frozen=True)
class TrainingSet(ShardSet):
    """Several splits as one set of shards, numbered through; an image's boxes are its ground truth and its pseudo labels."""

    parts: tuple[Part, ...]
    labelled_iou: float | None = None
    """IoU with a ground-truth box from which on a pseudo label of a labelled image is left out."""
    notes: tuple[str, ...] = ()
    """Sentences for the log."""

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """The number of each part's first shard, and behind them that of all shards."""
        return np.cumsum([0, *(len(part.shards.meta.shards) for part in self.parts)])

    def read_group(self, shard: int, group: int, rows: Sequence[int]) -> list[Sample]:
        number = int(np.searchsorted(self._first, shard, side="right")) - 1
        part, own = self.parts[number], shard - int(self._first[number])
        samples = part.shards.read_group(own, group, rows)
        if part.pseudo is None:
            return samples if part.labelled else [_bare(sample) for sample in samples]
        start = int(np.searchsorted(part.shards.index.shard, own))
        return [
            part.pseudo.added_to(sample, start + row, part.labelled, self.labelled_iou)
            for sample, row in zip(samples, rows, strict=True)
        ]

    def labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return row and label of every ground-truth box, which are those of the first part."""
        return self.parts[0].shards.labels()


def _bare(sample: Sample) -> Sample:
    """Return the sample as an unlabelled one."""
    return replace(sample, boxes=sample.boxes[:0], labels=sample.labels[:0], labelled=False)


def training_set(job: Job, train: ShardSet | None = None) -> ShardSet:
    """Open the images that ``job`` trains on; the predictions of its teacher are read, too, if it has any.

    Args:
        train: the split ``data.train``, if it is open.

    Raises:
        DataError: a split or the predictions cannot be used; all problems are listed.
    """
    train = train or ShardSet.open(job.data.train)
    unlabelled = None
    if job.data.unlabelled is not None:
        unlabelled = ShardSet.open(job.data.unlabelled, labelled=False)
        _check_pair(job, train, unlabelled)
    spec = None if job.teacher is None or job.teacher.is_network else job.teacher
    if unlabelled is None and spec is None:
        return train
    made, notes = ({}, []) if spec is None else _pseudo(spec, train, unlabelled)
    parts = [Part(train, True, made.get("data.train"))]
    if unlabelled is not None:
        parts.append(Part(unlabelled, False, made.get("data.unlabelled")))
    metas = [part.shards.meta for part in parts]
    shards = tuple(shard for meta in metas for shard in meta.shards)
    meta = replace(train.meta, shards=shards, images=sum(meta.images for meta in metas))
    iou = None if spec is None else spec.labelled_iou
    return TrainingSet(train.folder, meta, _joined(parts), tuple(parts), iou, tuple(notes))


def splits_of(shards: ShardSet) -> dict[str, ShardSet]:
    """Return the splits of what a job trains on, by their job keys."""
    if not isinstance(shards, TrainingSet):
        return {"data.train": shards}
    return {"data.train" if part.labelled else "data.unlabelled": part.shards for part in shards.parts}


def split_fingerprints(shards: ShardSet) -> dict[str, str]:
    """Return the fingerprint of each split of what a job trains on, by its job key."""
    return {key: split.meta.fingerprint for key, split in splits_of(shards).items()}


def _pseudo(spec: TeacherSpec, train: ShardSet, unlabelled: ShardSet | None) -> tuple[dict[str, PseudoLabels], list[str]]:
    assert spec.predictions is not None
    classes = classes_by_id(train)
    splits = {} if unlabelled is None else {"data.unlabelled": unlabelled}
    if spec.labelled_iou is not None:
        splits["data.train"] = train
    problems = Problems()
    found = read_predictions(spec.predictions, classes, spec.ignore_threshold, problems)
    return pseudo_labels(found, splits, classes, spec, problems)


def _check_pair(job: Job, train: ShardSet, unlabelled: ShardSet) -> None:
    """Raise DataError if the two splits cannot be one training set."""
    problems = []
    if {shard.sha256 for shard in unlabelled.meta.shards} & {shard.sha256 for shard in train.meta.shards}:
        problems.append(
            f"data.unlabelled: {job.data.unlabelled} has shards of data.train ({job.data.train}), whose images have labels; "
            "give other images, or leave out the key"
        )
    if unlabelled.meta.row_group != train.meta.row_group:
        problems.append(
            f"data.unlabelled: {job.data.unlabelled} was prepared with --row-group {unlabelled.meta.row_group}, data.train "
            f"with {train.meta.row_group}; prepare one of them again, with the other's"
        )
    try:
        places = {f"data.{name} ({split.folder.uri})": split for name, split in (("train", train), ("unlabelled", unlabelled))}
        check_same_range({place: split.meta.value_range for place, split in places.items()})
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(problems)


def _joined(parts: Sequence[Part]) -> ShardIndex:
    """Return one index of all parts, whose shards are numbered through."""
    indices = [part.shards.index for part in parts]
    first = np.cumsum([0, *(len(part.shards.meta.shards) for part in parts)])
    names = ("image_id", "width", "height", "row", "boxes")
    columns = {name: np.concatenate([getattr(index, name) for index in indices]) for name in names}
    shard = np.concatenate([index.shard + start for index, start in zip(indices, first, strict=False)]).astype(np.int32)
    rows = np.concatenate([np.full(len(part.shards.index), not part.labelled) for part in parts])
    taught = np.concatenate([_taught(part) for part in parts])
    return ShardIndex(**columns, shard=shard, row_group=indices[0].row_group, without_truth=Unlabelled(rows, rows & taught))


def _taught(part: Part) -> NDArray[np.bool_]:
    """Return the images of a part that a teacher says something about: all, or those with a pseudo label that counts."""
    return np.ones(len(part.shards.index), dtype=bool) if part.pseudo is None else part.pseudo.counts() > 0
