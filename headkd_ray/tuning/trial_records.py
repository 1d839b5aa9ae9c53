"""A search's folder, ``<run.storage>/<run.name>``: the search and one small file per trial, which are all that is needed to
resume or to analyse it.

- ``search.json``: the search, and its base job as written;
- ``trials/0003.json``: a trial, from the moment it is proposed;
- ``runs/0003-s0/``: the run folder of its training with seed 0, like that of any other training.

A trial's file is written by the driver when it proposes the trial, and by the trial's own process when it ends, before that
process reports the end; so no result is lost if the driver dies.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Generic, Literal, TypeVar

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from headkd_ray.errors import JobError
from headkd_ray.job.keys import dotted
from headkd_ray.storage import Folder
from headkd_ray.text import masked
from headkd_ray.tuning.search_file import check_search
from headkd_ray.tuning.space import Search, Values

Content = TypeVar("Content")

SEARCH_FILE = "search.json"
# Sections that may change when a search is resumed: they decide how it searches, not what.
FREE_SECTIONS = ("budget", "scheduler", "searcher")

State = Literal["running", "finished", "stopped", "failed"]
Metric = FiniteFloat | None
"""A metric in percent; None if it cannot be computed."""


@with_config(ConfigDict(extra="allow"))
class Result(TypedDict):
    """The result of one training in a trial's file: its best checkpoint's COCO metrics, and where its student is."""

    AP: Metric
    AP50: Metric
    AP75: Metric
    APs: Metric
    APm: Metric
    APl: Metric
    step: int
    student: str


@dataclass(frozen=True)
class Trial:
    """A trial, as its file stores it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    number: int
    values: Values
    state: State = "running"
    """running = proposed and not ended, even if its search was killed; stopped = stopped by the scheduler."""
    cause: str | None = None
    """Reason for the failure of a failed trial."""
    started: float = 0.0
    """Time of the proposal, in seconds since 1970."""
    ended: float | None = None
    """Time of the end, in seconds since 1970."""
    results: dict[str, Result] = field(default_factory=dict)
    """Result of each training, by seed."""
    curve: list[tuple[float, Metric]] = field(default_factory=list)
    """(epoch, objective's metric) of each evaluation of the first seed."""
    cost: dict[str, float] = field(default_factory=dict)
    """Cost of the student: params (million), flops (10^9), latency (ms), onnx_latency (ms)."""
    copies: list[dict[str, Any]] = field(default_factory=list)
    """pbt: {"from": trial number, "epoch": epoch of the copied state, "values": its own values until then} for each state that
    it copied. Its learning curve follows the copied states."""

    def scores(self, metric: str) -> list[float]:
        """Return the metric for each seed, in percent; NaN where it cannot be computed."""
        found: list[Mapping[str, Any]] = list(self.results.values())
        return [math.nan if result[metric] is None else result[metric] for result in found]

    def mean(self, metric: str) -> float:
        """Return the metric's mean over seeds, or NaN if there is none."""
        scores = self.scores(metric)
        return fmean(scores) if scores else math.nan

    def deviation(self, metric: str) -> float:
        """Return the metric's sample standard deviation over seeds, or NaN with fewer than two."""
        scores = self.scores(metric)
        return stdev(scores) if len(scores) > 1 and not math.isnan(sum(scores)) else math.nan

    def with_end(self, state: State, **changes: Any) -> Trial:
        """Return a copy of the trial that has ended now."""
        return replace(self, state=state, ended=time.time(), **changes)


@dataclass(frozen=True)
class SearchFolder:
    """The folder in which a search stores its state."""

    folder: Folder

    @classmethod
    def open(cls, uri: str) -> SearchFolder:
        """Open the folder of a search, which need not exist. Raises StorageError if no filesystem serves the URI."""
        return cls(Folder.open(uri))

    @property
    def exists(self) -> bool:
        """Whether a search has been started in this folder."""
        return self.folder.has(SEARCH_FILE)

    @property
    def runs(self) -> Folder:
        """The folder that holds the trials' run folders."""
        return self.folder / "runs"

    @staticmethod
    def run_name(trial: Trial, seed: int) -> str:
        """Return the run.name of a trial's training, which changes with each copy (pbt)."""
        return f"{trial.number:04d}-s{seed}" + (f"-c{len(trial.copies)}" if trial.copies else "")

    def start(self, search: Search) -> None:
        """Create the folder and write the search; when a search is resumed, this replaces the former one."""
        content = {"spec": search.spec.model_dump(mode="json"), "job": search.written}
        self.folder.create()
        (self.folder / "trials").create()
        self.folder.write(SEARCH_FILE, masked(json.dumps(content, indent=1)).encode())

    def search(self) -> Search:
        """Read the search.

        Raises:
            JobError: there is no search in the folder, its file is damaged, or another version wrote it.
        """
        if not self.exists:
            raise JobError(f"{self.folder.uri}: no search here (no {SEARCH_FILE}); give the folder <run.storage>/<run.name>")
        place = self.folder.named(SEARCH_FILE)
        content = _SEARCH_FILE.read(self.folder, SEARCH_FILE)
        found, spec = check_search(content["spec"])
        search = None if spec is None else Search(spec, content["job"])
        lines = [f"spec.{dotted(problem.path)}: {problem.message}" for problem in found]
        try:
            if search is not None and search.base:
                return search
        except JobError as error:
            lines = [f"job.{line}" for line in error.problems]
        raise JobError([f"{place}: not a search of this version: {line}" for line in lines])

    def check_same(self, search: Search) -> None:
        """Raise JobError, naming the keys, if the search here was started with another space, job or objective."""

        def asked(each: Search) -> dict[str, Any]:
            job = json.loads(masked(each.base.model_dump_json(exclude={"cluster", "run", "log"})))
            return {**each.spec.model_dump(mode="json", exclude={*FREE_SECTIONS, "run", "overrides"}), "job": job}

        old, new = asked(self.search()), asked(search)
        differing = [
            f"{key}: the search {self.folder.uri} was started with another; use that to resume it, or choose another run.name"
            for key in old
            if old[key] != new[key]
        ]
        if differing:
            raise JobError(differing)

    def write(self, trial: Trial) -> None:
        """Write a trial's file."""
        (self.folder / "trials").write(f"{trial.number:04d}.json", json.dumps(asdict(trial), indent=1).encode())

    def trial(self, number: int) -> Trial:
        """Read a trial's file.

        Raises:
            JobError: it is missing or damaged.
        """
        name = f"{number:04d}.json"
        trial = _TRIAL_FILE.read(self.folder / "trials", name)
        if trial.number != number:
            raise JobError(f"{(self.folder / 'trials').named(name)}: is the file of trial {trial.number}")
        return trial

    def trials(self, search: Search | None = None, warn: Callable[[str], None] | None = None) -> list[Trial]:
        """Read all trials, by number.

        Args:
            search: the search that each trial must fit; None = any.
            warn: called for each trial whose file is damaged or does not fit, which is left out; None = raise an error instead.

        Raises:
            JobError: a file is damaged or does not fit, and ``warn`` is None.
        """
        trials = []
        for number in self.numbers():
            try:
                trial = self.trial(number)
                if search is not None:
                    _check_fit(trial, search)
            except JobError as error:
                if warn is None:
                    raise
                where = (self.folder / "trials").named(f"{number:04d}.json")
                said = [line.removeprefix(f"{where}: ") for line in error.problems]
                warn(f"{where}: {'; '.join(said)}. Trial {number} is left out; its file stays as it is")
                continue
            trials.append(trial)
        return trials

    def numbers(self) -> list[int]:
        """Return the numbers of the trials that have a file, in order."""
        return [int(name[:-5]) for name in (self.folder / "trials").names() if re.fullmatch(r"\d{4,9}\.json", name)]

    def log(self, trial: Trial, seed: int) -> list[dict[str, Any]]:
        """Return the log records of a trial's training so far, in order; empty if it has not begun."""
        run = self.runs / self.run_name(trial, seed)
        if not run.has("log.jsonl"):
            return []
        records = []
        for line in run.read("log.jsonl").decode(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # being written now, or cut off when the process died
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def curve(self, trial: Trial, seed: int, metric: str) -> list[tuple[float, float | None]]:
        """Return (epoch, metric) of each evaluation of a trial's training so far; in percent, None if it cannot be computed."""
        evaluations = [record for record in self.log(trial, seed) if isinstance(record.get("val"), dict)]
        points: list[tuple[Any, Any]] = [(record.get("epoch"), record["val"].get(metric)) for record in evaluations]
        return [(epoch, value) for epoch, value in points if _is_number(epoch) and (value is None or _is_number(value))]


class _File(Generic[Content]):
    """A JSON file whose content has a given type."""

    def __init__(self, content: type[Content]) -> None:
        self.content: TypeAdapter[Content] = TypeAdapter(content)

    def read(self, folder: Folder, name: str) -> Content:
        """Read the file's content. Raises JobError if it is missing or has another type."""
        try:
            return self.content.validate_json(folder.read(name), strict=True)
        except OSError as error:
            raise JobError(f"{folder.named(name)}: cannot be read ({error.strerror or error})") from error
        except ValidationError as error:
            first, *more = error.errors(include_url=False, include_input=False)
            where = dotted(first["loc"])
            others = f", and {len(more)} more" if more else ""
            raise JobError(f"{folder.named(name)}: {where + ': ' if where else ''}{first['msg']}{others}") from None


class _SearchContent(TypedDict):
    spec: dict[str, Any]
    job: dict[str, Any]


_SEARCH_FILE = _File(_SearchContent)
_TRIAL_FILE = _File(Trial)


def _check_fit(trial: Trial, search: Search) -> None:
    """Raise JobError if the trial cannot belong to the search."""
    unknown = [key for key in trial.values if key not in search.spec.space]
    if unknown:
        raise JobError([f"values.{key}: not searched" for key in unknown])
    if trial.state == "failed":  # perhaps because of its values, so do not check them
        return
    search.job(trial.values, "trial", search.base.run.storage, search.base.run.seed)
    if trial.state == "finished" and not trial.results:
        raise JobError("finished without results")
    cost = search.spec.objective.cost
    if trial.state == "finished" and (trial.ended is None or (cost is not None and cost not in trial.cost)):
        raise JobError(f"finished without {'an end' if trial.ended is None else f'cost.{cost}'}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
