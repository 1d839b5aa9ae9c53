"""Analyse a search: ``python -m headkd_ray.analyze RUN``, where RUN is the search's folder, ``<run.storage>/<run.name>``.

Prints a table of the trials and writes RUN/analysis: index.html (one self-contained page), its figures as PNG, and best.yaml,
the best trial's job. The search may be finished, running or killed, and on remote storage. In a notebook,
``headkd_ray.analyze.load(RUN)`` returns a pandas data frame.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from headkd_ray.cli import command_parser, user_errors
from headkd_ray.report.plots import png, svg
from headkd_ray.report.terminal import Terminal
from headkd_ray.storage import Folder
from headkd_ray.text import warn
from headkd_ray.tuning.analysis.best import best_trial, render_best
from headkd_ray.tuning.analysis.figures import figures
from headkd_ray.tuning.analysis.frame import read_trials, trial_frame
from headkd_ray.tuning.analysis.importance import importances
from headkd_ray.tuning.analysis.page import page
from headkd_ray.tuning.analysis.table import print_trials
from headkd_ray.tuning.optuna_file import optuna_file
from headkd_ray.tuning.trial_records import SearchFolder

if TYPE_CHECKING:
    import pandas


def load(run: str) -> pandas.DataFrame:
    """Return a search's trials, one per row, with the columns of ``tuning.analysis.frame.trial_frame``.

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
    """Print the table, and write the page, the figures and the best job to ``out``."""
    folder = SearchFolder.open(run)
    search = folder.search()
    trials = read_trials(folder, search, warn)
    print_trials(console, search, trials)
    shares, note = importances(search, trials)
    drawn = figures(search, trials, shares, note)
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
    """Run the command and return its exit code."""
    parser = command_parser("analyze", __doc__)
    parser.add_argument("run", help="folder of the search")
    parser.add_argument("--out", help="folder for the page, the figures and the best job (default: RUN/analysis)")
    parser.add_argument("--csv", help="also write the trials to this CSV file")
    parser.add_argument("--parquet", help="also write the trials to this Parquet file")
    parser.add_argument(
        "--optuna", metavar="FILE", help="also write the search as an Optuna storage: optuna-dashboard sqlite:///FILE"
    )
    with user_errors():
        options = parser.parse_args(arguments)
        console = Terminal(soft_wrap=True)
        out = Folder.open(options.run) / "analysis" if options.out is None else Folder.open(options.out)
        analyze(options.run, out, console)
        others: list[tuple[str | None, Callable[[], bytes]]] = [
            (options.csv, lambda: load(options.run).to_csv(index=False).encode()),
            (options.parquet, lambda: load(options.run).to_parquet(index=False)),
            (options.optuna, lambda: _as_optuna(options.run)),
        ]
        for path, content in others:
            if path is not None:
                target, name = Folder.of_file(path)
                target.create()
                target.write(name, content())
    return 0


def _as_optuna(run: str) -> bytes:
    folder = SearchFolder.open(run)
    search = folder.search()
    return optuna_file(search, read_trials(folder, search, lambda warning: None))  # ``analyze`` has warned


if __name__ == "__main__":
    sys.exit(main())
