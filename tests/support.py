"""Helpers for several tests: a job on the drawn data set, a teacher with random weights, commands that refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from headkd_ray.data.packing import prepare_split
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.job import FasterRCNNSpec, Job
from tests.detectors.micro import liven

MICRO_BACKBONE: dict[str, Any] = {
    "name": "resnet10t",
    "kwargs": {"stem_width": 4, "channels": [8, 8, 16, 16]},
    "frozen_stages": 0,
    "norm_eval": False,
}
MICRO_STUDENT: dict[str, Any] = {
    "kind": "retinanet",
    "backbone": MICRO_BACKBONE,
    "neck": {"channels": 16},
    "head": {"convs": 1, "channels": 16, "proposals": {"pre_nms": 50, "post_nms": 20}},
}
KEEN_STUDENT = {**MICRO_STUDENT, "head": {**MICRO_STUDENT["head"], "postprocess": {"score": 0.0, "max_detections": 20}}}
"""One that detects something in every image, trained or not."""
MICRO_TEACHER: dict[str, Any] = {
    "kind": "faster_rcnn",
    "backbone": MICRO_BACKBONE,
    "neck": {"channels": 16, "extra": "pool"},
    "rpn": {"train_proposals": {"pre_nms": 50, "post_nms": 20}, "test_proposals": {"pre_nms": 50, "post_nms": 20}},
    "roi": {"fc_channels": 16, "pool": 3, "sampler": {"size": 16}},
}

TF_HEAD: dict[str, Any] = {
    "fcos": {"head": {"convs": 1, "channels": 16, "norm_groups": 4}},
    "rcnn": {"head": {"fc_channels": 16, "pool": 3, "sampler": {"size": 16}}},
}
"""TF-HEAD's assistants for MICRO_STUDENT."""

ROOT = Path(__file__).parents[1]
HANGS = 600
"""Seconds after which a test assumes that something hangs; generous, for busy machines."""


def micro_job(storage: Path, splits: dict[str, str], name: str = "run", **sections: Any) -> Job:
    """Return a supervised job that trains in seconds; ``sections`` replace or extend its sections, one level deep."""
    job: dict[str, Any] = {
        "run": {"name": name, "storage": str(storage)},
        "method": "supervised",
        "data": {
            **splits,
            "batch_size": 4,
            "short_side": [56, 72],
            "long_side": 96,
            "eval_short_side": 64,
            "shuffle_window": 16,
        },
        "student": MICRO_STUDENT,
        "optim": {"epochs": 2, "milestones": [1], "warmup_steps": 4, "lr_batch": None},
        "log": {"every_steps": 1, "tensorboard": False, "report": False},
        "eval": {"every_epochs": 2, "batch_size": 8},
        "cluster": {"workers": 0, "threads_per_worker": 1},
    }
    for section, value in sections.items():
        job[section] = {**job.get(section, {}), **value} if isinstance(value, dict) and "kind" not in value else value
    return Job.model_validate(job)


def micro_teacher(folder: Path, classes: Sequence[str], seed: int = 3, **meta: Any) -> str:
    """Save a micro Faster R-CNN with random weights, and ``meta``, in ``folder`` and return its address."""
    torch.manual_seed(seed)
    detector = build_detector(FasterRCNNSpec.model_validate(MICRO_TEACHER), len(classes))
    liven(detector)
    save_detector(folder, detector, tuple(classes), meta)
    return str(folder)


def student_weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Load the weights of the student that a run exported."""
    return load_file(Path(result["student"]) / "model.safetensors")


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of weights are equal bit for bit."""
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"{len(differing)} of {len(one)} tensors differ, first {differing[:3]}"


def start_training(job_file: Path, **options: Any) -> subprocess.Popen[Any]:
    """Start the train command in a process of its own; ``options`` are those of ``subprocess.Popen``."""
    path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]  # dependencies may be there
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.Popen([sys.executable, "-m", "headkd_ray.train", str(job_file)], env=environment, **options)


def wait_for_lines(log: Path, count: int, process: subprocess.Popen[Any]) -> None:
    """Wait until a run's log has ``count`` lines. Fails if the process ends first, or if it hangs."""
    deadline = time.monotonic() + HANGS
    while not (log.exists() and len(log.read_text().splitlines()) >= count):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before it could be killed"
        time.sleep(0.02)


def edit(file: Path, old: str, new: str) -> None:
    """Replace ``old``, which must occur; a link becomes a file of its own."""
    text = file.read_text(encoding="utf-8")
    assert old in text
    if file.is_symlink():
        file.unlink()
    file.write_text(text.replace(old, new), encoding="utf-8")


def run_installed(site: Path, folder: Path, *commands: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``headkd`` with the arguments of each of ``commands``, in one process, until one fails.

    Args:
        site: folder with the installed package; the dependencies are this Python's.
        folder: in which the commands run.
    """
    others = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and Path(place).resolve() != ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *others])}
    code = (
        f"import json, sys, headkd_ray.cli; assert headkd_ray.__file__.startswith({str(site)!r}); sys.argv[0] = 'headkd'; "
        "sys.exit(next((code for code in map(headkd_ray.cli.main, json.loads(sys.argv[1])) if code), 0))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps([list(command) for command in commands])],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def micro_predictions(split: str, scores: Sequence[float] = (0.9, 0.4, 0.1)) -> list[dict[str, Any]]:
    """Return COCO results that find all of a split's objects, with ``scores`` in turn."""
    from headkd_ray.data.shards import ShardSet

    records = ShardSet.open(split).ground_truth()["annotations"]
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: own[key] for key in keys}, "score": scores[place % len(scores)]} for place, own in enumerate(records)]


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], arguments: list[str]) -> str:
    """Return the last message of a command that refuses its input."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.rindex("error: ") :]


def other_split(tmp_path: Path, classes: list[str], name: str = "other") -> str:
    """Return a prepared split of one image with boxes of other classes."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.jpg")
    coco = {
        "images": [{"id": 1, "file_name": f"{name}.jpg", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 32, 32], "area": 1024, "iscrowd": 0}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    (tmp_path / f"{name}.json").write_text(json.dumps(coco))
    prepare_split(str(tmp_path / f"{name}.json"), str(tmp_path), str(tmp_path / name))
    return str(tmp_path / name)
