"""Measure what grows with the data set, at the size of COCO, of four times COCO and of Objects365.

    python bench/scale.py run [--sizes COCO "4 x COCO"] [--parts order cache]    into docs/scale.jsonl
    python bench/scale.py table                                                  rewrite the table of docs/scale.md

The annotations are drawn, and each part of ``scale_parts.PARTS`` runs in a process of its own. Times are CPU seconds, so that
they mean something on a machine that is busy with other work; memory is the peak of the process, its libraries included.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from evidence_tables import append, insert, read
from revision import ROOT, revision
from scale_parts import PARTS, READING, SIZES
from step_memory import RESET, resident

RESULTS, DOCUMENT = ROOT / "docs/scale.jsonl", ROOT / "docs/scale.md"
BEGIN, END = "<!-- scale: begin (python bench/scale.py table) -->", "<!-- scale: end -->"
Record = dict[str, Any]


def measure(part: str, size: str, folder: Path) -> list[Record]:
    """Run a part in this process, and return a record for each thing that it does."""
    records: list[Record] = []
    running, before = PARTS[part](folder, SIZES[size]), resident("VmRSS")
    step = next(running, "")
    while step != "":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory would hide what the step takes
        RESET.write_text("5")  # the peak starts from here (man 5 proc)
        started = time.process_time()
        following = next(running, "")
        seconds = time.process_time() - started
        if step is not None:
            own = {"seconds": round(seconds, 3), "peak_mb": round(resident("VmHWM")), "libraries_mb": round(before)}
            records.append({"size": size, "part": part, "step": step, **own})
        step = following
    return records


def run(sizes: Sequence[str], parts: Sequence[str], scratch: Path) -> None:
    """Measure the parts at each size and append the records to the results."""
    for size in sizes:
        folder = scratch / size.replace(" ", "")
        folder.mkdir(exist_ok=True)
        first = "prepare" if set(parts) & set(READING) else "bare"
        for part in [first, *(part for part in parts if part not in ("prepare", "bare"))]:
            if part == first and (folder / "train/meta.json").exists():
                continue
            command = [sys.executable, __file__, "part", part, size, str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            for record in json.loads(done.stdout):
                print(record, flush=True)
                append(RESULTS, {**record, "revision": revision(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"})


def section(records: Sequence[Record]) -> str:
    """Return the table, of the last record of each step and size."""
    found = {(record["step"], record["size"]): record for record in records}
    sizes = [size for size in SIZES if any(record["size"] == size for record in records)]
    heads = [f"{size}: s | MB" for size in sizes]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' ---: | ---: |' * len(sizes)}"]
    order = {part: number for number, part in enumerate(PARTS)}
    for step in dict.fromkeys(record["step"] for record in sorted(records, key=lambda record: order[record["part"]])):
        cells = [_cells(found.get((step, size))) for size in sizes]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    about = [
        f"{size}: {SIZES[size].images:,} images, {SIZES[size].boxes:,} boxes, {SIZES[size].val_images:,} validation images"
        for size in sizes
    ]
    libraries = [record["libraries_mb"] for record in found.values()]
    dates = ", ".join(dict.fromkeys(record["date"] for record in found.values()))
    notes = f"s: CPU seconds; MB: peak of the process, its {min(libraries)} to {max(libraries)} MB of libraries included."
    return "\n".join([*lines, "", f"{'; '.join(about)}. {notes} {dates}."])


def _cells(record: Record | None) -> str:
    return "– | –" if record is None else f"{record['seconds']:,.3g} | {record['peak_mb']:,}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    running.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    running.add_argument("--scratch", type=Path, help="folder to keep the prepared splits in (default: a temporary one)")
    commands.add_parser("table")
    part = commands.add_parser("part")
    for name in ("part", "size", "folder"):
        part.add_argument(name)
    options = parser.parse_args(arguments)
    if options.command == "part":
        print(json.dumps(measure(options.part, options.size, Path(options.folder))))
    elif options.command == "table":
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(insert(text, section(read(RESULTS)), BEGIN, END), encoding="utf-8")
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        with tempfile.TemporaryDirectory() as temporary:
            run(options.sizes, options.parts, options.scratch or Path(temporary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
