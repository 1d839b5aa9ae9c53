"""Search hyper-parameters: ``python -m headkd_ray.tune jobs/tune_tf_head.yaml [key.path=value ...]``.

The search file names a base job, the job keys to search and how. ``--resume`` goes on with a search that was stopped or killed,
or lets it try more (``budget.trials=40``). Look at it at any time with ``python -m headkd_ray.analyze RUN``.
"""

from __future__ import annotations

import argparse
import sys

from headkd_ray.doors import user_errors
from headkd_ray.errors import JobError
from headkd_ray.report.search.console import SearchConsole
from headkd_ray.search.load import load_search
from headkd_ray.search.records import SearchFolder, Trial
from headkd_ray.search.space import Search
from headkd_ray.search.study import check_optuna
from headkd_ray.storage import Folder
from headkd_ray.text import printable


def tune(search: Search, folder: SearchFolder, console: SearchConsole) -> list[Trial]:
    """Check everything, then search where the base job's cluster section says; all trials. Raises UserError."""
    # Imported here, because torch, timm and Ray take ten seconds: what is wrong with the files is told before.
    from headkd_ray.cluster.search import search_on_ray
    from headkd_ray.engine.preflight import preflight
    from headkd_ray.train import train

    preflight(search.job({}, "preflight", folder.runs.address, search.seeds[0]))
    folder.start(search)
    return search_on_ray(search, folder, train, console)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("search", help="search file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace keys of the search file")
    parser.add_argument("--resume", action="store_true", help="go on with the search of this name")
    with user_errors():
        options = parser.parse_intermixed_args(arguments)
        search = load_search(options.search, options.overrides)
        check_optuna(search)
        folder = SearchFolder(Folder.open(search.spec.run.storage) / search.spec.run.name)
        if folder.exists and not options.resume:
            raise JobError(f"{folder.folder.uri} is a search already: go on with it (--resume), or choose another run.name")
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
