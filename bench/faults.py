"""Faults, for real: processes and nodes killed under a training run on several nodes. ``FAULTS`` below is the list.

    python bench/faults.py run [FAULT ...] [--runs 3]    each fault so often, and once none; append to docs/faults.jsonl
    python bench/faults.py table                         write the table of docs/reliability.md anew

Each run is the command ``python -m headkd_ray.train`` on a Ray of a head, two trainer and two teacher nodes, all on this
machine: two train workers, whose teacher is asked in processes on the teacher nodes. At a step drawn from the run's number
something is killed with SIGKILL. A fault is survived if the run ends by itself (after the driver: if the same command, given
again, ends) with the weights of the undisturbed run, bit for bit, and with no actor or placement group left. ``run`` begins
nothing new after --minutes and then exits with code 3; the same command goes on where it stopped, and does not repeat what is
recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import yaml
from evidence_tables import append, insert, read
from machines import ENVIRONMENT, ROOT, Machines, kill, processes, steps_told

from headkd_ray.data.prepare import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.engine.run import finished, run_folder
from headkd_ray.errors import TrainingError
from headkd_ray.job import Job, load_job

RESULTS, DOCUMENT = ROOT / "docs/faults.jsonl", ROOT / "docs/reliability.md"
BEGIN, END = "<!-- faults: begin (python bench/faults.py table) -->", "<!-- faults: end -->"
UNDISTURBED = "none"
KEYS = """
    distill.rois=teacher distill.roi_budget=16 distill.warmup_steps=20 data.batch_size=4 optim.epochs=4 optim.milestones=[3]
    optim.warmup_steps=10 eval.every_epochs=1 log.every_steps=1 checkpoint.every_steps=5 teacher.placement=pool
    teacher.pool.cpus=0 'teacher.pool.resources={teacher: 1}' cluster.workers=2 cluster.cpus_per_worker=1.5
    cluster.data_cpus=0.5 cluster.threads_per_worker=1
"""
"""jobs/small/head.yaml, small enough to be killed often; a worker and its data tasks need a trainer node whole."""
IMAGES = 160
PATIENCE = 400.0
"""Seconds that a run may take."""
REPLACED_AFTER = 5.0
"""Seconds until another node is started for one that was killed."""

Record = dict[str, Any]


class Run:
    """One run of the command on the cluster, whose log a thread watches."""

    def __init__(self, machines: Machines, job: Job, scratch: Path) -> None:
        self.machines, self.folder = machines, run_folder(job)
        self.job_file, self.output = (scratch / f"{job.run.name}.{suffix}" for suffix in ("yaml", "txt"))
        self.job_file.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
        self.step = 0
        self.seen = [time.monotonic()]
        """When each step, from 0, was first in the log."""
        self.hit: int | None = None
        """The step at which something was killed."""
        self.back = 0
        """The step that training went back to then."""
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.start()
        self.watcher.start()

    def start(self) -> None:
        self.driver = self.machines.train(self.job_file, self.output)

    def _watch(self) -> None:
        while not self.over.wait(0.03):
            told = steps_told(self.folder)
            self.step = told[-1]["step"] if told else 0
            self.seen += [time.monotonic()] * (self.step + 1 - len(self.seen))
            self.back = min(self.back, self.step)

    def wait(self, what: Callable[[], bool]) -> None:
        """Wait until ``what()``. Raises TrainingError if the driver ends before, or it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            if self.driver.poll() is not None or time.monotonic() > deadline:
                told = self.output.read_text(encoding="utf-8").splitlines()[-1:]
                raise TrainingError(f"the run hung, or ended with code {self.driver.poll()}: {told}")
            time.sleep(0.01)

    def note_hit(self) -> None:
        self.hit = self.back = self.step

    def end(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.over.set()
        self.watcher.join()


Hit = Callable[[Run, Random], None]
"""Kills something of a run, and notes when."""


def one_of(*titles: str) -> Hit:
    """Kill one of the processes with such titles, as soon as there is one."""

    def hit(run: Run, random: Random) -> None:
        found: list[int] = []

        def there() -> bool:
            found.extend(pid for title in titles for pid in processes(title, os.getpid()))
            return bool(found)

        run.wait(there)
        run.note_hit()
        kill(random.choice(sorted(found)))

    return hit


def node(kind: str) -> Hit:
    """Kill a node of a kind; another one comes."""

    def hit(run: Run, random: Random) -> None:
        run.note_hit()
        run.machines.kill(random.choice(run.machines.nodes[kind]))
        time.sleep(REPLACED_AFTER)
        fill(run.machines)

    return hit


def the_driver(run: Run, random: Random) -> None:
    """Kill the command itself, and give it again."""
    run.note_hit()
    run.driver.kill()
    run.driver.wait()
    run.start()


FAULTS: dict[str, tuple[str, Hit]] = {
    "worker": ("a train worker", one_of("ray::RayTrainWorker", "ray::_RayTrainWorker")),
    "data": ("a process that decodes images", one_of("ray::Map(_Decode)", "ray::FlatMap(_Read)")),
    "teacher": ("a teacher process", one_of("ray::MapWorker")),
    "trainer-node": ("a node with a train worker and its data tasks", node("trainer")),
    "teacher-node": ("a node with a teacher process", node("teacher")),
    "driver": ("the driver; then the same command again", the_driver),
}


def fill(machines: Machines) -> None:
    """The nodes that the job needs."""
    machines.have("trainer", 2, cpus=2)
    machines.have("teacher", 2, teacher=1)


def trial(machines: Machines, job: Job, fault: str, number: int, scratch: Path) -> Record:
    """One run with a fault; its record."""
    random = Random(f"{fault}/{number}")
    folder = job.run.model_copy(update={"name": f"{fault}-{number}", "storage": str(scratch / "runs")})
    run = Run(machines, job.model_copy(update={"run": folder}), scratch)
    record: Record = {}
    try:
        if fault != UNDISTURBED:
            at = random.randrange(2, IMAGES // (2 * job.data.batch_size) * job.optim.epochs - 6)
            run.wait(lambda: run.step >= at)
            time.sleep(random.random())
            FAULTS[fault][1](run, random)
        run.wait(lambda: run.driver.poll() == 0)
    except TrainingError as error:
        record["error"] = str(error)
    run.end()
    if run.hit is not None:
        record |= {"hit": run.hit, "back": run.back}
    result = finished(run.folder)
    return {
        **record,
        "steps": result and result["last"]["step"],
        "weights": result and _digest((Path(result["student"]) / "model.safetensors").read_bytes()),
        "left": machines.left_over(),
        "seen": [round(when - run.seen[0], 2) for when in run.seen],
    }


def prepared(scratch: Path) -> Job:
    """The job, its data drawn and its teacher's weights random: what is learnt does not matter here."""
    import torch

    from headkd_ray.detectors import build_detector
    from headkd_ray.detectors.weights import save_detector

    drawn = draw_dataset(scratch / "drawn", train=IMAGES, val=32)
    places = {"data.train": scratch / "train", "data.val": scratch / "val", "teacher.checkpoint": scratch / "teacher"}
    for split, coco in (("train", drawn.train), ("val", drawn.val)):
        prepare_split(str(coco), str(drawn.images), str(places[f"data.{split}"]), shard_images=32)
    classes = ShardSet.open(str(places["data.train"])).meta.classes
    torch.manual_seed(0)
    teacher = build_detector(load_job(ROOT / "jobs/small/teacher.yaml").student, len(classes))
    save_detector(scratch / "teacher", teacher, classes)
    return load_job(ROOT / "jobs/small/head.yaml", [*shlex.split(KEYS), *(f"{key}={path}" for key, path in places.items())])


def run_faults(faults: Sequence[str], runs: int, minutes: float) -> bool:
    """Make the runs that are not recorded; False if the time was up before."""
    deadline = time.monotonic() + 60 * minutes
    made_with = {
        "job": _digest((ROOT / "jobs/small/head.yaml").read_bytes() + KEYS.encode()),
        **{package: version(package) for package in ("ray", "torch")},
    }
    known = {(record["fault"], record["run"]) for record in read(RESULTS) if made_with.items() <= record.items()}
    wanted = [(UNDISTURBED, 0), *((fault, number) for number in range(runs) for fault in faults)]
    wanted = [each for each in wanted if each not in known]
    if not wanted:
        return True
    with tempfile.TemporaryDirectory() as folder, Machines() as machines:
        job = prepared(Path(folder))
        fill(machines)
        for fault, number in wanted:
            if time.monotonic() > deadline:
                return False
            found = trial(machines, job, fault, number, Path(folder))
            record = {"fault": fault, "run": number, **found, **made_with, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
            print({key: value for key, value in record.items() if key != "seen"}, flush=True)
            append(RESULTS, record)
            fill(machines)
    return True


# --- the table ---


def section(records: Sequence[Record]) -> str:
    """One row a fault."""
    undisturbed = next((record for record in reversed(records) if record["fault"] == UNDISTURBED), None)
    if undisturbed is None:
        return "There are no figures yet: `python bench/faults.py run`."
    lines = ["| killed | tried | survived | steps repeated | seconds lost |", "| --- | ---: | ---: | ---: | ---: |"]
    for fault, (name, _) in FAULTS.items():
        own = {r["run"]: r for r in records if r["fault"] == fault and r["job"] == undisturbed["job"]}.values()
        if own:
            good = [record for record in own if survived(record, undisturbed)]
            repeated = [record["hit"] - record["back"] for record in good]
            lost = [seconds_lost(record, undisturbed) for record in good]
            lines.append(f"| {name} | {len(own)} | {len(good)} | {_spread(repeated)} | {_spread(lost)} |")
    versions = f"Ray {undisturbed['ray']}, torch {undisturbed['torch']}, {undisturbed['date']}"
    return "\n".join([*lines, "", f"Median (least–greatest). {versions}."])


def survived(record: Record, undisturbed: Record) -> bool:
    same = all(record[key] == undisturbed[key] for key in ("steps", "weights"))
    return same and not record["left"] and "error" not in record


def seconds_lost(record: Record, undisturbed: Record) -> float:
    """From the step at which it was hit to the second one after it, less the time that the undisturbed run took for them."""
    hit = record["hit"]
    took, would_have_taken = (each["seen"][hit + 2] - each["seen"][hit] for each in (record, undisturbed))
    return max(0.0, took - would_have_taken)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})" if values else "–"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:10]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; default: all")
    running.add_argument("--runs", type=int, default=3, help="of each fault (default: %(default)s)")
    running.add_argument("--minutes", type=float, default=9, help="begin nothing new after so long (default: %(default)s)")
    commands.add_parser("table")
    options = parser.parse_args(arguments)
    if options.command == "table":
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(insert(text, section(read(RESULTS)), BEGIN, END), encoding="utf-8")
        return 0
    unknown = set(options.faults) - FAULTS.keys()
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    os.environ.update(ENVIRONMENT)
    return 0 if run_faults(options.faults or list(FAULTS), options.runs, options.minutes) else 3


if __name__ == "__main__":
    sys.exit(main())
