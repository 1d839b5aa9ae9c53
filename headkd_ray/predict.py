"""Detect objects in images and videos: ``python -m headkd_ray.predict runs/head/student photos --out found``.

They are given as files, as folders (including subfolders), as patterns ("photos/**/*.jpg"), or as - for a list of these on
standard input, one per line; each is a local path or a URI. What cannot be read is skipped and reported at the end, with exit
code 2.

With --workers, processes on a Ray cluster detect in any number of images, and write the detections in parts; the same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import get_args

from pydantic import ValidationError

from headkd_ray.cli import callable_as, command_parser, positive, user_errors
from headkd_ray.deploy.predictor import Predictor, load
from headkd_ray.errors import StoppedError, StorageError, UserError
from headkd_ray.job import ClusterSpec
from headkd_ray.predicting.inputs import find_inputs, places_of
from headkd_ray.predicting.part_files import Format, problems_in, unfinished
from headkd_ray.predicting.part_plan import PartsRequest, make_plan
from headkd_ray.predicting.video import why_no_videos
from headkd_ray.predicting.whole import Predicted, predict_here
from headkd_ray.report.terminal import progress_bar
from headkd_ray.storage import Folder, locked
from headkd_ray.text import printable

SHOWN = 20
"""Maximum number of problems that are printed."""


def predict(
    checkpoint: str | os.PathLike[str],
    places: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    score: float | None = None,
    batch_size: int = 4,
) -> Predicted:
    """Detect objects in images and videos in this process, and write ``detections.json`` and pictures.

    Args:
        checkpoint: as for ``headkd_ray.load``: a student's folder, an mmdet or torchvision file, or an exported file.
        places: files, folders and patterns, each a path or a URI.
        out: folder or URI for ``detections.json``, a COCO data set whose annotations have a ``score``, and for the pictures.
        score: boxes of at least this score are drawn; None = of at least their class's best threshold on the validation images
            of training, or 0.3 if that is not known.
        batch_size: images of one padded size that pass through the network together.

    Raises:
        CheckpointError: the checkpoint is unreadable, or does not name its classes.
        DataError: there is nothing to detect in, a folder cannot be read, or a package is missing that videos need.
        DeviceMemoryError: a batch needs more memory than is available.
        StorageError: ``out`` is not writable.
    """
    folder = Folder.open(out)
    inputs = list(find_inputs(_strings(places), folder, why_no_videos()))
    folder.check_writable()
    return predict_here(_load(checkpoint), inputs, folder, score, batch_size)


def predict_parts(
    checkpoint: str | os.PathLike[str],
    places: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    cluster: ClusterSpec,
    *,
    batch_size: int = 4,
    output: Format = "parquet",
    part_images: int = 1000,
    retry: bool = False,
) -> Predicted:
    """Detect objects in any number of images on a Ray cluster, and write the detections in parts, in the order of the images.

    The images are listed once. A call that was stopped, by whatever, goes on with the parts that are missing if it is repeated.

    Args:
        checkpoint, places, out, batch_size: as for :func:`predict`, without videos; all nodes of the cluster must reach them.
        cluster: ``workers`` processes with ``cpus_per_worker`` and ``gpus_per_worker`` each, and the cluster's address.
        output: format of the parts: a row for each image (``predicting.part_files.SCHEMA``).
        part_images: images of a part.
        retry: also repeat finished parts that have images that could not be read.

    Raises:
        CheckpointError, DataError, DeviceMemoryError, StorageError: as :func:`predict`; what is finished is kept.
        ClusterError: the processes do not fit the cluster, or die.
    """
    from headkd_ray.cluster.part_actors import make_on_ray  # late: predict must start where Ray is not installed

    folder = Folder.open(out)
    folder.check_writable()
    description = _load(checkpoint, "cpu").description
    categories = tuple(
        {"id": category, "name": name} for category, name in zip(description.category_ids, description.classes, strict=True)
    )
    folder.create()
    with locked(folder, StorageError(f"{folder.uri}: another predict is at work there; wait for it, or choose another --out")):
        request = PartsRequest(os.fspath(checkpoint), categories, output, part_images)
        plan = make_plan(request, _strings(places), folder)
        parts = unfinished(folder, plan.parts, output, retry)
        if parts:
            if len(parts) < plan.parts:
                print(f"note: {plan.parts - len(parts)} of {plan.parts} parts are finished", file=sys.stderr)
            with progress_bar() as bar:
                made = make_on_ray(cluster, plan, folder.address, batch_size, parts)
                for _ in bar.track(made, total=len(parts), description="detecting, in parts"):
                    pass
        missing = unfinished(folder, plan.parts, output)
        if missing:
            raise StorageError(
                f"{folder.uri}: {len(missing)} parts were written, but not here; --out must be a folder that all machines of "
                "the cluster share, or a URI"
            )
        problems = problems_in(folder, plan.parts)
    return Predicted(folder.uri, plan.images, 0, plan.images - len(problems), None, problems)


def _load(checkpoint: str | os.PathLike[str], device: str | None = None) -> Predictor:
    return load(checkpoint, device, note=lambda note: print(f"note: {printable(note)}", file=sys.stderr))


def _strings(places: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterable[str]:
    if isinstance(places, str | os.PathLike):
        places = [places]
    return (os.fspath(place) for place in places)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with user_errors():
        options = _parser().parse_args(arguments)
        _refuse_contradictions(options)
        given = {name: getattr(options, name) for name in ("score", "batch_size", "output", "part_images", "retry")}
        chosen = {name: value for name, value in given.items() if value is not None}
        places = places_of(options.images)
        if options.workers is None:
            with _sigterm_as_error():
                predicted = predict(options.checkpoint, places, options.out, **chosen)
            found = f"{predicted.detections} detections on {predicted.images} images"
        else:
            predicted = predict_parts(options.checkpoint, places, options.out, _cluster(options), **chosen)
            found = f"detections on {predicted.images} images, in parts"
        print(f"{found}: {printable(predicted.result)}")
        _raise_problems(predicted, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("predict", __doc__)
    parser.add_argument(
        "checkpoint",
        help="student folder of a run, hf://owner/name, an exported file (.onnx, .pt2, .xml), or an mmdet or torchvision file",
    )
    parser.add_argument(
        "images",
        nargs="+",
        help="images (JPEG, PNG, WebP, BMP, TIFF), videos, folders, patterns, or - for a list on standard input",
    )
    parser.add_argument("--out", required=True, help="folder for the detections and the drawn images")
    parser.add_argument(
        "--score", type=float, help="draw boxes of at least this score (default: the best for each class, or 0.3)"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images of one padded size that are detected in together (default 4)"
    )
    parts = parser.add_argument_group("on a Ray cluster, for many images (no pictures, no videos)")
    parts.add_argument("--workers", type=positive, metavar="N", help="so many processes; without it, this one detects")
    parts.add_argument(
        "--format", dest="output", choices=get_args(Format), help="of the parts: a row for each image (default parquet)"
    )
    parts.add_argument("--part-images", type=positive, metavar="N", help="images of a part (default 1000)")
    parts.add_argument("--cpus-per-worker", type=float, metavar="X", help="CPUs of each process (default 1)")
    parts.add_argument(
        "--gpus-per-worker", type=float, metavar="X", help="GPUs of each (default: 1 if the cluster has one for each, else 0)"
    )
    parts.add_argument("--retry", action="store_const", const=True, help="also repeat parts with images that could not be read")
    return parser


@contextmanager
def _sigterm_as_error() -> Iterator[None]:
    """Let SIGTERM end the block by an error, as Ctrl-C does, so that what was found is written."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped by SIGTERM before the end")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_contradictions(options: argparse.Namespace) -> None:
    if options.workers is not None and options.score is not None:
        raise UserError("--score is for pictures, which are not drawn with --workers; leave one of them out")
    names = ("output", "part_images", "cpus_per_worker", "gpus_per_worker", "retry")
    given = [name for name in names if getattr(options, name) is not None]
    if options.workers is None and given:
        options_given = ", ".join("--format" if name == "output" else f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{options_given}: for --workers only; add --workers N, or leave this out")


def _cluster(options: argparse.Namespace) -> ClusterSpec:
    names = ("workers", "cpus_per_worker", "gpus_per_worker")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        return ClusterSpec.model_validate(given)
    except ValidationError as error:
        raise UserError(
            [f"--{str(each['loc'][0]).replace('_', '-')} {each['input']}: {each['msg']}" for each in error.errors()]
        ) from error


def _raise_problems(predicted: Predicted, out: str) -> None:
    """Raise a UserError that lists what could not be read and what could not be drawn or written, if anything."""
    unread, lines, said = len(predicted.problems), predicted.problems + predicted.unwritten, list[str]()
    if unread:
        others = f" (the others are in {out})" if predicted.images else ""
        what = "images and videos could not be read, or not to their end" if predicted.videos else "images could not be read"
        said.append(f"{unread} of {predicted.inputs} {what}{others}")
    if predicted.unwritten:
        pictures = "1 picture" if len(predicted.unwritten) == 1 else f"{len(predicted.unwritten)} pictures"
        said.append(f"{pictures} could not be written (all detections are in {predicted.result})")
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise UserError(lines[:SHOWN] + more, "; ".join(said) + ":")


callable_as(__name__, predict)

if __name__ == "__main__":
    sys.exit(main())
