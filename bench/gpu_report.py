"""Write the GPU's figures into docs/performance.md from the JSON in docs/gpu: ``python bench/gpu_report.py [RESULTS_FOLDER]``.

RESULTS_FOLDER is what ``bash bench/gpu.sh`` wrote. Its files replace those in docs/gpu, which are committed; results of a
rehearsal are refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence import order
from evidence_tables import document_section, insert, read
from revision import ROOT

from headkd_ray.cli import user_errors
from headkd_ray.errors import DataError

BEGIN, END = "<!-- gpu: begin (python bench/gpu_report.py) -->", "<!-- gpu: end -->"
NONE = "None has been measured yet: `bash bench/gpu.sh` on a machine with a GPU, then `python bench/gpu_report.py runs/gpu`."
FILES = ("run.json", "tests.json", "steps.json", "ray.json", "data.json")
EVIDENCE = "evidence.jsonl"
Part = dict[str, Any]


def load(folder: Path) -> dict[str, Part]:
    """Return the parts that exist, by name. Raises DataError with all problems at once."""
    parts: dict[str, Part] = {}
    problems = []
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
            if part["rehearsal"]:
                problems.append(f"{path}: from a rehearsal, which says nothing about a GPU; run bench/gpu.sh without options")
            parts[part["part"]] = part
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}: not what bench/gpu.sh writes ({error!r}); delete it, or run it again")
    if problems:
        raise DataError(problems)
    return parts


def take(source: Path, target: Path) -> None:
    """Replace the files of ``target`` by those of ``source``. Raises DataError if there are none, or if they are a
    rehearsal's."""
    if not load(source):
        raise DataError(f"{source}: there is no {', '.join(FILES)}; give the folder that bench/gpu.sh wrote")
    target.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, EVIDENCE):
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def section(parts: dict[str, Part], evidence: Sequence[dict[str, Any]]) -> str:
    """Return everything that stands between the markers."""
    shown = [write(parts[name]) for name, write in WRITERS.items() if name in parts]
    if evidence:
        shown.append("### Evidence\n\n" + document_section(evidence, order()).replace("## Tier", "#### Tier"))
    return "\n\n".join(shown) if shown else NONE


def made_with(part: Part) -> str:
    """Return one line with the card, the software, the revision and the date."""
    versions = ", ".join(f"{name} {part[name]}" for name in ("torch", "torchvision", "timm"))
    card = f"{part['card']} ({part['memory_gib']:g} GiB), {part['cpus']} CPUs"
    return f"{card}; CUDA {part['cuda']}, Python {part['python']}, {versions}; revision {part['revision']}, {part['date']}."


def steps(part: Part) -> str:
    """Return the table of steps: times compared with torchvision's and our plain detectors, then where the host waits."""
    rows = [row for row in part["rows"] if "ms" in row]
    plain = {row["precision"]: row["ms"] for row in rows if row["case"] == "RetinaNet R18, alone"}
    head = (
        "step",
        "precision",
        "ms",
        "× plain",
        "forward",
        "backward",
        "update",
        "images/s",
        "peak GiB",
        "GPU busy",
        "TFLOP/s",
        "syncs",
    )
    lines = table(head, [_step(row, plain) for row in rows])
    waits = [
        f"- {row['case']}, {row['precision']}: " + ", ".join(f"{count:g} at `{place}`" for place, count in row["syncs"].items())
        for row in rows
        if row.get("syncs")
    ]
    failed = [f"- {row['case']}, {row['precision']}: failed: {row['error']}" for row in part["rows"] if "error" in row]
    best = part["ceilings"]
    text = (
        "16 images of 640² a step, on the device. *× plain*: beside our own RetinaNet without a teacher. *GPU busy*: share of "
        "the step in which a kernel or a copy runs. *TFLOP/s*: of convolutions and matrix products. *syncs*: times a step that "
        f"the host waits for the GPU. At best this card multiplied bf16 matrices at {best['bf16_tflops']:.0f} TFLOP/s and "
        f"copied within its memory at {best['copy_tb_per_second']:.1f} TB/s; float32 convolutions "
        f"{'use' if part['tf32']['convolutions'] else 'do not use'} TF32."
    )
    blocks = ["### Training steps", made_with(part), text, lines, "\n".join(failed)]
    return "\n\n".join(filter(None, [*blocks, "Where the host waits:\n\n" + "\n".join(waits) if waits else ""]))


def _step(row: dict[str, Any], plain: dict[str, float]) -> list[str]:
    beside = f"{row['ms'] / plain[row['precision']]:.2f}" if row["precision"] in plain else "–"
    parts = [f"{row['parts_ms'][name]:.1f}" for name in ("forward", "backward", "update")]
    rate = "–" if row.get("tera_operations") is None else f"{1e3 * row['tera_operations'] / row['ms']:.0f}"
    busy = "–" if row.get("busy") is None else f"{row['busy']:.0%}"
    waits = "–" if row.get("syncs") is None else f"{sum(row['syncs'].values()):g}"
    times = [f"{row['ms']:.1f}", beside, *parts, f"{row['images_per_second']:.0f}"]
    return [row["case"], row["precision"], *times, f"{row['peak_gib']:.1f}", busy, rate, waits]


def on_ray(part: Part) -> str:
    """Return the table of what Ray, a pool and a cache cost."""
    head = ("run", "images/s", "data wait", "peak MiB", "first loss", "seconds in all")
    columns = {"images_per_second": ".0f", "data_wait": ".0%", "memory_mib": ".0f", "first_loss": ".5f", "seconds": ".0f"}
    done = [
        [row["run"], *(f"{row[name]:{form}}" for name, form in columns.items())] for row in part["rows"] if "error" not in row
    ]
    failed = [f"- {row['run']}: failed: {row['error']}" for row in part["rows"] if "error" in row]
    text = "HEAD, R18 RetinaNet ← R50 Faster R-CNN, 16 images of 320² a step, bf16, gradients over NCCL."
    return "\n\n".join(filter(None, ["### On Ray", made_with(part), text, table(head, done), "\n".join(failed)]))


def data(part: Part) -> str:
    """Return the table of images per second by number of CPUs."""
    rows = [
        [str(row["cpus"]), f"{row['images_per_second']:.0f}", f"{row['images_per_second_and_cpu']:.0f}"] for row in part["rows"]
    ]
    text = "640-pixel JPEGs from shards to padded batches on the device:"
    return "\n\n".join(["### Data", made_with(part), text, table(("CPUs", "images/s", "images/s and CPU"), rows)])


def tests(part: Part) -> str:
    """Return how the tests marked gpu ended."""
    outcomes = [row["outcome"] for row in part["rows"]]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped") if name in outcomes)
    failed = [f"- `{row['test']}`" for row in part["rows"] if row["outcome"] == "failed"]
    return "\n\n".join(filter(None, ["### Tests marked gpu", made_with(part), f"{counts}.", "\n".join(failed)]))


WRITERS = {"steps": steps, "ray": on_ray, "data": data, "tests": tests}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def main(arguments: list[str] | None = None) -> int:
    """Write the tables and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS_FOLDER", help="copied into docs/gpu first")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of performance.md and gpu (default: docs)")
    with user_errors():
        options = parser.parse_args(arguments)
        kept, document = options.docs / "gpu", options.docs / "performance.md"
        if options.results is not None:
            take(options.results, kept)
        found = section(load(kept), read(kept / EVIDENCE))
        document.write_text(insert(document.read_text(encoding="utf-8"), found, BEGIN, END), encoding="utf-8")
    print(f"{document}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
