"""Compare finished runs: ``python -m headkd_ray.compare runs/baseline_s0 runs/head_s0 runs/baseline_s1 runs/head_s1``.

Runs of one job with different seeds make a row. Every student is evaluated on one split, data.val of the first run unless
--data names another; rows are compared seed by seed, with a confidence interval from resampling seeds and images. With --jobs,
the jobs are trained first, with each of --seeds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from headkd_ray.cli import callable_as, command_parser, user_errors
from headkd_ray.comparison.figures_of_rows import Measured, RowFigures, figures_of, measure
from headkd_ray.comparison.run_rows import FinishedRun, Row, differences, read_run, reference_of, rows_of
from headkd_ray.comparison.tables_of_rows import markdown, page, rich_table
from headkd_ray.data.shards import ShardSet
from headkd_ray.diagnosis.detector_diagnosis import diagnose
from headkd_ray.diagnosis.overlaps import overlaps
from headkd_ray.diagnosis.resampling import resamples
from headkd_ray.engine.checkpoint import STUDENT_FOLDER
from headkd_ray.engine.coco_metrics import coco_metrics
from headkd_ray.errors import UserError
from headkd_ray.evaluate import detect_split
from headkd_ray.job import load_job
from headkd_ray.pictures import Findings, disagreements
from headkd_ray.report.plots import need_matplotlib
from headkd_ray.report.terminal import Terminal
from headkd_ray.storage import Folder
from headkd_ray.text import printable


class Comparison(NamedTuple):
    """What a comparison finds."""

    rows: list[RowFigures]
    reference: str
    """Name of the row that the others are compared with."""
    notes: list[str]
    """Sentences on what makes the comparison less than fair, and on the teachers."""


RESAMPLES = 200
"""Resamples of the images for a confidence interval."""


def compare(
    runs: Sequence[str],
    data: str | None = None,
    against: str | None = None,
    out: str | None = None,
    tell: Callable[[str], object] = lambda note: None,
) -> Comparison:
    """Compare finished runs; rows are in the order in which their first runs were given.

    Args:
        runs: folders of the runs.
        data: prepared split to compare on; None = data.val of the first run.
        against: name of the row that others are compared with; None = the first of method supervised, else the first.
        out: folder for compare.md, compare.html, compare.json and the detections, which are not made again if they are there.
        tell: called with a sentence on what is going on or should be known.

    Raises:
        UserError: a folder is not that of a finished run, two runs have the same job and seed, or matplotlib is missing.
        DataError, CheckpointError, StorageError, DeviceMemoryError: as ``evaluate_checkpoint``.
    """
    folder = None if out is None else Folder.open(out)
    if folder is not None:
        folder.check_writable()
        need_matplotlib()
    finished_runs, problems = [], []
    for address in runs:
        try:
            finished_runs.append(read_run(address))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    rows = rows_of(finished_runs)
    reference = reference_of(rows, against)
    split = data or finished_runs[0].job.data.val
    shards = ShardSet.open(split)
    truth = shards.ground_truth()
    weights = resamples(len(shards.index), RESAMPLES)
    measured: dict[str, dict[int, Measured]] = {}
    for row in rows:
        measured[row.name] = {}
        for seed, run in row.runs.items():
            tell(f"evaluating {row.name}, seed {seed}")
            results, most = _detections(run, shards, split, folder, tell)
            measured[row.name][seed] = measure(truth, results, most, weights)
    against_these = measured[reference.name]
    figures = [figures_of(row, measured[row.name], None if row is reference else against_these) for row in rows]
    notes = notes_on(rows, reference)
    teachers = dict.fromkeys(
        run.job.teacher.checkpoint
        for run in finished_runs
        if run.job.teacher is not None and run.job.teacher.checkpoint is not None
    )
    findings = {row.name: _findings(next(iter(measured[row.name].values()))) for row in rows}
    for teacher in teachers:
        note, found = _teacher(teacher, shards, split, truth)
        notes.append(note)
        if found is not None:
            findings["teacher" if len(teachers) == 1 else f"teacher {teacher}"] = found
    for note in notes:
        tell(note)
    if folder is not None:
        summary = (
            f"{len(shards.index)} images of {split}. Mean ± sample standard deviation over seeds, in percent; gains over "
            f"{reference.name} are paired, seed by seed; their intervals come from {RESAMPLES} resamples of seeds and images; "
            "hours are those of training steps, times the workers."
        )
        pictures = list(disagreements(shards, findings))
        folder.create()
        folder.write("compare.md", markdown(figures, summary, notes).encode())
        folder.write("compare.html", page(list(zip(rows, figures, strict=True)), summary, notes, pictures).encode())
        folder.write("compare.json", json.dumps([_as_json(each) for each in figures], indent=1).encode())
    return Comparison(figures, reference.name, notes)


def notes_on(rows: Sequence[Row], reference: Row) -> list[str]:
    """Return a sentence on each thing that makes a comparison less than fair: other keys, other seeds, one seed."""
    notes = []
    for row in rows:
        if row is reference:
            continue
        differing = [f"{key} ({before} there, {after} here)" for key, (before, after) in differences(row, reference).items()]
        if differing:
            notes.append(f"{row.name} differs from {reference.name} in more than the method: {', '.join(differing)}")
        alone = sorted(row.runs.keys() ^ reference.runs.keys())
        if alone:
            common = len(row.runs.keys() & reference.runs.keys())
            notes.append(
                f"{row.name} and {reference.name} do not have the same seeds; the gain is over {common} that both have"
            )
    if any(len(row.runs) < 3 for row in rows):
        notes.append(
            "fewer than three seeds say little: gains of this kind vary by a point of AP from seed to seed, and an interval of "
            "so few is too narrow"
        )
    return notes


def _findings(measured: Measured) -> Findings:
    return measured.diagnosis, measured.results


def _teacher(checkpoint: str, shards: ShardSet, split: str, truth: dict[str, Any]) -> tuple[str, Findings | None]:
    """Return a sentence on a teacher's AP on the split, and what it finds there; None if it cannot be evaluated."""
    try:
        found = detect_split(checkpoint, shards, split)
    except UserError as error:
        return f"the teacher {checkpoint} could not be evaluated: {error}", None
    metrics = coco_metrics(truth, found.results, found.image_ids, found.max_detections)
    diagnosis = diagnose(overlaps(truth, found.results, found.max_detections))
    return f"the teacher {checkpoint} has AP {metrics.AP:.1f}", (diagnosis, found.results)


def _detections(
    run: FinishedRun, shards: ShardSet, split: str, folder: Folder | None, warn: Callable[[str], object]
) -> tuple[list[dict[str, Any]], int]:
    """Return the student's COCO results on the split, and how many of an image count; from ``folder`` if they are there."""
    if folder is None:
        found = detect_split(run.student, shards, split, warn=warn)
        return found.results, found.max_detections
    weights = run.folder / STUDENT_FOLDER
    key = hashlib.sha256(weights.read("model.safetensors") + weights.read("model.json") + shards.meta.fingerprint.encode())
    name = f"{run.job.run.name}-{key.hexdigest()[:16]}.json"
    place = folder / "detections"
    if place.has(name):
        stored = json.loads(place.read(name))
        return stored["results"], stored["max_detections"]
    found = detect_split(run.student, shards, split, warn=warn)
    place.create()
    place.write(name, json.dumps(found._asdict()).encode())
    return found.results, found.max_detections


def _as_json(figures: RowFigures) -> dict[str, Any]:
    """Return the figures for JSON, which has no NaN: what cannot be computed is null."""
    entry = {
        **vars(figures),
        "metrics": {name: each._asdict() for name, each in figures.metrics.items()},
        "per_class": {name: each._asdict() for name, each in figures.per_class.items()},
        "gain": None if figures.gain is None else figures.gain._asdict(),
        "hours": figures.hours._asdict(),
    }
    text = json.dumps(entry)
    known: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)
    return known


def train_all(jobs: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], tell: Callable[[str], object]) -> list[str]:
    """Train each job with each seed, seed after seed, and return the runs' folders. What has ended is not trained again."""
    from headkd_ray.engine.run import run_folder
    from headkd_ray.report.console import RunConsole
    from headkd_ray.train import train

    loaded = [load_job(job, overrides) for job in jobs]
    runs = []
    for seed in seeds:
        for job in loaded:
            seeded = job.replace({"run.name": f"{job.run.name}_s{seed}", "run.seed": seed})
            tell(f"training {seeded.run.name}")
            with RunConsole(seeded.run.name) as console:
                train(seeded, console)
            runs.append(run_folder(seeded).address)
    return runs


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("compare", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a finished run: <run.storage>/<run.name>")
    parser.add_argument("--jobs", nargs="+", default=[], metavar="JOB", help="train these job files first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of --jobs (default 0 1 2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key.path=value", help="replace keys of all --jobs")
    parser.add_argument("--data", help="prepared split to compare on (default: data.val of the first run)")
    parser.add_argument(
        "--against", metavar="ROW", help="row that others are compared with (default: supervised, or the first)"
    )
    parser.add_argument("--out", help="folder for compare.md, compare.html, compare.json and the detections")
    with user_errors():
        options = parser.parse_args(arguments)
        if not options.runs and not options.jobs:
            raise UserError("name the folders of at least two runs, or --jobs to train")

        def tell(note: str) -> None:
            print(f"note: {printable(note)}", file=sys.stderr)

        runs = [*options.runs, *train_all(options.jobs, options.set, options.seeds, tell)]
        compared = compare(runs, options.data, options.against, options.out, tell)
        Terminal().print(rich_table(compared.rows, compared.reference))
        if options.out is not None:
            print(f"page: {printable(Folder.open(options.out).named('compare.html'))}")
    return 0


callable_as(__name__, compare)

if __name__ == "__main__":
    sys.exit(main())
