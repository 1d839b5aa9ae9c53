"""``ray job submit -- python -m headkd_ray.train`` against a real ``ray start --head``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import descendants, micro_job

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of its own, beside the session's cluster: (dashboard address, environment)."""
    ray = Path(sys.executable).with_name("ray")
    # HOME: a token file that Ray may find in the user's would turn authentication on. /tmp: socket paths have 107 bytes.
    scratch = Path("/tmp") / f"headkd-ray-{os.getpid()}"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    dashboard, gcs = free_port(), free_port()
    command = [
        *(str(ray), "start", "--head", "--num-cpus=3", "--disable-usage-stats", f"--port={gcs}", "--block"),
        *("--include-dashboard=true", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(f"--temp-dir={scratch}", f"--object-store-memory={80 * 2**20}", "--dashboard-agent-listen-port=0"),
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        started = [process.pid, *descendants("", process.pid)]  # by id: `ray stop` would end other clusters too
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=30)
        shutil.rmtree(scratch, ignore_errors=True)


def test_ray_job_submit(tmp_path: Path, drawn_splits: dict[str, str], head: tuple[str, dict[str, str]]) -> None:
    address, environment = head
    working_dir = tmp_path / "work"
    shutil.copytree(ROOT / "headkd_ray", working_dir / "headkd_ray", ignore=shutil.ignore_patterns("__pycache__"))
    job = micro_job(tmp_path / "runs", drawn_splits, "submitted", optim={"epochs": 1, "milestones": []}, cluster={"workers": 1})
    (working_dir / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    ray = str(Path(sys.executable).with_name("ray"))
    command = [
        *(ray, "job", "submit", "--address", address, "--working-dir", str(working_dir)),
        *("--", sys.executable, "-m", "headkd_ray.train", "job.yaml"),
    ]

    def submit() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def wait_for_dashboard() -> subprocess.CompletedProcess[str]:
        for _ in range(20):
            done = submit()
            if "Failed to connect" not in done.stderr + done.stdout:
                return done
        return done

    done = wait_for_dashboard()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AP50" in done.stdout and "step 1/" not in done.stderr
    result = json.loads((tmp_path / "runs" / "submitted" / "result.json").read_text())
    assert Path(result["student"], "model.safetensors").exists()

    (working_dir / "job.yaml").write_text("run: {name: wrong}\nmethods: supervised\n")
    failed = submit()
    assert failed.returncode != 0 and "did you mean method" in failed.stdout
