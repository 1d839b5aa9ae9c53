"""The evidence: rows differ in what they compare and in nothing else, runs are recorded once, tables are the results file's."""

from __future__ import annotations

import json
import statistics
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
from evidence_tables import BEGIN, END, METRICS, by_tier, document_section, insert, paired, read, readme_section, spread
from hypothesis import given
from hypothesis import strategies as st

from headkd_ray.detectors import build_detector
from headkd_ray.distill import build_trainee
from headkd_ray.errors import DataError, TrainingError
from headkd_ray.job import FasterRCNNSpec, Job, RetinaNetSpec, warnings
from tests.support import MICRO_TEACHER, micro_job

ROOT = Path(__file__).parents[2]
MICRO = evidence.ROWS["micro"]
STUDENTS = [row for row in MICRO if row not in ("teacher", "retina_teacher")]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, drawn_splits: dict[str, str]) -> Path:
    """A folder with the splits train, val and test."""
    folder = tmp_path_factory.mktemp("evidence")
    for split, source in {**drawn_splits, "test": drawn_splits["val"]}.items():
        (folder / split).symlink_to(source, target_is_directory=True)
    return folder


@pytest.fixture
def micro(tmp_path: Path, data: Path) -> Bench:
    """The real rows, on drawn data; without what searches have found."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    for file in (evidence.JOBS / "micro").glob("*.yaml"):
        (jobs / file.name).symlink_to(file)
    return Bench("micro", MICRO, jobs, data, tmp_path / "runs", tmp_path / "results.jsonl")


@pytest.fixture
def tiny(tmp_path: Path, data: Path, drawn_splits: dict[str, str]) -> Bench:
    """Rows that train in a second or two."""
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
    }
    return Bench("tiny", rows, jobs, data, tmp_path / "runs", tmp_path / "results.jsonl")


# --- the rows ---


def test_every_promised_row_is_there():
    rows = ["teacher", "retina_teacher", "baseline", "assist", "copy_only", "akd", "head", "fitnet"]
    rows += ["tf_head_fcos", "tf_head_rcnn", "tf_head", "tf_head_noes", "fcos_baseline", "fcos_head", "baseline_views"]
    for rois in (64, 128, 256):
        rows += [f"head_inline_{rois}", f"head_rois_{rois}", f"head_cache_{rois}_fp16", f"head_cache_{rois}_int8"]
    assert list(MICRO) == rows
    for row in STUDENTS:
        assert MICRO[row].against or row.endswith(("baseline", "baseline_views"))
        assert set(MICRO[row].against) <= set(MICRO)


def test_rows_differ_from_what_they_are_compared_with_in_nothing_but_the_method(micro: Bench):
    plans = {row: plan(micro, row, 3) for row in MICRO}
    every = plans["baseline"].job
    for row, own in plans.items():
        assert own.job.run.seed == 3 and own.job.run.name == f"{row}-{own.key}-3"
        assert warnings(own.job) == []
        for other in MICRO[row].against:
            theirs = plans[other].job
            for section in ("data", "student", "optim"):
                assert getattr(own.job, section) == getattr(theirs, section), f"{row}, {other}: {section}"
            assert own.matched == plans[other].matched
        for section in ("log", "checkpoint", "cluster"):
            assert getattr(own.job, section) == getattr(every, section)
        assert own.job.eval.every_epochs == own.job.optim.epochs, "no choice among checkpoints"
        assert own.job.optim.lr == every.optim.lr or row in micro.teachers, "the middle of every search"
        assert own.job.distill.warmup_steps == every.distill.warmup_steps or row in micro.teachers
    assert len({own.key for own in plans.values()}) == len(plans)
    schedules = {row: own.job.optim for row, own in plans.items()}
    assert len({optim.model_dump_json() for row, optim in schedules.items() if row not in micro.teachers}) == 1
    views = {row: (own.job.data.views, own.job.data.view_seed) for row, own in plans.items()}
    assert {row for row, seen in views.items() if seen == (4, 0)} == {*STUDENTS[STUDENTS.index("baseline_views") :]}
    assert set(views.values()) == {(None, None), (4, 0)}


def test_rows_are_the_methods_that_they_are_called(micro: Bench):
    jobs = {row: plan(micro, row, 0).job for row in MICRO}
    methods = dict.fromkeys(("teacher", "retina_teacher", "baseline", "fcos_baseline", "baseline_views"), "supervised")
    methods |= {row: row for row in ("assist", "copy_only", "akd", "head", "fitnet")}
    methods |= {row: "tf_head" for row in MICRO if row.startswith("tf_head")}
    assert {row: job.method for row, job in jobs.items()} == {row: methods.get(row, "head") for row in MICRO}

    roi, milestones = _roi(jobs["teacher"]), jobs["head"].optim.milestones
    assert jobs["assist"].distill.assistant == roi
    for row in ("tf_head_fcos", "tf_head_rcnn", "tf_head", "tf_head_noes"):
        assistants = jobs[row].distill.assistants
        given = {name for name, spec in assistants.model_dump().items() if spec is not None}
        assert given == {"tf_head_fcos": {"fcos"}, "tf_head_rcnn": {"rcnn"}}.get(row, {"fcos", "rcnn"})
        assert jobs[row].distill.ckd_epochs == (None if row == "tf_head_noes" else milestones[0])
        if assistants.rcnn is not None:
            assert assistants.rcnn.head == roi
        if assistants.fcos is not None:
            student = jobs["fcos_baseline"].student
            assert assistants.fcos.head == student.head.model_copy(
                update={"proposals": assistants.fcos.head.proposals, "postprocess": assistants.fcos.head.postprocess}
            )
    assert (jobs["fcos_head"].distill.ckd_weight, jobs["fcos_head"].distill.ckd_epochs) == (1.0, milestones[-1])
    for rois in (64, 128, 256):
        assert jobs[f"head_inline_{rois}"].distill.rois == "student"
        assert jobs[f"head_inline_{rois}"].distill.assistant == roi.model_copy(
            update={"sampler": roi.sampler.model_copy(update={"size": rois})}
        )
        for row in (f"head_rois_{rois}", f"head_cache_{rois}_fp16", f"head_cache_{rois}_int8"):
            assert (jobs[row].distill.rois, jobs[row].distill.roi_budget) == ("teacher", rois)
            assert _teacher(jobs[row]).placement == ("cache" if "cache" in row else "inline")
            assert "cache" not in row or row.endswith(_teacher(jobs[row]).cache.dtype)


def test_every_row_can_be_built(micro: Bench):
    """Widths fit: heads are copied, adapters made."""
    jobs = {row: plan(micro, row, 0).job for row in MICRO}
    teachers = {row: build_detector(jobs[row].student, 17) for row in micro.teachers}
    sizes = {row: sum(p.numel() for p in teacher.parameters()) for row, teacher in teachers.items()}
    assert all(0.5e6 < size < 2e6 for size in sizes.values())
    for row, job in jobs.items():
        teacher = MICRO[row].teacher
        trainee = build_trainee(job, 17, teachers[teacher] if teacher else None, steps_per_epoch=10)
        assert row in micro.teachers or 0.1e6 < sum(p.numel() for p in trainee.student.parameters()) < 0.25e6


def test_teachers_are_as_the_methods_need_them(micro: Bench):
    teacher, retina, student = (plan(micro, row, 0).job for row in ("teacher", "retina_teacher", "baseline"))
    assert (teacher.data, teacher.optim, teacher.eval) == (retina.data, retina.optim, retina.eval)
    assert teacher.data == student.data
    assert teacher.student.backbone.kwargs == retina.student.backbone.kwargs
    assert isinstance(retina.student, RetinaNetSpec) and isinstance(student.student, RetinaNetSpec)
    assert (retina.student.neck, retina.student.head) == (student.student.neck, student.student.head)
    assert teacher.student.neck.channels == student.student.neck.channels


def test_seeds_share_a_cache_and_other_rows_do_not(micro: Bench):
    rows = [row for row in MICRO if "cache" in row]
    paths = {row: {_teacher(plan(micro, row, seed).job).cache.path for seed in (0, 1)} for row in rows}
    assert [len(own) for own in paths.values()] == [1] * 6
    assert len(set().union(*paths.values())) == 6


def test_a_key_follows_what_decides_the_figures(micro: Bench, tmp_path: Path):
    one = plan(micro, "head", 0)
    assert plan(micro, "head", 1).key == one.key
    moved = replace(micro, storage=tmp_path / "elsewhere", results=tmp_path / "other.jsonl")
    assert plan(moved, "head", 0).key == one.key
    assert plan(micro, "head", 0, lr=0.01).key != one.key
    other_data = tmp_path / "swapped"
    other_data.mkdir()
    for split, source in {"train": "train", "val": "val", "test": "train"}.items():
        (other_data / split).symlink_to((micro.data / source).resolve(), target_is_directory=True)
    assert plan(replace(micro, data=other_data), "head", 0).key != one.key
    _change(micro.jobs / "teacher.yaml", "epochs: 36", "epochs: 48")
    taught = plan(micro, "head", 0)
    assert taught.key != one.key and taught.matched == one.matched
    assert taught.job.teacher and one.job.teacher and taught.job.teacher.checkpoint != one.job.teacher.checkpoint
    _change(micro.jobs / "retinanet.yaml", "epochs: 12", "epochs: 18")
    assert plan(micro, "head", 0).matched != one.matched
    assert plan(micro, "baseline", 0).matched == plan(micro, "head", 0).matched


# --- running ---


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
def test_a_teacher_is_trained_before_its_students_and_a_cache_built(tiny: Bench, monkeypatch: pytest.MonkeyPatch):
    evidence_run.work(tiny, [partial(evidence_run.run, tiny, row, 1) for row in ("head", "cached")])
    records = read(tiny.results)
    assert [(r["row"], r["seed"]) for r in records] == [("teacher", 0), ("head", 1), ("cached", 1)]
    assert records[1]["teacher"] == records[2]["teacher"] is not None
    assert len(list(tiny.storage.glob("cache-*/*.parquet"))) > 0

    # Recorded, but its weights are on another machine.
    (folder,) = (path for path in tiny.storage.glob("teacher-*") if path.is_dir())
    folder.rename(tiny.storage / "away")
    trained: list[str] = []
    monkeypatch.setattr(evidence_run, "train_row", lambda bench, todo: trained.append(todo.job.run.name))
    with pytest.raises(TypeError):  # no result: what follows is not looked at here
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
    """Instead of training: AP on val is highest at a learning rate of 0.02, and 0.005 diverges."""
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
    assert scores == {row: [0.02, 0.01, 0.005] for row in ("baseline", "head")}, "not of the teacher"
    for row in ("baseline", "head", "cached"):
        assert (plan(tiny, row, 0).job.optim.lr, plan(tiny, row, 0).searched) == (0.02, True)
    assert evidence_plan.choices(tiny)["head"]["val_AP"] == {"0.005": None, "0.01": 1.0, "0.02": 2.0}
    evidence_run.work(tiny, tasks)
    assert sum(map(len, scores.values())) == 6

    _change(tiny.jobs / "student.yaml", "epochs: 1", "epochs: 2")  # what was chosen for another job does not count
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


def test_data_that_was_not_prepared_is_told(micro: Bench, tmp_path: Path):
    with pytest.raises(DataError, match=r"evidence\.py prepare"):
        plan(replace(micro, data=tmp_path / "nowhere"), "baseline", 0)


# --- tables ---

ORDER = {"micro": {"teacher": (), "baseline": (), "head": ("baseline", "akd"), "akd": ("baseline",), "unmade": ("baseline",)}}


def made_up(row: str, seed: int, ap: float, **others: Any) -> dict[str, Any]:
    record = {"tier": "micro", "row": row, "seed": seed, **dict.fromkeys(METRICS, ap), "val_AP": ap, "images": 100}
    record |= {"seconds": 90.0, "parameters": 5, "lr": 0.01, "searched": True, "job": "j", "matched": "m"}
    record |= {"revision": "abc", "torch": "2", "torchvision": "3", "timm": "4", "machine": "a CPU", "threads": 1}
    return {**record, "date": "2026-01-01", **others}


MADE_UP = [
    made_up("baseline", 0, 10.0),
    made_up("baseline", 1, 12.0),
    made_up("head", 1, 99.0, job="old"),
    made_up("head", 0, 14.0, job="new", lr=0.02, searched=False),
    made_up("head", 1, 18.0, job="new", lr=0.02, searched=False, revision="def", APl=None),
    made_up("head", 2, 22.0, job="new", lr=0.02, searched=False, APl=None),
    made_up("akd", 1, 11.0, matched="another schedule"),
    made_up("teacher", 0, 30.0),
    made_up("stranger", 0, 1.0),
]


def test_tables_of_a_made_up_file():
    lines = readme_section(MADE_UP, ORDER).splitlines()
    assert lines[0] == "Tier micro, a CPU, 1 thread:"
    assert lines[2:9] == [
        "| row | seeds | AP | difference to its baseline |",
        "| --- | ---: | ---: | ---: |",
        "| `teacher` | 1 | 30.0 |  |",
        "| `baseline` | 2 | 11.0 ± 1.4 |  |",
        "| `head` | 3 | 18.0 ± 4.0 | +5.0 ± 1.4 (n = 2) |",
        "| `akd` | 1 | 11.0 | – |",  # not of the same schedule
        "| `stranger` | 1 | 1.0 |  |",
    ]
    full = document_section(MADE_UP, ORDER)
    assert "| `head` | 3 | 18.0 ± 4.0 | +5.0 ± 1.4 (n = 2) to `baseline`<br>– to `akd` |" in full
    assert "| 18.0 ± 4.0 | 18.0 ± 4.0 | 18.0 ± 4.0 | 14.0 | 18.0 ± 4.0 | 1.5 ± 0.0 |" in full
    assert "| `head` | 5 | 100 | 0.02 (not searched) | a CPU | abc; def | 2, 3, 4 | 2026-01-01 |" in full
    assert "unmade" not in full and "99" not in full


def test_no_results_is_said():
    assert "no figures yet" in readme_section([], ORDER) and "no figures yet" in document_section([], ORDER)


def test_a_repeated_seed_counts_once_the_last_one():
    rows = by_tier([made_up("baseline", 0, 10.0), made_up("baseline", 0, 20.0)], ORDER)["micro"]
    assert [record["AP"] for record in rows["baseline"].values()] == [20.0]


some_aps = st.dictionaries(st.integers(0, 9), st.floats(0, 100), max_size=6)


@given(some_aps, some_aps)
def test_differences_are_paired_by_seed(ours: dict[int, float], theirs: dict[int, float]):
    records = [made_up("baseline", seed, ap) for seed, ap in theirs.items()]
    records += [made_up("head", seed, ap) for seed, ap in ours.items()]
    rows = {"head": {}, **by_tier(records, ORDER).get("micro", {})}
    both = sorted(ours.keys() & theirs.keys())
    found = paired(rows, "head", "baseline")
    assert found == [ours[seed] - theirs[seed] for seed in both]
    text = spread(found, "+")
    if len(both) > 1:
        mean, sd = text.replace("−", "-").split(" ± ")
        assert float(mean) == pytest.approx(statistics.fmean(found), abs=0.051)
        assert float(sd) == pytest.approx(statistics.stdev(found), abs=0.051)
    else:
        assert "±" not in text
        assert (text == "–") == (not both)


def test_insert_replaces_what_is_between_the_markers():
    text = f"before\n{BEGIN}\n\nold\n\n{END}\nafter\n"
    assert insert(text, "new") == text.replace("old", "new")
    assert insert(insert(text, "new"), "old") == text
    with pytest.raises(DataError, match="markers"):
        insert("nothing", "new")


def test_a_broken_line_is_named(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text('{"row": "head"}\n{"row": "he')
    with pytest.raises(DataError, match=r"results\.jsonl:2"):
        read(tmp_path / "results.jsonl")


def test_committed_tables_are_fresh():
    records = read(ROOT / "docs" / "results.jsonl")
    for file, section in (("README.md", readme_section), ("docs/results.md", document_section)):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text == insert(text, section(records, evidence.order())), "run python bench/evidence.py table"


def _roi(job: Job) -> Any:
    assert isinstance(job.student, FasterRCNNSpec)
    return job.student.roi


def _teacher(job: Job) -> Any:
    assert job.teacher is not None
    return job.teacher


def _change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    if file.is_symlink():
        file.unlink()
    file.write_text(text.replace(old, new), encoding="utf-8")
