"""What a search found: ``python -m headkd_ray.analyze RUN``, with RUN the search's folder, ``<run.storage>/<run.name>``.

Prints a table of the trials and writes RUN/analysis: index.html (one self-contained page), its figures as PNG, and best.yaml,
the best trial's job. The search may be finished, running or killed, and on remote storage. In a notebook:
``headkd_ray.analyze.load(RUN)`` is a pandas frame.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING

from rich.console import Console

from headkd_ray.doors import user_errors
from headkd_ray.report.search.best import best_trial, render_best
from headkd_ray.report.search.figures import figures, png, svg
from headkd_ray.report.search.frame import read_trials, trial_frame
from headkd_ray.report.search.importance import importances
from headkd_ray.report.search.page import page
from headkd_ray.report.search.table import print_trials
from headkd_ray.report.terminal import Terminal
from headkd_ray.search.records import SearchFolder
from headkd_ray.storage import Folder
from headkd_ray.text import warn

if TYPE_CHECKING:
    import pandas


def load(run: str) -> pandas.DataFrame:
    """A search's trials, a row each; the columns are those of ``report.search.frame.trial_frame``.

    Args:
        run: the search's folder, local or remote.

    Raises:
        JobError: there is no search, or its file is damaged. (Trials whose files are damaged are left out with a warning.)
        UserError: pandas is not installed.
    """
    folder = SearchFolder.open(run)
    search = folder.search()
    return trial_frame(search, read_trials(folder, search, warnings.warn))


def analyze(run: str, out: Folder, console: Console) -> None:
    """Print the table, write the page, the figures and the best job into ``out``."""
    folder = SearchFolder.open(run)
    search = folder.search()
    trials = read_trials(folder, search, warn)
    print_trials(console, search, trials)
    shares, note = importances(search, trials)
    drawn = figures(search, trials, shares)
    out.create()
    for name, figure in drawn.items():
        out.write(f"{name}.png", png(figure))
    out.write("index.html", page(search, trials, {name: svg(figure) for name, figure in drawn.items()}, note).encode())
    best = best_trial(search, trials)
    if best is not None:
        out.write("best.yaml", render_best(search, best).encode())
        students = [result["student"] for result in best.results.values()]
        console.print(f"best: trial {best.number}, job {out.named('best.yaml')}, students {', '.join(students)}")
    else:
        console.print("no trial has finished yet")
    console.print(note)
    console.print(f"page: {out.named('index.html')}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the search")
    parser.add_argument("--out", help="folder for the page, the figures and the best job (default: analysis in the search's)")
    parser.add_argument("--csv", help="write the trials here, as CSV")
    parser.add_argument("--parquet", help="write the trials here, as Parquet")
    with user_errors():
        options = parser.parse_args(arguments)
        console = Terminal(soft_wrap=True)
        out = Folder.open(options.run) / "analysis" if options.out is None else Folder.open(options.out)
        analyze(options.run, out, console)
        for path, written in ((options.csv, "to_csv"), (options.parquet, "to_parquet")):
            if path is not None:
                target, name = Folder.of_file(path)
                target.create()
                content = getattr(load(options.run), written)(index=False)
                target.write(name, content.encode() if isinstance(content, str) else content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
