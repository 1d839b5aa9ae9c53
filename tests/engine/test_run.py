"""Which keys may change between a run and its resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headkd_ray.engine.run import check_run, open_run
from headkd_ray.errors import JobError
from tests.support import micro_job


def test_the_teacher_may_be_asked_elsewhere_but_not_about_other_things(tmp_path: Path) -> None:
    def job(budget: int, **teacher: Any) -> Any:
        return micro_job(
            tmp_path,
            {"train": "t", "val": "v"},
            method="head",
            teacher={"checkpoint": "c", **teacher},
            distill={"rois": "teacher", "roi_budget": budget},
        )

    open_run(job(64))
    check_run(job(64, placement="pool", pool={"actors": [1, 4], "gpus": 0.5}))
    check_run(job(64, placement="cache", batch_size=2, cache={"path": "elsewhere"}))
    with pytest.raises(JobError, match=r"distill\.roi_budget"):
        check_run(job(32))
    with pytest.raises(JobError, match=r"teacher\.cache\.dtype"):
        check_run(job(64, cache={"dtype": "int8"}))
