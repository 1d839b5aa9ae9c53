"""``python -m headkd_ray.cache`` and ``bench teacher`` as a user runs them: build, kill, resume, verify, refuse."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from headkd_ray import bench, cache
from headkd_ray.data.shards import ShardSet
from tests.support import micro_job, micro_teacher


def teacher_in(folder: Path, splits: dict[str, str], seed: int) -> str:
    return micro_teacher(folder / f"teacher{seed}", ShardSet.open(splits["train"]).meta.classes, seed)


@pytest.fixture
def job_file(tmp_path: Path, drawn_splits: dict[str, str]) -> Path:
    """Return a HEAD job whose cache has 2 views of 3 shards."""
    job = micro_job(
        tmp_path / "runs",
        drawn_splits,
        method="head",
        teacher={"checkpoint": teacher_in(tmp_path, drawn_splits, 1), "cache": {"path": str(tmp_path / "cache")}},
        distill={"rois": "teacher", "roi_budget": 16},
        data={"views": 2},
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return tmp_path / "job.yaml"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cache.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_build_verify_info_and_what_a_changed_job_is_told(
    job_file: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(job_file)
    assert "there is no cache" in refused(["info", job], capsys)
    assert cache.main(["build", job]) == 0
    assert "built 6 files" in capsys.readouterr().out
    assert cache.main(["build", job]) == 0
    assert "built 0 files" in capsys.readouterr().out
    assert cache.main(["verify", job, "--sample", "10"]) == 0
    assert "the same in 10 of 10 views" in capsys.readouterr().out
    assert cache.main(["info", job]) == 0
    assert "6 of 6 files" in capsys.readouterr().out

    refused_for = refused(["verify", job, "teacher.cache.logits=3"], capsys)
    assert "teacher.cache.logits: the cache was built with 0, the job has 3" in refused_for
    with_logits = [job, "teacher.cache.logits=3", f"teacher.cache.path={job_file.parent / 'more'}"]
    assert cache.main(["build", *with_logits]) == 0
    assert cache.main(["verify", *with_logits, "--sample", "10"]) == 0
    assert "class of the largest logit: the same for 100.00% of the RoIs" in capsys.readouterr().out

    other = teacher_in(job_file.parent, drawn_splits, 2)
    message = refused(["verify", job, f"teacher.checkpoint={other}", "data.short_side=[64, 72]"], capsys)
    assert "teacher.checkpoint (weights): the cache was built with" in message
    assert "data.short_side: the cache was built with [56, 72], the job has [64, 72]" in message


def test_a_build_that_was_killed_goes_on(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job_file.parent / "cache"
    command = [sys.executable, "-m", "headkd_ray.cache", "build", str(job_file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("view-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("view-*.parquet")}
    assert 0 < len(before) < 6
    assert cache.main(["build", str(job_file)]) == 0
    assert f"built {6 - len(before)} files" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("view-*.parquet")}
    assert len(after) == 6 and all(after[name] == made for name, made in before.items())


def test_training_without_a_whole_cache_is_refused_before_it_starts(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from headkd_ray import train

    assert cache.main(["build", str(job_file)]) == 0
    (job_file.parent / "cache" / "view-00001-shard-00002.parquet").unlink()
    with pytest.raises(SystemExit):
        train.main([str(job_file), "teacher.placement=cache"])
    text = capsys.readouterr().err
    assert "5 of 6 files are there" in text and "view-00001-shard-00002.parquet" in text and "headkd_ray.cache build" in text
    assert not (job_file.parent / "runs").exists()


def test_a_disk_without_room_is_told_early(
    job_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    message = refused(["build", str(job_file)], capsys)
    assert "GB are still to be written, the disk has 0.00 GB left" in message
    assert len(list((job_file.parent / "cache").glob("view-*.parquet"))) == 1


def test_a_job_whose_student_chooses_the_rois_has_no_cache(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "use a job of method akd or head with distill.rois: teacher" in refused(
        ["build", str(job_file), "distill.rois=student"], capsys
    )


def test_bench_teacher_measures_and_recommends(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["teacher", str(job_file), "--steps", "2", "--rounds", "1"]
    assert bench.main(arguments) == 0
    output = capsys.readouterr().out
    for name in ("no teacher", "inline, student's RoIs", "inline, teacher's RoIs", "cache: built at", "recommended: "):
        assert name in output
    with pytest.raises(SystemExit):
        bench.main([*arguments, "method=supervised", "teacher=null", "distill.rois=student"])
    assert "has no teacher to place" in capsys.readouterr().err
