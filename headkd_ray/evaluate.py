"""Evaluate a checkpoint with COCO metrics: ``python -m headkd_ray.evaluate runs/head/student data/coco/val [--out FILE]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

from headkd_ray.cli import callable_as, command_parser, positive, user_errors
from headkd_ray.data.batch_stream import BatchMaker, local_stream
from headkd_ray.data.epoch_order import eval_windows
from headkd_ray.data.meta import check_same_range
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights import keeping
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.diagnosis.detector_diagnosis import diagnose
from headkd_ray.diagnosis.overlaps import overlaps
from headkd_ray.engine.coco_metrics import CocoMetrics, coco_metrics
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import predict
from headkd_ray.engine.inference import trained_range, view_spec
from headkd_ray.engine.scoring import recorded_count, recorded_detections, scoring_of
from headkd_ray.errors import DataError
from headkd_ray.job.job import MAX_DETECTIONS
from headkd_ray.memory import enough_memory
from headkd_ray.pictures import mistakes
from headkd_ray.report.detector_page import detector_page
from headkd_ray.report.plots import need_matplotlib
from headkd_ray.report.tables import print_metrics
from headkd_ray.report.terminal import tracked
from headkd_ray.storage import Folder
from headkd_ray.text import printable


def evaluate_checkpoint(
    checkpoint: str,
    data: str,
    batch_size: int | None = None,
    out: str | None = None,
    max_detections: int | None = None,
    warn: Callable[[str], object] = lambda warning: None,
    report: str | None = None,
) -> CocoMetrics:
    """Evaluate a detector on a prepared split, in this process, on the first GPU if there is one.

    Args:
        batch_size: images per forward pass; None = as many as in the checkpoint's training, or 2. As many give exactly the
            metrics that training reported; another padding moves the last digits.
        out: where to write the detections (path or URI), as a COCO results file.
        max_detections: detections per image that count; None = as many as in the checkpoint's training, or COCO's 100.
        warn: called with each warning about the metrics.
        report: where to write a page on what the detector gets right and wrong (path or URI), as HTML.

    Raises:
        CheckpointError, DataError: unreadable, or the split has classes that the detector does not know.
        DeviceMemoryError: a batch needs more memory than is available.
        StorageError: ``out`` or ``report`` cannot be written; raised before the evaluation starts.
        UserError: matplotlib is not installed, which ``report`` needs.
    """
    targets = {path: Folder.of_file(path) for path in (out, report) if path is not None}
    for folder, _ in targets.values():
        folder.check_writable()
    if report is not None:
        need_matplotlib()
    shards = ShardSet.open(data)
    found = detect_split(checkpoint, shards, data, batch_size, max_detections, warn)
    truth = shards.ground_truth()
    metrics = coco_metrics(truth, found.results, found.image_ids, found.max_detections)
    content = {}
    if out is not None:
        content[out] = json.dumps(found.results)
    if report is not None:
        diagnosis = diagnose(overlaps(truth, found.results, found.max_detections))
        summary = f"{checkpoint} on {data}: {metrics.images} images, {len(shards.meta.classes)} classes."
        pictures = list(mistakes(shards, (diagnosis, found.results)))
        content[report] = detector_page(
            "What the detector gets right and wrong", summary, metrics.as_dict(), diagnosis, pictures
        )
    for path, text in content.items():
        folder, name = targets[path]
        folder.create()
        folder.write(name, text.encode())
    return metrics


class Found(NamedTuple):
    """A detector's detections on a split."""

    results: list[dict[str, Any]]
    """COCO results."""
    image_ids: list[int]
    """All images of the split."""
    max_detections: int
    """How many of an image's detections count."""


def detect_split(
    checkpoint: str,
    shards: ShardSet,
    data: str,
    batch_size: int | None = None,
    max_detections: int | None = None,
    warn: Callable[[str], object] = lambda warning: None,
) -> Found:
    """Detect in all images of a prepared split, which ``data`` names in messages; else as :func:`evaluate_checkpoint`."""
    loaded = fetch_detector(checkpoint)
    for note in loaded.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    check_same_range({data: shards.meta.value_range, checkpoint: trained_range(loaded.meta)})
    if loaded.classes is None and loaded.detector.num_classes != len(shards.meta.classes):
        raise DataError(f"{data} has {len(shards.meta.classes)} classes, {checkpoint} knows {loaded.detector.num_classes}")
    batch_size = batch_size or recorded_count(loaded.meta, "eval_batch_size", 2)
    most = max_detections or recorded_detections(loaded.meta)
    scoring = scoring_of(shards, data, loaded.classes or shards.meta.classes, checkpoint, most)
    for warning in scoring.warnings:
        warn(warning)
    if most > MAX_DETECTIONS:
        loaded = keeping(loaded, most)
    distributed = Distributed.alone()
    windows = list(eval_windows(shards.index, rank=0, world_size=1, batch_size=batch_size))
    batches = local_stream(shards, windows, BatchMaker(view_spec(loaded.meta), seed=0, train=False))
    total = sum(len(window.batches) for window in windows)
    with closing(batches):
        shown = tracked(batches, "evaluating", total)
        with enough_memory(f"evaluating {checkpoint}", f"lower --batch-size ({batch_size})"):
            found = predict(loaded.detector.to(distributed.device), shown, distributed.device, scoring.category_ids)
    results = [entry for entries in found.values() for entry in entries]
    return Found(results, list(found), scoring.max_detections)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("evaluate", (__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="student folder of a run, hf://owner/name, or an mmdet or torchvision .pth file")
    parser.add_argument("data", help="prepared split (folder or URI)")
    parser.add_argument("--batch-size", type=positive, help="images per forward pass (default: as in training, or 2)")
    parser.add_argument(
        "--max-detections",
        type=positive,
        help="detections per image and class that count (default: as in the checkpoint's training, or COCO's 100)",
    )
    parser.add_argument("--out", help="write the detections to this file, as COCO results")
    parser.add_argument(
        "--report", help="write an HTML page to this file: what errors cost, curves, score thresholds, confused classes, images"
    )
    with user_errors():
        options = parser.parse_args(arguments)
        metrics = evaluate_checkpoint(
            options.checkpoint,
            options.data,
            options.batch_size,
            options.out,
            options.max_detections,
            lambda warning: print(f"warning: {warning}", file=sys.stderr),
            options.report,
        )
    print_metrics({options.checkpoint: metrics.as_dict()})
    if options.report is not None:
        print(f"page: {printable(options.report)}")
    return 0


callable_as(__name__, evaluate_checkpoint)

if __name__ == "__main__":
    sys.exit(main())
