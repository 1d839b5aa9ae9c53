"""Load a detector from wherever a run stored it, also from remote storage."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from headkd_ray.detectors.weights import LoadedDetector, drop_unused_classes, load_checkpoint
from headkd_ray.errors import CheckpointError
from headkd_ray.storage import Folder


def fetch_detector(place: str, all_outputs: bool = False) -> LoadedDetector:
    """Load the checkpoint at a path or a URI; a remote one is copied to a temporary folder first.

    Args:
        all_outputs: also keep outputs of classes named "N/A", which torchvision's COCO models have and nobody wants to detect.

    Raises:
        CheckpointError: the checkpoint is missing or unreadable, or ``load_checkpoint`` raises it.
    """
    loaded = _fetch(place)
    return loaded if all_outputs else drop_unused_classes(loaded)


def fetch_named(place: str, classes: tuple[str, ...] | None, key: str) -> LoadedDetector:
    """Load the checkpoint at a path or a URI with a name for each of its outputs.

    Args:
        classes: names of all outputs, unused ones included; None = those that the file gives, without "N/A".
        key: the job key of ``classes``, for messages.

    Raises:
        CheckpointError: as :func:`fetch_detector`; or the file names no classes and none are given, or ``classes`` are more or
            fewer than the outputs.
    """
    loaded = fetch_detector(place, all_outputs=classes is not None)
    names = classes or loaded.classes
    if names is None:
        raise CheckpointError(f"{place}: does not name its classes; list them in order in {key}")
    if len(names) != loaded.detector.num_classes:
        raise CheckpointError(f"{place}: has {loaded.detector.num_classes} classes, but {key} names {len(names)}")
    return replace(loaded, classes=names)


def _fetch(place: str) -> LoadedDetector:
    folder, name = Folder.of_file(place, CheckpointError)
    if not folder.remote:
        return load_checkpoint(folder.at(name) if "://" in place else place)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / name
        try:
            if folder.has(name):
                copy.write_bytes(folder.read(name))
            else:
                Folder.open(copy).copy_from(folder / name)
        except OSError as error:
            raise CheckpointError(f"{place}: cannot be read ({error})") from error
        try:
            return load_checkpoint(copy)
        except CheckpointError as error:  # The user knows the place, not the copy.
            raise CheckpointError([line.replace(str(copy), place) for line in error.problems], error.headline) from error
