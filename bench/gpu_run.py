"""Run all GPU measurements, part by part; called by ``bash bench/gpu.sh``.

tests: the tests marked gpu. steps: what a training step costs, method by method. ray: Ray Train, a teacher pool and a cache on
the GPU. data: images per second from shards. evidence: rows of the standard tier in the time that is left.

Each part is a process with its own time limit that writes ``<out>/<part>.json`` as it goes (evidence: evidence.jsonl). If one
fails or overruns, the others still run. ``<out>/run.json`` says how each ended. Exit code 0: all parts succeeded; 1: some did
not.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from gpu_results import Results, Setting, add_options

PARTS = {"tests": 150, "steps": 200, "ray": 100, "data": 30, "evidence": 480}
"""Part -> longest time in seconds of a run of MINUTES, the most valuable part first."""
MINUTES = 8.0
LEAST = 15.0
"""Seconds below which a part is not started."""
GRACE = 5.0
"""Seconds between asking a part to end and killing it."""


def run_part(part: str, seconds: float, place: Setting) -> str:
    """Run one part and return how it ended."""
    command = [sys.executable, str(Path(__file__).with_name(f"gpu_{part}.py")), "--device", place.device.type]
    command += ["--out", str(place.out), "--seconds", f"{seconds - GRACE:.0f}", *(["--tiny"] if place.tiny else [])]
    process = subprocess.Popen(command, start_new_session=True)  # a process group of its own, so that its children end with it
    try:
        code = process.wait(timeout=seconds)
        return "done" if code == 0 else f"failed (exit code {code})"
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group, including processes that the part left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="bash bench/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, separated by commas (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all; the parts' limits scale (default %(default)g)")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)}: no such part; the parts are {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny rehearses everything on the CPU")
    place = Setting(torch.device(options.device), options.tiny, options.out, time.monotonic() + 60 * options.minutes)
    results = Results("run", place)
    for part in parts:
        seconds = min(PARTS[part] * options.minutes / MINUTES, place.left())
        started = time.monotonic()
        print(f"{part}: at most {seconds:.0f} s", flush=True)
        ended = run_part(part, seconds, place) if seconds >= LEAST else "no time left"
        results.add({"part": part, "ended": ended, "seconds": round(time.monotonic() - started, 1)})
    return int(any(row["ended"] != "done" for row in results.content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
