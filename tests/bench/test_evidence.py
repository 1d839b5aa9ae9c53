"""The evidence records each run once, and its searches try the same values for all rows."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import evidence
import evidence_plan
import evidence_run
import evidence_search
import pytest
import yaml
from evidence_plan import Bench, Row, plan
from evidence_run import BusyError, OutOfTimeError
from evidence_tables import METRICS, read

from headkd_ray.errors import TrainingError
from tests.support import MICRO_TEACHER, edit, micro_job

PSEUDO = "teacher.kind=predictions teacher.score_threshold=0 teacher.ignore_threshold=0"
"""Keys of a row whose teacher is hardly trained, and sure of nothing."""


@pytest.fixture
def tiny(tmp_path: Path, data: Path, drawn_splits: dict[str, str]) -> Bench:
    """Return rows that train in a second or two."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    short = {"optim": {"epochs": 1, "milestones": [], "warmup_steps": 0}, "eval": {"every_epochs": 1}}
    files = {"student": {}, "teacher": {"student": MICRO_TEACHER}}
    for name, sections in files.items():
        job = micro_job(tmp_path, drawn_splits, name, **short, **sections, cluster={"gpus_per_worker": 0})
        (jobs / f"{name}.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    cached = "method=head distill.rois=teacher distill.roi_budget=8 data.views=1 data.view_seed=0 teacher.placement=cache"
    rows = {
        "teacher": Row("teacher"),
        "baseline": Row("student"),
        "head": Row("student", "method=head", ("baseline",), "teacher"),
        "cached": Row("student", cached, ("baseline",), "teacher", lr_of="head"),
        "pseudo": Row("student", PSEUDO, ("baseline",), "teacher", "head", unlabelled="halves/train", predicted="halves/train"),
    }
    return Bench("tiny", rows, jobs, data, tmp_path / "runs", tmp_path / "results.jsonl")


@pytest.mark.slow
def test_a_run_appends_one_line_once_also_after_an_interruption(tiny: Bench, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(OutOfTimeError):
        evidence_run.run(replace(tiny, deadline=time.monotonic()), "baseline", 0)
    assert not tiny.results.exists()
    evidence_run.run(tiny, "baseline", 0)
    (record,) = read(tiny.results)
    assert (record["tier"], record["row"], record["seed"], record["lr"], record["searched"]) == (
        "tiny",
        "baseline",
        0,
        0.01,
        False,
    )
    assert {*METRICS, "val_AP"} <= record.keys()
    assert all(record[name] is None or 0 <= record[name] <= 100 for name in METRICS)
    assert (record["AP"], record["images"]) == (record["val_AP"], 42), "test is val here"
    assert 0 < record["seconds"] < 60 and record["parameters"] > 1000
    todo = plan(tiny, "baseline", 0)
    assert (record["job"], record["matched"], record["teacher"], record["threads"]) == (todo.key, todo.matched, None, 1)
    assert {"revision", "torch", "torchvision", "timm", "python", "machine", "load", "date"} <= record.keys()
    assert str(tiny.storage) not in json.dumps(record) and str(tiny.data) not in json.dumps(record)
    evidence_run.run(tiny, "baseline", 0)
    assert len(read(tiny.results)) == 1
    assert "recorded" in capsys.readouterr().out


@pytest.mark.slow
def test_predictions_are_made_once_and_recorded(tiny: Bench):
    evidence_run.run(tiny, "pseudo", 0)
    teacher, record = read(tiny.results)
    assert (teacher["row"], record["row"]) == ("teacher", "pseudo") and record["images"] > teacher["images"]
    (file,) = tiny.storage.glob("predictions-*.json")
    assert record["teacher"] == hashlib.sha256(file.read_bytes()).hexdigest()[:10]
    made = file.stat().st_mtime_ns
    evidence_run.run(tiny, "pseudo", 1)
    assert file.stat().st_mtime_ns == made and len(read(tiny.results)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["standard"], indirect=True)
@pytest.mark.parametrize("row", ["tf_head", "fcos_head", "head_mnv2"])
def test_the_standard_tier_trains(tier: Bench, row: str):
    """The tier's jobs and teachers train for one epoch on a few drawn images, on whatever device there is."""
    rows = {
        name: replace(spec, keys=re.sub(r"ckd_epochs=\d+", "ckd_epochs=null", spec.keys)) for name, spec in tier.rows.items()
    }
    bench = replace(tier, rows=rows)
    for file in bench.jobs.glob("*.yaml"):
        job = yaml.safe_load(file.read_text())
        job["optim"] |= {"epochs": 1, "milestones": [], "warmup_steps": 0}
        job["eval"]["every_epochs"] = 1
        file.unlink()
        file.write_text(yaml.safe_dump(job))
    evidence_run.run(bench, row, 0)
    taught = [] if bench.rows[row].teacher is None else [bench.rows[row].teacher]
    assert [record["row"] for record in read(bench.results)] == [*taught, row]


@pytest.mark.slow
def test_a_teacher_is_trained_before_its_students_and_a_cache_built(tiny: Bench, monkeypatch: pytest.MonkeyPatch):
    evidence_run.work(tiny, [partial(evidence_run.run, tiny, row, 1) for row in ("head", "cached")])
    records = read(tiny.results)
    assert [(r["row"], r["seed"]) for r in records] == [("teacher", 0), ("head", 1), ("cached", 1)]
    assert records[1]["teacher"] == records[2]["teacher"] is not None
    assert len(list(tiny.storage.glob("cache-*/*.parquet"))) > 0

    # Its record is there, but its weights are on another machine.
    (folder,) = (path for path in tiny.storage.glob("teacher-*") if path.is_dir())
    folder.rename(tiny.storage / "away")
    trained: list[str] = []
    monkeypatch.setattr(evidence_run, "train_row", lambda bench, todo: trained.append(todo.job.run.name))
    with pytest.raises(TypeError):  # there is no result; what follows is not tested here
        evidence_run.run(tiny, "head", 2)
    assert [name.split("-")[0] for name in trained] == ["teacher", "head"]

    evidence_run.forget(tiny, ["teacher"])
    assert read(tiny.results) == []
    assert [path.name for path in tiny.storage.iterdir() if path.is_dir()] == ["away"]


def test_what_another_process_is_at_comes_later(tiny: Bench, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with evidence_run.locked(tiny, "taken"), pytest.raises(BusyError), evidence_run.locked(tiny, "taken"):
        pass
    tries = iter([True, True, False])

    def busy() -> None:
        if next(tries):
            raise BusyError
        done.append("busy")

    evidence_run.work(tiny, [busy, lambda: done.append("free")])
    assert done == ["free", "busy"]
    with pytest.raises(OutOfTimeError):
        evidence_run.work(replace(tiny, deadline=time.monotonic() - 1), [lambda: done.append("late")])
    assert done == ["free", "busy"]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Replace training: AP on val is highest at a learning rate of 0.02, and 0.005 diverges."""
    trained: dict[str, list[float]] = {}

    def fake(bench: Bench, todo: evidence_plan.Plan) -> dict[str, Any]:
        lr = todo.job.optim.lr
        trained.setdefault(todo.row, []).append(lr)
        assert todo.job.run.seed == evidence_search.SEARCH_SEED
        if lr == 0.005:
            raise TrainingError("not finite")
        return {"best": {"AP": 100 * lr}}

    monkeypatch.setattr(evidence_search, "train_row", fake)
    monkeypatch.setattr(evidence_search, "have_teacher", lambda bench, row: None)
    return trained


def test_search_tries_the_same_for_all_and_runs_take_what_it_chose(tiny: Bench, scores: dict[str, list[float]]):
    assert not plan(tiny, "cached", 0).searched
    tasks = evidence_search.searches(tiny, ["cached", "baseline"])
    evidence_run.work(tiny, list(reversed(tasks)))
    assert scores == {row: [0.04, 0.02, 0.01, 0.005] for row in ("baseline", "head")}, "not of the teacher"
    for row in ("baseline", "head", "cached"):
        assert (plan(tiny, row, 0).job.optim.lr, plan(tiny, row, 0).searched) == (0.04, True)
    assert evidence_plan.choices(tiny)["head"]["val_AP"] == {"0.005": None, "0.01": 1.0, "0.02": 2.0, "0.04": 4.0}
    evidence_run.work(tiny, tasks)
    assert sum(map(len, scores.values())) == 8

    edit(tiny.jobs / "student.yaml", "epochs: 1", "epochs: 2")  # a choice made for another job does not count
    assert not any(plan(tiny, row, 0).searched for row in ("teacher", "baseline", "head", "cached"))


def test_the_command_refuses_unknown_rows_and_says_when_time_is_over(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    places = ["--data", str(data), "--storage", str(tmp_path / "runs"), "--results", str(tmp_path / "results.jsonl")]
    with pytest.raises(SystemExit) as refused:
        evidence.main([*places, "run", "haed"])
    assert refused.value.code == 2
    assert "haed: no such row" in capsys.readouterr().err
    assert evidence.main([*places, "run", "head", "--minutes", "0"]) == 3
    assert evidence.main([*places, "all", "--minutes", "0"]) == 3
    assert not (tmp_path / "results.jsonl").exists()
