"""Train a job: ``python -m headkd_ray.train jobs/head.yaml [key.path=value ...]``.

On a laptop: ``python -m headkd_ray.train jobs/small/head.yaml cluster.workers=0``. On a cluster:
``ray job submit -- python -m headkd_ray.train jobs/head.yaml``. Starting the same run.name again resumes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from headkd_ray.cli import callable_as, command_parser, user_errors
from headkd_ray.errors import JobError
from headkd_ray.job import LENGTH_KEYS, Job, load_job, render_job, warnings
from headkd_ray.report.console import RunConsole
from headkd_ray.report.tables import print_metrics
from headkd_ray.text import masked, printable

if TYPE_CHECKING:
    from headkd_ray.engine.log import Record, Sink


def train(
    job: Job | str | Path,
    tell: Sink = lambda record: None,
    note: Callable[[str], None] = lambda text: None,
    extend: bool = False,
) -> Record:
    """Check everything, train where ``job.cluster`` says, and return the result; a run that has ended is not trained again.

    Args:
        job: a job, or the path of a job file.
        tell: receives the log records.
        note: receives a sentence about the run: if it has already ended, and which batch size it found.
        extend: train a run longer than it was started for: ``optim.epochs`` may be more, ``optim.milestones`` may have further
            ones, and ``eval.patience`` may be another.
    """
    # Imported late, because torch, timm and Ray take ten seconds: mistakes in the job file are reported before that.
    from headkd_ray.engine.preflight import preflight
    from headkd_ray.engine.run import extend_run, finished, is_started, only_one, run_folder
    from headkd_ray.run_report import report_problems, reporting
    from headkd_ray.trackers import tracker_problems, tracking

    if not isinstance(job, Job):
        job = load_job(job)
    job = preflight(job, [*tracker_problems(job), *report_problems(job)], longer=extend)
    run = run_folder(job)
    if extend:
        with only_one(run):
            extend_run(job)
    result = finished(run)
    if result is not None:
        note(
            f"the run {run.uri} has already ended, at step {result['last'].get('step')}: this is its result, and nothing was "
            "trained now; to train again, choose another run.name, or --extend epochs=N to train it longer"
        )
        return result
    with only_one(run), _machine(job) as (find_batch_size, train_there):
        if job.data.max_batch_size is not None and not is_started(job):
            job = job.replace({"data.batch_size": find_batch_size(job)})
            note(f"data.batch_size: {job.data.batch_size} is used, the largest up to data.max_batch_size that was found to fit")
        with tracking(job, run, tell) as trackers:
            with reporting(job, run, trackers, trackers.show) as sink:
                result = train_there(job, sink)
            if trackers:
                from headkd_ray.data.shards import ShardSet
                from headkd_ray.pictures import compare

                picture, _ = compare(ShardSet.open(job.data.val), {job.run.name: result})
                trackers.finish(result, picture)
    return result


def _length_key(given: str) -> str:
    """Return ``epochs=24`` as an override of the job's key. Raises JobError for other keys than those of a run's length."""
    key, _, value = given.partition("=")
    known = {name: path for path in LENGTH_KEYS for name in (path, path.rpartition(".")[2])}
    if key not in known or not value:
        raise JobError(f"--extend {given}: give KEY=VALUE, where KEY is one of epochs, milestones and patience")
    return f"{known[key]}={value}"


@contextmanager
def _machine(job: Job) -> Iterator[tuple[Callable[[Job], int], Callable[[Job, Sink], Record]]]:
    """Yield two functions that work where ``job.cluster`` says, which is known to have room.

    One finds the largest batch size of the job, the other trains the job and takes the sink of the log.
    """
    if job.cluster.workers == 0:
        from headkd_ray.engine.local import train_here
        from headkd_ray.profiling.batch_size import largest_batch_size_here

        yield largest_batch_size_here, train_here
    else:
        from headkd_ray.cluster.trainer import on_ray  # workers: 0 must run where Ray is not installed

        with on_ray(job) as there:
            yield there


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("train", (__doc__ or "").splitlines()[0])
    parser.add_argument("job", help="job file (YAML); python -m headkd_ray.jobs lists those that come with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument(
        "--extend",
        nargs="+",
        default=[],
        metavar="epochs=N",
        help="train a run longer than it was started for, exactly as if it had been started so: epochs=24 and, if they change, "
        "milestones=[8,11,20] and patience=null",
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete job with all defaults, and exit")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        job = load_job(options.job, [*options.overrides, *map(_length_key, options.extend)])
        if options.print_config:
            print(masked(render_job(job)), end="")
            return 0
        for warning in warnings(job):
            print(f"warning: {warning}", file=sys.stderr)
        with RunConsole(job.run.name) as console:
            result = train(job, console, console.note, extend=bool(options.extend))
        print_metrics({job.run.name: result["best"]})
        print(f"student: {printable(result['student'])}")
        from headkd_ray.engine.run import run_folder
        from headkd_ray.run_report import PAGE

        if (run := run_folder(job)).has(PAGE):
            print(f"page: {printable(run.named(PAGE))}")
    return 0


callable_as(__name__, train)

if __name__ == "__main__":
    sys.exit(main())
