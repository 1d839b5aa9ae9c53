"""Search hyper-parameters: ``python -m headkd_ray.tune jobs/tune_tf_head.yaml [key.path=value ...]``.

The search file names a base job, the job keys to search, and how to search them. ``--resume`` continues a search that was
stopped or killed, or extends it (``budget.trials=40``). Inspect it at any time with ``python -m headkd_ray.analyze RUN``.
"""

from __future__ import annotations

import sys

from headkd_ray.cli import command_parser, user_errors
from headkd_ray.errors import JobError
from headkd_ray.storage import Folder
from headkd_ray.text import printable, warn
from headkd_ray.tuning.analysis.progress import SearchConsole
from headkd_ray.tuning.search_file import load_search
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.study import check_optuna
from headkd_ray.tuning.trial_records import SearchFolder, Trial
from headkd_ray.tuning.warm_start import earlier_trials


def tune(search: Search, folder: SearchFolder, console: SearchConsole) -> list[Trial]:
    """Check everything, run the search as the base job's cluster section says, and return all trials. Raises UserError."""
    earlier = earlier_trials(search, warn)
    # Imported late, because torch, timm and Ray take ten seconds: mistakes in the files are reported before that.
    from headkd_ray.deploy.extras import needs_extra
    from headkd_ray.engine.preflight import preflight
    from headkd_ray.train import train
    from headkd_ray.tuning.on_ray.tuner import search_on_ray

    if search.spec.objective.cost == "onnx_latency":
        with needs_extra("onnx", "objective.cost: onnx_latency"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
    preflight(search.job({}, "preflight", folder.runs.address, search.seeds[0]))
    folder.start(search)
    return search_on_ray(search, folder, train, console, earlier)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = command_parser("tune", __doc__)
    parser.add_argument("search", help="search file (YAML); python -m headkd_ray.jobs lists those that come with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the search file")
    parser.add_argument("--resume", action="store_true", help="continue the search of this name")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        search = load_search(options.search, options.overrides)
        check_optuna(search)
        folder = SearchFolder(Folder.open(search.spec.run.storage) / search.spec.run.name)
        if folder.exists and not options.resume:
            raise JobError(f"{folder.folder.uri} is already a search: continue it (--resume), or choose another run.name")
        if folder.exists:
            folder.check_same(search)
        elif options.resume:
            raise JobError(f"{folder.folder.uri}: no search to resume; start it without --resume")
        with SearchConsole(search) as console:
            trials = tune(search, folder, console)
        console.summary(trials)
        print(f"more: python -m headkd_ray.analyze {printable(folder.folder.uri)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
