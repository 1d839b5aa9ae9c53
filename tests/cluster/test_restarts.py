"""Workers and controllers are lost at arbitrary moments: losses are counted once, and the run continues."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from machines import processes
from ray.cloudpickle import register_pickle_by_value
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import ActorDiedError
from ray.train import CheckpointConfig, PreemptionError, PreemptionInfo, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import (
    CheckpointManagerInitializationError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from headkd_ray.cluster import trainer as ray_train
from headkd_ray.cluster.listing import SNAPSHOT, drop_unusable
from headkd_ray.cluster.lost_requests import withdraw_former
from headkd_ray.cluster.restarts import PreemptedError, with_restarts
from headkd_ray.engine.checkpoint import STATE_FILE, seal
from headkd_ray.errors import CheckpointError, ClusterError
from headkd_ray.job import ClusterSpec
from headkd_ray.storage import Folder
from headkd_ray.train import train
from tests.support import HANGS, assert_same_weights, micro_job, start_training, student_weights, wait_for_lines

ON_RAY = {"workers": 1, "threads_per_worker": 1}


class Fit:
    """A stand-in for Ray Train whose successive attempts end as given."""

    def __init__(self, *ends: Exception | str) -> None:
        self.ends = list(ends)

    def __call__(self) -> str:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def test_what_a_lost_controller_asked_for_is_free_for_the_next_one(ray_cluster: None, tmp_path: Path) -> None:
    """Else the next one waits until Ray forgets it, for three minutes."""
    coordinator = get_or_create_autoscaling_coordinator()
    trainers = [TorchTrainer(print, run_config=RunConfig(name="run", storage_path=str(tmp_path))) for _ in range(3)]
    names = [f"train-{trainer.train_run_context.run_id}" for trainer in trainers]
    for trainer, name in zip(trainers, names, strict=True):
        withdraw_former(Folder.open(tmp_path), trainer)
        bundles = [{"CPU": 4}]
        ray.get(coordinator.request_resources.remote(name, bundles, 180, priority=ResourceRequestPriority.HIGH))
    assert [bool(ray.get(coordinator.get_reserved_resources.remote(name))) for name in names] == [False, False, True]
    ray.get(coordinator.cancel_request.remote(names[-1]))


def test_every_loss_counts_once_and_waiting_for_a_node_does_not(ray_cluster: None) -> None:
    in_training = WorkerGroupError("lost", {0: ActorDiedError()})
    at_its_start = ControllerError(ActorDiedError())
    starting_again = ControllerError(WorkerGroupStartupFailedError("lost"))
    waiting = ControllerError(WorkerGroupStartupTimeoutError(2))
    controller = ActorDiedError()
    losses = [in_training, at_its_start, starting_again, controller]
    notes: list[str] = []
    assert with_restarts(Fit(*losses, *[waiting] * 9, "done"), ClusterSpec(max_failures=4), notes.append) == "done"
    assert [text.partition("(")[2] for text in notes[:-1]] == [f"{number} of 4 times)" for number in (1, 2, 3, 4)]
    assert notes[-1].startswith("the cluster has no room for the train workers yet"), "said once, however long it takes"
    for loss in losses:
        with pytest.raises(type(loss)):
            with_restarts(Fit(loss, loss, "done"), ClusterSpec(max_failures=1), notes.append)


def test_a_preemption_is_no_failure_and_has_a_limit_of_its_own(ray_cluster: None) -> None:
    """Announced in time, known to Ray but too late for a checkpoint, or only seen by the death of a worker."""
    died = ActorDiedError()
    died._preempted = True
    late = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"ab": [0]}), drain_timed_out=True)
    ends = [PreemptedError(["ab" * 28]), late, WorkerGroupError("lost", {0: died, 1: RuntimeError("connection reset")})]
    notes: list[str] = []
    assert with_restarts(Fit(*ends, *ends, "done"), ClusterSpec(max_failures=0), notes.append) == "done"
    assert [text.partition("(")[2] for text in notes] == [f"preemption {number})" for number in range(1, 7)]
    assert "with a checkpoint of this step" in notes[0] and "before there was a checkpoint" in notes[1]
    for end in ends:
        with pytest.raises(type(end)):
            with_restarts(Fit(end, end, "done"), ClusterSpec(max_failures=9, max_preemption_failures=1), notes.append)
    assert notes[-1].endswith("(preemption 1 of 1)")


def test_what_a_restart_would_meet_again_is_not_tried_again(ray_cluster: None) -> None:
    fit = Fit(ControllerError(CheckpointManagerInitializationError("damaged")), "done")
    with pytest.raises(ControllerError, match="damaged"):
        with_restarts(fit, ClusterSpec(max_failures=3), lambda text: None)
    assert fit.ends == ["done"]


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    """Write a sealed checkpoint and return its entry in Ray's listing."""
    folder = run / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_bytes(bytes(1000))
    seal(folder)
    return {"version": 0, "checkpoint_dir_name": folder.name, "metrics": {"AP": -1.0, "step": step}}


def test_checkpoints_that_are_gone_or_damaged_leave_ray_s_listing(tmp_path: Path) -> None:
    """Ray's own reader then accepts the rest; otherwise it would not start the run."""
    run = tmp_path / "run"
    entries = [checkpoint(run, step) for step in (4, 6, 8)]
    none: dict[str, list[Any]] = {
        name: []
        for name in (
            "pending_training_results",
            "pending_validation_specs",
            "validated_checkpoint_dir_names",
            "timed_out_validation_checkpoint_dir_names",
            "failed_validation_checkpoint_dir_names",
        )
    }
    snapshot = {
        "ray_version": ray.__version__,
        "checkpoint_results": entries,
        "checkpoint_report_indices": [1, 2, 3],
        "latest_checkpoint_result": entries[-1],
        "current_report_index": 3,
        **none,
    }
    (run / SNAPSHOT).write_text(json.dumps(snapshot))
    assert drop_unusable(Folder.open(run)) == []
    (run / "step_00000008" / STATE_FILE).write_bytes(bytes(999) + b"!")
    shutil.rmtree(run / "step_00000006")
    assert drop_unusable(Folder.open(run)) == [
        f"{run}/step_00000006: is missing",
        f"{run}/step_00000008/{STATE_FILE}: is damaged: its content differs from what was written",
        "resuming from the previous checkpoint, step_00000004",
    ]
    manager = CheckpointManager(CheckpointConfig(num_to_keep=2), StorageContext(str(tmp_path), "run"))
    assert manager.latest_checkpoint_result is not None
    assert manager.latest_checkpoint_result.checkpoint.path == f"{run}/step_00000004"
    shutil.rmtree(run / "step_00000004")
    with pytest.raises(CheckpointError, match=r"step_00000004: is missing(?s:.*)to train the run from the start"):
        drop_unusable(Folder.open(run))
    (run / SNAPSHOT).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{SNAPSHOT}: is not Ray Train's list"):
        drop_unusable(Folder.open(run))


def dies_at_first(config: dict[str, Any]) -> dict[str, Any]:
    """Kill this worker as soon as its function runs, the first two times."""
    lives = Path(config["job"]["run"]["storage"]) / "lives"
    count = int(lives.read_text()) if lives.exists() else 0
    if count < 2:
        lives.write_text(str(count + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return ray_train._worker(config)


@pytest.mark.slow
def test_a_worker_killed_before_its_first_step_is_started_again(
    tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    before = reserved()
    monkeypatch.setattr(ray_train, "_worker", dies_at_first)
    notes: list[str] = []

    def tell(record: dict[str, Any]) -> None:
        notes.extend([record["note"]] if "note" in record else [])

    job = micro_job(tmp_path, drawn_splits, cluster={**ON_RAY, "max_failures": 1})
    with pytest.raises(ClusterError, match="training failed for good"):
        train(job, tell)
    assert (tmp_path / "lives").read_text() == "2"
    result = train(job, tell)
    assert [text.partition("(")[2] for text in notes] == ["1 of 1 times)"]
    assert_same_weights(student_weights(result), student_weights(train(micro_job(tmp_path, drawn_splits, "whole"), tell)))
    assert reserved() == before, "a reservation was left behind"


@pytest.mark.slow
@pytest.mark.parametrize("title", ["ray::TrainController", "ray::RayTrainWorker"])
def test_the_controller_or_a_worker_that_starts_is_killed(
    title: str, tmp_path: Path, drawn_splits: dict[str, str], ray_cluster: None
) -> None:
    """The process is killed as soon as it exists."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + HANGS
        while not killed and time.monotonic() < deadline:
            for pid in processes(title):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = train(micro_job(tmp_path, drawn_splits, cluster=ON_RAY), lambda record: None)
    thread.join()
    assert killed, "nothing was killed"
    assert_same_weights(
        student_weights(result), student_weights(train(micro_job(tmp_path, drawn_splits, "whole"), lambda record: None))
    )


@pytest.mark.slow
def test_a_run_whose_raylet_is_killed_is_told_and_goes_on_when_started_again(
    tmp_path: Path, drawn_splits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command starts a Ray of its own, which cannot outlive its raylet."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    sections: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "optim": {"epochs": 4, "milestones": []}}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(micro_job(tmp_path, drawn_splits, cluster=ON_RAY, **sections).model_dump(mode="json")))
    process = start_training(job_file, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "run" / "log.jsonl", 5, process)
    (raylet,) = [pid for pid in processes("", process.pid) if "/raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(raylet, signal.SIGKILL)
    _, told = process.communicate(timeout=HANGS)
    assert process.returncode == 2, told
    assert "raylet, has died" in told.splitlines()[-1] and "Traceback" not in told
    assert start_training(job_file).wait(HANGS) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if "losses" in record] == list(range(1, 45))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    whole = train(micro_job(tmp_path, drawn_splits, "whole", **sections), lambda record: None)
    assert_same_weights(student_weights(result), student_weights(whole))


def reserved() -> list[str]:
    table = ray.util.placement_group_table()
    return [key for key, group in table.items() if group["state"] != "REMOVED"]
