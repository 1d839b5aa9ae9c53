"""Measure what Ray and the driver cost a step of training, and a trial of a search.

    python bench/scale_ray.py steps [--workers 1 2 4 8]    a training, with a worker on each of so many nodes
    python bench/scale_ray.py trials [--trials 300]        a search of so many tiny trials, and its analysis
    python bench/scale_ray.py table                        rewrite the tables of docs/scale.md

The first two append to docs/scale_ray.jsonl.

The nodes are all on this machine, so what counts is CPU seconds of each process, from /proc, and not how long a step takes. The
step itself is as small as it can be.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from evidence_tables import append, insert, read
from machines import ENVIRONMENT, ROOT, Machines, logged_steps, wait_for
from revision import revision

from headkd_ray.data.packing import prepare_split
from headkd_ray.data.synthetic import draw_dataset
from headkd_ray.engine.run import run_folder
from headkd_ray.job import Job, load_job
from headkd_ray.tuning.search_file import load_search
from headkd_ray.tuning.study import propose
from headkd_ray.tuning.trial_records import SearchFolder

RESULTS, DOCUMENT = ROOT / "docs/scale_ray.jsonl", ROOT / "docs/scale.md"
BEGIN, END = "<!-- ray: begin (python bench/scale_ray.py table) -->", "<!-- ray: end -->"
IMAGES = 64
KEYS = """
    data.batch_size=2 data.short_side=[64,64] data.long_side=96 data.eval_short_side=64 data.pad=16
    'student.backbone.kwargs={stem_width: 4, channels: [8, 8, 16, 16]}' student.neck.channels=8
    student.head.channels=8 student.head.convs=1 optim.warmup_steps=0 log.report=false cluster.threads_per_worker=1
"""
"""Overrides that make the step of jobs/small/baseline.yaml trivial."""
WARM, STEPS, LOGGED = 50, 200, 10
"""Steps before those that count, steps that count, and steps for each record of the log."""
PROPOSALS = (50, 100, 200, 299)
"""Numbers of trials after which a proposal is timed."""
GROUPS = {
    "driver": ("headkd_ray.train",),
    "Ray Train's controller": ("ray::TrainController",),
    "actors for the log and for stopping": ("_QueueActor", "StopSign"),
    "train workers": ("RayTrainWorker",),
    "data tasks": ("ray::IDLE", "ray::Map", "ray::FlatMap"),
    "raylets": ("/raylet ",),
    "the head's GCS": ("gcs_server ",),
    "dashboard and agents": ("dashboard", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "log_monitor", "monitor.py"),
}
"""Group -> what the command line of one of its processes contains."""
OTHER = "other actors of Ray's"

Record = dict[str, Any]


def group_of(command_line: str) -> str:
    """Return the group of a process below this one."""
    return next((group for group, marks in GROUPS.items() if any(mark in command_line for mark in marks)), OTHER)


class CpuTimes:
    """CPU seconds of all processes below this one, by group."""

    def __init__(self) -> None:
        self.before = self._now()

    def spent(self) -> Record:
        """Return the seconds since the start, of processes that still exist."""
        spent: dict[str, float] = {}
        for pid, (named_now, seconds) in self._now().items():
            group, before = self.before.get(pid, (named_now, 0.0))
            spent[group] = spent.get(group, 0.0) + seconds - before
        return {group: round(seconds, 3) for group, seconds in spent.items()}

    @staticmethod
    def _now() -> dict[int, tuple[str, float]]:
        import psutil  # a dependency of Ray

        found = {}
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                found[process.pid] = group_of(" ".join(process.cmdline())), times.user + times.system
            except psutil.Error:  # it has ended in the meantime
                continue
        return found


def stores(machines: Machines) -> tuple[int, int]:
    """Return the bytes that were ever put into the object stores of all nodes, and those that are in them now."""
    from ray._private.internal_api import node_stats

    nodes = [machines.cluster.head_node, *(node for nodes in machines.nodes.values() for node in nodes)]
    found = [node_stats(node.node_ip_address, node.node_manager_port, False).store_stats for node in nodes]
    return sum(store.cumulative_created_bytes for store in found), sum(store.object_store_bytes_used for store in found)


def step_costs(workers: int, folder: Path) -> Record:
    """Train with ``workers`` workers on as many nodes, and return what ``STEPS`` steps cost."""
    on_ray = f"cluster.workers={workers} cluster.cpus_per_worker=1 cluster.data_cpus=1"
    job = _job(folder, f"steps-{workers}", f"{on_ray} optim.epochs=9999 eval.every_epochs=9999 log.every_steps={LOGGED}")
    file, run = folder / f"steps-{workers}.yaml", run_folder(job)
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))

    def step() -> int:
        return max((record["step"] for record in logged_steps(run)), default=0)

    with Machines() as machines:
        machines.have("trainer", workers, cpus=2)
        driver = machines.train(file, folder / f"steps-{workers}.txt")
        wait_for(lambda: step() >= WARM, driver)
        first, started, cpu, (created, most) = step(), time.monotonic(), CpuTimes(), stores(machines)
        while step() < first + STEPS:
            most = max(most, stores(machines)[1])
            time.sleep(1)
        steps, seconds, spent, (later, _) = step() - first, time.monotonic() - started, cpu.spent(), stores(machines)
        driver.send_signal(signal.SIGTERM)
        driver.wait()
    put = {"created_bytes": later - created, "most_bytes": most}
    return {"part": "steps", "workers": workers, "steps": steps, "seconds": round(seconds, 1), "cpu": spent, **put}


def trial_costs(trials: int, folder: Path) -> Record:
    """Run a search of ``trials`` trials one after the other, and analyse it."""
    job = _job(folder, "base", "cluster.workers=0 optim.epochs=1 optim.milestones=[] data.batch_size=16 eval.every_epochs=1")
    (folder / "base.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    space = {
        "optim.lr": {"loguniform": [1e-4, 1e-1]},
        "optim.weight_decay": {"loguniform": [1e-6, 1e-2]},
        "optim.warmup_steps": {"randint": [0, 3]},
        "data.flip": {"choice": [0, 0.5]},
    }
    search = {"run": {"name": "search", "storage": str(folder)}, "job": str(folder / "base.yaml"), "space": space}
    search |= {"searcher": {"kind": "tpe", "startup_trials": 10}, "budget": {"trials": trials}}
    file, found = folder / "search.yaml", folder / "search"
    file.write_text(yaml.safe_dump(search))
    with Machines() as machines:
        machines.have("trainer", 1, cpus=1)
        started = time.monotonic()
        driver = _measured(machines.start(["headkd_ray.tune", str(file)], folder / "search.txt"))
        minutes = (time.monotonic() - started) / 60
    analysis = _measured(subprocess.Popen([sys.executable, "-m", "headkd_ray.analyze", str(found)], stdout=subprocess.DEVNULL))
    ended = SearchFolder.open(str(found)).trials()
    states = Counter(trial.state for trial in ended)
    proposals = {}
    for count in [count for count in PROPOSALS if count < len(ended)]:
        before = time.process_time()
        propose(load_search(file, []), ended[:count])
        proposals[str(count)] = round(time.process_time() - before, 3)
    page = (found / "analysis/index.html").stat().st_size
    about = {"part": "trials", "trials": trials, "states": dict(states), "minutes": round(minutes, 1)}
    return {**about, "driver": driver, "proposals": proposals, "analysis": analysis, "page_bytes": page}


def _measured(process: subprocess.Popen[bytes]) -> Record:
    """Wait for a process, and return its CPU seconds and its peak memory. Raises RuntimeError if it fails."""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{process.args!r} failed ({os.waitstatus_to_exitcode(status)})")
    return {"seconds": round(usage.ru_utime + usage.ru_stime, 1), "peak_mb": round(usage.ru_maxrss / 2**10)}


def _job(folder: Path, name: str, keys: str) -> Job:
    """Return a job on drawn images, which are made unless they are there."""
    splits = {split: folder / split for split in ("train", "val")}
    if not splits["val"].exists():
        drawn = draw_dataset(folder / "drawn", train=IMAGES, val=8)
        for split, coco in (("train", drawn.train), ("val", drawn.val)):
            prepare_split(str(coco), str(drawn.images), str(splits[split]), shard_images=16)
    own = [f"data.{split}={path}" for split, path in splits.items()]
    return load_job(
        ROOT / "jobs/small/baseline.yaml",
        [*shlex.split(KEYS), *keys.split(), *own, f"run.name={name}", f"run.storage={folder}"],
    )


# --- the tables ---


def section(records: Sequence[Record]) -> str:
    """Return both tables, from the last record of each number of workers and of trials."""
    steps = {r["workers"]: r for r in records if r["part"] == "steps"}
    trials = {r["trials"]: r for r in records if r["part"] == "trials"}
    parts = [_steps_table([steps[workers] for workers in sorted(steps)])] if steps else []
    parts += [_trials_table([trials[count] for count in sorted(trials)])] if trials else []
    shown = [*steps.values(), *trials.values()]
    made = "; ".join(
        f"{title} {', '.join(dict.fromkeys(record[key] for record in shown))}"
        for title, key in {"Ray": "ray", "made on": "date", "with revision": "revision"}.items()
    )
    return "\n\n".join([*parts, f"{made}."]) if parts else "There are no figures yet: `python bench/scale_ray.py steps`."


def _steps_table(records: Sequence[Record]) -> str:
    heads = [f"{r['workers']} worker{'s' * (r['workers'] > 1)}" for r in records]
    lines = [_row("CPU ms a step (% of a core)", heads), f"| --- |{' ---: |' * len(records)}"]
    for group in [*GROUPS, OTHER]:
        spent = [(r["cpu"].get(group, 0.0), r) for r in records]
        lines.append(_row(group, [f"{1e3 * cpu / r['steps']:.1f} ({cpu / r['seconds']:.1%})" for cpu, r in spent]))
    others: dict[str, Callable[[Record], str]] = {
        "put into the object stores a step": lambda r: f"{r['created_bytes'] / r['steps'] / 1e3:.0f} kB",
        "most in the object stores": lambda r: f"{r['most_bytes'] / 1e6:.1f} MB",
        "steps a second, all on one core": lambda r: f"{r['steps'] / r['seconds']:.1f}",
    }
    lines += [_row(title, [cell(r) for r in records]) for title, cell in others.items()]
    return "\n".join(lines)


def _trials_table(records: Sequence[Record]) -> str:
    rows: dict[str, Callable[[Record], str]] = {
        "the driver in all: CPU s": lambda r: f"{r['driver']['seconds']:.0f}",
        "the driver a trial: CPU s": lambda r: f"{r['driver']['seconds'] / r['trials']:.2f}",
        "the driver: peak MB": lambda r: f"{r['driver']['peak_mb']:,}",
        "a proposal after so many trials: CPU s": lambda r: ", ".join(f"{n}: {s:.2f}" for n, s in r["proposals"].items()),
        "`analyze`: CPU s": lambda r: f"{r['analysis']['seconds']:.0f}",
        "`analyze`: peak MB": lambda r: f"{r['analysis']['peak_mb']:,}",
        "its page: MB": lambda r: f"{r['page_bytes'] / 1e6:.2f}",
        "finished": lambda r: f"{r['states'].get('finished', 0)}",
        "minutes in all": lambda r: f"{r['minutes']:.0f}",
    }
    lines = [_row("search", [f"{r['trials']} trials" for r in records]), f"| --- |{' ---: |' * len(records)}"]
    return "\n".join([*lines, *(_row(title, [cell(r) for r in records]) for title, cell in rows.items())])


def _row(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    steps = commands.add_parser("steps")
    steps.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8])
    trials = commands.add_parser("trials")
    trials.add_argument("--trials", type=int, default=300)
    commands.add_parser("table")
    options = parser.parse_args(arguments)
    if options.command == "table":
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(insert(text, section(read(RESULTS)), BEGIN, END), encoding="utf-8")
        return 0
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for size in options.workers if options.command == "steps" else [options.trials]:
            record = step_costs(size, folder) if options.command == "steps" else trial_costs(size, folder)
            record |= {"ray": version("ray"), "revision": revision(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
            print(record, flush=True)
            append(RESULTS, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
