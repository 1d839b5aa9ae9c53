"""``python -m headkd_ray.plan`` as a user runs it: real steps are timed, and nothing is started or written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from headkd_ray import plan
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from tests.support import MICRO_STUDENT, TF_HEAD, micro_job
from tests.teacher.test_cache_command import teacher_in


def write(folder: Path, splits: dict[str, str], **sections: Any) -> str:
    job = micro_job(folder / "runs", splits, **sections)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return str(folder / "job.yaml")


def test_a_plan_with_prices_for_some_numbers_of_workers(
    tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"checkpoint": teacher_in(tmp_path, drawn_splits, 1), "placement": "cache"}
    job = write(
        tmp_path, drawn_splits, method="head", teacher=teacher, distill={"rois": "teacher", "roi_budget": 16}, data={"views": 1}
    )
    before = sorted(tmp_path.rglob("*"))
    assert plan.main([job, "--workers", "1", "2", "--price-per-cpu-hour", "0.5", "--steps", "2"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for part in ("a micro-batch: teacher", "money", "CPU-h", "bottleneck", "Model: each of k workers", "A cache of 1 views"):
        assert part in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("supervised", {}),
        ("tf_head", {"distill": {"assistants": TF_HEAD}, "optim": {"accumulate": 2, "ema": 0.9, "precision": "bf16"}}),
        ("head", {"teacher": {"placement": "pool", "pool": {"actors": [1, 2]}}, "cluster": {"workers": 2}}),
        ("akd", {"distill": {"rois": "teacher"}}),
        ("copy_only", {}),
        ("assist", {"student": {**MICRO_STUDENT, "checkpoint": "student"}}),
    ],
)
def test_every_kind_of_job_can_be_planned(
    method: str, sections: dict[str, Any], tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    if method in ("head", "akd", "copy_only"):
        teacher = {"checkpoint": teacher_in(tmp_path, drawn_splits, 1), **sections.get("teacher", {})}
        sections = {**sections, "teacher": teacher}
    if method == "assist":
        classes = ShardSet.open(drawn_splits["train"]).meta.classes
        spec = micro_job(tmp_path, drawn_splits).student
        save_detector(tmp_path / "student", build_detector(spec, len(classes)), classes)
        sections["student"]["checkpoint"] = str(tmp_path / "student")
    assert plan.main([write(tmp_path, drawn_splits, method=method, **sections), "--steps", "1"]) == 0
    assert "bottleneck" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    job = write(tmp_path, drawn_splits)
    with pytest.raises(SystemExit) as caught:
        plan.main([job, "data.train=nowhere"])
    assert caught.value.code == 2 and "nowhere: the data set is missing" in capsys.readouterr().err
    for wrong in (["--gbps", "0"], ["--price-per-gpu-hour", "-1"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as caught:
            plan.main([job, *wrong])
        assert caught.value.code == 2


@pytest.mark.slow
def test_ray_is_not_needed(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = write(tmp_path, drawn_splits, cluster={"workers": 4})
    script = "import sys; sys.modules['ray'] = None; from headkd_ray import plan; plan.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, job, "--steps", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
