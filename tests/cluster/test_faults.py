"""Whole machines that go: a real Ray of several nodes, and nodes killed under a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from machines import Machines, last_step, wait_for

from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.engine.run import run_folder
from headkd_ray.job import FasterRCNNSpec
from headkd_ray.train import train
from tests.detectors.micro import liven
from tests.support import MICRO_TEACHER, assert_same_weights, micro_job, student_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> str:
    """Folder of a micro Faster R-CNN with drawn weights."""
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    torch.manual_seed(3)
    detector = build_detector(FasterRCNNSpec.model_validate(MICRO_TEACHER), len(classes))
    liven(detector)
    folder = tmp_path_factory.mktemp("teacher")
    save_detector(folder, detector, classes)
    return str(folder)


@pytest.mark.parametrize(("rois", "title"), [("teacher", "ray::MapWorker"), ("student", "ray::Holder")])
def test_a_teacher_s_node_that_is_lost_costs_only_its_batches(
    rois: str, title: str, machines: Machines, tmp_path: Path, drawn_splits: dict[str, str], teacher: str
) -> None:
    """The teacher goes on on another node, and the weights are those of a run with the teacher in place."""

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
    wait_for(lambda: last_step(folder) >= 2, driver)
    (node,) = machines.hosts(title, "teacher")
    machines.kill(node)
    assert driver.wait(240) == 0, (tmp_path / "output").read_text()
    result = json.loads(folder.read("result.json"))
    assert_same_weights(student_weights(expected), student_weights(result))
    records = [json.loads(line) for line in folder.read("log.jsonl").splitlines()]
    told = [record for record in records if "losses" in record]
    assert told[-1]["teacher_restarts"] == 1
    assert [record["step"] for record in told] == list(range(1, told[-1]["step"] + 1)), "a step was repeated or lost"
    assert not machines.left_over()
