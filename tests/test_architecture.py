"""Each folder imports what docs/architecture.md allows, and all but two of them work without Ray."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

import headkd_ray
from headkd_ray.cli import COMMANDS
from tests.support import micro_job

PACKAGE = Path(headkd_ray.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
ROW = re.compile(r"^\| `([\w/]+)` \|.*\| (.*) \|$", re.MULTILINE)
FOLDERS = {name: set(re.findall(r"`([\w/]+)`", allowed)) for name, allowed in ROW.findall(PAGE.read_text(encoding="utf-8"))}
"""Folder or module -> what it may import besides itself, from the page's table. Other modules are commands."""
RAY = {"cluster", "tuning/on_ray"}


def folder_of(parts: Sequence[str]) -> str:
    """Return the table's name for the module whose path within the package is ``parts``."""
    return max((name for name in FOLDERS if list(parts[: name.count("/") + 1]) == name.split("/")), key=len, default=parts[0])


def imports() -> Iterator[tuple[str, str, bool, str]]:
    """Yield (folder, imported module, in a function or for type checking only, place) for every import in the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        folder = folder_of(inside.with_suffix("").parts)
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
                yield folder, name, node not in tree.body, f"{inside}:{node.lineno}: {name}"


def test_the_table_names_every_folder() -> None:
    commands = {folder for folder, *_ in imports()} - set(FOLDERS) - {"__init__"}
    assert commands == set(COMMANDS)


def test_a_folder_imports_what_the_table_allows() -> None:
    wrong = []
    for folder, name, _, place in imports():
        if folder in FOLDERS and name.startswith("headkd_ray."):
            target = folder_of(name.split(".")[1:])
            if target != folder and target not in FOLDERS[folder]:
                wrong.append(place)
    assert not wrong, wrong


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(FOLDERS):
        free = {folder for folder, below in FOLDERS.items() if folder not in done and below <= done}
        assert free, f"circle among {set(FOLDERS) - done}"
        done |= free


def test_no_two_modules_have_one_base_name() -> None:
    names = Counter(file.stem for file in PACKAGE.rglob("*.py") if file.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []


def test_commands_import_ray_s_folders_late() -> None:
    """Every command must start where Ray is not installed."""
    early = [
        place
        for folder, name, late, place in imports()
        if name.startswith("headkd_ray.") and folder_of(name.split(".")[1:]) in RAY and not late and folder not in RAY
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
    without = [name for name in modules if folder_of(name.split(".")[1:] or ["__init__"]) not in RAY]
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
