"""Whole nodes are lost: a real Ray cluster of several nodes, some of which are killed under a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import ENVIRONMENT, Machines, logged_steps, wait_for
from metadata_server import MetadataServer

from headkd_ray.cluster.spot_watch import ENDPOINT
from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.run import run_folder
from headkd_ray.train import train
from tests.cluster.files import pre_stop_hooks
from tests.support import HANGS, assert_same_weights, micro_job, micro_teacher, student_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> str:
    """Return the folder of a micro Faster R-CNN with random weights."""
    return micro_teacher(tmp_path_factory.mktemp("teacher"), ShardSet.open(drawn_splits["train"]).meta.classes)


@pytest.mark.parametrize(("rois", "title"), [("teacher", "ray::MapWorker"), ("student", "ray::TeacherActor")])
def test_a_teacher_s_node_that_is_lost_costs_only_its_batches(
    rois: str, title: str, machines: Machines, tmp_path: Path, drawn_splits: dict[str, str], teacher: str
) -> None:
    """The teacher continues on another node, and the weights are those of a run with the teacher inline."""

    def keys(placement: str) -> dict[str, Any]:
        pool = {"actors": [1, 1], "cpus": 0, "resources": {"teacher": 1}}
        return {
            "method": "head",
            "teacher": {"checkpoint": teacher, "placement": placement, "pool": pool},
            "distill": {"rois": rois, "roi_budget": 24, "warmup_steps": 4},
            "optim": {"epochs": 6, "milestones": [3]},
            "eval": {"every_epochs": 6},
        }

    expected = train(micro_job(tmp_path, drawn_splits, "inline", **keys("inline")), lambda record: None)
    machines.have("trainer", 1, cpus=2)
    machines.have("teacher", 2, teacher=1)
    on_ray = {"workers": 1, "threads_per_worker": 1}
    job = micro_job(tmp_path, drawn_splits, "pool", **keys("pool"), cluster=on_ray)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    driver = machines.train(file, tmp_path / "output")
    folder = run_folder(job)
    wait_for(lambda: len(logged_steps(folder)) >= 2, driver)
    (node,) = machines.hosts(title, "teacher")
    machines.kill(node)
    assert driver.wait(HANGS) == 0, (tmp_path / "output").read_text()
    result = json.loads(folder.read("result.json"))
    assert_same_weights(student_weights(expected), student_weights(result))
    records = logged_steps(folder)
    assert records[-1]["teacher_restarts"] == 1
    assert [record["step"] for record in records] == list(range(1, records[-1]["step"] + 1)), "a step was repeated or lost"
    assert not machines.left_over()


def test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it(
    machines: Machines, tmp_path: Path, drawn_splits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes from two workers to one and back; each step is in the log once, and none is missing."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    machines.have("trainer", 2, cpus=2)
    job = micro_job(
        tmp_path,
        drawn_splits,
        optim={"epochs": 1000, "milestones": []},  # the run is stopped once it has grown again
        eval={"every_epochs": 1000},
        checkpoint={"every_steps": 20},
        cluster={"workers": [1, 2], "cpus_per_worker": 1.5, "data_cpus": 0.5, "threads_per_worker": 1, "resize_seconds": 2},
    )
    file, folder = tmp_path / "job.yaml", run_folder(job)
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    driver = machines.train(file, tmp_path / "output")

    def at_work(workers: int) -> bool:
        records = logged_steps(folder)
        return bool(records) and records[-1]["workers"] == workers

    wait_for(lambda: at_work(2) and len(logged_steps(folder)) > 25, driver)
    machines.kill(machines.nodes["trainer"][0])
    wait_for(lambda: at_work(1), driver)
    machines.have("trainer", 2, cpus=2)
    wait_for(lambda: at_work(2), driver)
    driver.terminate()
    assert driver.wait(HANGS) == 143, (tmp_path / "output").read_text()
    records = logged_steps(folder)
    assert [record["step"] for record in records] == list(range(1, records[-1]["step"] + 1))
    phases = [workers for workers, _ in groupby(record["workers"] for record in records)]
    assert phases == [2, 1, 2]
    assert not machines.left_over()


def test_a_spot_notice_costs_no_step_and_is_no_failure(
    machines: Machines, tmp_path: Path, drawn_splits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS announces the end of one of two trainers; the run writes a checkpoint at once and goes on with another node."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    machines.have("trainer", 2, cpus=2)
    job = micro_job(
        tmp_path,
        drawn_splits,
        optim={"epochs": 1000, "milestones": []},  # the run is stopped after its restart
        eval={"every_epochs": 1000},
        cluster={"workers": 2, "cpus_per_worker": 1.5, "data_cpus": 0.5, "threads_per_worker": 1, "max_failures": 0},
    )
    file, folder, output = tmp_path / "job.yaml", run_folder(job), tmp_path / "output"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    driver = machines.train(file, output)
    wait_for(lambda: len(logged_steps(folder)) >= 3, driver)
    leaving = machines.nodes["trainer"][-1]
    watch = [sys.executable, "-m", "headkd_ray.cluster.spot_watch"]
    with MetadataServer() as server:
        environment = {**os.environ, **ENVIRONMENT, ENDPOINT: server.url}
        watcher = subprocess.Popen(
            [*watch, "--address", machines.cluster.address, "--node-id", leaving.node_id],
            env=environment,
            stdout=subprocess.PIPE,
        )
        end = datetime.now(timezone.utc) + timedelta(seconds=600)
        server.answers = [server.notice("terminate", f"{end:%Y-%m-%dT%H:%M:%SZ}")]
        told, _ = watcher.communicate(timeout=HANGS)
    assert watcher.returncode == 0 and f"Ray node {leaving.node_id} is being drained" in told.decode()
    wait_for(lambda: "preemption 1)" in output.read_text(), driver)
    steps = len(logged_steps(folder))
    assert folder.has(f"step_{steps:08d}/training_state.pt"), "the checkpoint is that of the last step"
    machines.replace(leaving)
    machines.have("trainer", 2, cpus=2)
    wait_for(lambda: len(logged_steps(folder)) > steps + 2, driver)
    driver.terminate()
    assert driver.wait(HANGS) == 143, output.read_text()
    records = logged_steps(folder)
    assert [record["step"] for record in records] == list(range(1, records[-1]["step"] + 1))
    trained = [int(line.split("step ")[1].split("/")[0]) for line in output.read_text().splitlines() if "images/s" in line]
    assert trained == sorted(set(trained)), "a step was repeated"
    assert not machines.left_over()


def test_a_pod_s_end_within_an_evaluation_costs_no_step_and_the_evaluation_is_made_up(
    machines: Machines, tmp_path: Path, drawn_splits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preStop hook of cluster/kuberay.yaml drains the node, which is killed when the hook has ended, as a pod is."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    machines.have("trainer", 1, cpus=2)
    job = micro_job(
        tmp_path,
        {**drawn_splits, "val": drawn_splits["train"]},
        data={"eval_short_side": 1600, "long_side": 2667},  # so that evaluations are long, and steps are not
        eval={"every_epochs": 1, "batch_size": 1},
        cluster={"workers": 1, "cpus_per_worker": 1.5, "data_cpus": 0.5, "threads_per_worker": 1, "max_failures": 0},
    )
    file, folder, output = tmp_path / "job.yaml", run_folder(job), tmp_path / "output"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    driver = machines.train(file, output)
    wait_for(lambda: len(logged_steps(folder)) >= 11, driver)  # the last step of the first epoch
    leaving = machines.nodes["trainer"][-1]
    (hook,) = {tuple(pre_stop) for pre_stop in pre_stop_hooks()}
    command = [sys.executable, *hook[1:-1], "60", "--address", machines.cluster.address, "--node-id", leaving.node_id]
    told = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: "preemption 1)" in output.read_text(), driver)
    assert folder.has("step_00000011/training_state.pt") and not folder.has("step_00000011/metrics.json")
    assert [record["step"] for record in logged_steps(folder)] == list(range(1, 12))
    said, _ = told.communicate(timeout=HANGS)
    assert told.returncode == 0 and f"Ray node {leaving.node_id} is being drained" in said, said
    assert "the node has ended" in said, "something of the run was left on the node"
    machines.kill(leaving)
    machines.have("trainer", 1, cpus=2)
    assert driver.wait(HANGS) == 0, output.read_text()
    log = [json.loads(line) for line in folder.read("log.jsonl").splitlines()]
    order = [(record["step"], "val" in record) for record in log]
    assert order == [
        *((step, False) for step in range(1, 12)),
        (11, True),
        *((step, False) for step in range(12, 23)),
        (22, True),
    ]
    assert not machines.left_over()
