"""Training, checkpoints, evaluation and prediction on the GPU."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from headkd_ray.cache import build
from headkd_ray.data.batch import TENSORS, Batch
from headkd_ray.data.images import decode
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors.weights import load_checkpoint, save_detector
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.evaluation import evaluate
from headkd_ray.engine.evaluation import predict as predict_all
from headkd_ray.engine.inference import detect_images, view_spec
from headkd_ray.engine.local import train_here
from headkd_ray.engine.loop import on_device
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.errors import DeviceMemoryError
from headkd_ray.evaluate import evaluate_checkpoint
from headkd_ray.job import Job
from headkd_ray.predict import predict
from headkd_ray.profiling.batch_size import largest_batch_size
from headkd_ray.teacher.verify import open_builder, verify
from headkd_ray.train import train
from tests.support import micro_job, micro_teacher, start_training, student_weights, wait_for_lines

pytestmark = pytest.mark.gpu
HERE = torch.device("cpu")
EPOCH = 11
"""Steps per epoch of a micro job."""
Losses = dict[int, dict[str, float]]
"""Step -> losses by name."""


def job_on(device: torch.device, storage: Path, splits: dict[str, str], name: str, **sections: Any) -> Job:
    """Return a micro job of two epochs on the device, with a checkpoint every other step."""
    cluster = {"gpus_per_worker": int(device.type == "cuda")}
    return micro_job(storage, splits, name, cluster=cluster, checkpoint={"every_steps": 2}, **sections)


class InterruptedRunError(Exception):
    """Raised from a log callback to interrupt a run."""


def losses_of(job: Job, until: int | None = None) -> Losses:
    """Return the losses of a run, which is interrupted after step ``until``."""
    losses: Losses = {}

    def tell(record: dict[str, Any]) -> None:
        if "losses" in record:
            losses[record["step"]] = record["losses"]
            if record["step"] == until:
                raise InterruptedRunError

    if until is None:
        train_here(job, tell)
    else:
        with pytest.raises(InterruptedRunError):
            train_here(job, tell)
    return losses


@pytest.fixture(scope="module")
def whole(device: torch.device, drawn_splits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return losses and result of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    losses = losses_of(job_on(device, folder, drawn_splits, "whole", optim={"ema": 0.9}))
    return {"losses": losses, "result": json.loads((folder / "whole" / "result.json").read_text())}


def assert_close_losses(ours: Losses, whole: Losses, first: float, later: float) -> None:
    """Compare losses by relative difference: ``first`` for the first step of ``ours``, ``later`` for the others.

    The later steps' weights have been moved apart by rounding.
    """
    begin = min(ours)
    for step, losses in ours.items():
        for name, loss in losses.items():
            assert loss == pytest.approx(whole[step][name], rel=first if step == begin else later, abs=1e-4), (
                f"{name}, step {step}"
            )


def test_a_run_tells_the_gpu_memory_that_it_takes(cuda: torch.device, tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """A micro model takes tens of MiB; the process's own memory would be thousands."""
    records: list[dict[str, Any]] = []
    torch.cuda.reset_peak_memory_stats(cuda)
    train_here(job_on(cuda, tmp_path, drawn_splits, "run", optim={"epochs": 1, "milestones": []}), records.append)
    assert 1 < records[0]["memory_mib"] < 300


def test_the_largest_batch_is_found_on_the_gpu(cuda: torch.device, tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """A run takes the most that it may have, as that fits; in a hundredth of the GPU, which is real, less fits."""
    sections: dict[str, Any] = {"data": {"batch_size": 4, "max_batch_size": 16}, "optim": {"lr_batch": 4}}
    train(job_on(cuda, tmp_path, drawn_splits, "found", **sections))
    assert json.loads((tmp_path / "found" / "job.json").read_text())["data"]["batch_size"] == 16
    large = {"data.short_side": (512, 512), "data.long_side": 512, "data.batch_size": 1, "data.max_batch_size": 42}
    job = job_on(cuda, tmp_path, drawn_splits, "narrow", **sections).replace(large)
    assert 1 <= largest_batch_size(job, share=0.01) < largest_batch_size(job) == 42


def test_checkpoints_go_from_the_gpu_to_the_cpu_and_back(
    whole: dict[str, Any], drawn_splits: dict[str, str], device: torch.device, tmp_path: Path
) -> None:
    """One run starts on the device, continues on the CPU and ends on the device, with the losses of the run that stayed.

    They agree to 1e-3 in the first step after each move (other kernels, the same weights), to 5 % later.
    """
    moves = [(device, 5), (HERE, 9), (device, None)]
    for place, until in moves:
        ours = losses_of(job_on(place, tmp_path, drawn_splits, "moved", optim={"ema": 0.9}), until)
        assert_close_losses(ours, whole["losses"], first=1e-3, later=5e-2)
    assert max(ours) == 2 * EPOCH
    moved = json.loads((tmp_path / "moved" / "result.json").read_text())
    student, wanted = student_weights(moved), student_weights(whole["result"])
    for name, tensor in wanted.items():
        torch.testing.assert_close(student[name].float(), tensor.float(), rtol=0.1, atol=0.02)


def test_a_run_that_was_killed_goes_on(
    whole: dict[str, Any], drawn_splits: dict[str, str], device: torch.device, tmp_path: Path
) -> None:
    """On the CPU the losses are the same bit for bit.

    On a GPU gradients are summed in no fixed order (RoIAlign, indexing), so that two runs drift apart: to 1e-4 in the first
    step after the kill, to 5 % later.
    """
    killed = job_on(device, tmp_path, drawn_splits, "killed", optim={"ema": 0.9})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    process = start_training(tmp_path / "job.yaml")
    wait_for_lines(tmp_path / "killed" / "log.jsonl", 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists(), "killed too late: the run had ended"
    resumed = losses_of(killed)
    assert 1 < min(resumed) and max(resumed) == 2 * EPOCH
    if device == HERE:
        assert resumed == {step: losses for step, losses in whole["losses"].items() if step in resumed}
    assert_close_losses(resumed, whole["losses"], first=1e-4, later=5e-2)


def test_copies_are_pinned_and_whole(drawn_splits: dict[str, str], device: torch.device, tmp_path: Path) -> None:
    """Every batch of an epoch equals the CPU's, even while kernels that take longer than a copy are in flight."""
    job = job_on(device, tmp_path, drawn_splits, "run")
    splits = ShardSet.open(job.data.train), ShardSet.open(job.data.val)
    streams = Streams(job, Distributed(0, 1, device), *splits, decode_here)
    with streams.train(first=0) as here, streams.train(first=0) as there:
        busy = torch.zeros(2000, 2000, device=device)
        for number, (batch, copied) in enumerate(zip(here, on_device(there, device), strict=True)):
            busy = (busy @ busy).clamp(-1, 1)
            assert all(getattr(copied, name).device == device for name in TENSORS)
            assert all(torch.equal(getattr(copied, name).cpu(), getattr(batch, name)) for name in TENSORS), f"batch {number}"
            if device.type == "cuda":
                pinned = batch.pin()
                assert isinstance(pinned, Batch) and all(getattr(pinned, name).is_pinned() for name in TENSORS)
    assert number == 2 * EPOCH - 1


def test_out_of_memory_names_the_keys_to_lower(cuda: torch.device, drawn_splits: dict[str, str], tmp_path: Path) -> None:
    """The error is a real one, within half a percent of the GPU's memory."""
    job = job_on(cuda, tmp_path, drawn_splits, "large", data={"short_side": [1500, 1500], "long_side": 2000, "batch_size": 16})
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.005, cuda)
    try:
        with pytest.raises(DeviceMemoryError) as caught:
            train_here(job, lambda record: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    message = str(caught.value)
    assert message.startswith(f"run large, training: out of memory on {torch.cuda.get_device_name(cuda)} (")
    assert "lower data.batch_size (16) and raise optim.accumulate (1)" in message and "data.short_side (1500)" in message


@pytest.fixture(scope="module")
def lively(drawn_splits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a detector that finds something everywhere."""
    folder = tmp_path_factory.mktemp("lively")
    loaded = load_checkpoint(micro_teacher(folder / "teacher", ShardSet.open(drawn_splits["val"]).meta.classes))
    view = {"eval_short_side": 64, "long_side": 96, "pad": 32}  # as in micro_job
    save_detector(folder / "lively", loaded.detector, loaded.classes, {"data": view})
    return str(folder / "lively")


def test_evaluation_is_the_cpu_s(lively: str, drawn_splits: dict[str, str], device: torch.device, tmp_path: Path) -> None:
    """Scores in every image and AP are the same, and so is the AP of the command, which takes a GPU if there is one."""
    job = job_on(device, tmp_path, drawn_splits, "run")
    splits = ShardSet.open(job.data.train), ShardSet.open(job.data.val)
    scored, found = [], []
    for place in (device, HERE):
        distributed, detector = Distributed(0, 1, place), load_checkpoint(lively).detector.to(place)
        streams = Streams(job, distributed, *splits, decode_here)
        with streams.val() as batches:
            found.append(predict_all(detector, batches, place, splits[1].meta.category_ids))
        with streams.val() as batches:
            scored.append(evaluate(detector, batches, distributed, splits[1].ground_truth(), streams.scoring))
    assert found[0].keys() == found[1].keys() and sum(map(len, found[1].values())) > 100, "nothing was compared"
    for image_id, entries in found[1].items():
        assert scores(found[0][image_id]) == pytest.approx(scores(entries), rel=1e-3)
    assert scored[0].AP == pytest.approx(scored[1].AP, abs=0.01) and scored[0].images == 10
    assert evaluate_checkpoint(lively, drawn_splits["val"], batch_size=8).AP == pytest.approx(scored[1].AP, abs=0.1)


def test_prediction_finds_what_the_cpu_finds(lively: str, drawn_splits: dict[str, str], tmp_path: Path) -> None:
    """Compare the command, which takes a GPU if there is one, with the same on the CPU."""
    images = sorted((Path(drawn_splits["val"]).parent / "images").glob("*.jpg"))[:3]
    result = json.loads(Path(predict(lively, images, tmp_path / "found", score=0.0).result).read_text())
    loaded = load_checkpoint(lively)
    pixels = [decode(path.read_bytes()) for path in images]
    wanted = detect_images(loaded.detector, pixels, view_spec(loaded.meta), range(1, 100), HERE)
    for number, entries in enumerate(wanted, start=1):
        found = [annotation for annotation in result["annotations"] if annotation["image_id"] == number]
        assert len(entries) > 10 and scores(found) == pytest.approx(scores(entries), rel=1e-3)


def scores(entries: list[dict[str, Any]]) -> list[float]:
    """Return the ten highest scores, best first."""
    return sorted((entry["score"] for entry in entries), reverse=True)[:10]


def test_a_run_from_a_cache_that_was_built_on_the_device(
    drawn_splits: dict[str, str], device: torch.device, tmp_path: Path
) -> None:
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    teacher = {"checkpoint": micro_teacher(tmp_path / "teacher", classes), "placement": "cache"}
    teacher["cache"] = {"path": str(tmp_path / "cache")}
    distill = {"rois": "teacher", "roi_budget": 8, "warmup_steps": 2}
    job = job_on(device, tmp_path, drawn_splits, "cached", method="head", teacher=teacher, distill=distill, data={"views": 1})
    builder = open_builder(job, device)
    build(job, builder, lambda unit, size: None)
    agreement = verify(open_builder(job, HERE), sample=12)
    assert agreement.cosine > 0.999 and agreement.views == 12
    losses = losses_of(job)
    assert max(losses) == 2 * EPOCH and {"loss_akd_1", "loss_ckd"} <= losses[EPOCH].keys()
