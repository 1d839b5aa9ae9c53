"""Searches by the command ``tune`` on a lasting Ray cluster, with what only such a one shows: reservations, GPUs, time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import Machines, processes, raylet_of

from headkd_ray.data.shards import ShardSet
from headkd_ray.tuning.trial_records import SearchFolder
from tests.support import HANGS, micro_job, micro_teacher
from tests.tuning.test_search_on_ray import STUDENT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A cluster with a node of four CPUs and a GPU, which is only a number here."""
    with Machines() as machines:
        machines.have("trainer", 1, cpus=4, gpus=1)
        yield machines


def write_search(folder: Path, splits: dict[str, str], job: dict[str, Any], **sections: Any) -> list[str]:
    """Write a search of the learning rate and its base job, and return the command that runs it."""
    every = {"eval": {"every_epochs": 1, "batch_size": 8}, "student": STUDENT, **job}
    (folder / "job.yaml").write_text(yaml.safe_dump(micro_job(folder, splits, **every).model_dump(mode="json")))
    search = {"run": {"name": "search", "storage": str(folder)}, "job": str(folder / "job.yaml"), **sections}
    (folder / "search.yaml").write_text(yaml.safe_dump({"searcher": {"kind": "grid"}, **search}))
    return ["headkd_ray.tune", str(folder / "search.yaml")]


def test_halving_gives_back_what_stopped_trials_had_reserved(
    machines: Machines, tmp_path: Path, drawn_splits: dict[str, str]
) -> None:
    """Two trials of two train workers fit at a time; each that is stopped makes room for the next."""
    command = write_search(
        tmp_path,
        drawn_splits,
        {
            "cluster": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 0.5, "data_cpus": 0.5, "threads_per_worker": 1},
            "optim": {"epochs": 8, "milestones": [6], "lr": 0.01, "warmup_steps": 0, "lr_batch": None},
        },
        space={"optim.lr": {"choice": [0.01, 1e-7, 2e-7, 3e-7]}},
        scheduler={"kind": "asha", "reduction": 2},
        budget={"max_concurrent": 1},
    )
    driver = machines.start(command, tmp_path / "output")
    assert driver.wait(HANGS) == 0, (tmp_path / "output").read_text()
    trials = SearchFolder.open(str(tmp_path / "search")).trials()
    assert trials[0].state == "finished" and len(trials) == 4
    assert [trial.state for trial in trials[1:]] == ["stopped"] * 3, (tmp_path / "output").read_text()
    assert not machines.left_over(), "placement groups or actors of stopped trials"


def test_trials_whose_teacher_has_processes_of_its_own(
    machines: Machines, tmp_path: Path, drawn_splits: dict[str, str]
) -> None:
    """A trial takes half of the CPUs, its teacher's included, so that two run at a time and none waits for another's."""
    teacher = micro_teacher(tmp_path / "teacher", ShardSet.open(drawn_splits["train"]).meta.classes)
    job = {
        "method": "head",
        "teacher": {"checkpoint": teacher, "placement": "pool", "pool": {"actors": [1, 1], "cpus": 1}},
        "distill": {"rois": "student"},
        "cluster": {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 0.5, "data_cpus": 0.5, "threads_per_worker": 1},
        "optim": {"epochs": 1, "milestones": []},
    }
    command = write_search(tmp_path, drawn_splits, job, space={"optim.lr": {"choice": [0.01, 0.02, 0.03]}})
    driver = machines.start(command, tmp_path / "output")
    assert driver.wait(HANGS) == 0, (tmp_path / "output").read_text()
    trials = SearchFolder.open(str(tmp_path / "search")).trials()
    assert [(trial.state, trial.cause) for trial in trials] == [("finished", None)] * 3
    assert not machines.left_over()


def test_trials_share_a_gpu(machines: Machines, tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Of trials that ask for half a GPU, two run at a time on one, though there are CPUs for four."""
    cluster = {"workers": 0, "gpus_per_worker": 0.5, "cpus_per_worker": 1, "threads_per_worker": 1}
    space = {"optim.lr": {"choice": [0.01, 0.02, 0.03, 0.04]}}
    command = write_search(tmp_path, drawn_splits, {"cluster": cluster, "optim": {"epochs": 6, "milestones": [4]}}, space=space)
    driver = machines.start(command, tmp_path / "output")
    (node,) = machines.nodes["trainer"]
    most, deadline = 0, time.monotonic() + HANGS
    while driver.poll() is None and time.monotonic() < deadline:
        most = max(most, sum(len(processes(title, raylet_of(node))) for title in ("ray::ImplicitFunc", "ray::run_trial")))
        time.sleep(0.1)
    assert driver.poll() == 0, (tmp_path / "output").read_text()
    assert most == 2
    assert {trial.state for trial in SearchFolder.open(str(tmp_path / "search")).trials()} == {"finished"}


def test_when_its_minutes_are_over_a_search_ends_and_can_be_resumed(
    machines: Machines, tmp_path: Path, drawn_splits: dict[str, str]
) -> None:
    """The trial that was running goes on from its checkpoint."""
    command = write_search(
        tmp_path,
        drawn_splits,
        {"cluster": {"workers": 0, "gpus_per_worker": 0, "threads_per_worker": 1}, "optim": {"epochs": 300, "milestones": []}},
        space={"optim.lr": {"choice": [0.01, 0.02]}},
        budget={"max_concurrent": 1},
    )
    driver = machines.start([*command, "budget.minutes=0.6", "budget.trials=1"], tmp_path / "output")
    assert driver.wait(HANGS) == 0, (tmp_path / "output").read_text()
    folder = SearchFolder.open(str(tmp_path / "search"))
    (trial,) = folder.trials()
    before = folder.log(trial, 0)
    assert trial.state == "running" and before[-1]["epoch"] < 300
    driver = machines.start([*command, "--resume", "budget.minutes=0.6", "budget.trials=1"], tmp_path / "output")
    assert driver.wait(HANGS) == 0, (tmp_path / "output").read_text()
    steps = [record["step"] for record in folder.log(trial, 0) if "losses" in record]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > before[-1]["step"]
    assert json.loads((tmp_path / "search/search.json").read_text())["spec"]["budget"]["minutes"] == 0.6
