"""``ray job submit -- python -m headkd_ray.train`` works against a real ``ray start --head``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from machines import processes

from headkd_ray.job import Job
from headkd_ray.train import train
from tests.support import HANGS, assert_same_weights, micro_job, student_weights

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Head = tuple[str, dict[str, str]]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Yield a head node of its own, beside the session's cluster: (dashboard address, environment)."""
    with started(sys.executable, tmp_path_factory.mktemp("home")) as head:
        yield head


@contextlib.contextmanager
def started(python: str, home: Path) -> Iterator[Head]:
    """Start a head node with ``python``, and kill it on leaving.

    ``home``: a token file in the user's home would turn authentication on.
    """
    scratch = tempfile.mkdtemp(prefix="headkd-ray-", dir="/tmp")  # /tmp: a socket's path has at most 107 bytes
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home)}
    environment.pop("RAY_ADDRESS", None)
    dashboard, gcs = free_port(), free_port()
    command = [
        *(
            python,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--num-cpus=3",
            "--disable-usage-stats",
            f"--port={gcs}",
            "--block",
        ),
        *("--include-dashboard=true", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(f"--temp-dir={scratch}", f"--object-store-memory={80 * 2**20}", "--dashboard-agent-listen-port=0"),
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        pids = [process.pid, *processes("", process.pid)]  # killed by id, because `ray stop` would end other clusters too
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=30)
        shutil.rmtree(scratch, ignore_errors=True)


def ray_job(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``ray job ARGUMENTS``, again and again while the dashboard is starting."""
    address, environment = head
    command = [str(Path(sys.executable).with_name("ray")), "job", arguments[0], "--address", address, *arguments[1:]]
    for _ in range(20):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "Failed to connect" not in done.stderr + done.stdout:
            break
    return done


def working_dir_of(folder: Path, job: Job) -> Path:
    """Return a folder with the code and a job file, like a user's checkout."""
    shutil.copytree(ROOT / "headkd_ray", folder / "headkd_ray", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return folder


TRAIN = ("--", sys.executable, "-m", "headkd_ray.train", "job.yaml")


@pytest.mark.slow
def test_ray_job_submit(tmp_path: Path, drawn_splits: dict[str, str], head: Head) -> None:
    job = micro_job(tmp_path / "runs", drawn_splits, "submitted", optim={"epochs": 1, "milestones": []}, cluster={"workers": 1})
    working_dir = working_dir_of(tmp_path / "work", job)
    done = ray_job(head, "submit", "--working-dir", str(working_dir), *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AP50" in done.stdout and "step 1/" not in done.stderr
    result = json.loads((tmp_path / "runs" / "submitted" / "result.json").read_text())
    assert Path(result["student"], "model.safetensors").exists()

    (working_dir / "job.yaml").write_text("run: {name: wrong}\nmethods: supervised\n")
    failed = ray_job(head, "submit", "--working-dir", str(working_dir), *TRAIN)
    assert failed.returncode != 0 and "did you mean method" in failed.stdout


@pytest.mark.slow
def test_ray_job_stop_keeps_the_step_and_the_same_job_goes_on(tmp_path: Path, drawn_splits: dict[str, str], head: Head) -> None:
    """The stop writes a checkpoint of the current step, though checkpoints are otherwise due only at the ends of epochs."""
    job = micro_job(tmp_path / "runs", drawn_splits, "stopped", optim={"epochs": 40}, eval={"every_epochs": 40})
    on_ray = job.replace({"cluster.workers": 1})
    patient = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    submit = ("submit", "--working-dir", str(working_dir_of(tmp_path / "work", on_ray)), "--runtime-env-json", patient)
    done = ray_job(head, *submit, "--no-wait", "--submission-id", "first", *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    log = tmp_path / "runs" / "stopped" / "log.jsonl"
    deadline = time.monotonic() + HANGS
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline, ray_job(head, "logs", "first").stdout
        time.sleep(0.1)
    stopped = ray_job(head, "stop", "first")
    assert stopped.returncode == 0 and "was stopped" in stopped.stdout + stopped.stderr
    told = ray_job(head, "logs", "first").stdout
    ((step, steps),) = re.findall(r"stopped as requested at step (\d+) of (\d+), with a checkpoint", told.splitlines()[-1])
    assert int(step) < int(steps) and "Traceback" not in told

    again = ray_job(head, *submit, *TRAIN)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"step {int(step) + 1}/{steps}" in again.stdout and f"step {step}/{steps}" not in again.stdout
    result = json.loads((log.parent / "result.json").read_text())
    whole = job.replace({"run.name": "whole"})
    assert_same_weights(student_weights(train(whole, lambda record: None)), student_weights(result))


def thin_environment(folder: Path) -> Path:
    """Create a virtual environment that borrows this one's packages, and return its Python.

    Ray copies the environment in which it runs before it adds packages, and this one has gigabytes.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def wheel_of(folder: Path, name: str) -> Path:
    """Write a wheel with one empty module."""
    file, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    content = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for member, text in {**content, f"{info}/RECORD": "".join(f"{each},,\n" for each in content)}.items():
            archive.writestr(member, text)
    return file


@pytest.mark.slow
def test_a_job_s_own_packages_are_installed_with_uv(tmp_path: Path) -> None:
    """The runtime environment of cluster/, with a local wheel in place of a package that would be downloaded."""
    pytest.importorskip("uv")
    wanted = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    assert set(wanted["uv"]["packages"]) <= set(pyproject_extra("mlflow"))
    wanted["uv"] |= {"packages": [str(wheel_of(tmp_path, "only_in_this_job"))], "uv_check": False}  # borrowed ones do not count
    wanted["uv"]["uv_pip_install_options"] += ["--offline", "--no-index"]
    (tmp_path / "runtime_env.yaml").write_text(yaml.safe_dump(wanted))
    program = (
        "import os, only_in_this_job, ray; from headkd_ray.job import Job; ray.init(); "
        "there = ray.get(ray.remote(lambda: __import__('only_in_this_job').__file__).remote()); "
        "print('imported', there, os.environ['RAY_JOB_STOP_WAIT_TIME_S'])"
    )
    job = micro_job(tmp_path, {"train": "none", "val": "none"})
    submit = ("--working-dir", str(working_dir_of(tmp_path / "work", job)), "--runtime-env", str(tmp_path / "runtime_env.yaml"))
    with started(str(thin_environment(tmp_path / "environment")), tmp_path) as head:
        done = ray_job(head, "submit", *submit, "--", "python", "-c", program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"imported /\S+/runtime_resources/uv/\S+/only_in_this_job.py 120", done.stdout), done.stdout


def pyproject_extra(name: str) -> list[str]:
    """Return the requirements of an extra of this package."""
    (text,) = re.findall(rf"^{name} = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    requirements: list[str] = json.loads(text)
    return requirements
