"""COCO metrics of a checkpoint: ``python -m headkd_ray.evaluate runs/head/student data/coco/val [--out detections.json]``."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing

from rich.console import Console
from rich.progress import track

from headkd_ray.data.classes import check_same_classes
from headkd_ray.data.plan import eval_windows
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.stream import BatchMaker, local_stream
from headkd_ray.doors import positive, user_errors
from headkd_ray.engine.coco import CocoMetrics, coco_metrics
from headkd_ray.engine.evaluate import predict
from headkd_ray.engine.fetch import fetch_detector
from headkd_ray.engine.serving import view_spec
from headkd_ray.engine.world import World
from headkd_ray.errors import DataError
from headkd_ray.memory import enough_memory
from headkd_ray.report.tables import print_metrics
from headkd_ray.storage import Folder


def evaluate_checkpoint(checkpoint: str, data: str, batch_size: int = 2, out: str | None = None) -> CocoMetrics:
    """Metrics of a detector on a prepared split, in this process, on the first GPU if there is one.

    Args:
        out: where to write the detections (path or URI), as a COCO results file.

    Raises:
        CheckpointError, DataError: unreadable, or their class lists disagree.
        DeviceMemoryError: a batch needs more memory than there is.
        StorageError: ``out`` cannot be written; raised before the work.
    """
    target = None if out is None else Folder.of_file(out)
    if target is not None:
        target[0].check_writable()
    shards = ShardSet.open(data)
    loaded = fetch_detector(checkpoint)
    if loaded.classes is not None:
        check_same_classes({data: shards.meta.classes, checkpoint: loaded.classes})
    elif loaded.detector.num_classes != len(shards.meta.classes):
        raise DataError(f"{data} has {len(shards.meta.classes)} classes, {checkpoint} knows {loaded.detector.num_classes}")
    world = World.alone()
    windows = list(eval_windows(shards.index, rank=0, world=1, batch_size=batch_size))
    batches = local_stream(shards, windows, BatchMaker(view_spec(loaded.meta), seed=0, train=False))
    total = sum(len(window.batches) for window in windows)
    with closing(batches):
        shown = track(batches, "evaluating", total, console=Console(stderr=True), transient=True)
        with enough_memory(f"evaluating {checkpoint}", f"lower --batch-size ({batch_size})"):
            found = predict(loaded.detector.to(world.device), shown, world.device, shards.meta.category_ids)
    results = [entry for entries in found.values() for entry in entries]
    if target is not None:
        folder, name = target
        folder.create()
        folder.write(name, json.dumps(results).encode())
    return coco_metrics(shards.ground_truth(), results, list(found))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m headkd_ray.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="student folder of a run, or an mmdet or torchvision .pth file")
    parser.add_argument("data", help="prepared split (folder or URI)")
    parser.add_argument("--batch-size", type=positive, default=2, help="images a forward pass (default %(default)s)")
    parser.add_argument("--out", help="write the detections here, as a COCO results file")
    options = parser.parse_args(arguments)
    with user_errors():
        metrics = evaluate_checkpoint(options.checkpoint, options.data, options.batch_size, options.out)
    print_metrics({options.checkpoint: metrics.as_dict()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
