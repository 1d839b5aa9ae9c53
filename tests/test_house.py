"""Rooms: what each may import, and that all but one of them do without Ray."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

import headkd_ray
from tests.support import micro_job

PACKAGE = Path(headkd_ray.__file__).parent
DETECTORS = {"detectors", "job", "errors"}
LEARNING = {"distill", "data", "storage", "targets", *DETECTORS}
TEACHING = {"data", "storage", "targets", "memory", *DETECTORS}
ENGINE = {"engine", "teacher", "text", *TEACHING, *LEARNING}
ROOMS = {
    "text": set[str](),
    "errors": {"text"},
    "storage": {"errors", "text"},
    "job": {"errors"},
    "detectors": DETECTORS - {"detectors"},
    "distill": {"data", "storage", "targets", *DETECTORS},
    "targets": set[str](),
    "memory": {"errors"},
    "data": {"storage", "job", "errors", "targets"},
    "teacher": TEACHING,
    "engine": ENGINE - {"engine"},
    "search": {"storage", "job", "errors", "text"},
    "golden": LEARNING,
    "cluster": ENGINE | {"search"},
    "report": {"search", "job", "errors", "text"},
    "doors": {"errors", "report"},
}
"""Room -> rooms that it may import besides itself; they point down, so there is no circle. Other modules are doors."""


def imports() -> Iterator[tuple[str, str, bool, str]]:
    """(room, imported module, in a function or for type checking only, place) of every import in the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        room = inside.parts[0] if len(inside.parts) > 1 else inside.stem
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{inside}:{node.lineno}: relative import"
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield room, name, node not in tree.body, f"{inside}:{node.lineno}: {name}"


def test_arrows_point_down_only() -> None:
    doors = {room for room, *_ in imports()} - set(ROOMS) - {"__init__"}
    assert {"train", "evaluate", "predict", "prepare"} <= doors
    wrong = []
    for room, name, _, place in imports():
        if room in ROOMS and name.startswith("headkd_ray."):
            target = name.split(".")[1]
            if target != room and target not in ROOMS[room]:
                wrong.append(place)
    assert not wrong, wrong


def test_rooms_have_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ROOMS):
        free = {room for room, below in ROOMS.items() if room not in done and below <= done}
        assert free, f"circle among {set(ROOMS) - done}"
        done |= free


def test_doors_import_the_cluster_room_late() -> None:
    """The quickstart is about Ray; every other door must start where Ray is not installed."""
    early = [
        place
        for room, name, late, place in imports()
        if name.startswith("headkd_ray.cluster") and not late and room not in ("cluster", "quickstart")
    ]
    assert not early, early


WITHOUT_RAY = """
import importlib.abc, sys

class NoRay(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)", name=name)

sys.meta_path.insert(0, NoRay())
import torch
torch.set_num_threads(1)
for module in sys.argv[4:]:
    importlib.import_module(module)
from headkd_ray import evaluate, predict, train
job, data, image = sys.argv[1:4]
assert train.main([job]) == 0
student = job.removesuffix("job.yaml") + "runs/alone/student"
assert evaluate.main([student, data]) == 0
assert predict.main([student, image, "--out", job.removesuffix("job.yaml") + "found"]) == 0
assert not [name for name in sys.modules if name.split(".")[0] == "ray"]
"""


def test_everything_but_the_cluster_works_without_ray(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Every module is imported, and one epoch trained, evaluated and used, in a process in which ``import ray`` fails."""
    job = micro_job(tmp_path / "runs", drawn_splits, "alone", optim={"epochs": 1, "milestones": []}, log={"tensorboard": True})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    files = [file.relative_to(PACKAGE.parent).with_suffix("") for file in sorted(PACKAGE.rglob("*.py"))]
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files]
    without = [name for name in modules if not name.startswith(("headkd_ray.cluster", "headkd_ray.quickstart"))]
    assert len(without) > 50
    image = next((Path(drawn_splits["val"]).parent / "images").glob("*.jpg"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(tmp_path / "job.yaml"), drawn_splits["val"], str(image), *without],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "alone" / "result.json").exists() and (tmp_path / "found" / "detections.json").exists()


def test_the_blocker_of_the_test_above_blocks() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY.partition("import torch")[0] + "import ray"], capture_output=True)
    assert done.returncode == 1 and b"hidden by the test" in done.stderr
