"""Search for a row's learning rate. The command is ``bench/evidence.py``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from evidence_plan import Bench, Plan, choices, plan
from evidence_run import BusyError, have_teacher, locked, train_row

from headkd_ray.errors import TrainingError
from headkd_ray.job import load_job

SEARCH_SEED = 100
SEARCH_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Learning rates tried for each row, as multiples of the one in its job file."""


def searches(bench: Bench, rows: Sequence[str]) -> list[Callable[[], None]]:
    """Return the tasks that choose the rows' learning rates. A teacher keeps that of its job file: its students share it."""
    wanted = {bench.rows[row].lr_of or row for row in rows} - bench.teachers
    return [partial(try_lr, bench, row, factor) for row in bench.rows if row in wanted for factor in SEARCH_FACTORS]


def try_lr(bench: Bench, row: str, factor: float) -> None:
    """Train a row with one learning rate and record its AP on val. The last of a row's trials to finish makes the choice."""
    written = load_job(bench.jobs / f"{bench.rows[row].job}.yaml").optim.lr
    lr = written * factor
    todo = plan(bench, row, SEARCH_SEED, lr)
    if f"{lr:g}" in _tried(bench, todo):
        return
    have_teacher(bench, row)
    with locked(bench, todo.job.run.name):
        if f"{lr:g}" in _tried(bench, todo):
            return
        try:
            found = round(train_row(bench, todo)["best"]["AP"], 3)
        except TrainingError as error:
            print(f"{todo.job.run.name}: {error}")
            found = None
        _choose(bench, todo, f"{lr:g}", found, [f"{written * each:g}" for each in SEARCH_FACTORS])


def _tried(bench: Bench, todo: Plan) -> dict[str, float | None]:
    """Return learning rate -> AP on val for those tried already in the search for the row as it is now."""
    found = choices(bench).get(todo.row, {})
    return found["val_AP"] if found.get("search") == todo.search else {}


def _choose(bench: Bench, todo: Plan, lr: str, ap: float | None, grid: Sequence[str]) -> None:
    while True:
        try:
            with locked(bench, "choices"):
                tried = {**_tried(bench, todo), lr: ap}
                entry: dict[str, Any] = {"search": todo.search, "val_AP": {each: tried[each] for each in grid if each in tried}}
                known = {each: value for each, value in entry["val_AP"].items() if value is not None}
                if known and len(entry["val_AP"]) == len(grid):
                    entry["lr"] = float(max(known, key=lambda each: known[each]))
                entries = {**choices(bench), todo.row: entry}
                draft = bench.choices.with_suffix(".tmp")
                draft.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n", encoding="utf-8")
                draft.replace(bench.choices)
                break
        except BusyError:
            time.sleep(0.1)
    print(f"{todo.row}: val AP by learning rate {entry['val_AP']}" + (f", chose {entry['lr']}" if "lr" in entry else ""))
