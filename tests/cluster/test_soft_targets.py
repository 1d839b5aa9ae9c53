"""Soft targets on a real Ray cluster: pool and cache give the inline teacher's, and a killed teacher loses nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import processes
from torch import Tensor

from headkd_ray.cache import build
from headkd_ray.cluster.ray_stream import decode_on_ray
from headkd_ray.data.batch import Batch
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.distill import build_training_model
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.loop import soft_targets
from headkd_ray.engine.streams import Streams
from headkd_ray.errors import ClusterError
from headkd_ray.job import Job
from headkd_ray.teacher.loading import load_teacher
from headkd_ray.teacher.verify import open_builder
from headkd_ray.train import train
from tests.detectors.hf_micro import hf_folder
from tests.detectors.micro import fcos_spec
from tests.support import assert_same_weights, micro_job, micro_teacher, student_weights

pytestmark = pytest.mark.usefixtures("ray_cluster")

POOL = {"actors": [1, 1], "cpus": 1}


@pytest.fixture(params=["ours", pytest.param("transformers", marks=pytest.mark.slow)])
def any_teacher(request: pytest.FixtureRequest, teacher: str, drawn_splits: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Return the sections of a job that name a teacher: the micro Faster R-CNN, or a DETR of transformers."""
    if request.param == "ours":
        return {"teacher": {"checkpoint": teacher}, "distill": {}, "optim": {"epochs": 2}}
    pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "detr", "rt_detr_v2", ShardSet.open(drawn_splits["train"]).meta.classes)
    assistant = {"fc_channels": 16, "pool": 3, "sampler": {"size": 16}}
    return {
        "teacher": {"kind": "transformers", "checkpoint": str(folder)},
        "distill": {"copy_head": False, "assistant": assistant, "distance": "pearson"},
        "optim": {"epochs": 1, "milestones": []},
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> str:
    """Return the folder of a micro Faster R-CNN with random weights."""
    return micro_teacher(tmp_path_factory.mktemp("teacher"), ShardSet.open(drawn_splits["train"]).meta.classes)


def job_of(
    folder: Path,
    splits: dict[str, str],
    teacher: str | dict[str, Any],
    placement: str,
    name: str = "run",
    rois: str = "teacher",
    **keys: Any,
) -> Job:
    own = teacher if isinstance(teacher, dict) else {"teacher": {"checkpoint": teacher}, "distill": {}}
    kept = {**own["teacher"], "placement": placement, "pool": POOL, "cache": {"path": str(folder / "cache")}}
    distill = {"rois": rois, "roi_budget": 24, "warmup_steps": 4, **own["distill"]}
    return micro_job(folder, splits, name, method="head", teacher=kept, distill=distill, **keys)


def losses_of(job: Job, epochs: int = 2) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Yield the batches of the job's stream through Ray Data, with the losses of its untrained student on them."""
    distributed = Distributed.alone(use_gpu=False)
    teacher_job = job if job.teacher is not None and job.teacher.placement == "pool" else None
    sets = ShardSet.open(job.data.train), ShardSet.open(job.data.val)
    streams = Streams(job, distributed, *sets, decode_on_ray(job.cluster, teacher_job))
    own = load_teacher(job, sets[0].meta.classes)
    assert own is not None
    torch.manual_seed(0)
    model = (
        build_training_model(job, len(sets[0].meta.classes), own.detector, steps_per_epoch=10)
        .train()
        .to(memory_format=torch.channels_last)
    )
    answer, cache = soft_targets(job, sets[0], own.detector, distributed.device)
    with streams.train(first=0, cache=cache) as batches:
        for batch in batches:
            with torch.no_grad():
                if answer is not None:
                    batch = replace(batch, targets=answer(batch))
                losses = model(batch, 100, torch.Generator().manual_seed(batch.step))
            yield batch, losses


def test_inline_pool_and_cache_agree(tmp_path: Path, drawn_splits: dict[str, str], any_teacher: dict[str, Any]) -> None:
    """Inline and pool agree exactly, although the pool's teacher is killed on the way, which is counted and loses no batch.

    The cache has nearly the same losses, because its features have 16 bits.
    """
    one_cpu = {"workers": 1, "data_cpus": 1}
    keys = {"cluster": one_cpu, "optim": any_teacher["optim"]}
    jobs = {name: job_of(tmp_path, drawn_splits, any_teacher, name, **keys) for name in ("inline", "pool", "cache")}
    builder = open_builder(jobs["cache"])
    build(jobs["cache"], builder, lambda unit, size: None)  # by an actor pool, because cluster.workers is 1
    builder.cache.check()
    restarts: list[int] = []
    killed: list[int] = []
    threading.Thread(target=kill_first, args=("ray::MapWorker", killed), daemon=True).start()
    for inline, pool, cache in zip(*(losses_of(jobs[name]) for name in ("inline", "pool", "cache")), strict=True):
        batch, expected = inline
        targets = batch.targets
        assert targets is not None and targets.valid.any() and expected["loss_akd_1"] > 0 and expected["loss_ckd"] > 0
        for other, (said, losses) in (("pool", pool), ("cache", cache)):
            assert torch.equal(said.image_ids, batch.image_ids) and torch.equal(said.views, batch.views)
            theirs = said.targets
            assert theirs is not None and losses.keys() == expected.keys() and torch.equal(theirs.truth, targets.truth)
            if other == "pool":
                assert all(torch.equal(one, two) for one, two in zip(theirs, targets, strict=True))
                assert all(torch.equal(loss, expected[name]) for name, loss in losses.items())
            else:  # the views were batched otherwise, so a convolution may round differently
                torch.testing.assert_close(theirs.boxes, targets.boxes, rtol=0, atol=1e-3)
                torch.testing.assert_close(theirs.taps, targets.taps, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(losses, expected, rtol=2e-3, atol=1e-6)
        restarts.append(pool[0].teacher_restarts)
    assert len(restarts) == any_teacher["optim"]["epochs"] * 11 and killed and restarts[-1] == 1


def kill_first(title: str, killed: list[int]) -> None:
    """Kill the first process of this session with such a title as soon as there is one."""
    while not killed:
        for pid in processes(title)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_pool_answers_about_the_student_s_rois(tmp_path: Path, drawn_splits: dict[str, str], teacher: str) -> None:
    """The pool gives exactly what an inline teacher gives, even if the process that holds the features is killed."""
    one_cpu = {"workers": 1, "data_cpus": 1}
    jobs = {name: job_of(tmp_path, drawn_splits, teacher, name, rois="student", cluster=one_cpu) for name in ("inline", "pool")}
    restarts = []
    for number, (inline, pool) in enumerate(zip(*(losses_of(job) for job in jobs.values()), strict=True)):
        (batch, expected), (same, losses) = inline, pool
        assert torch.equal(batch.image_ids, same.image_ids) and losses.keys() == expected.keys()
        assert expected["loss_akd_1"] > 0 and expected["loss_ckd"] > 0
        assert all(torch.equal(loss, expected[name]) for name, loss in losses.items())
        restarts.append(same.teacher_restarts)
        if number == 5:
            (pid,) = processes("ray::TeacherActor")
            os.kill(pid, signal.SIGKILL)
    assert restarts[5] == 0 and restarts[-1] == 1


@pytest.mark.slow
def test_a_pool_answers_for_a_dense_teacher(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    torch.manual_seed(3)
    save_detector(tmp_path / "fcos", build_detector(fcos_spec(), len(classes)), classes)
    folder, one_cpu = str(tmp_path / "fcos"), {"workers": 1, "data_cpus": 1}
    jobs = [job_of(tmp_path, drawn_splits, folder, name, rois="student", cluster=one_cpu) for name in ("inline", "pool")]
    for _, ((_, expected), (_, losses)) in zip(range(3), zip(*map(losses_of, jobs), strict=True), strict=False):
        assert expected["loss_akd_2"] > 0 and expected["loss_ckd"] > 0
        assert all(torch.equal(loss, expected[name]) for name, loss in losses.items())


class TeacherKiller:
    """A log callback that kills this session's teacher process with SIGKILL at a given step."""

    def __init__(self, at_step: int) -> None:
        self.at_step, self.killed = at_step, 0
        self.last: dict[str, Any] = {}

    def __call__(self, record: dict[str, Any]) -> None:
        self.last = record if "losses" in record else self.last
        if not self.killed and record["step"] >= self.at_step:
            (self.killed,) = processes("ray::MapWorker")
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_teacher_costs_only_its_batches_in_flight(tmp_path: Path, drawn_splits: dict[str, str], teacher: str) -> None:
    """The run ends with the weights of an undisturbed one, and the log has counted the restart."""
    keys: dict[str, Any] = {"optim": {"epochs": 4, "milestones": [3]}, "eval": {"every_epochs": 4}}
    inline = job_of(tmp_path, drawn_splits, teacher, "inline", "inline", **keys)
    expected = train(inline, lambda record: None)
    killer = TeacherKiller(at_step=2)
    pooled = job_of(tmp_path, drawn_splits, teacher, "pool", "pool", cluster={"workers": 1, "threads_per_worker": 1}, **keys)
    result = train(pooled, killer)
    assert killer.killed
    assert_same_weights(student_weights(expected), student_weights(result))
    assert killer.last["teacher_restarts"] == 1


def test_a_pool_that_no_node_can_hold_is_an_error_not_a_hang(
    tmp_path: Path, drawn_splits: dict[str, str], teacher: str
) -> None:
    job = job_of(tmp_path, drawn_splits, teacher, "pool", cluster={"workers": 1})
    assert job.teacher is not None
    for keys, message in (
        ({"resources": {"teacher": 1}}, r"no node has what a process requests \(1 CPU, 1 teacher\)"),
        ({"gpus": 0.5}, "no node has what a process requests"),
        ({"actors": [9, 9]}, "9 processes of 1 CPU requested"),
    ):
        changed = job.replace({f"teacher.pool.{key}": value for key, value in keys.items()})
        with pytest.raises(ClusterError, match=message):
            train(changed, lambda record: None)
