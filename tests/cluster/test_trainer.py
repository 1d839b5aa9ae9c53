"""Jobs on a real Ray Train end with the same weights as without Ray, even after a kill -9, and errors do not hang."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray
from machines import processes

from headkd_ray.cluster.data_actors import keep_data_actors_here
from headkd_ray.cluster.shared_paths import check_shared
from headkd_ray.cluster.trainer import with_absolute_paths
from headkd_ray.engine.log import records_in
from headkd_ray.engine.run import open_run, run_folder
from headkd_ray.errors import ClusterError, DataError, TrainingError
from headkd_ray.job import ClusterSpec, Job
from headkd_ray.train import train
from tests.support import KEEN_STUDENT, MICRO_STUDENT, MICRO_TEACHER, TF_HEAD, assert_same_weights, micro_job, student_weights

ON_RAY = {"workers": 1, "threads_per_worker": 1}
IN_PROCESS = ClusterSpec(workers=0, threads_per_worker=1)


@pytest.mark.slow
def test_ray_and_in_process_runs_end_with_the_same_weights(
    tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None
) -> None:
    here = train(micro_job(tmp_path, drawn_splits, "here"), lambda record: None)
    records: list[dict[str, Any]] = []
    on_ray = train(micro_job(tmp_path, drawn_splits, "on_ray", cluster=ON_RAY), records.append)
    assert_same_weights(student_weights(here), student_weights(on_ray))
    assert [r["step"] for r in records if "losses" in r] == list(range(1, records[-1]["step"] + 1))
    assert on_ray["best"]["per_class"].keys() == here["best"]["per_class"].keys()
    assert not [thread for thread in threading.enumerate() if thread.name == "headkd-log"], "the log's thread outlived the run"


@pytest.mark.slow
def test_tf_head_on_ray_learns_and_exports_the_student_alone(
    tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None
) -> None:
    job = micro_job(
        tmp_path,
        drawn_splits,
        method="tf_head",
        student={**MICRO_STUDENT, "neck": {"channels": 16, "norm": "batch"}},
        distill={"assistants": TF_HEAD, "warmup_steps": 8, "ckd_epochs": 3},
        optim={"optimizer": "adamw", "lr": 0.001, "epochs": 4, "milestones": [3], "warmup_steps": 4, "lr_batch": None},
        cluster=ON_RAY,
    )
    records: list[dict[str, Any]] = []
    result = train(job, records.append)
    losses = [record["losses"] for record in records if "losses" in record]
    epoch = len(losses) // 4
    assistants = {"loss_fcos_cls": 1, "loss_rcnn_cls": 1}  # they have their full weight only from the second epoch on
    for name, start in {"loss_cls": 0, "loss_box": 0, **assistants}.items():
        early, late = (sum(entry[name] for entry in losses[i * epoch : (i + 1) * epoch]) for i in (start, 3))
        assert late < early, name
    assert all((entry["loss_rcnn_ckd"] == 0) == (step > 3 * epoch) for step, entry in enumerate(losses[1:], start=2))
    assert not [name for name in student_weights(result) if "assistant" in name or "adapter" in name]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_worker_resumes_bit_exact(workers: int, tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None) -> None:
    """A worker is killed in the middle of an epoch; with two workers there are also BatchNorm buffers and an idle step."""
    teacher = train(
        micro_job(tmp_path, drawn_splits, "teacher", student=MICRO_TEACHER, optim={"epochs": 1, "milestones": []}), _quiet
    )

    def job(name: str) -> Job:
        return micro_job(
            tmp_path,
            drawn_splits,
            name,
            method="head",
            teacher={"checkpoint": teacher["student"]},
            distill={"warmup_steps": 8},
            checkpoint={"every_steps": 2},
            cluster={**ON_RAY, "workers": workers, "cpus_per_worker": 1, "data_cpus": 1},
        )

    # With one worker a run on Ray ends like one without (see above), so the undisturbed run need not take Ray's time.
    undisturbed = job("whole") if workers > 1 else job("whole").replace({"cluster": IN_PROCESS})
    expected = train(undisturbed, _quiet)
    victim = Killer(job("killed"), at_step=3)
    result = train(job("killed"), victim)
    assert victim.killed, "no worker was killed"
    assert victim.records_after_kill, "nothing was trained after the kill"
    assert_same_weights(student_weights(expected), student_weights(result))


@pytest.mark.slow
def test_evaluations_in_a_task_are_those_in_place(tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None) -> None:
    """The worker trains on meanwhile, and is killed; nothing is evaluated twice in the log, or left out."""
    sections: dict[str, Any] = {
        "student": KEEN_STUDENT,
        "optim": {"epochs": 3, "milestones": []},
        "checkpoint": {"every_steps": 2},
    }
    every: dict[str, Any] = {"every_epochs": 1, "batch_size": 2}
    in_place: list[dict[str, Any]] = []
    expected = train(micro_job(tmp_path, drawn_splits, "in_place", eval=every, **sections), in_place.append)
    job = micro_job(tmp_path, drawn_splits, "beside", eval={**every, "placement": "task"}, cluster=ON_RAY, **sections)
    killer, records = Killer(job, at_step=12), list[dict[str, Any]]()

    def tell(record: dict[str, Any]) -> None:
        records.append(record)
        killer(record)

    result = train(job, tell)
    assert killer.killed, "no worker was killed"
    assert {key: result[key] for key in ("best", "last", "data")} == {key: expected[key] for key in ("best", "last", "data")}
    assert result["best"]["AP"] > 0
    assert_same_weights(student_weights(result), student_weights(expected))
    log = list(records_in(run_folder(job)))
    assert [each["step"] for each in log if "losses" in each] == [each["step"] for each in in_place if "losses" in each]
    scored = [(each["step"], each["val"]) for each in log if "val" in each]
    assert scored == [(each["step"], each["val"]) for each in in_place if "val" in each]


@pytest.mark.slow
def test_an_error_of_an_evaluation_in_a_task_is_told(tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None) -> None:
    shutil.copytree(drawn_splits["val"], tmp_path / "val")
    shard = sorted((tmp_path / "val").glob("shard-*.parquet"))[-1]
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    shard.write_bytes(content)
    cluster = {**ON_RAY, "data_cpus": 0.5}
    job = micro_job(tmp_path, {**drawn_splits, "val": str(tmp_path / "val")}, eval={"placement": "task"}, cluster=cluster)
    with pytest.raises(DataError, match=shard.name):
        train(job, _quiet)


class Killer:
    """A log callback that kills one of this session's worker processes with SIGKILL at a given step."""

    def __init__(self, job: Job, at_step: int) -> None:
        self.at_step, self.killed = at_step, 0
        self.records_after_kill: list[dict[str, Any]] = []

    def __call__(self, record: dict[str, Any]) -> None:
        if self.killed:
            self.records_after_kill.append(record)
        elif record["step"] >= self.at_step:
            (pid, *_) = processes("ray::RayTrainWorker") or processes("ray::_RayTrainWorker")
            os.kill(pid, signal.SIGKILL)
            self.killed = pid


@pytest.mark.slow
def test_a_run_given_up_goes_on_when_started_again(tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None) -> None:
    """It resumes from Ray's own listing on storage, where the latest checkpoint was not evaluated."""
    sections: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "cluster": {**ON_RAY, "max_failures": 0}}
    job = micro_job(tmp_path, drawn_splits, "given_up", **sections)
    listing = tmp_path / "given_up" / "checkpoint_manager_snapshot.json"
    killer = Killer(job, at_step=1)
    with pytest.raises(ClusterError, match="training failed for good"):
        train(job, lambda record: killer(record) if listing.exists() else None)
    records: list[dict[str, Any]] = []
    result = train(job, records.append)
    assert records[0]["step"] > 1, "started over"
    assert_same_weights(student_weights(result), student_weights(train(micro_job(tmp_path, drawn_splits, "whole"), _quiet)))


def test_too_many_workers_is_an_error_not_a_hang(
    tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracked = {"mlflow": "photos"} if find_spec("mlflow") is not None else {}
    job = micro_job(tmp_path, drawn_splits, cluster={"workers": 64, "gpus_per_worker": 1}, log=tracked)
    started = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        train(job, _quiet)
    assert time.monotonic() - started < 120, "waited for them"
    text = str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing is written before the cluster is known to suffice"
    assert not (tmp_path / "mlflow.db").exists(), "a tracker was told of a run that cannot start"
    assert "64" in text and "GPUs requested, the cluster has 0" in text and "CPUs requested, the cluster has" in text


@pytest.mark.slow
def test_a_damaged_shard_is_told_and_not_tried_again(tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None) -> None:
    """The error is the shard's own, not that workers failed too often."""
    shutil.copytree(drawn_splits["train"], tmp_path / "train")
    shard = sorted((tmp_path / "train").glob("shard-*.parquet"))[-1]
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    shard.write_bytes(content)
    splits = {**drawn_splits, "train": str(tmp_path / "train")}
    with pytest.raises(DataError) as caught:
        train(micro_job(tmp_path, splits, cluster=ON_RAY), _quiet)
    assert shard.name in str(caught.value)


@pytest.mark.slow
def test_a_loss_that_explodes_ends_the_run_at_once(tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None) -> None:
    job = micro_job(
        tmp_path, drawn_splits, optim={"lr": 1000.0, "lr_batch": None, "clip_norm": None, "warmup_steps": 0}, cluster=ON_RAY
    )
    with pytest.raises(TrainingError, match=r"not finite.*lower optim\.lr"):
        train(job, _quiet)


def _quiet(record: dict[str, Any]) -> None:
    """Ignore the records, for runs without a console."""


def test_a_job_s_relative_paths_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in another folder. Addresses, and names that are no files, stay as they are."""
    monkeypatch.chdir(tmp_path)
    teacher = {"checkpoint": "t.pth", "placement": "cache", "cache": {"path": "cache"}}
    job = micro_job(Path("runs"), {"train": "a", "val": "s3://b"}, method="head", teacher=teacher)
    job = with_absolute_paths(job.replace({"student.checkpoint": "start", "student.backbone.weights": "r.pth"}))
    kept = [job.run.storage, job.data.train, job.student.checkpoint, job.student.backbone.weights]
    assert job.teacher is not None
    kept += [job.teacher.checkpoint, job.teacher.cache.path]
    assert kept == [str(tmp_path / name) for name in ("runs", "a", "start", "r.pth", "t.pth", "cache")]
    assert job.data.val == "s3://b"
    assert with_absolute_paths(job.replace({"student.backbone.weights": "timm"})).student.backbone.weights == "timm"


def test_a_node_that_does_not_see_the_run_or_its_data_is_told(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """A worker on it would train until its first checkpoint, and then again after each restart."""
    job = micro_job(tmp_path, {**drawn_splits, "val": "s3://bucket/val?endpoint_override=127.0.0.1:1"})
    open_run(job)
    check_shared(job, "10.0.0.2", patience=0)
    elsewhere = job.replace({"run.storage": str(tmp_path / "other"), "data.train": str(tmp_path / "train")})
    with pytest.raises(ClusterError) as caught:
        check_shared(elsewhere, "10.0.0.2", patience=0)
    assert [line.partition(";")[0] for line in caught.value.problems] == [
        f"run.storage: the node 10.0.0.2 does not see the command's folder {tmp_path}/other/run",
        f"data.train: the node 10.0.0.2 does not see the command's folder {tmp_path}/train",
    ]


@pytest.mark.slow
def test_ray_data_starts_no_actor_that_stays_on_a_worker_s_node(ray_cluster: None) -> None:
    """Once they run on the driver's node; elsewhere they would keep a node from being drained, or removed by an autoscaler."""

    def lasting() -> set[str]:
        return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}

    @ray.remote(num_cpus=0)
    def use(callable_class: type) -> int:
        import ray.data

        one = ray.data.from_items([0], override_num_blocks=1)
        return one.map(callable_class, num_cpus=0.5, compute=ray.data.ActorPoolStrategy(size=1)).count()

    class Same:
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return row

    for actor in ray.util.list_named_actors(all_namespaces=True):  # of earlier tests
        with suppress(ValueError):
            ray.kill(ray.get_actor(**actor))
    deadline = time.monotonic() + 60
    while lasting() and time.monotonic() < deadline:
        time.sleep(0.05)
    keep_data_actors_here(pool=True)
    before = lasting()
    assert ray.get(use.remote(Same)) == 1
    assert lasting() == before
