"""Kill processes and nodes under real commands on several nodes. ``fault_kinds.FAULTS`` is the list of commands and faults.

    python bench/faults.py run [COMMAND [FAULT ...]] [--seeds 0 1 2]    one run per seed; into docs/faults.jsonl
    python bench/faults.py run --kills 100       runs with new seeds, until so many faults are in the file
    python bench/faults.py table                 rewrite the table of docs/reliability.md

A run is a command (``fault_commands``) on a Ray cluster of a head and some nodes, all on this machine. One fault after another
strikes, with SIGKILL or a spot notice, in an order, at steps and after delays that are drawn from the seed; so are the command
and its faults unless they are named. A run has survived if it ends by itself (after the driver's death: if the same command,
started again, ends), leaves no actor or placement group, and ends with what the command ends with in this process, without Ray:
the same weights or files, bit for bit, or, on another number of workers, with the losses of the same steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from evidence_tables import append, insert, read
from fault_commands import COMMANDS, Command, Inputs
from fault_kinds import FAULTS, PATIENCE, EndedFirstError, Run, have
from fault_table import section
from machines import ENVIRONMENT, ROOT, Machines
from revision import revision

RESULTS, DOCUMENT = ROOT / "docs/faults.jsonl", ROOT / "docs/reliability.md"
BEGIN, END = "<!-- faults: begin (python bench/faults.py table) -->", "<!-- faults: end -->"
FAULTS_PER_RUN = 3
UNTIL = 0.85
"""Faults strike before this share of a command's steps, so that it does not end first."""

Record = dict[str, Any]


def drawn(seed: int) -> tuple[str, list[str]]:
    """Return the command of a seed and its faults, in the order in which they strike; every fault is as likely as any other."""
    random = Random(seed)
    command, _ = random.choice([(command, fault) for command, kinds in FAULTS.items() for fault in kinds])
    return command, random.sample(list(FAULTS[command]), min(FAULTS_PER_RUN, len(FAULTS[command])))


def disturb(machines: Machines, command: Command, kind: str, faults: Sequence[str], seed: int, expected: Record) -> Record:
    """Run the command once while all the faults happen, and return the record."""
    random = Random(f"{seed}: {' '.join(faults)}")
    have(machines, command)
    run = Run(machines, command)
    record: Record = {}
    width = int(UNTIL * command.total) // len(faults)
    try:
        for number, fault in enumerate(faults):
            at = number * width + random.randrange(1, width)
            run.wait(lambda at=at: run.position >= at)  # type: ignore[misc]
            time.sleep(random.random())
            hit = FAULTS[kind][fault][1](run, random)
            run.note_hit(fault)
            hit()
    except EndedFirstError:
        pass
    except RuntimeError as error:
        record["error"] = _with_last_line(error, command)
    if "error" not in record and (code := run.driver.wait(PATIENCE)):
        record["error"] = _with_last_line(f"the command failed with exit code {code}", command)
    run.end()
    return {
        "hits": [{**hit, "seconds": seconds_lost(run.seen, stop, hit["step"], command.period)} for hit, stop in _spans(run)],
        "same": "error" not in record and command.equals(command.ended(), expected),
        "left": machines.left_over(),
        **record,
    }


def _with_last_line(error: object, command: Command) -> str:
    return f"{error}: {command.output.read_text(encoding='utf-8').splitlines()[-1:]}"


def _spans(run: Run) -> list[tuple[Record, int]]:
    """Return each hit with the step at which the next one struck."""
    return list(zip(run.hits, [*(hit["step"] for hit in run.hits[1:]), len(run.seen) - 1], strict=True))


def seconds_lost(seen: Sequence[float], stop: int, step: int, period: int) -> float | None:
    """Return the longest pause between steps from ``step`` to ``stop``, less the shortest in its place in other periods."""
    pauses = [after - before for before, after in pairwise(seen)]
    lost = []
    for place in range(step, min(max(stop, step + 1), len(pauses))):
        others = [pauses[other] for other in range(place % period, len(pauses), period) if other not in (0, place)]
        if others:
            lost.append(pauses[place] - min(others))
    return round(max(0.0, *lost), 1) if lost else None


def seeds_until(kills: int, results: Path) -> Iterator[int]:
    """Yield new seeds while the file has fewer faults than that; each run is expected to add its record."""
    while True:
        records = read(results)
        if sum(len(record["hits"]) for record in records) >= kills:
            return
        yield max((record["seed"] for record in records), default=-1) + 1


def run_faults(plan: Iterator[tuple[int, str, list[str]]], scratch: Path) -> None:
    """Make the runs of (seed, command, faults) and append their records to the results."""
    with _inputs(scratch) as inputs, Machines() as machines:
        expected: dict[str, Record] = {}
        for seed, kind, faults in plan:
            if kind not in expected:
                expected[kind] = COMMANDS[kind].expected(inputs)
            started = time.monotonic()
            command = COMMANDS[kind](inputs, f"faults-{kind}-{seed}")
            found = disturb(machines, command, kind, faults, seed, expected[kind])
            record = {
                "seed": seed,
                "command": kind,
                **found,
                "minutes": round((time.monotonic() - started) / 60, 1),
                **{package: version(package) for package in ("ray", "torch")},
                "revision": revision(),
                "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            }
            print(record, flush=True)
            append(RESULTS, record)


@contextmanager
def _inputs(scratch: Path) -> Iterator[Inputs]:
    """Prepare the inputs and an S3 server."""
    from pyarrow.fs import S3FileSystem

    from tests.s3 import moto_server, nobody

    os.environ.update(nobody())
    scratch.mkdir(parents=True, exist_ok=True)
    with moto_server(scratch, nobody()) as url:
        inputs = Inputs(scratch, url.removeprefix("http://"))
        S3FileSystem(endpoint_override=inputs.s3, scheme="http", allow_bucket_creation=True).create_dir("bucket")
        inputs.prepare()
        yield inputs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument(
        "kind", nargs="?", metavar="COMMAND", choices=FAULTS, help=f"one of {', '.join(FAULTS)}; default: drawn"
    )
    running.add_argument("faults", nargs="*", metavar="FAULT", help="its faults, in order; default: all")
    running.add_argument("--scratch", type=Path, help="folder for the runs and what they print (default: a temporary one)")
    amount = running.add_mutually_exclusive_group()
    amount.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run per seed (default: %(default)s)")
    amount.add_argument("--kills", type=int, metavar="N", help="add runs with new seeds until the file has N faults")
    commands.add_parser("table")
    options = parser.parse_args(arguments)
    if options.command == "table":
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(insert(text, section(read(RESULTS)), BEGIN, END), encoding="utf-8")
        return 0
    unknown = set(options.faults) - set(FAULTS[options.kind] if options.kind else ())
    if unknown:
        parser.error(
            f"no such fault: {', '.join(sorted(unknown))}; those of {options.kind} are {', '.join(FAULTS[options.kind])}"
        )
    os.environ.update({**ENVIRONMENT, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"})
    torch.set_num_threads(1)
    seeds = iter(options.seeds) if options.kills is None else seeds_until(options.kills, RESULTS)
    plan = ((seed, *_chosen(options.kind, options.faults, seed)) for seed in seeds)
    with tempfile.TemporaryDirectory() as temporary:
        run_faults(plan, options.scratch or Path(temporary))
    return 0


def _chosen(kind: str | None, faults: list[str], seed: int) -> tuple[str, list[str]]:
    return drawn(seed) if kind is None else (kind, faults or list(FAULTS[kind]))


if __name__ == "__main__":
    sys.exit(main())
