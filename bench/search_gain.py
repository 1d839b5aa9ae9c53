"""Compare a search's best trial with its base job, on images and with seeds that the search has not used.

``python bench/search_gain.py runs/tune_tf_head --seeds 1 2 3`` trains both jobs with each seed (run again, it continues),
evaluates them on a held-out split, and prints the metric and the paired difference. The split is ``--test``, a prepared one; by
default 200 further images are drawn like the quickstart's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headkd_ray.cli import user_errors
from headkd_ray.comparison.spread import spread
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.errors import JobError
from headkd_ray.evaluate import evaluate_checkpoint
from headkd_ray.report.console import RunConsole, number
from headkd_ray.train import train
from headkd_ray.tuning.analysis.best import best_trial
from headkd_ray.tuning.space import base_values
from headkd_ray.tuning.trial_records import SearchFolder

HELD_OUT_SEED = 20_260_101
"""Seed of the drawn held-out images; the quickstart's have seed 0."""


def held_out(folder: Path) -> str:
    """Return a prepared split of 200 drawn images, made on first use."""
    out = folder / "test"
    if not out.exists():
        drawn = draw_dataset(folder / "drawn", train=1, val=200, seed=HELD_OUT_SEED)
        prepare_split(str(drawn.val), str(drawn.images), str(out))
    return str(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the search (local)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="run.seed of the trainings (default: 1 2 3)")
    parser.add_argument("--test", help="prepared split that the search has not seen")
    with user_errors():
        options = parser.parse_args()
        folder = SearchFolder.open(options.run)
        search = folder.search()
        best = best_trial(search, folder.trials(search))
        used = sorted(set(options.seeds) & set(search.seeds))
        if best is None:
            raise JobError(f"{options.run}: no trial has finished")
        if used:
            raise JobError(f"--seeds: the search used {used} itself; give others")
        out = options.run / "gain"
        test = options.test or held_out(out)
        metric = search.spec.objective.metric
        scores: dict[str, list[float]] = {"base": [], "best": []}
        for seed in options.seeds:
            for name, values in (("base", base_values(search)), ("best", best.values)):
                run = f"{name if name == 'base' else f'trial{best.number}'}-s{seed}"
                job = search.job(values, run, str(out / "runs"), seed)
                with RunConsole(run) as console:
                    result = train(job, console)
                scores[name].append(evaluate_checkpoint(result["student"], test).as_dict()[metric])
    table = Table(title=f"{metric} (%) on {test}")
    for head in ("seed", "base job", f"trial {best.number}", "difference"):
        table.add_column(head, justify="right")
    gains = [after - before for before, after in zip(scores["base"], scores["best"], strict=True)]
    for seed, *row in zip(options.seeds, scores["base"], scores["best"], gains, strict=True):
        table.add_row(str(seed), number(row[0]), number(row[1]), f"{row[2]:+.1f}")
    if len(gains) > 1:
        table.add_row("mean ± std", *(str(spread(column)) for column in (scores["base"], scores["best"], gains)))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
