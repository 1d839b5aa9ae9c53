"""Runs with predictions as their teacher, and with unlabelled images, from job to student."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headkd_ray.data.batch_stream import BatchMaker, local_stream
from headkd_ray.data.epoch_order import train_rows, train_windows
from headkd_ray.data.shards import ShardSet
from headkd_ray.data.training_set import training_set
from headkd_ray.distill import build_training_model
from headkd_ray.engine.local import train_here
from headkd_ray.errors import UserError
from headkd_ray.job import Job
from headkd_ray.teacher import soft_teacher
from headkd_ray.teacher.loading import teacher_of
from headkd_ray.teacher.verify import open_builder
from headkd_ray.train import train
from tests.support import TF_HEAD, micro_job, micro_predictions, micro_teacher

ONCE = {"epochs": 1, "milestones": []}
SHORT = {"eval": {"every_epochs": 1, "batch_size": 8}, "optim": ONCE}


@pytest.fixture
def predictions(tmp_path: Path, drawn_splits: dict[str, str]) -> Path:
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(micro_predictions(drawn_splits["val"])))
    return file


@pytest.fixture
def job_with(tmp_path: Path, drawn_splits: dict[str, str], predictions: Path) -> Callable[..., Job]:
    """Return a function that makes a job with predictions and unlabelled images."""

    def make(name: str = "run", **sections: Any) -> Job:
        teacher = {"kind": "predictions", "predictions": str(predictions)}
        splits = {**drawn_splits, "unlabelled": drawn_splits["val"]}
        return micro_job(tmp_path, splits, name, **{**SHORT, "teacher": teacher, **sections})

    return make


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_remembers_its_predictions(tmp_path: Path, job_with: Callable[..., Job], predictions: Path) -> None:
    """In the log, in the student, and in the result: with other predictions the run is another one."""
    result = train(job_with().replace({"log.report": True}))
    images = len(train_rows(training_set(job_with()).index, False))
    assert result["last"]["step"] == -(-images // 4)
    told = [record["note"] for record in records(tmp_path / "run") if "note" in record]
    assert any(" pseudo labels (score from 0.5) on " in note for note in told)
    meta = json.loads((Path(result["student"]) / "model.json").read_text())["meta"]["teacher"]
    assert meta["predictions"] == str(predictions) and len(meta["fingerprint"]) == 64
    assert f"taught by {predictions}" in (tmp_path / "run" / "report.html").read_text()
    assert result["data"]["teacher.predictions"] == meta["fingerprint"] and "data.unlabelled" in result["data"]
    predictions.write_text(predictions.read_text() + " ")
    with pytest.raises(UserError, match=r"teacher\.predictions: the run .* has ended, and learned from different predictions"):
        train(job_with())


def test_assistants_learn_from_pseudo_labels(job_with: Callable[..., Job]) -> None:
    """A dense one and an R-CNN, beside the student; also if an epoch shows a part of the images."""
    job = job_with(method="tf_head", distill={"assistants": TF_HEAD}).replace({"data.unlabelled_share": 0.5})
    losses: list[str] = []
    result = train_here(job, lambda record: losses.extend(record.get("losses", {})))
    assert result["last"]["step"] > 0 and {"loss_fcos_cls", "loss_rcnn_cls", "loss_cls"} <= set(losses)


@pytest.mark.parametrize("rois", ["student", "teacher"])
def test_a_network_distils_on_unlabelled_images(
    rois: str, tmp_path: Path, drawn_splits: dict[str, str], job_with: Callable[..., Job]
) -> None:
    """On a batch of unlabelled images alone, features are compared, and nothing is learnt from labels."""
    classes = ShardSet.open(drawn_splits["val"]).meta.classes
    teacher = {"checkpoint": micro_teacher(tmp_path / "teacher", classes)}
    distill = {"rois": rois, "roi_budget": 16, "warmup_steps": 0}
    job = job_with(method="head", teacher=teacher, distill=distill)
    shards = training_set(job)
    network = teacher_of(job, classes)
    torch.manual_seed(0)
    model = build_training_model(job, len(classes), network, steps_per_epoch=1).train()
    rows = train_rows(shards.index, False)[-8:]
    windows = train_windows(shards.index, rows, seed=0, rank=0, world_size=1, batch_size=8, window=8, epochs=1)
    (batch,) = local_stream(shards, windows, BatchMaker(job.data, 0, train=True))
    assert not batch.background.any()
    if rois == "teacher":
        batch = replace(batch, targets=soft_teacher(job, network)(batch))
    losses = {name: float(loss.detach()) for name, loss in model(batch, 1, torch.Generator().manual_seed(0)).items()}
    compared = {"loss_akd_1", "loss_akd_2", "loss_ckd"}
    assert {name for name, loss in losses.items() if loss != 0} == compared, losses


def test_a_cache_holds_the_views_of_unlabelled_images(
    tmp_path: Path, drawn_splits: dict[str, str], job_with: Callable[..., Job]
) -> None:
    classes = ShardSet.open(drawn_splits["val"]).meta.classes
    teacher = {
        "checkpoint": micro_teacher(tmp_path / "teacher", classes),
        "placement": "cache",
        "cache": {"path": str(tmp_path / "cache")},
    }
    job = job_with(method="akd", teacher=teacher, distill={"rois": "teacher", "roi_budget": 8})
    builder = open_builder(job)
    assert {key for key in builder.cache.recipe if "contents" in key} == {"data.train (contents)", "data.unlabelled (contents)"}
    builder.cache.begin()
    for unit in builder.cache.units():
        builder.build(*unit)
    builder.cache.check()
    shards = builder.cache.shards
    rows = train_rows(shards.index, False)[-6:]
    windows = list(train_windows(shards.index, rows, seed=0, rank=0, world_size=1, batch_size=6, window=6, epochs=1))
    (batch,) = local_stream(shards, windows, BatchMaker(job.data, 0, train=True, cache=builder.cache))
    live = builder.teacher(batch)
    assert batch.targets is not None and batch.targets.valid.all() and not batch.targets.truth.any()
    torch.testing.assert_close(batch.targets.boxes, live.boxes, rtol=0, atol=0.01)
    torch.testing.assert_close(batch.targets.taps, live.taps, rtol=0.01, atol=0.01)
