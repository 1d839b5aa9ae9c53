"""Load a detector from wherever it is stored: a local path, remote storage, or the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from headkd_ray import hub
from headkd_ray.detectors.weights import LoadedDetector, drop_unused_classes, load_checkpoint
from headkd_ray.detectors.weights.native import CARD, WEIGHTS
from headkd_ray.errors import CheckpointError
from headkd_ray.storage import Folder


def fetch_detector(place: str, all_outputs: bool = False) -> LoadedDetector:
    """Load the checkpoint at a path or a URI; a remote one is copied to a temporary folder first.

    ``hf://owner/name[@revision]`` is a repository of the Hugging Face Hub that ``headkd push`` wrote.

    Args:
        all_outputs: also keep outputs of classes named "N/A", which torchvision's COCO models have and nobody wants to detect.

    Raises:
        CheckpointError: the checkpoint is missing or unreadable, or ``load_checkpoint`` raises it.
        StorageError: a store or the hub refuses access or cannot be reached.
    """
    loaded = _fetch(place)
    return loaded if all_outputs else drop_unused_classes(loaded)


def _fetch(place: str) -> LoadedDetector:
    if place.startswith(hub.SCHEME):
        return _load_copy(hub.download(place, (CARD, WEIGHTS)), place)
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
