"""predict --workers: the command on a real Ray cluster, killed in the middle and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headkd_ray import predict
from tests.data.coco_files import encoded, pixels
from tests.support import HANGS, micro_teacher

ray = pytest.importorskip("ray")

IMAGES = 60


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments of a prediction in parts of one image; the second image is none."""
    micro_teacher(tmp_path / "teacher", ("cat", "dog"), data={"eval_short_side": 64, "long_side": 96})
    (tmp_path / "photos").mkdir()
    photo = encoded(pixels(1, 90, 60), "JPEG")
    for number in range(IMAGES):
        (tmp_path / "photos" / f"{number:03d}.jpg").write_bytes(b"nonsense" if number == 1 else photo)
    places = [str(tmp_path / "teacher"), str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    return [*places, "--workers", "1", "--part-images", "1", "--format", "jsonl"]


@pytest.mark.slow
def test_a_killed_prediction_goes_on(
    ray_cluster: None, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with subprocess.Popen([sys.executable, "-m", "headkd_ray.predict", *command], env=environment) as process:
        deadline = time.monotonic() + HANGS
        while not list(out.glob("part-*[0-9].jsonl")):
            assert process.poll() is None and time.monotonic() < deadline, "the command ended or hangs"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    first = {path: path.stat().st_mtime_ns for path in out.glob("part-*[0-9].jsonl")}
    assert 0 < len(first) < IMAGES, "it was killed too late"

    with pytest.raises(SystemExit) as caught:
        predict.main(command)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert f"detections on {IMAGES - 1} images, in parts: {out}" in said.out
    assert f"of {IMAGES} parts are finished" in said.err
    assert f"error: 1 of {IMAGES} images could not be read (the others are in {out}):\n" in said.err
    assert f"{tmp_path}/photos/001.jpg: not a JPEG, PNG, WebP, BMP or TIFF" in said.err
    assert {path: path.stat().st_mtime_ns for path in first} == first, "a finished part was made again"
    parts = sorted(out.glob("part-*[0-9].jsonl"))
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"{tmp_path}/photos/{number:03d}.jpg" for number in range(IMAGES)]
    assert all(row["detections"] == rows[0]["detections"] != [] for row in rows if row["problem"] is None)


def test_what_does_not_fit_is_told_before_anything_starts(
    ray_cluster: None, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value, reason in (
        ("--gpus-per-worker", "1", "--workers 1: each requests 1 CPUs and 1 GPUs, and the cluster has room for 0"),
        ("--cpus-per-worker", "0", "--cpus-per-worker 0.0: Input should be greater than 0"),
        ("--score", "0.5", "--score is for pictures, which are not drawn with --workers"),
    ):
        with pytest.raises(SystemExit):
            predict.main([*command, option, value])
        assert f"error: {reason}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict.main([*command[:4], "--format", "jsonl"])
    assert "error: --format: for --workers only; add --workers N" in capsys.readouterr().err
