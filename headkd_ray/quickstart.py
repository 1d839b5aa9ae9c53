"""The whole method in one command: ``python -m headkd_ray.quickstart`` draws a data set, trains a Faster R-CNN teacher, a
RetinaNet student without and with HEAD, through Ray, and compares the two students.

On own photos: ``python -m headkd_ray.quickstart --train train.json --val val.json --images photos/``. Run it again to go on
where it was stopped; delete the output folder to start over.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from headkd_ray.data.images import decode
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.doors import user_errors
from headkd_ray.job import ClusterSpec, load_job
from headkd_ray.prepare import prepare
from headkd_ray.report.console import RunConsole
from headkd_ray.report.draw import TILE, contact_sheet, draw, draw_found
from headkd_ray.report.tables import class_table, headline_table
from headkd_ray.report.terminal import Terminal
from headkd_ray.train import train

SHOWN_SCORE = 0.3
"""Detections in the picture have at least this score."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m headkd_ray.quickstart", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--train", help="own training annotations (COCO JSON); default: a drawn data set")
    parser.add_argument("--val", help="own validation annotations (COCO JSON)")
    parser.add_argument("--images", help="folder of the own images")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="output folder (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=Path, default=Path("jobs/small"), help="folder of teacher.yaml, baseline.yaml, head.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of all three jobs")
    options = parser.parse_args(arguments)
    own = (options.train, options.val, options.images)
    if any(own) and not all(own):
        parser.error("own photos need --train, --val and --images together")
    started = time.perf_counter()
    with user_errors():
        quickstart(own if all(own) else None, options.out, options.jobs, options.overrides)
    Terminal().print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def quickstart(own: tuple[str, str, str] | None, out: Path, jobs: Path, overrides: list[str]) -> None:
    """Every stage in order. ``own`` = train JSON, val JSON, image folder; None = the drawn data set."""
    console = Terminal(soft_wrap=True)

    console.rule("1/5 data")
    if own is None:
        with console.status("drawing a data set"):
            drawn = draw_dataset(out / "drawn")
        console.print(f"drew a data set (COCO format, JPEG) in {out / 'drawn'}")
        own = (str(drawn.train), str(drawn.val), str(drawn.images))
    splits = {"train": out / "data" / "train", "val": out / "data" / "val"}
    for (name, split), coco in zip(splits.items(), own[:2], strict=True):
        meta = prepare(coco, own[2], str(split)).meta
        console.print(f"{name}: {meta.images} images, {meta.boxes} boxes, {len(meta.classes)} classes in {split}")

    from headkd_ray.cluster.resources import connected  # Ray takes seconds to import: after the first stage, not before it

    results: dict[str, Any] = {}
    common = [f"data.train={splits['train']}", f"data.val={splits['val']}", f"run.storage={out}", *overrides]
    stages = {
        "teacher": "Faster R-CNN teacher, supervised",
        "baseline": "RetinaNet student, supervised",
        "head": "the same student with HEAD",
    }
    with connected(ClusterSpec()):
        for number, (name, title) in enumerate(stages.items(), start=2):
            console.rule(f"{number}/5 {name}: {title}")
            teacher = [f"teacher.checkpoint={results['teacher']['student']}"] if name == "head" else []
            job = load_job(jobs / f"{name}.yaml", [*common, *teacher])
            with RunConsole(name, console) as run:
                results[name] = train(job, run)

    console.rule("5/5 comparison")
    metrics = {name: results[name]["best"] for name in results}
    console.print(headline_table(metrics))
    console.print(class_table({name: metrics[name] for name in ("baseline", "head")}))
    picture = out / "detections.png"
    compare(ShardSet.open(str(splits["val"])), {name: results[name]["student"] for name in results}, picture)
    for name in results:
        console.print(f"{name} checkpoint: {results[name]['student']}")
    console.print(f"picture of detections: {picture}")


def compare(shards: ShardSet, checkpoints: dict[str, str], path: Path, images: int = 6) -> None:
    """Save a sheet: a row an image of the split, columns ground truth and each checkpoint's detections."""
    from headkd_ray.detectors.weights import load_checkpoint
    from headkd_ray.engine.serving import detect_images, view_spec

    rows_of_first_group = list(range(min(images, len(shards.index))))
    samples = shards.read_group(0, 0, rows_of_first_group)
    pixels = [decode(sample.image) for sample in samples]
    classes = shards.meta.classes
    columns = [
        [
            draw(
                image,
                torch.from_numpy(sample.boxes),
                torch.from_numpy(sample.labels),
                [classes[i] for i in sample.labels.tolist()],
                TILE,
            )
            for image, sample in zip(pixels, samples, strict=True)
        ]
    ]
    for checkpoint in checkpoints.values():
        loaded = load_checkpoint(checkpoint)
        found = detect_images(loaded.detector, pixels, view_spec(loaded.meta), range(len(classes)), torch.device("cpu"))
        names = dict(enumerate(classes))
        columns.append(
            [draw_found(image, entries, names, SHOWN_SCORE, TILE) for image, entries in zip(pixels, found, strict=True)]
        )
    contact_sheet(list(zip(*columns, strict=True)), ["ground truth", *checkpoints], path)


if __name__ == "__main__":
    sys.exit(main())
