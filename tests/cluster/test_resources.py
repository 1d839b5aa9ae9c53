"""Resources are checked before anything starts, also those of nodes that have only been announced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headkd_ray.cluster import resources
from headkd_ray.errors import ClusterError
from tests.support import micro_job

Check = Callable[..., resources.Resources]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Return a function that checks a job with given keys of its cluster section, on two nodes with 2 CPUs each."""
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2
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
