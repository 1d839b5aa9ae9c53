"""The README's table of exports is made of an export's report."""

from __future__ import annotations

from pathlib import Path

from export_table import BEGIN, END, NONE, section

ROOT = Path(__file__).parents[2]


def test_the_table_shows_what_the_report_has() -> None:
    def row(name: str, kind: str, median: float) -> dict[str, object]:
        latency = {str(threads): {"median": median / threads, "p95": median} for threads in (1, 2)}
        return {"name": name, "format": kind, "bytes": 1_060_000, "metrics": {"AP": 33.64}, "latency": latency}

    report = {"images": 200, "cpu": "x86_64", "versions": {"torch": "2.15.0+cu132"}}
    lines = section([row("student with HEAD", "PyTorch", 20.0), row("model.onnx", "ONNX", 8.04)], report).splitlines()
    assert lines == [
        "| detector | runs in | AP | MB | ms, 1 thread | ms, 2 threads |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| student with HEAD | PyTorch | 33.6 | 1.1 | 20.0 (20.0) | 10.0 (20.0) |",
        "| model.onnx | ONNX | 33.6 | 1.1 | 8.0 (8.0) | 4.0 (8.0) |",
        "",
        "Time of an image, batch 1: median (95th percentile). 200 images, x86_64, torch 2.15.0.",
    ]


def test_the_readme_has_the_whole_table_or_none() -> None:
    between = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    if between.strip() == NONE:
        return
    shown = [line.split("|")[1].strip() for line in between.splitlines() if line.startswith("| ")][2:]
    assert shown[0] == "student with HEAD" and {
        "model.onnx",
        "model-int8.onnx",
        "model.pt2",
        "student alone",
        "teacher",
    } <= set(shown)
