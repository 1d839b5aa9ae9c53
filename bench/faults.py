"""Kill processes and nodes under a real training run on several nodes. ``FAULTS`` below is the list of faults.

    python bench/faults.py run [FAULT ...] [--seeds 0 1 2]    one run per seed with all these faults; into docs/faults.jsonl
    python bench/faults.py run --kills 100                    runs with new seeds, until so many faults are in the file
    python bench/faults.py table                              rewrite the table of docs/reliability.md

A run is the command ``python -m headkd_ray.train`` on a Ray cluster of a head, a trainer node and two teacher nodes, all on
this machine; the teacher runs in a process on a teacher node and is used in every step. One fault after another strikes with
SIGKILL, in an order, at steps and after delays that are drawn from the seed. A run has survived if it ends by itself (after the
driver's death: if the same command, started again, ends), leaves no actor or placement group, and ends with the weights of a
run in this process, without Ray, bit for bit.
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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from evidence_tables import append, insert, read
from machines import ENVIRONMENT, ROOT, Machines, kill, logged_steps, processes, wait_for
from revision import revision

from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.engine.run import finished, run_folder
from headkd_ray.job import Job, load_job
from headkd_ray.train import train

RESULTS, DOCUMENT = ROOT / "docs/faults.jsonl", ROOT / "docs/reliability.md"
BEGIN, END = "<!-- faults: begin (python bench/faults.py table) -->", "<!-- faults: end -->"
KEYS = """
    distill.warmup_steps=20 data.batch_size=4 optim.epochs=6 optim.milestones=[5] optim.warmup_steps=10 eval.every_epochs=1
    log.every_steps=1 checkpoint.every_steps=5 cluster.max_failures=9 cluster.threads_per_worker=1
"""
"""Overrides that make jobs/small/head.yaml small enough to be killed often."""
HERE = "cluster.workers=0"
THERE = "teacher.placement=pool teacher.pool.cpus=0 'teacher.pool.resources={teacher: 1}'"
IMAGES = 80
STEPS = 20
"""Steps per epoch."""
PATIENCE = 600.0
"""Longest wait for anything, in seconds."""
REPLACED_AFTER = 5.0
"""Seconds until a killed node is replaced."""

Record = dict[str, Any]


class Run:
    """One run of the command on the cluster. A thread follows its log."""

    def __init__(self, machines: Machines, job: Job, scratch: Path) -> None:
        self.machines, self.folder = machines, run_folder(job)
        self.job_file, self.output = (scratch / f"{job.run.name}.{suffix}" for suffix in ("yaml", "txt"))
        self.job_file.write_text(yaml.safe_dump(job.model_dump(mode="json")), encoding="utf-8")
        self.step = 0
        self.seen = [time.monotonic()]
        """Times at which each step, from 0, first appeared in the log (``time.monotonic()``)."""
        self.hits: list[Record] = []
        """What was killed, at which step, and the step that training went back to."""
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.start()
        self.watcher.start()

    def start(self) -> None:
        self.driver = self.machines.train(self.job_file, self.output)

    def _watch(self) -> None:
        while not self.over.wait(0.03):
            records = logged_steps(self.folder)
            self.step = records[-1]["step"] if records else 0
            self.seen += [time.monotonic()] * (self.step + 1 - len(self.seen))
            for hit in self.hits[-1:]:
                hit["back"] = min(hit["back"], self.step)

    def wait(self, what: Callable[[], bool]) -> None:
        """Wait until ``what()`` is true. Raises RuntimeError if the driver ends first or it takes too long."""
        wait_for(what, self.driver, PATIENCE)

    def note_hit(self, fault: str) -> None:
        self.hits.append({"fault": fault, "step": self.step, "back": self.step})

    def end(self) -> None:
        self.driver.kill()
        self.driver.wait()
        self.over.set()
        self.watcher.join()


Fault = Callable[[Run, Random], Callable[[], None]]
"""A function that waits until there is something to kill, and returns the function that kills it."""


def process(*titles: str) -> Fault:
    """Return the fault that kills a process with one of these titles."""

    def find(run: Run, random: Random) -> Callable[[], None]:
        found: list[int] = []

        def there() -> bool:
            found.extend(pid for title in titles for pid in processes(title))
            return bool(found)

        run.wait(there)
        return partial(kill, random.choice(sorted(found)))

    return find


def node(kind: str, title: str) -> Fault:
    """Return the fault that kills a node of a kind on which a process with this title runs. Another node replaces it."""

    def find(run: Run, random: Random) -> Callable[[], None]:
        run.wait(lambda: bool(run.machines.hosts(title, kind)))
        victim = random.choice(run.machines.hosts(title, kind))

        def hit() -> None:
            run.machines.kill(victim)
            time.sleep(REPLACED_AFTER)
            fill(run.machines)

        return hit

    return find


def the_driver(run: Run, random: Random) -> Callable[[], None]:
    """The fault that kills the command itself and then starts it again."""

    def hit() -> None:
        run.driver.kill()
        run.driver.wait()
        run.start()

    return hit


WORKER, TEACHER = "ray::RayTrainWorker", "ray::TeacherActor"
FAULTS: dict[str, tuple[str, Fault]] = {
    "worker": ("a train worker", process(WORKER)),
    "data": ("a process that reads or decodes images", process("ray::Map(DecodeChunk)", "ray::FlatMap(ReadWindow)")),
    "teacher": ("a teacher process", process(TEACHER)),
    "trainer-node": ("the node of a train worker and its data tasks", node("trainer", WORKER)),
    "teacher-node": ("the node of a teacher process", node("teacher", TEACHER)),
    "controller": ("Ray Train's controller", process("ray::TrainController")),
    "driver": ("the driver; then the same command again", the_driver),
}


def fill(machines: Machines) -> None:
    """Start the nodes that the job needs, and one spare teacher node."""
    machines.have("trainer", 1, cpus=2)
    machines.have("teacher", 2, teacher=1)


def trial(machines: Machines, job: Job, faults: Sequence[str], seed: int, scratch: Path) -> Record:
    """Run the job once while all the faults happen, and return the record."""
    random = Random(f"{seed}: {' '.join(faults)}")
    fill(machines)
    run = Run(machines, job, scratch)
    record: Record = {}
    section = (STEPS * job.optim.epochs - 4) // len(faults)
    try:
        for number, fault in enumerate(random.sample(faults, len(faults))):
            at = number * section + random.randrange(1, section)
            run.wait(lambda at=at: run.step >= at)  # type: ignore[misc]
            time.sleep(random.random())
            hit = FAULTS[fault][1](run, random)
            run.note_hit(fault)
            hit()
        run.wait(lambda: run.driver.poll() == 0)
    except RuntimeError as error:
        last_line = run.output.read_text(encoding="utf-8").splitlines()[-1:]
        record["error"] = f"{error}: {last_line}"
    run.end()
    return {
        **record,
        "hits": [{**hit, "seconds": seconds_lost(run.seen, hit["step"])} for hit in run.hits],
        "left": machines.left_over(),
        **outcome(finished(run.folder)),
    }


def outcome(result: Record | None) -> Record:
    """Return the last step of a run and a digest of its weights."""
    if result is None:
        return {"steps": None, "weights": None}
    weights = (Path(result["student"]) / "model.safetensors").read_bytes()
    return {"steps": result["last"]["step"], "weights": _digest(weights)}


def seconds_lost(seen: Sequence[float], step: int) -> float | None:
    """Return the seconds from ``step`` to the second step after it, minus the least that these took in another epoch."""
    others = [other for other in range(step % STEPS, len(seen) - 2, STEPS) if other not in (0, step)]
    if step + 2 >= len(seen) or not others:
        return None
    took, *calm = (seen[first + 2] - seen[first] for first in (step, *others))
    return round(max(0.0, took - min(calm)), 1)


def prepared(scratch: Path, keys: str) -> Job:
    """Return the job with drawn data and a random teacher; what is learnt does not matter here."""
    drawn = draw_dataset(scratch / "drawn", train=IMAGES, val=32)
    places = {"data.train": scratch / "train", "data.val": scratch / "val", "teacher.checkpoint": scratch / "teacher"}
    for split, coco in (("train", drawn.train), ("val", drawn.val)):
        prepare_split(str(coco), str(drawn.images), str(places[f"data.{split}"]), shard_images=32)
    classes = ShardSet.open(str(places["data.train"])).meta.classes
    torch.manual_seed(0)
    teacher = build_detector(load_job(ROOT / "jobs/small/teacher.yaml").student, len(classes))
    save_detector(scratch / "teacher", teacher, classes)
    own = [f"run.storage={scratch / 'runs'}", *(f"{key}={path}" for key, path in places.items())]
    return load_job(ROOT / "jobs/small/head.yaml", [*shlex.split(KEYS), *shlex.split(keys), *own])


def seeds_until(kills: int, records: Sequence[Record], faults: Sequence[str]) -> range:
    """Return new seeds, of as many runs as it takes until the file has that many faults."""
    first = max((record["seed"] for record in records), default=-1) + 1
    missing = kills - sum(len(record["hits"]) for record in records)
    return range(first, first + max(0, -(-missing // len(faults))))


def run_faults(faults: Sequence[str], seeds: Sequence[int]) -> None:
    """Run the faults once per seed and append the records to the results."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        calm, disturbed = (prepared(scratch, keys) for keys in (HERE, THERE))
        torch.set_num_threads(1)
        expected = outcome(train(calm, lambda record: None))
        with Machines() as machines:
            for seed in seeds:
                found = trial(machines, disturbed.replace({"run.name": f"faults-{seed}"}), faults, seed, scratch)
                same = all(found.pop(key) == value for key, value in expected.items())
                record = {
                    "seed": seed,
                    "faults": list(faults),
                    **found,
                    "same": same,
                    **{package: version(package) for package in ("ray", "torch")},
                    "revision": revision(),
                    "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
                }
                print(record, flush=True)
                append(RESULTS, record)


# --- the table ---


def section(records: Sequence[Record]) -> str:
    """Return the table, one row per fault."""
    if not records:
        return "There are no figures yet: `python bench/faults.py run`."
    lines = ["| killed | times | survived | steps repeated | seconds lost |", "| --- | ---: | ---: | ---: | ---: |"]
    for fault, (name, _) in FAULTS.items():
        hits = [(hit, survived(record)) for record in records for hit in record["hits"] if hit["fault"] == fault]
        if hits:
            good = [hit for hit, through in hits if through]
            repeated = [hit["step"] - hit["back"] for hit in good]
            lost = [hit["seconds"] for hit in good if hit["seconds"] is not None]
            lines.append(f"| {name} | {len(hits)} | {len(good)} | {_spread(repeated)} | {_spread(lost)} |")
    made = ", ".join(dict.fromkeys(f"Ray {r['ray']}, torch {r['torch']}, {r['date']}" for r in records))
    runs = f"{sum(map(survived, records))} of {len(records)} runs survived"
    return "\n".join([*lines, "", f"{runs}; median (least to greatest). {made}."])


def survived(record: Record) -> bool:
    return record["same"] and not record["left"] and "error" not in record


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})" if values else "–"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:10]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("faults", nargs="*", metavar="FAULT", help=f"one or more of {', '.join(FAULTS)}; default: all")
    amount = running.add_mutually_exclusive_group()
    amount.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run per seed (default: %(default)s)")
    amount.add_argument("--kills", type=int, metavar="N", help="add runs with new seeds until the file has N faults")
    commands.add_parser("table")
    options = parser.parse_args(arguments)
    if options.command == "table":
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(insert(text, section(read(RESULTS)), BEGIN, END), encoding="utf-8")
        return 0
    unknown = set(options.faults) - FAULTS.keys()
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; the faults are {', '.join(FAULTS)}")
    os.environ.update(ENVIRONMENT)
    faults, seeds = options.faults or list(FAULTS), options.seeds
    run_faults(faults, seeds if options.kills is None else seeds_until(options.kills, read(RESULTS), faults))
    return 0


if __name__ == "__main__":
    sys.exit(main())
