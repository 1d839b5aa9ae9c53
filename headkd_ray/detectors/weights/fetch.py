"""Load a detector from wherever it is stored: a local path, remote storage, or the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from headkd_ray import hub
from headkd_ray.detectors.hf_models import CONFIG, PROCESSOR
from headkd_ray.detectors.weights import LoadedDetector, drop_unused_classes, load_checkpoint
from headkd_ray.detectors.weights.hf_folder import is_hf_folder
from headkd_ray.detectors.weights.loaded import UNUSED
from headkd_ray.detectors.weights.native import CARD, WEIGHTS
from headkd_ray.errors import CheckpointError, StorageError
from headkd_ray.storage import Folder


def fetch_detector(place: str, all_outputs: bool = False) -> LoadedDetector:
    """Load the checkpoint at a path or a URI; a remote one is copied to a temporary folder first.

    ``hf://owner/name[@revision]`` is a repository of the Hugging Face Hub that ``headkd push`` wrote, or a detector of
    transformers.

    Args:
        all_outputs: also keep outputs of classes named "N/A", which torchvision's COCO models have and nobody wants to detect.

    Raises:
        CheckpointError: the checkpoint is missing or unreadable, or ``load_checkpoint`` raises it.
        StorageError: a store or the hub refuses access or cannot be reached.
    """
    loaded = _fetch(place)
    return loaded if all_outputs else drop_unused_classes(loaded)


def fetch_named(section: str, place: str, classes: tuple[str, ...] | None) -> LoadedDetector:
    """Load the checkpoint at a path or a URI, which a job's ``section`` (teacher, student) names, with its classes.

    Args:
        classes: names of all outputs, unused ones included; None = those that the file gives, without "N/A".

    Raises:
        CheckpointError: as :func:`fetch_detector`, with the job key in front; or the file names no classes and none are given,
            or they are more or fewer than the outputs or have a name twice.
        StorageError: as :func:`fetch_detector`, with the job key in front.
    """
    with prefixed(section):
        loaded = fetch_detector(place, all_outputs=classes is not None)
    return replace(loaded, classes=check_names(section, place, classes, loaded.classes, loaded.detector.num_classes))


@contextmanager
def prefixed(section: str) -> Iterator[None]:
    """Put the job key ``section``.checkpoint in front of the errors that are raised within the context."""
    try:
        yield
    except (CheckpointError, StorageError) as error:
        if error.headline is not None:
            raise type(error)(error.problems, f"{section}.checkpoint: {error.headline}") from error
        raise type(error)([f"{section}.checkpoint: {problem}" for problem in error.problems]) from error


def check_names(
    section: str, place: str, given: tuple[str, ...] | None, found: tuple[str, ...] | None, outputs: int
) -> tuple[str, ...]:
    """Return the class names of a checkpoint's ``outputs``: those ``given`` by the job, else those ``found`` in it.

    Raises CheckpointError if there are none, more or fewer than the outputs, or one of them twice.
    """
    names = given or found
    if names is None:
        raise CheckpointError(
            f"{section}.checkpoint: {place} does not name its {outputs} classes; list them in order in {section}.classes"
        )
    if len(names) != outputs:
        raise CheckpointError(f"{section}.classes: names {len(names)} classes, but {place} has {outputs} outputs for classes")
    twice = sorted({name for name in names if names.count(name) > 1} - {UNUSED})
    if twice:
        who = f"{section}.classes:" if given else f"{section}.checkpoint: {place} names its classes itself, but"
        raise CheckpointError(
            f"{who} {', '.join(map(repr, twice))} is there more than once; {section}.classes needs other names"
        )
    return names


def _fetch(place: str) -> LoadedDetector:
    if place.startswith(hub.SCHEME):
        files = hub.download(place, (), also=(CARD, WEIGHTS, CONFIG, PROCESSOR))
        if not is_hf_folder(files):
            files = hub.download(place, (CARD, WEIGHTS))  # raises if it has not both
        return _load_copy(files, place)
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
        return _load_copy(copy, place)


def _load_copy(copy: Path, place: str) -> LoadedDetector:
    try:
        return load_checkpoint(copy)
    except CheckpointError as error:  # The user knows the place, not the copy.
        headline = error.headline and error.headline.replace(str(copy), place)
        raise CheckpointError([line.replace(str(copy), place) for line in error.problems], headline) from error
