"""Measure what a training step costs, method by method, beside torchvision's detectors: ``python bench/step.py``.

R18 RetinaNet, distilled from an R50 Faster R-CNN, with random weights (trained ones would cost the same), 80 classes. All steps
take turns, round after round, so that what else a machine does slows all of them alike; the medians' ratios are what counts.
Beside the time of the clock stand the CPU time of this process, which other processes disturb less, and the operations in
convolutions and matrix products. ``--ray`` adds the whole training loop, with and without Ray.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_measure import tera_operations
from gpu_results import machine
from rich import box
from rich.console import Console
from rich.table import Table
from step_cases import CASES, PARTS, PLAIN, PLAIN_TWO_STAGE, Case, Size, Step
from step_memory import step_mib

from headkd_ray.cli import positive

Row = dict[str, Any]
WARM_UP = 1
"""Rounds at the start that do not count."""
RATIOS = {"times_plain": "ms", "times_plain_cpu": "cpu_ms", "times_plain_operations": "tera_operations"}
"""Ratio to the plain detector -> the figure of which it is the ratio."""
NAMED = {case.name: case for case in CASES}


class Measured:
    """A step and its times, round by round."""

    def __init__(self, case: Case, size: Size) -> None:
        self.case = case
        self.step = Step(case, size)
        self.parts: list[tuple[float, ...]] = []
        self.cpu: list[float] = []

    def take(self, counts: bool) -> None:
        """Take one step; its times are kept if it ``counts``."""
        before = time.process_time()
        parts = self.step.timed()
        if counts:
            self.cpu.append(1e3 * (time.process_time() - before))
            self.parts.append(parts)

    def row(self) -> Row:
        """Return the medians, in ms, with memory and floating-point operations, for which two more steps are taken."""
        self.step.optimizer.zero_grad(set_to_none=True)  # the gradients of the last step would hide those of the next
        return {
            "case": self.case.name,
            "ms": median(sum(parts) for parts in self.parts),
            "cpu_ms": median(self.cpu),
            "parts_ms": {name: median(parts[place] for parts in self.parts) for place, name in enumerate(PARTS)},
            "step_mib": step_mib(self.step, self.step.device),
            "tera_operations": tera_operations(self.step),
            "rounds": len(self.parts),
        }


def measure(cases: Sequence[Case], size: Size, rounds: int) -> list[Row]:
    """Measure ``cases`` in turns and return a row for each, with ratios to the plain detector of its kind."""
    measured = [Measured(case, size) for case in cases]
    for turn in range(WARM_UP + rounds):
        for each in measured:
            each.take(counts=turn >= WARM_UP)
        print(f"round {turn + 1} of {WARM_UP + rounds}", flush=True)
    rows = [each.row() for each in measured]
    plain = {row["case"]: row for row in rows}
    for row in rows:
        beside = plain.get(PLAIN_TWO_STAGE if "Faster" in row["case"] else PLAIN)
        if beside is not None:
            row |= {name: row[field] / beside[field] for name, field in RATIOS.items()}
    return rows


def table(rows: Sequence[Row], size: Size) -> Table:
    """Return the rows as a table, ratios first."""
    title = f"{size.images} images of {size.side}², {size.precision}, {size.device.type}: x = beside the plain detector of ours"
    shown = Table(title=title, box=box.SIMPLE, title_justify="left")
    shown.add_column("step", no_wrap=True)
    for name in ("x", "x CPU time", "x operations", "ms", "CPU ms", *PARTS, "MiB"):
        shown.add_column(name, justify="right")
    for row in rows:
        ratios = [
            f"{row[name]:.2f}" if name in row else "-" for name in ("times_plain", "times_plain_cpu", "times_plain_operations")
        ]
        memory = "-" if row["step_mib"] is None else f"{row['step_mib']:.0f}"
        times = [row["ms"], row["cpu_ms"], *row["parts_ms"].values()]
        shown.add_row(row["case"], *ratios, *(f"{value:.0f}" for value in times), memory)
    return shown


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=positive, default=2, help="images per step (default %(default)s)")
    parser.add_argument("--side", type=positive, default=320, help="side of the images, pixels (default %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=positive, default=2, help="torch's CPU threads (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=9, help="steps of each that count (default %(default)s)")
    only = f"measure these steps alone, separated by ; (default: all but compiled ones): {'; '.join(NAMED)}"
    parser.add_argument("--only", type=_cases, default=[case for case in CASES if not case.compiled], help=only)
    parser.add_argument("--ray", action="store_true", help="also measure the whole loop, with Ray, a pool, and without")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--tiny", action="store_true", help="micro models: a rehearsal")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return chosen


def _cases(names: str) -> list[Case]:
    wanted = names.split(";")
    if unknown := [name for name in wanted if name not in NAMED]:
        raise argparse.ArgumentTypeError(f"{unknown} are not among: {'; '.join(NAMED)}")
    return [NAMED[name] for name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print ratios first."""
    chosen = options(arguments)
    torch.set_num_threads(chosen.threads)
    size = Size(torch.device(chosen.device), chosen.images, chosen.side, chosen.precision, chosen.tiny)
    found: Row = {**machine(size.device), "threads": chosen.threads, "rows": measure(chosen.only, size, chosen.rounds)}
    console = Console(width=140)
    console.print(table(found["rows"], size))
    if chosen.ray:
        from step_ray import measure_loops  # Ray is needed for this alone

        found["loops"] = measure_loops(size, chosen.threads, chosen.rounds)
        for row in found["loops"]:
            console.print(f"{row['loop']}: {row['times_bare']:.3f} x the bare loop, {row['ms']:.0f} ms a step")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
