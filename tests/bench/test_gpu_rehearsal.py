"""``bash bench/gpu.sh`` on a bare machine: the interpreter lacks Ray, pydantic, simplejpeg, pycocotools; wheels bring them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_run import PARTS
from revision import ROOT

BARE = (
    *("torch==2.11.*", "torchvision==0.26.*", "timm", "pyarrow", "pandas", "pyyaml", "rich", "tensorboard", "safetensors"),
    *("pillow", "hypothesis", "pytest", "psutil", "fsspec"),
    *("requests", "aiohttp", "grpcio", "protobuf", "click", "filelock", "msgpack", "packaging", "jinja2", "attrs"),  # Ray's
    "prometheus-client",
)
CARRIED = ("ray", "pydantic", "pydantic_core", "faster_coco_eval", "pycocotools", "simplejpeg", "jsonschema")


def bare_python(folder: Path) -> str:
    """Return HEADKD_BARE_PYTHON, or an interpreter made here; skip the test if neither is possible."""
    python = os.environ.get("HEADKD_BARE_PYTHON")
    if python is None:
        python = str(folder / "bare" / "bin" / "python")
        made = [sys.executable, "-m", "uv", "venv", "--quiet", "--python", "3.12", str(folder / "bare")]
        filled = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *BARE]
        for command in (made, filled):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                why = (done.stderr.strip().splitlines() or ["no reason told"])[-1]
                pytest.skip(f"no Python 3.12 with torch 2.11: set HEADKD_BARE_PYTHON, or let uv make one ({why})")
    test = f"import importlib.util, sys; sys.exit(any(map(importlib.util.find_spec, {CARRIED})))"
    assert subprocess.run([python, "-c", test], cwd=folder, env={"PATH": os.environ["PATH"]}).returncode == 0, (
        f"{python} has some of {CARRIED} itself: nothing would be shown"
    )
    return python


def wheels() -> None:
    """Make sure that .wheels-gpu exists; skip the test if it cannot be made."""
    if (ROOT / ".wheels-gpu").is_dir():
        return
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "bench/gpu_wheels.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"bench/gpu_wheels.sh: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


@pytest.mark.slow
def test_every_part_runs_with_the_wheels_alone(tmp_path: Path) -> None:
    python = bare_python(tmp_path)
    wheels()
    out = tmp_path / "out"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"PYTHON": python, "OUT": str(out), "HEADKD_REVISION": "rehearsed", "OMP_NUM_THREADS": "1"}
    command = ["bash", "bench/gpu.sh", "--device", "cpu", "--tiny", "--minutes", "60"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    files = list(out.iterdir())
    assert len(files) <= 8 and all(path.stat().st_size <= 16 << 20 for path in files)
    parts = {name: json.loads((out / f"{name}.json").read_text()) for name in ("run", *PARTS) if name != "evidence"}
    assert all(part["rehearsal"] and part["torch"].startswith("2.") for part in parts.values())
    assert [row["ended"] for row in parts["run"]["rows"]] == ["done"] * len(PARTS)
    assert {row["outcome"] for row in parts["tests"]["rows"]} == {"passed", "skipped"}
    assert len(parts["steps"]["rows"]) == 22 and len(parts["ray"]["rows"]) == 5
    assert not [row for part in parts.values() for row in part["rows"] if "error" in row]
    assert [json.loads(line)["row"] for line in (out / "evidence.jsonl").read_text().splitlines()] == ["baseline"]
