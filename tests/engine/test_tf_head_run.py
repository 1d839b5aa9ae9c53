"""In a TF-HEAD run CKD stops at its epoch, even after a resume, and only the student is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headkd_ray.engine.local import train_here
from headkd_ray.job import Job
from headkd_ray.train import train
from tests.support import TF_HEAD, assert_same_weights, micro_job, student_weights


def job(storage: Path, splits: dict[str, str], name: str, **sections: Any) -> Job:
    keys = {
        "checkpoint": {"every_steps": 3},
        "distill": {"assistants": TF_HEAD, "ckd_epochs": 1, "warmup_steps": 2},
        **sections,
    }
    return micro_job(storage, splits, name, method="tf_head", **keys)


class PowerCutError(Exception):
    pass


def test_ckd_stops_at_its_epoch_also_when_the_run_was_cut_there(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    whole: list[dict[str, Any]] = []
    expected = train(job(tmp_path, drawn_splits, "whole"), whole.append)
    steps_per_epoch = whole[-1]["steps"] // 2
    cut_at = steps_per_epoch + 2  # resumes from the checkpoint at the end of epoch 1, or just after it

    def cut(record: dict[str, Any]) -> None:
        if record["step"] >= cut_at:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train_here(job(tmp_path, drawn_splits, "cut"), cut)
    resumed: list[dict[str, Any]] = []
    result = train(job(tmp_path, drawn_splits, "cut"), resumed.append)
    assert 1 < resumed[0]["step"] <= cut_at, "did not resume"
    assert_same_weights(student_weights(expected), student_weights(result))

    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    for record in (entry for entry in log if "losses" in entry):
        # The loss of record n was computed at step n - 1, counted from 0.
        stopped, losses = record["step"] > steps_per_epoch, record["losses"]
        assert (losses["loss_fcos_ckd"] == 0) == (losses["loss_rcnn_ckd"] == 0) == (stopped or record["step"] == 1)
        assert (losses["loss_rcnn_cls"] > 0) == (record["step"] > 1)


def test_only_the_student_is_exported(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    alone = train(micro_job(tmp_path, drawn_splits, "alone", optim={"epochs": 1, "milestones": []}), lambda record: None)
    sections = {"optim": {"epochs": 1, "milestones": []}, "distill": {"assistants": TF_HEAD}}
    taught = train(job(tmp_path, drawn_splits, "taught", **sections), lambda record: None)
    assert student_weights(taught).keys() == student_weights(alone).keys()
