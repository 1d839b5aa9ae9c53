"""Export a detector and prove the file: ``python -m headkd_ray.export runs/head/student --to onnx --val data/val --out files``.

The file runs on the validation images beside the checkpoint; a float file whose detections differ is not written. AP, size and
latency of both are printed. ``onnx-int8`` is calibrated on training images (``--calibrate data/train``).
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

import headkd_ray
from headkd_ray.cli import callable_as, command_parser, positive, user_errors
from headkd_ray.data.sample import Sample
from headkd_ray.data.shards import ShardSet
from headkd_ray.deploy.description import Description, describe
from headkd_ray.deploy.entrants import Entrant, Warn, load_as_trained, scoring_on
from headkd_ray.deploy.exported import Exported, as_openvino
from headkd_ray.deploy.extras import needs_extra
from headkd_ray.deploy.graph import RawGraph
from headkd_ray.deploy.networks import FileNetwork
from headkd_ray.deploy.onnx_file import onnx_bytes
from headkd_ray.deploy.quantise import quantised
from headkd_ray.deploy.side_by_side import Track, Tried, detect_side_by_side, pixels_of, raw_error
from headkd_ray.deploy.torch_file import torch_bytes
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.weights import LoadedDetector
from headkd_ray.engine.inference import batch_of
from headkd_ray.errors import ExportError, UserError
from headkd_ray.report.export_table import export_table
from headkd_ray.report.terminal import Terminal, tracked
from headkd_ray.storage import Folder
from headkd_ray.text import warn as print_warning

TARGETS = {
    "onnx": "model.onnx",
    "onnx-int8": "model-int8.onnx",
    "torch-export": "model.pt2",
    "openvino": "model.xml and model.bin",
}
"""Names of the files by target."""
TIMED_IMAGES = 8
"""Number of images, the first of the split, with which latency is measured."""
RAW_ERROR = 1e-3
"""Largest difference of a raw output, relative to its largest magnitude."""


@dataclass(frozen=True)
class Request:
    """What to export, and how to prove it."""

    checkpoint: str
    targets: Sequence[str]
    """Keys of TARGETS."""
    out: str
    """Folder or URI for the files."""
    val: str | None
    """Prepared split on which the files are proved; None = they are not."""
    calibrate: str | None = None
    """Prepared split on which onnx-int8 is calibrated."""
    calibration_images: int = 128
    raw: bool = False
    """Export the outputs of the head, before post-processing."""
    size: tuple[int, int] | None = None
    """Fixed height and width of the input in pixels; None = any."""
    images: int | None = None
    """Number of validation images, the first of the split; None = all."""
    beside: Sequence[str] = ()
    """Checkpoints to list in the table as well."""
    json: str | None = None
    """File or URI for the report."""


def export(request: Request, warn: Warn = lambda warning: None) -> dict[str, Any]:
    """Export a checkpoint, and return the report that ``--json`` writes.

    Raises:
        UserError: the request contradicts itself.
        CheckpointError, DataError: a checkpoint or split is unreadable, does not fit, or has values that are not finite.
        ExportError: a package is missing, the detector cannot be exported, or a float file detects something else.
        StorageError: the folder, or the report, cannot be written; raised before anything else is done.
    """
    _check(request)
    out, report_file = Folder.open(request.out), None if request.json is None else Folder.of_file(request.json)
    for folder in (out, *(report_file or ())[:1]):
        folder.check_writable()
    loaded = load_as_trained(request.checkpoint, warn)
    _exportable(request, loaded)
    description = _description(request, loaded)
    shards = None if request.val is None else ShardSet.open(request.val)
    calibration = None if request.calibrate is None else ShardSet.open(request.calibrate)
    others = {place: load_as_trained(place, warn) for place in request.beside if place != request.checkpoint}
    scorings = {}
    if shards is not None:
        for place, other in {request.checkpoint: loaded, **others}.items():
            scorings[place] = scoring_on(shards, str(request.val), other, place, warn)

    checkpoint = Entrant.of_checkpoint(request.checkpoint, loaded.detector, description)
    files = [Entrant.of_file(file) for file in _files(request, loaded, description, calibration)]
    beside = [Entrant.of_checkpoint(place, other.detector, describe(other, place)) for place, other in others.items()]
    entrants, tried = [checkpoint, *files, *beside], None
    if shards is not None:
        scorings |= {file.name: scorings[request.checkpoint] for file in files}
        detecting = [entrant for entrant in entrants if entrant.detects]
        tried = detect_side_by_side(detecting, scorings, shards, request.images, _progress("checking", shards, request.images))
        for file in filter(lambda file: file.exact, files):
            _refuse_another(request, loaded, file, tried, shards, warn)
    _write(files, out)
    report = _report(request, entrants, tried, shards)
    if report_file is not None:
        folder, name = report_file
        folder.create()
        folder.write(name, (json.dumps(report, indent=2) + "\n").encode())
    return report


def _check(request: Request) -> None:
    """Raise UserError listing what contradicts itself in the request, or ExportError for a package that is missing."""
    problems = []
    if "onnx-int8" in request.targets and request.calibrate is None:
        problems.append("--to onnx-int8 needs --calibrate: the prepared training split, whose images set the 8-bit ranges")
    if "onnx-int8" not in request.targets and request.calibrate is not None:
        problems.append("--calibrate is for --to onnx-int8 alone; leave it out, or add that target")
    if request.val is None and (request.beside or request.images):
        problems.append("--beside and --images belong to the check on validation images; give --val, or leave them out")
    if problems:
        raise UserError(problems)
    through_onnx = [target for target in request.targets if target != "torch-export"]
    if through_onnx:
        with needs_extra("onnx", f"--to {through_onnx[0]}"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
    if "openvino" in request.targets:
        with needs_extra("openvino", "--to openvino"):
            import openvino  # noqa: F401


def _description(request: Request, loaded: LoadedDetector) -> Description:
    description = describe(loaded, request.checkpoint)
    wrong = [side for side in request.size or () if side % description.pad]
    if wrong:
        raise UserError(
            f"--size: {wrong[0]} is not a multiple of {description.pad} pixels, to which this detector pads its input"
        )
    return description.model_copy(update={"size": request.size, "outputs": "raw" if request.raw else "detections"})


def _exportable(request: Request, loaded: LoadedDetector) -> AnyDetector:
    """Return the detector. Raises ExportError if it is none that can be exported."""
    if isinstance(loaded.detector, AnyDetector):
        return loaded.detector
    raise ExportError(
        f"{request.checkpoint}: a detector of transformers cannot be exported here; its folder is one that transformers itself "
        "reads, and with it the package optimum, which exports many"
    )


def _files(request: Request, loaded: LoadedDetector, description: Description, calibration: ShardSet | None) -> list[Exported]:
    """Make the file of each target."""
    detector = _exportable(request, loaded)
    targets = dict.fromkeys(request.targets)
    content = onnx_bytes(detector, description) if targets.keys() - {"torch-export"} else b""
    files = []
    for target in targets:
        if target == "openvino":
            files.append(as_openvino(content, description))
        elif target == "torch-export":
            files.append(Exported(TARGETS[target], {TARGETS[target]: torch_bytes(detector, description)}))
        elif calibration is not None and target == "onnx-int8":
            limit = request.calibration_images
            shown = _progress("calibrating", calibration, limit)(calibration.samples(limit))
            batches = (batch_of(pixels_of(sample), description.view, canvas=description.size) for sample in shown)
            eight = quantised(content, description.model_copy(update={"precision": "int8"}), batches)
            files.append(Exported(TARGETS[target], {TARGETS[target]: eight}))
        else:
            files.append(Exported(TARGETS[target], {TARGETS[target]: content}))
    return files


def _refuse_another(
    request: Request, loaded: LoadedDetector, file: Entrant, tried: Tried, shards: ShardSet, warn: Warn
) -> None:
    """Raise ExportError if the outputs of a float file are not those of the checkpoint."""
    if not file.detects:
        network = file.predictor.network
        assert isinstance(network, FileNetwork)
        shown = _progress("comparing", shards, request.images)
        worst = raw_error(RawGraph(_exportable(request, loaded)).eval(), network, shards, request.images, shown)
        if worst > RAW_ERROR:
            raise ExportError(f"{file.name}: not written, because its outputs differ from the checkpoint's by {worst:.1%}")
        return
    agreement = tried.agreements[file.name]
    if not agreement.holds:
        raise ExportError(
            f"{file.name}: not written, because {agreement.alone} of {agreement.detections} detections are not the "
            f"checkpoint's: {agreement.example}"
        )
    if not agreement.detections:
        warn(
            f"{file.name}: nothing is proved, because the checkpoint detects nothing with a score above "
            f"{file.predictor.description.score} on the images of {request.val}"
        )


def _write(files: Sequence[Entrant], out: Folder) -> None:
    out.create()
    for name, content in [each for file in files if file.file is not None for each in file.file.files.items()]:
        try:
            out.write(name, content)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ExportError(f"{out.named(name)}: cannot be written ({reason}); make room or choose another --out") from error


def _report(request: Request, entrants: Sequence[Entrant], tried: Tried | None, shards: ShardSet | None) -> dict[str, Any]:
    images = [] if shards is None else [pixels_of(sample) for sample in islice(shards.samples(TIMED_IMAGES), TIMED_IMAGES)]
    rows = []
    for entrant in entrants:
        metrics = tried.metrics.get(entrant.name) if tried is not None else None
        agreement = tried.agreements.get(entrant.name) if tried is not None else None
        times = entrant.latencies(images) if images else {}
        rows.append(
            {
                "name": entrant.name,
                "format": entrant.format,
                "bytes": entrant.size,
                "metrics": None if metrics is None else metrics.as_dict(),
                "agreement": None if agreement is None else agreement.as_dict(),
                "latency": {str(threads): time._asdict() for threads, time in times.items()},
            }
        )
    return {
        "checkpoint": request.checkpoint,
        "val": request.val,
        "images": 0 if shards is None else min(request.images or len(shards.index), len(shards.index)),
        "size": request.size,
        "cpu": platform.processor() or platform.machine(),
        "versions": {"headkd_ray": headkd_ray.__version__, "torch": torch.__version__},
        "rows": rows,
    }


def _progress(what: str, shards: ShardSet, limit: int | None) -> Track:
    total = min(limit or len(shards.index), len(shards.index))

    def shown(samples: Iterable[Sample]) -> Iterable[Sample]:
        return tracked(samples, what, total)

    return shown


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("export", __doc__)
    parser.add_argument("checkpoint", help="student folder of a run, or an mmdet or torchvision .pth file with class names")
    parser.add_argument("--to", nargs="+", required=True, choices=TARGETS, metavar="TARGET", help="; ".join(TARGETS))
    parser.add_argument("--out", required=True, help="folder for the files: " + ", ".join(TARGETS.values()))
    proof = parser.add_mutually_exclusive_group(required=True)
    proof.add_argument("--val", help="prepared split on which the files are compared with the checkpoint")
    proof.add_argument("--no-check", action="store_true", help="write the files without running them")
    parser.add_argument("--images", type=positive, help="compare on so many images (default: all of --val)")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="CHECKPOINT", help="also list these, as baseline and teacher"
    )
    parser.add_argument("--calibrate", metavar="SPLIT", help="prepared training split for --to onnx-int8")
    parser.add_argument("--calibration-images", type=positive, default=128, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="outputs of the head, without post-processing")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="fixed input size (default: any)")
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file")
    with user_errors():
        options = parser.parse_args(arguments)
        request = Request(
            checkpoint=options.checkpoint,
            targets=options.to,
            out=options.out,
            val=options.val,
            calibrate=options.calibrate,
            calibration_images=options.calibration_images,
            raw=options.raw,
            size=tuple(options.size) if options.size else None,
            images=options.images,
            beside=options.beside,
            json=options.json,
        )
        report = export(request, print_warning)
        terminal = Terminal()
        for row in report["rows"]:
            if row["agreement"] is not None and row["agreement"]["detections"]:
                terminal.print(agreement_sentence(row), soft_wrap=True)
        terminal.print(export_table(report["rows"]))
        written = " and ".join(TARGETS[target] for target in dict.fromkeys(options.to))
        terminal.print(f"written to {options.out}: {written}", soft_wrap=True)
    return 0


def agreement_sentence(row: dict[str, Any]) -> str:
    """Say how far a float file's detections agree with the checkpoint's."""
    found = row["agreement"]
    same = found["detections"] - found["alone"]
    return (
        f"{row['name']}: {same} of {found['detections']} detections are the checkpoint's, boxes within {found['box']:.1g} px, "
        f"scores within {found['score']:.1g}"
    )


callable_as(__name__, export)

if __name__ == "__main__":
    sys.exit(main())
