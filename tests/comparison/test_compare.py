"""Finished runs are compared as they should be: seed by seed, on one split, with what else differs."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import headkd_ray
from headkd_ray import compare
from headkd_ray.comparison.figures_of_rows import figures_of, measure
from headkd_ray.comparison.run_rows import Row, read_run, rows_of
from headkd_ray.data.shards import ShardSet
from headkd_ray.diagnosis.resampling import resamples
from headkd_ray.errors import UserError
from tests.diagnosis.test_curves import split
from tests.support import micro_job


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> dict[str, Any]:
    """Train two jobs with two seeds through the command: {"folder": its place, "code": exit code}."""
    folder = tmp_path_factory.mktemp("compare")
    jobs = []
    for name, optim in {"plain": {}, "faster": {"lr": 0.02}}.items():
        job = micro_job(folder / "runs", drawn_splits, name, optim={"epochs": 1, "milestones": [], **optim})
        jobs.append(folder / f"{name}.yaml")
        jobs[-1].write_text(yaml.safe_dump(job.model_dump(mode="json")))
    arguments = ["--jobs", *map(str, jobs), "--seeds", "0", "1", "--set", "eval.batch_size=5", "--out", str(folder / "out")]
    return {"folder": folder, "code": compare.main(arguments), "arguments": arguments}


def test_jobs_are_trained_with_each_seed_and_compared(compared: dict[str, Any]) -> None:
    folder = compared["folder"]
    assert compared["code"] == 0
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["faster_s0", "faster_s1", "plain_s0", "plain_s1"]
    plain, faster = json.loads((folder / "out" / "compare.json").read_text())
    assert (plain["name"], faster["name"]) == ("supervised (optim.lr=0.01)", "supervised (optim.lr=0.02)")
    assert plain["gain"] is None and plain["seeds"] == [0, 1]
    best = [json.loads((folder / "runs" / f"faster_s{seed}" / "result.json").read_text())["best"]["AP"] for seed in (0, 1)]
    assert faster["metrics"]["AP"]["mean"] == pytest.approx(np.mean(best)), "on the split and batches of training"
    markdown, page = ((folder / "out" / f"compare.{kind}").read_text() for kind in ("md", "html"))
    assert "| supervised (optim.lr=0.02) | 2 | " in markdown and "supervised (optim.lr=0.02)" in page
    told = (
        "supervised (optim.lr=0.02) differs from supervised (optim.lr=0.01) in more than the method: optim.lr (0.01 there, 0.02"
    )
    assert told in markdown and "fewer than three seeds" in markdown


def test_again_nothing_is_trained_and_no_image_is_read(
    compared: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(compare, "detect_split")
    logs = {path: path.read_bytes() for path in compared["folder"].glob("runs/*/log.jsonl")}
    before = json.loads((compared["folder"] / "out" / "compare.json").read_text())
    assert compare.main(compared["arguments"]) == 0
    assert json.loads((compared["folder"] / "out" / "compare.json").read_text()) == before
    assert {path: path.read_bytes() for path in logs} == logs and "gains over supervised" in capsys.readouterr().out


def test_the_teacher_s_detections_are_shown_beside_the_students(compared: dict[str, Any], tmp_path: Path) -> None:
    runs = compared["folder"] / "runs"
    taught, teacher = tmp_path / "taught", str(runs / "faster_s1" / "student")
    shutil.copytree(runs / "plain_s0", taught)
    job = json.loads((taught / "job.json").read_text())
    (taught / "job.json").write_text(json.dumps({**job, "method": "akd", "teacher": {"checkpoint": teacher}}))
    out = tmp_path / "out"
    shutil.copytree(compared["folder"] / "out" / "detections", out / "detections")
    (stored,) = (out / "detections").glob("plain_s0-*.json")  # which is read instead of evaluating again: a perfect student's
    truth = ShardSet.open(job["data"]["val"]).ground_truth()["annotations"]
    perfect = [{**each, "score": 0.9} for each in truth]
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "results": perfect}))
    found = headkd_ray.compare([str(runs / "plain_s0"), str(taught)], out=str(out))  # type: ignore[operator]
    assert found.notes[-1].startswith(f"the teacher {teacher} has AP ")
    captions = re.findall("<figcaption>(.*)</figcaption>", (out / "compare.html").read_text())
    told = re.compile(
        r"val_\d+\.jpg \(image \d+\): ground truth, then supervised: 0 .*, akd: 0 .*, teacher: [1-9]\d* mistakes?"
    )
    assert captions and all(told.fullmatch(caption) for caption in captions)


def test_what_cannot_be_compared_is_told_at_once(compared: dict[str, Any], tmp_path: Path) -> None:
    runs = compared["folder"] / "runs"
    shutil.copytree(runs / "plain_s0", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    with pytest.raises(UserError) as error:
        headkd_ray.compare([str(runs / "plain_s0"), str(tmp_path), str(tmp_path / "unfinished")])  # type: ignore[operator]
    assert [problem.split(": ")[1][:28] for problem in error.value.problems] == [
        "is not the folder of a run (",
        "the run has not ended; finis",
    ]
    shutil.copytree(runs / "plain_s0", tmp_path / "copy")
    with pytest.raises(UserError, match=r"plain_s0 and .*copy have the same job and seed; leave one out"):
        rows_of([read_run(str(runs / "plain_s0")), read_run(str(tmp_path / "copy"))])
    with pytest.raises(
        UserError, match=r"--against akd: there is no such row; one of supervised \(optim.lr=0.01\), supervised \("
    ):
        headkd_ray.compare([str(runs / "plain_s0"), str(runs / "faster_s0")], against="akd")  # type: ignore[operator]


def test_figures_by_hand(compared: dict[str, Any]) -> None:
    """The better detector has every object at its place; the gain is over the seeds that both have."""
    truth, results = split(3)
    perfect = [
        {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 0.9}
        for each in truth["annotations"]
        if not each["iscrowd"]
    ]
    weights = resamples(12, 50)
    poor = {0: measure(truth, results, 100, weights), 1: measure(truth, results[::2], 100, weights)}
    good = {seed: measure(truth, perfect, 100, weights) for seed in (0, 1, 2)}
    row = Row("good", {0: read_run(str(compared["folder"] / "runs" / "plain_s0"))})
    figures = figures_of(row, good, poor)
    gains = [100 - poor[seed].metrics.AP for seed in (0, 1)]
    assert str(figures.metrics["AP"]) == "100.0 ± 0.0" and figures.hours.mean > 0
    assert figures.gain == (pytest.approx(np.mean(gains)), pytest.approx(np.std(gains, ddof=1)))
    assert figures.interval is not None and figures.interval[0] < np.mean(gains) < figures.interval[1]
    alone = figures_of(row, {5: good[0]}, poor)
    assert alone.gain is None and alone.interval is None and math.isnan(alone.metrics["AP"].deviation)
