"""Check Ray Train's listing of a run's checkpoints before Ray reads it, since Ray does not start if a checkpoint is missing."""

from __future__ import annotations

import json
from typing import Any

from headkd_ray.engine.checkpoint import STATE_FILE, check, none_intact
from headkd_ray.engine.files import read_json, writing
from headkd_ray.errors import CheckpointError
from headkd_ray.storage import Folder

SNAPSHOT = "checkpoint_manager_snapshot.json"


def drop_unusable(run: Folder) -> list[str]:
    """Remove missing or damaged checkpoints from the listing, and return a sentence about each.

    Raises:
        CheckpointError: the listing is damaged, or no checkpoint is left.
    """
    if not run.has(SNAPSHOT):
        return []
    mend = f"restore it, or delete it and the step_… folders in {run.uri} to train the run from the start"
    snapshot = read_json(run, SNAPSHOT, CheckpointError, mend)
    try:
        entries = list(zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True))
        names = [entry["checkpoint_dir_name"] for entry, _ in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run.named(SNAPSHOT)}: is not Ray Train's list of checkpoints ({error!r}); {mend}") from error
    problems = {name: problem for name in names if (problem := _problem(run, name)) is not None}
    if not problems:
        return []
    kept = [(entry, index) for entry, index in entries if entry["checkpoint_dir_name"] not in problems]
    if not kept:
        raise none_intact(run, list(problems.values()))
    latest = max((entry for entry, _ in kept), key=_step)
    snapshot["checkpoint_results"] = [entry for entry, _ in kept]
    snapshot["checkpoint_report_indices"] = [index for _, index in kept]
    snapshot["latest_checkpoint_result"] = latest
    with writing(run.named(SNAPSHOT), "run.storage"):
        run.write(SNAPSHOT, json.dumps(snapshot).encode())
    return [*problems.values(), f"resuming from the previous checkpoint, {latest['checkpoint_dir_name']}"]


def _problem(run: Folder, name: str) -> str | None:
    folder = run / name
    if not folder.has(STATE_FILE):
        return f"{folder.uri}: is missing"
    try:
        check(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _step(entry: dict[str, Any]) -> str:
    return entry["checkpoint_dir_name"]  # step_00000123
