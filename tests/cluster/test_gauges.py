"""A run's numbers reach Prometheus through Ray, and the Grafana dashboard asks for them by their names."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from typing import Any

import pytest
import ray

from headkd_ray.cluster.gauges import EXTRA_TAGS, OF_RANK, OF_RUN, TAGS, Gauges, values_of
from headkd_ray.job import Job
from tests.cluster.files import CLUSTER
from tests.support import HANGS

STEP: dict[str, Any] = {
    **{"step": 12, "steps": 48, "epoch": 1.5, "workers": 2, "lr": 0.01, "losses": {"total": 1.5, "loss_cls": 0.5}},
    **{"images_per_second": 8.0, "data_wait": 0.25, "memory_mib": 2.0, "teacher_restarts": 1},
}
EVALUATION: dict[str, Any] = {"step": 24, "steps": 48, "epoch": 2, "val": {"AP": 31.5, "APs": None, "per_class": {"cat": 1.0}}}


def test_the_dashboard_shows_every_gauge_and_nothing_else() -> None:
    board = json.loads((CLUSTER / "grafana.json").read_text(encoding="utf-8"))
    queries = [(target["expr"], target["legendFormat"]) for panel in board["panels"] for target in panel["targets"]]
    assert {name for query, _ in queries for name in re.findall(r"ray_(headkd_\w+)", query)} == {*OF_RUN, *OF_RANK}
    for query, legend in queries:
        (name, *_) = re.findall(r"ray_(headkd_\w+)", query)
        assert query.count('{run=~"$run"}') == query.count("ray_headkd_"), "a panel would show other runs, too"
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= {*TAGS, EXTRA_TAGS.get(name)}
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "run"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(places)) == len(set(ids)) == len(places)


def test_every_gauge_gets_a_value() -> None:
    assert {name for record in (STEP, EVALUATION) for name, _, _ in values_of(record)} == {*OF_RUN, *OF_RANK}
    assert [(value, metric) for name, value, metric in values_of(EVALUATION) if name == "headkd_ap_percent"] == [(31.5, "AP")]


@pytest.mark.slow
def test_ray_exports_the_gauges_to_prometheus(ray_cluster: None, tmp_path: Any) -> None:
    job = Job.model_validate(
        {"run": {"name": "shown", "storage": str(tmp_path)}, "method": "supervised", "data": {"train": "a", "val": "b"}}
    )
    of_run, of_rank = Gauges(job, 0), Gauges(job, 1)
    for record in (STEP, EVALUATION):
        of_run(record)
    of_rank({**STEP, "images_per_second": 6.0})
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + HANGS, {}
    while len(found) < 14:
        assert time.monotonic() < deadline, found
        with urllib.request.urlopen(address) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_headkd_")]
        found = {}
        for line in lines:
            tags = dict(re.findall(r'(\w+)="([^"]*)"', line))
            assert tags["run"] == "shown" and tags["method"] == "supervised"
            found[line.partition("{")[0], tags["rank"], tags.get("loss") or tags.get("metric")] = float(line.split()[-1])
        time.sleep(0.5)
    assert found["ray_headkd_loss", "0", "loss_cls"] == 0.5 and found["ray_headkd_ap_percent", "0", "AP"] == 31.5
    assert found["ray_headkd_step", "0", None] == 24 and found["ray_headkd_memory_bytes", "0", None] == 2 * 2**20
    assert {rank: found["ray_headkd_images_per_second", rank, None] for rank in "01"} == {"0": 8.0, "1": 6.0}
    assert {name for name, rank, _ in found if rank == "1"} == {f"ray_{name}" for name in OF_RANK}
