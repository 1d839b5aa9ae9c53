"""A search's folder, ``<run.storage>/<run.name>``: what was asked, and one small file a trial. Whoever resumes or analyses a
search reads these alone.

- ``search.json``: the search, and its base job as written;
- ``trials/0003.json``: a trial, from the moment that it is proposed;
- ``runs/0003-s0/``: the run folder of its training with seed 0, as of any other training.

A trial's file is written by the process that proposes, then by the trial's own when it ends, before anybody else is told; so a
driver that dies never loses a result.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal

from headkd_ray.errors import JobError
from headkd_ray.search.space import Search, Values
from headkd_ray.search.spec import SearchSpec
from headkd_ray.storage import Folder

SEARCH_FILE = "search.json"
# Keys that may change when a search is resumed: they decide how much and where, not what is searched.
FREE_SECTIONS = ("budget", "scheduler", "searcher")

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial as its file says it."""

    number: int
    values: Values
    state: State = "running"
    """running = proposed and not ended, also if its search was killed; stopped = by the scheduler."""
    cause: str | None = None
    """Why it failed."""
    started: float = 0.0
    """Seconds since 1970, of the proposal."""
    ended: float | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Seed -> the run's result: its best checkpoint's COCO metrics, and where its student is."""
    curve: list[tuple[float, float | None]] = field(default_factory=list)
    """(epoch, objective's metric) of each evaluation of the first seed."""
    cost: dict[str, float] = field(default_factory=dict)
    """Of the student: params (million), flops (10^9), latency (ms)."""
    copies: list[dict[str, Any]] = field(default_factory=list)
    """pbt: {"from": trial number, "epoch": of the copied state, "values": its own until then} of each state that it copied. Its
    learning curve is that of the states it has."""

    def scores(self, metric: str) -> list[float]:
        """The metric of each seed, in percent; NaN where it cannot be computed."""
        return [math.nan if result[metric] is None else result[metric] for result in self.results.values()]

    def mean(self, metric: str) -> float:
        """The metric's mean over seeds; NaN if there is none."""
        scores = self.scores(metric)
        return fmean(scores) if scores else math.nan

    def deviation(self, metric: str) -> float:
        """Its sample standard deviation over seeds; NaN with fewer than two."""
        scores = self.scores(metric)
        return stdev(scores) if len(scores) > 1 and not math.isnan(sum(scores)) else math.nan

    def with_end(self, state: State, **changes: Any) -> Trial:
        """The same trial, ended now."""
        return replace(self, state=state, ended=time.time(), **changes)


@dataclass(frozen=True)
class SearchFolder:
    """Where a search keeps what it knows."""

    folder: Folder

    @classmethod
    def open(cls, uri: str) -> SearchFolder:
        """The folder of a search; it need not exist. Raises StorageError if no filesystem serves the URI."""
        return cls(Folder.open(uri))

    @property
    def exists(self) -> bool:
        """Has a search been started here?"""
        return self.folder.has(SEARCH_FILE)

    @property
    def runs(self) -> Folder:
        """The folder of the trials' run folders."""
        return self.folder / "runs"

    @staticmethod
    def run_name(trial: Trial, seed: int) -> str:
        """The run.name of a trial's training; another one after each copy."""
        return f"{trial.number:04d}-s{seed}" + (f"-c{len(trial.copies)}" if trial.copies else "")

    def start(self, search: Search) -> None:
        """Write what is asked; over what a resumed search was asked before."""
        content = {"spec": search.spec.model_dump(mode="json"), "job": search.written}
        self.folder.create()
        (self.folder / "trials").create()
        self.folder.write(SEARCH_FILE, json.dumps(content, indent=1).encode())

    def search(self) -> Search:
        """What was asked.

        Raises:
            JobError: there is no search in the folder, or of another version.
        """
        if not self.exists:
            raise JobError(f"{self.folder.uri}: no search here (no {SEARCH_FILE}); give the folder <run.storage>/<run.name>")
        content = json.loads(self.folder.read(SEARCH_FILE))
        try:
            return Search(SearchSpec.model_validate_json(json.dumps(content["spec"])), content["job"])
        except (ValueError, KeyError) as error:
            raise JobError(f"{self.folder.named(SEARCH_FILE)}: not a search of this version ({error})") from error

    def check_same(self, search: Search) -> None:
        """Raises JobError, naming the keys, if the search here was started with another space, job or objective."""

        def asked(each: Search) -> dict[str, Any]:
            job = each.base.model_dump(mode="json", exclude={"cluster", "run", "log"})
            return {**each.spec.model_dump(mode="json", exclude={*FREE_SECTIONS, "run", "overrides"}), "job": job}

        old, new = asked(self.search()), asked(search)
        differing = [
            f"{key}: the search {self.folder.uri} was started with another; keep that to resume it, or choose another run.name"
            for key in old
            if old[key] != new[key]
        ]
        if differing:
            raise JobError(differing)

    def write(self, trial: Trial) -> None:
        """Write a trial's file."""
        (self.folder / "trials").write(f"{trial.number:04d}.json", json.dumps(asdict(trial), indent=1).encode())

    def trial(self, number: int) -> Trial:
        """Read a trial's file."""
        return Trial(**json.loads((self.folder / "trials").read(f"{number:04d}.json")))

    def trials(self) -> list[Trial]:
        """All trials, by number."""
        names = (self.folder / "trials").names()
        return [self.trial(int(name.removesuffix(".json"))) for name in names if name.endswith(".json")]

    def log(self, trial: Trial, seed: int) -> list[dict[str, Any]]:
        """The log records of a trial's training so far, in order; empty if it has not begun."""
        run = self.runs / self.run_name(trial, seed)
        if not run.has("log.jsonl"):
            return []
        records = []
        for line in run.read("log.jsonl").decode().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # a line that is being written, or was when the process died
                break
        return records

    def curve(self, trial: Trial, seed: int, metric: str) -> list[tuple[float, float | None]]:
        """(epoch, metric in percent, None where it cannot be computed) of each evaluation of a trial's training so far."""
        return [(record["epoch"], record["val"][metric]) for record in self.log(trial, seed) if "val" in record]
