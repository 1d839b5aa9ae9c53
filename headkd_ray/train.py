"""Train a job: ``python -m headkd_ray.train jobs/head.yaml [key.path=value ...]``.

On a laptop: ``python -m headkd_ray.train jobs/small/head.yaml cluster.workers=0``. On a cluster:
``ray job submit -- python -m headkd_ray.train jobs/head.yaml``. Starting the same run.name again resumes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from headkd_ray.cli import callable_as, command_parser, user_errors
from headkd_ray.job import Job, load_job, render_job, warnings
from headkd_ray.report.console import RunConsole
from headkd_ray.report.tables import print_metrics
from headkd_ray.text import masked, printable

if TYPE_CHECKING:
    from headkd_ray.engine.log import Record, Sink


def train(
    job: Job | str | Path,
    tell: Sink = lambda record: None,
    note: Callable[[str], None] = lambda text: None,
) -> Record:
    """Check everything, train where ``job.cluster`` says, and return the result; a run that has ended is not trained again.

    Args:
        job: a job, or the path of a job file.
        tell: receives the log records.
        note: receives a sentence about the run if it has already ended.
    """
    # Imported late, because torch, timm and Ray take ten seconds: mistakes in the job file are reported before that.
    from headkd_ray.engine.preflight import preflight
    from headkd_ray.engine.run import finished, only_one, run_folder
    from headkd_ray.trackers import tracker_problems, tracking

    if not isinstance(job, Job):
        job = load_job(job)
    job = preflight(job, tracker_problems(job))
    run = run_folder(job)
    result = finished(run)
    if result is not None:
        note(
            f"the run {run.uri} has already ended, at step {result['last'].get('step')}: this is its result, and nothing was "
            "trained now; to train again, choose another run.name"
        )
        return result
    with only_one(run), tracking(job, run, tell) as trackers:
        if job.cluster.workers == 0:
            from headkd_ray.engine.local import train_here

            result = train_here(job, trackers)
        else:
            from headkd_ray.cluster.trainer import train_on_ray  # workers: 0 must run where Ray is not installed

            result = train_on_ray(job, trackers)
        if trackers:
            from headkd_ray.data.shards import ShardSet
            from headkd_ray.pictures import compare

            picture, _ = compare(ShardSet.open(job.data.val), {job.run.name: result})
            trackers.finish(result, picture)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("train", (__doc__ or "").splitlines()[0])
    parser.add_argument("job", help="job file (YAML); python -m headkd_ray.jobs lists those that come with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the job file")
    parser.add_argument("--print-config", action="store_true", help="print the complete job with all defaults, and exit")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        job = load_job(options.job, options.overrides)
        if options.print_config:
            print(masked(render_job(job)), end="")
            return 0
        for warning in warnings(job):
            print(f"warning: {warning}", file=sys.stderr)
        with RunConsole(job.run.name) as console:
            result = train(job, console, console.note)
        print_metrics({job.run.name: result["best"]})
        print(f"student: {printable(result['student'])}")
    return 0


callable_as(__name__, train)

if __name__ == "__main__":
    sys.exit(main())
