"""Detect objects in images and videos: ``python -m headkd_ray.predict runs/head/student photos --out found``.

They are given as files, as folders (including subfolders), as patterns (``'photos/**/*.jpg'``), or as ``-`` for a list of these on
standard input, one per line; each is a local path or a URI. What cannot be read is skipped and reported at the end, with exit
code 2. With ``--workers`` millions of images are detected in by Ray; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from headkd_ray.cli import command_parser, positive, user_errors
from headkd_ray.deploy.predictor import load
from headkd_ray.errors import UserError
from headkd_ray.job import ClusterSpec
from headkd_ray.predicting.inputs import find_inputs, places_of
from headkd_ray.predicting.parts import FORMATS, PARQUET, PART_IMAGES, PartsRequest
from headkd_ray.predicting.video import why_no_videos
from headkd_ray.predicting.whole import Predicted, predict_here
from headkd_ray.storage import Folder
from headkd_ray.text import printable

SHOWN = 20
"""Maximum number of problems that are printed."""
SCORE = 0.3
BATCH_SIZE = 4


def predict(
    checkpoint: str, places: str | Iterable[str], out: str, score: float = SCORE, batch_size: int = BATCH_SIZE
) -> Predicted:
    """Detect objects in images and videos in this process, and write ``detections.json`` and pictures.

    Args:
        checkpoint: as for ``headkd_ray.load``: a student's folder, an mmdet or torchvision file, or an ``.onnx`` file.
        places: files, folders and patterns, each a path or a URI.
        out: folder or URI for ``detections.json``, a COCO data set whose annotations have a ``score``, and for the pictures.
        score: boxes of at least this score are drawn.
        batch_size: images of one padded size that pass through the network together.

    Raises:
        CheckpointError: unreadable, or without class names.
        DataError: there is nothing to detect in, a folder cannot be read, or a package is missing that videos need.
        DeviceMemoryError: a batch needs more memory than is available.
        StorageError: ``out`` is not writable.
    """
    folder = Folder.open(out)
    inputs = list(find_inputs([places] if isinstance(places, str) else places, folder, why_no_videos()))
    folder.check_writable()
    predictor = load(checkpoint)
    for note in predictor.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    return predict_here(predictor, inputs, folder, score, batch_size)


def predict_parts(checkpoint: str, places: str | Iterable[str], out: str, workers: int, request: PartsRequest) -> Predicted:
    """Detect objects in images with processes on a Ray cluster, and write the detections in parts, in the order of the images.

    A prediction that was stopped goes on with the parts that are missing.
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with user_errors():
        options = _parser().parse_args(arguments)
        predicted = predict(options.checkpoint, places_of(options.images), options.out, options.score, options.batch_size)
        print(f"{predicted.detections} detections on {predicted.images} images: {printable(predicted.result)}")
        _raise_problems(predicted, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("predict", __doc__)
    return parser
