"""Resources are checked before anything starts, also those of nodes that have only been announced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headkd_ray.cluster import resources
from headkd_ray.errors import ClusterError
from headkd_ray.job import PoolSpec
from tests.support import micro_job

Check = Callable[..., resources.Resources]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Return a function that checks a job with given keys of its cluster section, on two nodes with 2 CPUs each."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 2.0, f"accelerator_type:{gpu}": 1.0}, "Labels": {"market": market}}
        for market, gpu in (("spot", "L4"), ("on-demand", "A10G"))
    ]
    monkeypatch.setattr(resources.ray, "nodes", lambda: nodes)

    def check(**keys: Any) -> resources.Resources:
        return resources.check_resources(micro_job(tmp_path, {"train": "train", "val": "val"}, cluster=keys))

    return check


def test_of_a_range_of_workers_the_fewest_must_fit(check: Check) -> None:
    part = {"cpus_per_worker": 1.5, "data_cpus": 0.5}
    assert check(workers=(1, 8), **part).workers == (1, 8)
    assert check(workers=2, **part).workers == 2
    with pytest.raises(ClusterError, match=r"cluster\.workers 3 x .* = 6 CPUs requested, the cluster has 4"):
        check(workers=(3, 8), **part)


def test_as_many_workers_as_find_room_must_leave_some_to_data_tasks(check: Check) -> None:
    """Otherwise Ray would start them, and their data tasks would wait for ever."""
    with pytest.raises(ClusterError, match=r"cluster\.workers \[1, 8\]: the 4 that fit would leave 4 - 4 x"):
        check(workers=(1, 8), cpus_per_worker=1, data_cpus=1)
    assert check(workers=(1, 2), cpus_per_worker=1, data_cpus=1).workers == (1, 2)


def test_only_nodes_with_the_labels_and_the_gpu_count_for_workers(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data tasks may run on the others. What an autoscaler's nodes do not say is taken to fit."""
    half = {"cpus_per_worker": 1, "data_cpus": 1}
    for chosen in ({"labels": {"market": "spot"}}, {"labels": {"market": "!in(spot, other)"}}, {"accelerator_type": "L4"}):
        assert check(workers=2, **half, **chosen).workers == 2
        with pytest.raises(ClusterError, match=r"cluster\.workers 2: only 1 fit on nodes with"):
            check(workers=2, cpus_per_worker=1.5, data_cpus=0.5, **chosen)
    with pytest.raises(ClusterError) as caught:
        check(workers=1, labels={"market": "none"}, accelerator_type="H100")
    assert str(caught.value).startswith(
        "cluster.labels {'market': 'none'} and cluster.accelerator_type H100: no node of the cluster"
    )
    assert "the nodes have [{'market': 'spot', 'accelerator_type': 'L4'}, " in str(caught.value)
    monkeypatch.setenv(resources.GROWS, '[{"count": 2, "CPU": 8}]')
    assert check(workers=2, labels={"market": "none"}, accelerator_type="H100").workers == 2
    monkeypatch.setenv(resources.GROWS, '[{"count": 2, "CPU": 8, "labels": {"market": "spot"}, "accelerator_type:L4": 1}]')
    assert check(workers=2, labels={"market": "spot"}, accelerator_type="L4").workers == 2
    with pytest.raises(ClusterError, match="no node of the cluster has this"):
        check(workers=1, labels={"market": "spot"}, accelerator_type="H100")


def test_a_teacher_pool_is_checked_on_the_nodes_that_it_selects(tmp_path: Path, check: Check) -> None:
    def problems(**pool: Any) -> str:
        teacher = {"checkpoint": "t", "placement": "pool", "pool": {"cpus": 0.5, **pool}}
        job = micro_job(tmp_path, {"train": "a", "val": "b"}, method="head", teacher=teacher, cluster={"workers": 1})
        with pytest.raises(ClusterError) as caught:
            resources.check_resources(job)
        return str(caught.value)

    assert "teacher.pool.labels {'pool': 'teacher'}: no node of the cluster has this" in problems(labels={"pool": "teacher"})
    assert "4 processes of 0.6 CPU requested, the nodes have room for 3" in problems(
        accelerator_type="L4", cpus=0.6, actors=[4, 4]
    )


def test_an_evaluation_s_task_must_fit_beside_the_workers(tmp_path: Path, check: Check) -> None:
    """Otherwise it would wait until the workers have ended, and they wait for it."""

    def fits(**task: Any) -> resources.Resources:
        job = micro_job(
            tmp_path,
            {"train": "a", "val": "b"},
            eval={"placement": "task", "task": task},
            cluster={"workers": 2, "cpus_per_worker": 1, "data_cpus": 0.5},
        )
        return resources.check_resources(job)

    assert fits().workers == 2 == fits(labels={"market": "spot"}, accelerator_type="L4").workers
    with pytest.raises(
        ClusterError, match=r"eval\.task: a process of 1\.5 CPU requested, besides 3 for the train workers, the n"
    ):
        fits(cpus=1.5)
    with pytest.raises(ClusterError, match=r"eval\.task: no node has what a process requests \(1 CPU, 1 GPU\)"):
        fits(gpus=1)
    with pytest.raises(ClusterError, match=r"eval\.task\.labels {'market': 'none'}: no node of the cluster has this"):
        fits(labels={"market": "none"})


def test_trials_with_teacher_processes_leave_them_room(tmp_path: Path, check: Check) -> None:
    """Otherwise the workers of several trials would fill the cluster, and wait for ever for their teachers."""

    def room(**pool: Any) -> int:
        keys: dict[str, Any] = {"cluster": {"workers": 1, "cpus_per_worker": 0.5, "data_cpus": 0.5}}
        if pool:
            keys |= {"method": "head", "teacher": {"checkpoint": "teacher", "placement": "pool", "pool": pool}}
            keys |= {"distill": {"rois": "student"}}
        return resources.room_for(micro_job(tmp_path, {"train": "train", "val": "val"}, **keys))

    assert room() == 4
    assert room(actors=[1, 1], cpus=1) == 2
    assert room(actors=[1, 2], cpus=1, labels={"market": "spot"}) == 2
    assert room(actors=[1, 1], cpus=2) == 1


def test_a_process_takes_nothing_from_the_reservation_of_the_one_that_starts_it(ray_cluster: None) -> None:
    """In a search Ray keeps what a train worker starts within its reservation, where a teacher's process would find no room."""

    @ray.remote(num_cpus=0)
    def start(options: dict[str, Any]) -> bool:
        call = ray.remote(lambda: ray.util.get_current_placement_group() is None).options(**options).remote()
        return ray.get(call, timeout=60)  # type: ignore[no-any-return]

    group = placement_group([{"CPU": 0.5}])
    within = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    try:
        assert ray.get(start.options(scheduling_strategy=within).remote(resources.options_of(PoolSpec(cpus=1))))
    finally:
        remove_placement_group(group)
