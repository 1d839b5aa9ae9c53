"""Checks before a run: they change nothing, and know a run that was started otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.engine.preflight import preflight
from headkd_ray.engine.run import open_run
from headkd_ray.errors import UserError
from tests.support import MICRO_TEACHER, micro_job


def test_a_sound_job_passes_and_nothing_is_changed(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    (tmp_path / "old").mkdir()
    before = torch.get_rng_state()
    preflight(micro_job(tmp_path / "old" / "new", drawn_splits))
    assert torch.equal(torch.get_rng_state(), before), "the run's first random numbers would depend on the check"
    assert not list((tmp_path / "old").iterdir())


def test_the_teacher_is_checked_although_the_data_is_missing(tmp_path: Path) -> None:
    splits = {"train": str(tmp_path / "no1"), "val": str(tmp_path / "no2")}
    spec = micro_job(tmp_path, splits, student=MICRO_TEACHER).student
    save_detector(tmp_path / "teacher", build_detector(spec, 2), ("cat", "dog"))
    job = micro_job(tmp_path / "runs", splits, method="fitnet", teacher={"checkpoint": str(tmp_path / "teacher")})
    with pytest.raises(UserError) as caught:
        preflight(job)
    assert len(caught.value.problems) == 3
    assert "needs a retinanet teacher, this one is a faster_rcnn" in caught.value.problems[2]


def test_a_student_that_timm_does_not_know_is_refused(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits)
    job = job.replace({"student.backbone.name": "resnet10tt"})
    with pytest.raises(UserError, match="resnet10tt"):
        preflight(job)


def test_a_run_of_this_name_was_started_with_other_keys(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """What a run learns is settled when it starts; where it runs and what it tells is not. All differences are named."""
    open_run(micro_job(tmp_path, drawn_splits))
    preflight(
        micro_job(tmp_path, drawn_splits, log={"every_steps": 7}, checkpoint={"every_steps": 3}, cluster={"data_cpus": 2})
    )
    with pytest.raises(UserError) as caught:
        preflight(micro_job(tmp_path, drawn_splits, optim={"lr": 0.5}, run={"seed": 1}))
    first, second = caught.value.problems
    assert first.startswith(f"optim.lr: the run {tmp_path}/run was started with 0.01, now 0.5") and "another run.name" in first
    assert second.startswith("run.seed: ")


def test_a_run_of_an_older_version_lacks_newer_keys(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """They have their default there; a key that is no more is told."""
    job = micro_job(tmp_path, drawn_splits)
    file = tmp_path / "run" / "job.json"
    open_run(job)
    keys = json.loads(file.read_text())
    del keys["distill"]["fitnet_levels"]
    file.write_text(json.dumps(keys))
    preflight(job)
    with pytest.raises(UserError, match=r"distill\.fitnet_levels: the run .* was started with 5, now 3"):
        preflight(micro_job(tmp_path, drawn_splits, distill={"fitnet_levels": 3}))
    file.write_text(json.dumps({**keys, "distill": {**keys["distill"], "gone": 7}}))
    with pytest.raises(UserError, match=r"distill\.gone: the run .* was started with 7, now None"):
        preflight(job)


def test_another_kind_of_student_under_the_same_name(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    open_run(micro_job(tmp_path, drawn_splits))
    with pytest.raises(UserError, match=r"student\.kind: .*'retinanet', now 'faster_rcnn'"):
        preflight(micro_job(tmp_path, drawn_splits, student=MICRO_TEACHER))


def test_without_ray_and_with_it_are_not_the_same_run(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Each keeps its checkpoints in its own way: the other would not find them, and start over."""
    open_run(micro_job(tmp_path, drawn_splits))
    with pytest.raises(UserError, match=r"cluster\.workers: the run .* was started with 0, now 2"):
        preflight(micro_job(tmp_path, drawn_splits, cluster={"workers": 2}))
    (tmp_path / "run" / "result.json").write_text("{}")  # ended: nothing to resume
    preflight(micro_job(tmp_path, drawn_splits, cluster={"workers": 2}))
