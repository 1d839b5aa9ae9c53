"""The training loop: details of a run that must not affect its result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from headkd_ray.detectors import CascadeRCNN
from headkd_ray.detectors.weights import load_checkpoint
from headkd_ray.distill import build_training_model
from headkd_ray.engine.loop import restore, save
from headkd_ray.engine.step import build_learner
from headkd_ray.errors import CheckpointError
from headkd_ray.train import train
from tests.detectors.micro import gfl_spec
from tests.support import MICRO_TEACHER, assert_same_weights, micro_job, student_weights

ONE_EPOCH = {"epochs": 1, "milestones": []}


def test_blank_images_of_idle_steps_stay_out_of_batchnorm(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """42 images in batches of 4 are 11 batches; two per step make 12, the last one blank."""
    records: list[dict] = []
    result = train(micro_job(tmp_path, drawn_splits, optim={**ONE_EPOCH, "accumulate": 2}), records.append)
    assert result["last"]["step"] == 6
    seen = {name: int(value) for name, value in student_weights(result).items() if name.endswith("num_batches_tracked")}
    assert seen and set(seen.values()) == {11}


def test_a_run_killed_after_its_last_checkpoint_ends_as_if_not(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """All steps are trained and only the export is missing: the next start does just that and returns the same result."""
    job = micro_job(tmp_path, drawn_splits, optim=ONE_EPOCH)
    result = train(job, lambda record: None)
    weights = student_weights(result)
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "student")
    records: list[dict] = []
    assert train(job, records.append) == result and not records
    assert_same_weights(student_weights(result), weights)


def test_a_training_state_of_a_network_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    """As GFL's, whose tower convs had biases beside the norm before there was ``conv_bias``."""
    splits = {"train": "none", "val": "none"}
    older, newer = (
        build_learner(job, build_training_model(job, 3, None, 10), torch.device("cpu"), 2, 10)
        for job in (micro_job(tmp_path, splits, student=gfl_spec(conv_bias=biased).model_dump()) for biased in (True, False))
    )
    save(older, tmp_path, {})
    with pytest.raises(CheckpointError, match=r"at step 0 was written by an older headkd_ray, .* cannot resume"):
        restore(newer, tmp_path, {})
    restore(older, tmp_path, {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cascade_trains_evaluates_and_is_exported(precision: str, tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    records: list[dict] = []
    student = {**MICRO_TEACHER, "kind": "cascade_rcnn"}
    job = micro_job(tmp_path, drawn_splits, student=student, optim={**ONE_EPOCH, "precision": precision})
    result = train(job, records.append)
    stages = {f"loss_roi_s{i}_{name}" for i in range(3) for name in ("cls", "box")}
    assert records[0]["losses"].keys() == {"loss_rpn_cls", "loss_rpn_box", *stages, "total"}
    assert result["last"]["step"] == 11
    loaded = load_checkpoint(tmp_path / "run" / "student")
    assert isinstance(loaded.detector, CascadeRCNN) and loaded.detector.spec == job.student
