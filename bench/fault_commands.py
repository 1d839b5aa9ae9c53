"""The commands that bench/faults.py disturbs: how each is started, how far it is, and what it must end with."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from machines import ROOT, Machines, logged_steps

from headkd_ray import cache
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.engine.local import train_here
from headkd_ray.engine.run import finished, run_folder
from headkd_ray.job import Job, load_job
from headkd_ray.storage import Folder
from headkd_ray.train import train
from headkd_ray.tuning.search_file import load_search
from headkd_ray.tuning.study import propose
from headkd_ray.tuning.trial_records import SearchFolder, Trial

Record = dict[str, Any]
IMAGES, SHARD_IMAGES = 80, 16
SMALL = """
    data.batch_size=4 optim.warmup_steps=10 eval.every_epochs=2 log.every_steps=1 log.report=false checkpoint.every_steps=5
    cluster.threads_per_worker=1 cluster.max_failures=9
"""
"""Overrides that make the jobs of jobs/small small enough to be killed often."""
STEP = re.compile(r"  step (\d+)/.* images/s ")
"""A training step in what ``headkd_ray.train`` prints."""


@dataclass(frozen=True)
class Inputs:
    """What all the commands read: prepared splits of drawn images, and a teacher with random weights."""

    folder: Path
    s3: str
    """host:port of an S3 server with a bucket "bucket"."""

    def prepare(self) -> None:
        """Make them; what is learnt does not matter here."""
        drawn = draw_dataset(self.folder / "drawn", train=IMAGES, val=8)
        for split, coco in (("train", drawn.train), ("val", drawn.val)):
            prepare_split(str(coco), str(drawn.images), str(self.folder / split), shard_images=SHARD_IMAGES)
        classes = ShardSet.open(str(self.folder / "train")).meta.classes
        torch.manual_seed(0)
        save_detector(
            self.folder / "teacher", build_detector(load_job(ROOT / "jobs/small/teacher.yaml").student, len(classes)), classes
        )

    def job(self, file: str, name: str, keys: str = "") -> Job:
        """Return a job of jobs/small on these inputs."""
        own = [f"run.name={name}", f"run.storage={self.folder / 'runs'}"]
        own += [f"data.{split}={self.folder / split}" for split in ("train", "val")]
        teacher = [f"teacher.checkpoint={self.folder / 'teacher'}"] if file == "head.yaml" else []
        return load_job(ROOT / "jobs/small" / file, [*shlex.split(SMALL), *own, *teacher, *shlex.split(keys)])

    def write(self, name: str, content: Any) -> str:
        """Write a job or search file, and return its path."""
        file = self.folder / f"{name}.yaml"
        content = content.model_dump(mode="json") if isinstance(content, Job) else content
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(file)


class Command(ABC):
    """A command that runs on a cluster, and may be started again while it has not ended."""

    title: ClassVar[str]
    nodes: ClassVar[dict[str, int]]
    """How many nodes of each of ``faults.NODES`` there are for it."""
    total: ClassVar[int]
    """Number of its steps."""
    period: ClassVar[int]
    """Number of steps after which the same work comes again."""

    def __init__(self, inputs: Inputs, name: str) -> None:
        self.inputs, self.name = inputs, name
        self.output = inputs.folder / f"{name}.txt"
        """What it prints, every time that it is started."""

    @classmethod
    @abstractmethod
    def expected(cls, inputs: Inputs) -> Record:
        """Return what it ends with if nothing disturbs it, computed in this process without Ray."""

    @abstractmethod
    def arguments(self, again: bool) -> Sequence[str]:
        """Return the module and its arguments; ``again``: it was started before."""

    @abstractmethod
    def positions(self) -> Iterator[int]:
        """Yield the numbers of steps done that are news since the last call; after a restart they fall."""

    @abstractmethod
    def ended(self) -> Record:
        """Return what it has ended with."""

    @staticmethod
    def equals(found: Record, expected: Record) -> bool:
        return found == expected

    def start(self, machines: Machines, again: bool = False) -> subprocess.Popen[bytes]:
        return machines.start(self.arguments(again), self.output)


class Training(Command):
    """A distillation whose teacher runs in a process on a node of its own and is used in every step."""

    title = "training"
    nodes: ClassVar = {"trainer": 1, "teacher": 2}
    total, period = 80, 20
    FILE = "head.yaml"
    KEYS = "distill.warmup_steps=20 optim.epochs=4 optim.milestones=[3]"
    THERE = "teacher.placement=pool teacher.pool.cpus=0 'teacher.pool.resources={teacher: 1}'"

    def __init__(self, inputs: Inputs, name: str) -> None:
        super().__init__(inputs, name)
        self.job = self.job_of(inputs, name)
        self.file = inputs.write(name, self.job)
        self.read = 0

    def job_of(self, inputs: Inputs, name: str) -> Job:
        return inputs.job(self.FILE, name, f"{self.KEYS} {self.THERE}")

    @classmethod
    def expected(cls, inputs: Inputs) -> Record:
        job = inputs.job(cls.FILE, f"expected-{cls.__name__}", f"{cls.KEYS} cluster.workers=0")
        return student_of(train(job, lambda record: None))

    def arguments(self, again: bool) -> Sequence[str]:
        return ["headkd_ray.train", self.file]

    def positions(self) -> Iterator[int]:
        """Yield from what it prints, for a log on S3 is written now and then."""
        if not self.output.exists():
            return
        with self.output.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if line.endswith(b"\n"):
                    self.read += len(line)
                    if step := STEP.search(line.decode()):
                        yield from (int(step[1]) - 1, int(step[1]))

    def ended(self) -> Record:
        return student_of(finished(run_folder(self.job)))


class TrainingOnS3(Training):
    """A training without a teacher whose run is on S3: all that is needed to go on comes from there."""

    title = "training, its run on S3"
    nodes: ClassVar = {"trainer": 1, "teacher": 0}
    FILE, THERE = "baseline.yaml", ""
    KEYS = "optim.epochs=4 optim.milestones=[3]"

    def job_of(self, inputs: Inputs, name: str) -> Job:
        from tests.s3 import uri

        return super().job_of(inputs, name).replace({"run.storage": uri("bucket", inputs.s3, "runs")})


class ElasticTraining(Training):
    """A training with one or two workers, each on a node of its own."""

    title = "training with 1 to 2 workers"
    nodes: ClassVar = {"trainer": 2, "teacher": 0}
    total, period = 80, 10
    FILE = "baseline.yaml"
    KEYS = "optim.epochs=8 optim.milestones=[6] optim.optimizer=sgd optim.lr=0.01"
    THERE = "cluster.workers=[1,2] cluster.cpus_per_worker=1.5 cluster.data_cpus=0.5 cluster.resize_seconds=2"

    @classmethod
    def expected(cls, inputs: Inputs) -> Record:
        """One process does the work of both workers in turn."""
        job = inputs.job(cls.FILE, "expected-elastic", f"{cls.KEYS} cluster.workers=2")
        return cls._ended(job, train_here(job, lambda record: None))

    def ended(self) -> Record:
        return self._ended(self.job, finished(run_folder(self.job)))

    @staticmethod
    def _ended(job: Job, result: Record | None) -> Record:
        losses = [[record["step"], record["losses"]["total"]] for record in logged_steps(run_folder(job))]
        return {**student_of(result), "losses": losses}

    @staticmethod
    def equals(found: Record, expected: Record) -> bool:
        """The steps are the same, each once, and so are their losses but for the order of additions."""
        steps, theirs = ([step for step, _ in each["losses"]] for each in (found, expected))
        pairs = zip(found["losses"], expected["losses"], strict=False)
        return steps == theirs and all(abs(one - other) <= 0.01 * other for (_, one), (_, other) in pairs)

    def workers(self) -> int:
        """Return with how many workers the last step was made."""
        records = logged_steps(run_folder(self.job))
        return records[-1]["workers"] if records else 0


class CacheBuild(Command):
    """A build of a cache of soft targets by two processes."""

    title = "cache build"
    nodes: ClassVar = {"trainer": 0, "teacher": 3}
    VIEWS = 8
    total = VIEWS * IMAGES // SHARD_IMAGES
    period = 1

    def __init__(self, inputs: Inputs, name: str) -> None:
        super().__init__(inputs, name)
        self.cache = inputs.folder / name
        there = "teacher.pool.cpus=0 teacher.pool.actors=[2,2] 'teacher.pool.resources={teacher: 1}'"
        self.file = inputs.write(f"{name}-job", self.job_of(inputs, self.cache, there))

    @classmethod
    def job_of(cls, inputs: Inputs, path: Path, keys: str) -> Job:
        views = f"data.views={cls.VIEWS} optim.epochs={cls.VIEWS} optim.milestones=[7]"
        own = f"distill.rois=teacher teacher.placement=cache teacher.cache.path={path} {views}"
        return inputs.job("head.yaml", path.name, f"{own} {keys}")

    @classmethod
    def expected(cls, inputs: Inputs) -> Record:
        path = inputs.folder / "expected-cache"
        code = cache.main(["build", inputs.write("expected-cache-job", cls.job_of(inputs, path, "cluster.workers=0"))])
        assert code == 0
        return files_of(path)

    def arguments(self, again: bool) -> Sequence[str]:
        return ["headkd_ray.cache", "build", self.file]

    def positions(self) -> Iterator[int]:
        yield sum(name.endswith(".parquet") for name in os.listdir(self.cache)) if self.cache.exists() else 0

    def ended(self) -> Record:
        return files_of(self.cache)


class Search(Command):
    """A search whose trials train with Ray Train, one after the other."""

    title = "search"
    nodes: ClassVar = {"trainer": 1, "teacher": 0}
    TRIALS = 3
    period = 40
    total = TRIALS * period

    def __init__(self, inputs: Inputs, name: str) -> None:
        super().__init__(inputs, name)
        job = inputs.job("baseline.yaml", f"{name}-base", "optim.epochs=2 optim.milestones=[1]")
        search = {
            "run": {"name": name, "storage": str(inputs.folder / "runs")},
            "job": inputs.write(f"{name}-base", job),
            "space": {"optim.lr": {"choice": [job.optim.lr / (1 + trial) for trial in range(self.TRIALS)]}},
            "searcher": {"kind": "grid"},
            "budget": {"max_concurrent": 1, "max_failures": 9},
        }
        self.file = inputs.write(name, search)
        self.folder = SearchFolder.open(str(inputs.folder / "runs" / name))

    @classmethod
    def expected(cls, inputs: Inputs) -> Record:
        search, trials = load_search(cls(inputs, "expected-search").file, []), list[Trial]()
        runs, ended = str(inputs.folder / "runs"), {}
        while (values := propose(search, trials)) is not None:
            job = search.job(values, f"expected-trial-{len(trials)}", runs, search.seeds[0])
            ended[str(len(trials))] = ["finished", student_of(train(job.replace({"cluster.workers": 0}), lambda record: None))]
            trials.append(Trial(len(trials), values))
        return ended

    def arguments(self, again: bool) -> Sequence[str]:
        return ["headkd_ray.tune", self.file, *(["--resume"] if again else [])]

    def positions(self) -> Iterator[int]:
        logs = Path(self.folder.runs.path).glob("*/log.jsonl")
        yield sum(line.endswith(b"\n") and b'"losses"' in line for log in logs for line in log.read_bytes().splitlines(True))

    def ended(self) -> Record:
        """Return the state of each trial, and what its training ended with."""
        ended = {}
        for trial in self.folder.trials():
            result = finished(self.folder.runs / self.folder.run_name(trial, 0))
            ended[str(trial.number)] = [trial.state, student_of(result)]
        return ended


COMMANDS: dict[str, type[Command]] = {
    "training": Training,
    "s3": TrainingOnS3,
    "elastic": ElasticTraining,
    "cache": CacheBuild,
    "search": Search,
}


def student_of(result: Record | None) -> Record:
    """Return the last step of a run and a digest of its weights."""
    if result is None:
        return {"steps": None, "weights": None}
    weights = Folder.open(result["student"]).read("model.safetensors")
    return {"steps": result["last"]["step"], "weights": _digest(weights)}


def files_of(folder: Path) -> Record:
    """Return a digest of each file's content."""
    return {path.name: _digest(path.read_bytes()) for path in sorted(folder.iterdir())}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:10]
