"""The commands of docs/walkthrough.md in an empty folder, with only the wheel: photos, teacher, student, file, video."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from headkd_ray.data.synthetic import draw_dataset
from tests.data.format_files import yolo_of_coco
from tests.distill.test_start import torchvision_model
from tests.support import MICRO_STUDENT, run_installed

PAGE = (Path(__file__).parents[1] / "docs" / "walkthrough.md").read_text(encoding="utf-8")


def commands_of(text: str) -> list[list[str]]:
    """Return the arguments of each headkd command in the text's blocks."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("headkd ")]


COMMANDS, SMALL = map(commands_of, PAGE.split("## A YOLO data set"))
COCO_FILE = "fasterrcnn_resnet50_fpn_coco.pth"

FEW = {"pre_nms": 50, "post_nms": 20}
MICRO: dict[str, dict[str, Any]] = {
    "data": {"short_side": [64, 64], "long_side": 96, "eval_short_side": 64, "batch_size": 4},
    "optim": {"epochs": 1, "milestones": [], "warmup_steps": 2, "lr": 0.001, "lr_batch": None},
    "log": {"every_steps": 1, "tensorboard": False},
    "eval": {"every_epochs": 1, "batch_size": 4},
    "cluster": {"workers": 0, "gpus_per_worker": 0},
}
"""What replaces keys of both copied jobs."""
OF_JOB: dict[str, dict[str, Any]] = {
    "teacher_coco": {
        "student": {
            "backbone": {"name": "resnet18"},
            "neck": {"channels": 32},
            "rpn": {"train_proposals": FEW, "test_proposals": FEW},
        },
    },
    "head": {"student": {**MICRO_STUDENT, "neck": {"channels": 32}}, "distill": {"warmup_steps": 2}},
}
"""What also replaces keys of each; the file in COCO_FILE's place has the teacher's widths."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with what the page says that the reader has: photos of own classes, a COCO detector, a video."""
    drawn = draw_dataset(tmp_path / "drawn", train=12, val=4)
    home = tmp_path / "empty"
    home.mkdir()
    drawn.images.rename(home / "photos")
    for split, source in (("train", drawn.train), ("val", drawn.val)):
        coco = json.loads(source.read_text())
        for category, name in zip(coco["categories"], ("zebra", "person"), strict=False):
            category["name"] = name
        (home / f"{split}.json").write_text(json.dumps(coco))
    torch.manual_seed(0)
    state = torchvision_model("faster_rcnn").state_dict()  # 91 outputs
    torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, home / COCO_FILE)
    return home


def made_micro(job: Path) -> None:
    """Make a copied job micro: the same method on the same places."""
    keys = merged(merged(yaml.safe_load(job.read_text()), MICRO), OF_JOB[job.stem])
    keys["student"]["backbone"]["weights"] = "none"
    job.write_text(yaml.safe_dump(keys))


def merged(keys: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``keys`` with ``changes`` at any depth."""
    inner = {key: merged(keys[key], value) for key, value in changes.items() if isinstance(value, dict) and key in keys}
    return {**keys, **changes, **inner}


def film(place: Path) -> None:
    """Write a video of a few frames."""
    av = pytest.importorskip("av")
    with av.open(str(place), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(3):
            frame = np.full((64, 96, 3), 60 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_the_page_names_every_step_and_its_jobs_are_sound(wheel: Path, folder: Path) -> None:
    """The quick part: the jobs are copied and checked with the page's overrides, and the photos prepared."""
    assert [command[0] for command in COMMANDS] == ["jobs", "prepare", "prepare", "train", "train", "export", "predict"]
    checked = [[*command, "--print-config"] for command in COMMANDS if command[0] == "train"]
    done = run_installed(wheel, folder, *COMMANDS[:3], *checked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote jobs/teacher_coco.yaml" in done.stdout and f"\n  checkpoint: {COCO_FILE}" in done.stdout
    assert (folder / "data/mine/val/index.parquet").is_file()


@pytest.mark.slow
def test_the_commands_of_the_page_run_one_after_another(wheel: Path, folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    film(folder / "clip.mp4")
    copied = run_installed(wheel, folder, COMMANDS[0])
    assert copied.returncode == 0, copied.stderr
    for job in OF_JOB:
        made_micro(folder / "jobs" / f"{job}.yaml")
    # The micro jobs train in the command's own process; the page's GPU is not here.
    commands = [["cluster.workers=0" if word == "cluster.workers=1" else word for word in command] for command in COMMANDS[1:]]
    done = run_installed(wheel, folder, *commands)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (folder / "runs/teacher_coco/log.jsonl").read_text()
    assert "its outputs for 2 of 8 classes are taken: 'zebra', 'person'" in log
    found = json.loads((folder / "found/detections.json").read_text())
    assert len(found["images"]) == 3 and {"zebra", "person"} < {category["name"] for category in found["categories"]}
    assert (folder / "found/0001_clip.mp4").stat().st_size > 0
    assert (folder / "exported/model.onnx").is_file() and "runs/teacher_coco/student" in done.stdout


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Return a folder with a YOLO data set."""
    drawn = draw_dataset(tmp_path / "drawn", train=16, val=6)
    home = tmp_path / "home"
    yolo_of_coco(home, {"train": (drawn.train, drawn.images), "val": (drawn.val, drawn.images)})
    return home


def test_the_small_way_names_every_step_and_its_jobs_find_its_data(wheel: Path, yolo: Path) -> None:
    assert [command[0] for command in SMALL] == [
        *("jobs", "prepare", "prepare", "train", "train", "train", "compare", "export", "predict")
    ]
    checked = [[*command, "--print-config"] for command in SMALL if command[0] == "train"]
    done = run_installed(wheel, yolo, *SMALL[:3], *checked)
    assert done.returncode == 0, done.stdout + done.stderr
    outs = [command[command.index("--out") + 1] for command in SMALL[1:3]]
    for key, out in zip(("train", "val"), outs, strict=True):
        assert done.stdout.count(f"\n  {key}: {out}\n") == 3 and (yolo / out / "index.parquet").is_file()


@pytest.mark.slow
def test_the_small_way_from_a_yolo_folder_to_pictures(wheel: Path, yolo: Path) -> None:
    pytest.importorskip("onnxruntime")
    short = ["optim.epochs=1", "optim.milestones=[]", "cluster.workers=0"]
    done = run_installed(wheel, yolo, *([*command, *(short if command[0] == "train" else [])] for command in SMALL))
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("runs/quickstart/head/report.html", "comparison/compare.html"):
        assert "</html>" in (yolo / page).read_text()
    assert len(json.loads((yolo / "found_small/detections.json").read_text())["images"]) == 6
