"""The trackers that a job asks for: opened before the run, told every log record, closed with its result.

They live in the process that starts the run, which receives every record and has the user's credentials.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from headkd_ray.engine.files import read_json
from headkd_ray.engine.log import Record, Sink, flattened
from headkd_ray.errors import TrackerError
from headkd_ray.job import Job
from headkd_ray.storage import Folder
from headkd_ray.text import masked
from headkd_ray.trackers.tracker import RunFacts, Tracker

TRACKERS = {"mlflow": "mlflow_tracker:MLflowTracker", "wandb": "wandb_tracker:WandbTracker"}
"""Module and class by the job's key in section log, which is the client's module and the extra that installs it, too."""
IDS_FILE = "trackers.json"
"""File of the run's folder with each service's own identifier of the run, under which a resumed run continues."""
PACKAGES = ("headkd-ray", "torch", "torchvision", "timm", "ray")


def tracker_problems(job: Job) -> list[str]:
    """List the trackers whose clients are not installed, each with what installs it."""
    return [
        f"log.{key}: needs the package {key}, which is not installed: pip install 'headkd-ray[{key}]'"
        for key in _asked_for(job)
        if find_spec(key) is None
    ]


def _asked_for(job: Job) -> dict[str, str]:
    places = {key: getattr(job.log, key) for key in TRACKERS}
    return {key: place for key, place in places.items() if place is not None}


class Trackers:
    """The open trackers of a run. One that fails is dropped with a note: training is worth more than its record elsewhere."""

    def __init__(self, tell: Sink) -> None:
        self.trackers: dict[str, Tracker] = {}
        self.tell = tell

    def __bool__(self) -> bool:
        return bool(self.trackers)

    def __call__(self, record: Record) -> None:
        """Pass a log record on to ``tell`` and to all trackers."""
        self.tell(record)
        metrics = numbers({key: value for key, value in record.items() if key not in ("step", "steps", "workers")})
        if "losses" in record or "val" in record:
            self._each(lambda tracker: tracker.log(metrics, record["step"]), record)

    def show(self, picture: bytes, step: int) -> None:
        """Record a picture of sample images with the detections of the evaluation at ``step``, a JPEG file."""
        self._each(lambda tracker: tracker.show(picture, step), {"step": step})

    def finish(self, result: Record, picture: bytes) -> None:
        """Record the run's ``result`` and a PNG ``picture`` of its student's detections."""
        with TemporaryDirectory(prefix="headkd-tracked-") as name:
            folder = Path(name)
            Folder.open(folder / "student").copy_from(Folder.open(result["student"]))
            (folder / "detections.png").write_bytes(picture)
            best = numbers(result["best"])
            self._each(lambda tracker: tracker.finish(best, folder / "student", folder / "detections.png"), result["last"])

    def close(self, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed), {})

    def _each(self, do: Callable[[Tracker], None], at: Record) -> None:
        for key, tracker in list(self.trackers.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever a client or its network raises
                del self.trackers[key]
                place = {"step": at.get("step", 0), "steps": at.get("steps"), "epoch": at.get("epoch", 0.0)}
                self.tell({**place, "note": f"log.{key}: failed, and is told no more in this process: {_cause(error)}"})


@contextmanager
def tracking(job: Job, run: Folder, tell: Sink) -> Iterator[Trackers]:
    """Open the job's trackers; use them in place of ``tell``. Leaving the context by an exception marks the run as failed.

    Raises:
        TrackerError: a service cannot be reached, refuses the credentials, or no longer has the run; the run's file of
            identifiers is damaged.
    """
    trackers, asked = Trackers(tell), _asked_for(job)
    try:
        if asked:
            _open(trackers, asked, facts(job, run), run)
        yield trackers
    except BaseException:
        trackers.close(failed=True)
        raise
    trackers.close(failed=False)


def _open(trackers: Trackers, asked: Mapping[str, str], about: RunFacts, run: Folder) -> None:
    """Open the trackers ``asked`` for, place by key, and remember their runs' identifiers in the run's folder."""
    ids = {}
    if run.has(IDS_FILE):
        mend = "delete it, and the run begins a new one in each tracker"
        ids = read_json(run, IDS_FILE, TrackerError, mend)
    for key, place in asked.items():
        module, name = TRACKERS[key].split(":")
        try:
            trackers.trackers[key] = getattr(import_module(f"headkd_ray.trackers.{module}"), name)(place, about, ids.get(key))
        except Exception as error:  # whatever a client or its network raises
            raise TrackerError(f"log.{key}: {place}: {_cause(error)}") from error
    ids |= {key: tracker.run_id for key, tracker in trackers.trackers.items()}
    run.write(IDS_FILE, json.dumps(ids).encode())


def facts(job: Job, run: Folder) -> RunFacts:
    """Collect what trackers are told about a run when it starts."""
    keys = dict(flattened(json.loads(masked(json.dumps(job.model_dump(mode="json")))), "."))
    plain = {key: value if isinstance(value, (str, int, float)) else json.dumps(value) for key, value in keys.items()}
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return RunFacts(job.run.name, run.address, plain, {**versions, **git_state()})


def git_state() -> dict[str, str]:
    """Return the commit of the current folder's git checkout, with "+" if files differ from it; nothing outside a checkout."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git commit": commit.strip() + ("+" if changes.strip() else "")}


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record by their names, those of nested dictionaries joined by slashes."""
    return {
        name: float(value)
        for name, value in flattened(record, "/")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _cause(error: Exception) -> str:
    """Return an error's first line, shortened."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
