"""The largest batch size is found by real steps that run out of real memory; tests/gpu does the same on a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headkd_ray.errors import JobError, StoppedError
from headkd_ray.job import render_job
from headkd_ray.profiling.batch_size import largest_batch_size, largest_multiple
from headkd_ray.train import train
from tests.support import micro_job

WITH_LITTLE_MEMORY = """
import re, resource, sys
from pathlib import Path
import torch
from headkd_ray.job import load_job
from headkd_ray.memory import enough_memory
from headkd_ray.profiling import batch_size
torch.set_num_threads(1)
torch.backends.mkldnn.enabled = False  # it has words of its own for want of memory
job, tried = load_job(sys.argv[1]), []
try_steps = batch_size.try_steps
def noting(job, *splits):
    tried.append(job.data.batch_size)
    return try_steps(job, *splits)
batch_size.try_steps = noting
batch_size.largest_batch_size(job.replace({"data.max_batch_size": None}))  # imports, and thread pools
now = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (now + (150 << 20),) * 2)
tried.clear()
print(batch_size.largest_batch_size(job), *tried)
"""

ON_RAY = """
import ray
from headkd_ray.cluster.trainer import on_ray
from headkd_ray.errors import UserError
from headkd_ray.job import load_job
job = load_job("job.yaml")
ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
with on_ray(job) as (find, train):
    print(find(job))
    try:
        find(job.replace({"data.train": "nowhere"}))
    except UserError as error:
        print("refused" if "nowhere" in str(error) else error)
"""
SECTIONS: dict[str, Any] = {
    "data": {"batch_size": 2, "max_batch_size": 8},
    "optim": {"lr_batch": 8},
    "cluster": {"gpus_per_worker": None},
}


@given(st.integers(1, 20), st.integers(1, 500), st.integers(1, 500))
def test_the_largest_multiple_is_found_in_few_trials(unit: int, most: int, room: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= max(room, unit)

    found = largest_multiple(fits, unit, most)
    assert found % unit == 0 and fits(found)
    assert found == unit or found <= most
    assert found + unit > most or not fits(found + unit)
    assert len(tried) - 2 <= 2 * (most // unit + 1).bit_length() + 1
    assert all(size <= 2 * max(room, unit) for size in tried), "none is far too large"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_the_size_that_is_found_fits_and_the_next_one_does_not(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """The steps are real, and so is the lack of memory: large views where 150 MB are left."""
    data = {"batch_size": 2, "max_batch_size": 64, "short_side": [320, 320], "long_side": 320, "eval_short_side": 64}
    job = micro_job(tmp_path, drawn_splits, "search", data=data, optim={"lr_batch": 2}, cluster={"gpus_per_worker": 1})
    (tmp_path / "job.yaml").write_text(render_job(job))
    done = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY, str(tmp_path / "job.yaml")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found, *tried = map(int, done.stdout.split())
    assert tried[0] == 2 and found in tried and found % 2 == 0
    assert min(size for size in tried if size > found) == found + 2, "the next size was tried, and did not fit"


def test_with_enough_memory_the_most_is_taken_up_to_the_training_set(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, **SECTIONS)
    state = torch.get_rng_state()
    assert largest_batch_size(job.replace({"data.max_batch_size": 9})) == 8
    assert torch.equal(torch.get_rng_state(), state), "the run's own initial weights would be others"
    assert largest_batch_size(job.replace({"data.batch_size": 20, "data.max_batch_size": 400})) == 40, "of 42 images"
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_the_run_does_not_start(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    with pytest.raises(JobError, match=r"data\.max_batch_size: is for GPUs, and there is none"):
        train(micro_job(tmp_path, drawn_splits, "cpu", **SECTIONS))
    assert not (tmp_path / "cpu").exists()


def test_a_run_that_goes_on_keeps_what_was_found(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """It starts here with the size as if it had been found, since there is no GPU to find it on."""
    found = micro_job(tmp_path, drawn_splits, **{**SECTIONS, "data": {"batch_size": 8}})

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        train(found, stop)
    result = train(micro_job(tmp_path, drawn_splits, **SECTIONS))
    assert result["last"]["step"] == 2 * 6, "of 42 images in batches of 8"
    assert json.loads((tmp_path / "run" / "job.json").read_text())["data"]["batch_size"] == 8


@pytest.mark.slow
def test_tasks_on_ray_agree(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """The GPU is only a number here, and two workers share it. Paths may be relative to the driver's folder."""
    splits = {name: os.path.relpath(place, tmp_path) for name, place in drawn_splits.items()}
    cluster = {"workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0.5}
    job = micro_job(Path("runs"), splits, **{**SECTIONS, "cluster": cluster})
    (tmp_path / "job.yaml").write_text(render_job(job))
    done = subprocess.run([sys.executable, "-c", ON_RAY], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "refused"], done.stderr
