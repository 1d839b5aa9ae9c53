"""bench/gpu.sh and its report: parts end in time, a rehearsal is never published, and every figure names its card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import gpu_report
import gpu_run
import pytest
import torch
from gpu_measure import covered, place_of
from gpu_results import Results, Setting
from revision import ROOT

MADE_WITH = {
    "card": "NVIDIA H100 80GB HBM3",
    "memory_gib": 79.1,
    "cuda": "13.0",
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "timm": "1.0.31",
    "python": "3.12.3",
    "cpus": 16,
    "tf32": {"convolutions": True, "products": False},
    "revision": "0123456789",
    "date": "2026-12-01",
}


def step_row(case: str, ms: float, **more: Any) -> dict[str, Any]:
    parts = {"forward": 0.4 * ms, "backward": 0.5 * ms, "update": 0.1 * ms}
    row = {"case": case, "torchvision": False, "precision": "bf16", "ms": ms, "images": 16, "parts_ms": parts, "steps": 20}
    return {**row, "images_per_second": 16e3 / ms, "peak_gib": 4.25, "tera_operations": 2.0, **more}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "performance.md").write_text(f"# Performance\n\n{gpu_report.BEGIN}\n\nold\n\n{gpu_report.END}\n\nThe end.\n")
    return folder


def write(folder: Path, part: str, rows: list[dict[str, Any]], rehearsal: bool = False, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps({"part": part, "rehearsal": rehearsal, **MADE_WITH, "rows": rows, **more}))


def test_without_results_the_document_says_that_nothing_was_measured(docs: Path) -> None:
    assert gpu_report.main(["--docs", str(docs)]) == 0
    text = (docs / "performance.md").read_text()
    assert "None has been measured yet" in text and "old" not in text and text.endswith("The end.\n")


def test_the_committed_document_is_what_the_report_writes() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    kept = ROOT / "docs" / "gpu"
    found = gpu_report.section(gpu_report.load(kept), gpu_report.read(kept / gpu_report.EVIDENCE))
    assert gpu_report.insert(text, found, gpu_report.BEGIN, gpu_report.END) == text


def test_tables_name_card_software_revision_and_date_and_keep_what_failed(docs: Path, tmp_path: Path) -> None:
    rows = [
        step_row("RetinaNet R18, alone", 20.0, busy=0.93, syncs={"headkd_ray/detectors/ops/nms.py:22": 2.0}),
        step_row("HEAD inline", 36.0, busy=None, syncs=None, busy_error="RuntimeError('no profiler')"),
        {"case": "TF-HEAD", "torchvision": False, "precision": "bf16", "error": "RuntimeError('lost')"},
    ]
    results = tmp_path / "results"
    write(results, "steps", rows, ceilings={"bf16_tflops": 790.0, "copy_tb_per_second": 3.0})
    write(results, "tests", [{"test": "a", "outcome": "passed"}, {"test": "b", "outcome": "failed", "error": "E"}])
    write(results, "data", [{"cpus": 16, "images_per_second": 3200.0, "images_per_second_and_cpu": 200.0}])
    ray = {"run": "Ray Train", "images_per_second": 300.0, "data_wait": 0.01, "memory_mib": 900.0, "first_loss": 5.0}
    write(results, "ray", [{**ray, "seconds": 20.0}, {"run": "cache", "error": "ClusterError('x')"}])
    assert gpu_report.main([str(results), "--docs", str(docs)]) == 0
    assert (docs / "gpu" / "steps.json").exists()
    text = (docs / "performance.md").read_text()
    assert text.count("NVIDIA H100 80GB HBM3 (79.1 GiB), 16 CPUs; CUDA 13.0, Python 3.12.3, torch 2.11.0") == 4
    assert text.count("revision 0123456789, 2026-12-01.") == 4
    assert "| RetinaNet R18, alone | bf16 | 20.0 | 1.00 | 8.0 | 10.0 | 2.0 | 800 | 4.2 | 93% | 100 | 2 |" in text
    assert "| HEAD inline | bf16 | 36.0 | 1.80 | 14.4 | 18.0 | 3.6 | 444 | 4.2 | – | 56 | – |" in text
    assert "- RetinaNet R18, alone, bf16: 2 at `headkd_ray/detectors/ops/nms.py:22`" in text
    assert "TF-HEAD, bf16: failed: RuntimeError('lost')" in text and "cache: failed: ClusterError('x')" in text
    assert "1 passed, 1 failed." in text and "- `b`" in text


def test_a_rehearsal_is_refused_and_nothing_changes(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "results", "steps", [], rehearsal=True)
    (tmp_path / "results" / "ray.json").write_text("{")
    before = (docs / "performance.md").read_text()
    with pytest.raises(SystemExit) as caught:
        gpu_report.main([str(tmp_path / "results"), "--docs", str(docs)])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert "steps.json: from a rehearsal" in message and "ray.json: not what bench/gpu.sh writes" in message
    assert not (docs / "gpu").exists() and (docs / "performance.md").read_text() == before


def test_results_are_whole_after_every_row(tmp_path: Path) -> None:
    results = Results("steps", Setting(torch.device("cpu"), False, tmp_path, 0.0))
    for number in range(3):
        results.add({"case": str(number)})
        content = json.loads((tmp_path / "steps.json").read_text())
        assert content["rehearsal"] and [row["case"] for row in content["rows"]] == [str(n) for n in range(number + 1)]
    assert {"card", "torch", "revision", "date"} <= content.keys()


def test_a_part_that_overruns_is_ended_with_its_children(tmp_path: Path) -> None:
    place = Setting(torch.device("cpu"), True, tmp_path, time.monotonic() + 60)
    assert gpu_run.run_part("evidence", 2.0, place) == "cut off after 2 s"
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        assert os.fsencode(tmp_path) not in command, command


def test_the_time_in_which_something_runs() -> None:
    assert covered([]) == 0
    assert covered([(3, 5), (0, 2), (1, 4), (3.5, 3.6), (9, 10)]) == 6


def test_the_place_that_waits_is_the_innermost_of_ours() -> None:
    import torchvision

    import headkd_ray

    ours, theirs = Path(headkd_ray.__file__).parent / "detectors/ops/nms.py", Path(torchvision.__file__).parent / "ops/boxes.py"
    frames = [traceback.FrameSummary(str(file), line, "f") for file, line in ((ours, 7), (ours, 22), (theirs, 41))]
    assert place_of(frames) == "headkd_ray/detectors/ops/nms.py:22"
    assert place_of(frames[2:]) == "torchvision/ops/boxes.py:41"
    assert place_of([traceback.FrameSummary("/else/where.py", 1, "f")]) == "elsewhere"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--parts", "tests"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no GPU here; --device cpu --tiny rehearses everything on the CPU" in done.stdout
