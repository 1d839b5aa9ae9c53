"""Whether a detector's files are the same as before."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePosixPath

from headkd_ray import hub
from headkd_ray.detectors.weights.native import CARD, WEIGHTS
from headkd_ray.storage import Folder

PIECE = 1 << 20
"""Bytes that are read at a time."""


def content_sha256(place: str) -> str:
    """Return the SHA-256 of the files that ``load`` reads at a path or URI: a folder's, or a file and those that belong to it.

    Raises:
        CheckpointError, StorageError: as :func:`headkd_ray.deploy.predictor.load`.
        OSError: a file cannot be read.
    """
    if place.startswith(hub.SCHEME):
        folder, names = Folder.open(hub.download(place, (CARD, WEIGHTS))), [CARD, WEIGHTS]
    else:
        folder, name = Folder.of_file(place)
        names = [
            each for each in (name, str(PurePosixPath(name).with_suffix(".bin"))) if folder.has(each)
        ]  # OpenVINO's weights
        if name not in names:
            folder = folder / name
            names = folder.names()
    found = hashlib.sha256()
    for each in names:
        found.update(os.fsencode(each))
        with folder.open_file(each) as file:
            while piece := file.read(PIECE):
                found.update(piece)
    return found.hexdigest()
