"""The whole method in one command: ``python -m headkd_ray.quickstart`` draws a data set, trains a Faster R-CNN teacher and a
RetinaNet student without and with HEAD, using Ray, and compares the two students.

On your photos: ``python -m headkd_ray.quickstart --train train.json --val val.json --images photos/``, with ``--val-images``
if the validation images are in another folder; or ``--train data.yaml`` alone for YOLO, and ``--train FOLDER`` for Pascal VOC,
which name their splits themselves. All locations except --jobs are local paths or URIs. Run it again to continue where it was
stopped; delete the output folder to start over.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from headkd_ray.cli import command_parser, user_errors
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_splits
from headkd_ray.errors import UserError
from headkd_ray.job import ClusterSpec, Job, load_job
from headkd_ray.job.provided import job_folder
from headkd_ray.prepare import prepare
from headkd_ray.report.console import RunConsole
from headkd_ray.report.tables import class_table, headline_table
from headkd_ray.report.terminal import Terminal
from headkd_ray.storage import Folder
from headkd_ray.train import train

STAGES = {
    "teacher": "Faster R-CNN teacher, supervised",
    "baseline": "RetinaNet student, supervised",
    "head": "the same student with HEAD",
}
"""Titles of the stages, by the name of their job file and run."""
PICTURE = "detections.png"
STAGES_OF_SECTION = {"student": ("baseline", "head"), "teacher": ("head",), "distill": ("head",), "method": ("head",)}
"""Stages whose jobs the overrides of a section reach, where it is not all: the teacher's job has a student of its own."""


class Split(NamedTuple):
    """A split as ``prepare`` takes it; places are paths or URIs."""

    annotations: str
    images: str | None
    """Folder of the images; None if the annotations name it."""
    name: str | None = None
    """Name of the split in annotations that hold several."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("quickstart", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--train", help="your annotations: COCO JSON, data.yaml or VOC folder; default: a drawn data set")
    parser.add_argument("--val", help="your validation annotations (default: split val of --train, if that has splits)")
    parser.add_argument("--images", help="folder of your images, which a COCO JSON needs")
    parser.add_argument("--val-images", help="folder of your validation images (default: that of --images)")
    parser.add_argument("--out", default="runs/quickstart", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--jobs",
        type=Path,
        default=job_folder() / "small",
        help="folder with your own teacher.yaml, baseline.yaml and head.yaml (default: the micro jobs of this package)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="replace keys of the three jobs: student.* in baseline and head, teacher.* and distill.* in head, others in all",
    )
    with user_errors():
        options = parser.parse_args(arguments)
        own = None
        if any((options.train, options.val, options.images, options.val_images)):
            needed = (options.train, options.val, options.images)
            if not options.train or (options.train.lower().endswith(".json") and not all(needed)):
                parser.error(
                    "your own photos need --train, --val and --images together; a data.yaml, or a folder in Pascal VOC's "
                    "format, needs --train alone"
                )
            own = _own(options.train, options.val or options.train, options.images, options.val_images)
        started = time.perf_counter()
        quickstart(own, options.out, options.jobs, options.overrides)
    Terminal().print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def quickstart(own: Mapping[str, Split] | None, out: str, jobs: Path, overrides: list[str]) -> None:
    """Run all stages in order. ``own``: the splits train and val; None = the drawn data set. ``out``: a path or URI."""
    if any(each.startswith("teacher.checkpoint=") for each in overrides):
        raise UserError("teacher.checkpoint: the quickstart trains its own teacher; for another use python -m headkd_ray.train")
    folder = Folder.open(out)
    folder.check_writable()
    splits = {name: (folder / "data" / name).uri for name in ("train", "val")}
    common = [f"data.train={splits['train']}", f"data.val={splits['val']}", f"run.storage={folder.uri}", *overrides]
    clusters = [_job(jobs, name, common, "unknown yet").cluster for name in STAGES]  # reports mistakes in the jobs now
    console = Terminal(soft_wrap=True)

    console.rule("1/5 data")
    if own is None:
        drawn = folder / "drawn"
        with console.status("drawing a data set"):
            draw_splits(drawn)
        console.print(f"drew a data set (COCO format, JPEG) in {drawn.uri}")
        own = {name: Split(drawn.named(f"{name}.json"), drawn.named("images")) for name in splits}
    for name, place in splits.items():
        meta = prepare(own[name].annotations, own[name].images, place, split=own[name].name).meta
        text = f"{name}: {meta.images} images, {meta.boxes} boxes, {len(meta.classes)} classes in {place}"
        console.print(text)

    results: dict[str, Any] = {}
    with _ray() if any(cluster.most_workers > 0 for cluster in clusters) else nullcontext():
        for number, (name, title) in enumerate(STAGES.items(), start=2):
            console.rule(f"{number}/5 {name}: {title}")
            job = _job(jobs, name, common, results["teacher"]["student"] if name == "head" else "")
            with RunConsole(name, console) as run:
                results[name] = train(job, run, run.note)

    console.rule("5/5 comparison")
    metrics = {name: results[name]["best"] for name in results}
    console.print(headline_table(metrics))
    console.print(class_table({name: metrics[name] for name in ("baseline", "head")}))
    from headkd_ray.pictures import compare  # imported late, with timm, which takes seconds
    from headkd_ray.run_report import PAGE

    sheet, note = compare(ShardSet.open(splits["val"]), results)
    if note is not None:
        console.print(f"note: {note}")
    folder.write(PICTURE, sheet)
    for name in results:
        console.print(f"{name} checkpoint: {results[name]['student']}")
        if (folder / name).has(PAGE):
            console.print(f"{name} page: {(folder / name).named(PAGE)}")
    console.print(f"picture of detections: {folder.named(PICTURE)}")


def _own(train: str, val: str, images: str | None, val_images: str | None) -> dict[str, Split]:
    """Return the user's splits; of annotations that hold several, those that are called train and val."""
    places = {"train": (train, images), "val": (val, val_images or images)}
    return {
        name: Split(place, folder, name if train == val or place.lower().endswith((".yaml", ".yml")) else None)
        for name, (place, folder) in places.items()
    }


def _job(jobs: Path, name: str, common: list[str], teacher: str) -> Job:
    """Load the job of a stage; only HEAD has a teacher."""
    fitting = [each for each in common if name in STAGES_OF_SECTION.get(re.split(r"[.=]", each)[0], STAGES)]
    return load_job(jobs / f"{name}.yaml", [*fitting, *([f"teacher.checkpoint={teacher}"] if name == "head" else [])])


def _ray() -> AbstractContextManager[Any]:
    """Return a context in which Ray is connected: to an existing cluster, or started on this machine."""
    from headkd_ray.cluster.connect import connected  # imported late, because Ray takes seconds

    return connected(ClusterSpec())


if __name__ == "__main__":
    sys.exit(main())
