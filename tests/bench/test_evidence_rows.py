"""The evidence's rows differ in what they compare and in nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from evidence_plan import Bench, plan
from evidence_rows import ROWS
from safetensors.torch import save_file

from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.distill import build_training_model
from headkd_ray.errors import DataError
from headkd_ray.job import FasterRCNNSpec, Job, RetinaNetSpec, warnings
from headkd_ray.teacher.loading import teacher_of
from tests.bench.conftest import real_rows
from tests.support import edit

PREDICTED = {"pseudo", "teacher_half", "baseline_half", "baseline_half_long", "pseudo_unlabelled"}
"""Rows about pseudo labels."""
LARGE = {"large_half_long", "large_half_crop_long"}
"""Models of a teacher's size, which teach nobody."""
DETR = {"akd_detr", "head_detr"}
"""Rows that a DETR teaches."""
LADDER = ["baseline", "assist", "copy_only", "akd", "head"]


def students(bench: Bench) -> list[str]:
    return [row for row in bench.rows if row not in {*bench.teachers, *LARGE}]


@pytest.mark.parametrize("tier", ["micro", "standard"])
def test_every_promised_row_is_there(tier: str):
    rows = ["teacher", "retina_teacher", *LADDER, "fitnet"]
    rows += ["tf_head_fcos", "tf_head_rcnn", "tf_head", "tf_head_noes", "fcos_baseline", "fcos_head"]
    rows += ["akd_pearson", "head_pearson", "head_pearson_half", "head_pearson_double", "tf_head_pearson"]
    rows += ["tf_head_pearson_half", "tf_head_pearson_quarter", "fcos_head_pearson"]
    rows += ["head_cache_64_int8_pearson"]
    rows += ["baseline_views"]
    for rois in (64, 128, 256):
        rows += [f"head_inline_{rois}", f"head_rois_{rois}", f"head_cache_{rois}_fp16", f"head_cache_{rois}_int8"]
    rows += ["detr_teacher", "akd_detr", "head_detr"]
    more = {
        "micro": [
            "head_ckd_quarter",
            "head_ckd_stop",
            "tf_head_rcnn_quarter",
            "tf_head_quarter",
            "tf_head_rcnn_warm",
            *("baseline_augment", "head_augment", "baseline_long", "baseline_crop_long"),
            *("large_half_long", "large_half_crop_long"),
            *("pseudo", "teacher_half", "baseline_half", "baseline_half_long", "pseudo_unlabelled"),
        ],
        "standard": [f"{row}_mnv2" for row in LADDER],
    }
    assert list(ROWS[tier]) == [*rows, *more[tier]]
    for row, spec in ROWS[tier].items():
        assert spec.against or "teacher" in row or "baseline" in row or row in LARGE
        assert set(spec.against) <= set(ROWS[tier])


def test_rows_differ_from_what_they_are_compared_with_in_nothing_but_the_method(tier: Bench):
    plans = {row: plan(tier, row, 3) for row in tier.rows}
    every = plans["baseline"].job
    for row, own in plans.items():
        assert own.job.run.seed == 3 and own.job.run.name == f"{row}-{own.key}-3"
        assert warnings(own.job) == []
        for other in tier.rows[row].against:
            theirs = plans[other].job
            data = own.job.data.replace({"unlabelled": theirs.data.unlabelled})
            assert (data, own.job.student, own.job.optim) == (theirs.data, theirs.student, theirs.optim), f"{row}, {other}"
            assert own.matched == plans[other].matched
        for section in ("log", "checkpoint", "cluster"):
            assert getattr(own.job, section) == getattr(every, section)
        assert own.job.eval.every_epochs == own.job.optim.epochs, "no choice among checkpoints"
        alike = row in students(tier)
        assert own.job.optim.lr == every.optim.lr or not alike, "the middle of every search"
        assert own.job.distill.warmup_steps == every.distill.warmup_steps or not alike or row.endswith("_warm")
    assert len({own.key for own in plans.values()}) == len(plans)
    schedules = {row: own.job.optim for row, own in plans.items()}
    assert len({schedules[row].model_dump_json() for row in students(tier) if not row.endswith("_long")}) == 1
    views = {row: (own.job.data.views, own.job.data.view_seed) for row, own in plans.items()}
    cached = {row for row in plans if row == "baseline_views" or row.startswith(("head_inline", "head_rois", "head_cache"))}
    assert {row for row, seen in views.items() if seen == (4, 0)} == cached
    assert set(views.values()) == {(None, None), (4, 0)}


def test_rows_are_the_methods_that_they_are_called(tier: Bench):
    jobs = {row: plan(tier, row, 0).job for row in tier.rows}
    named = {row: row.removesuffix("_mnv2").removesuffix("_pearson") for row in jobs}
    methods = dict.fromkeys(
        (
            *("teacher", "retina_teacher", "detr_teacher", *LARGE),
            *("baseline", "fcos_baseline", "baseline_views", "baseline_augment", "baseline_long", "baseline_crop_long"),
        ),
        "supervised",
    )
    methods |= {"akd_detr": "akd"}
    methods |= dict.fromkeys(PREDICTED & {*tier.rows}, "supervised")
    methods |= {row: row for row in ("assist", "copy_only", "akd", "head", "fitnet")}
    methods |= {row: "tf_head" for row in tier.rows if row.startswith("tf_head")}
    assert {row: job.method for row, job in jobs.items()} == {row: methods.get(named[row], "head") for row in jobs}

    distances = {row: job.distill.distance for row, job in jobs.items()}
    assert distances == {row: "pearson" if "_pearson" in row or row in DETR else "mse" for row in jobs}

    roi, milestones = _roi(jobs["teacher"]), jobs["head"].optim.milestones
    for row in (row for row in jobs if named[row] == "assist"):
        assert jobs[row].distill.assistant == roi
    for row in ("tf_head_fcos", "tf_head_rcnn", "tf_head", "tf_head_noes"):
        assistants = jobs[row].distill.assistants
        given = {name for name, spec in assistants.model_dump().items() if spec is not None}
        assert given == {"tf_head_fcos": {"fcos"}, "tf_head_rcnn": {"rcnn"}}.get(row, {"fcos", "rcnn"})
        assert jobs[row].distill.ckd_epochs == (None if row == "tf_head_noes" else milestones[0])
        if assistants.rcnn is not None:
            assert assistants.rcnn.head == roi
        if assistants.fcos is not None:
            student = jobs["fcos_baseline"].student
            assert assistants.fcos.head == student.head.replace(
                {"proposals": assistants.fcos.head.proposals, "postprocess": assistants.fcos.head.postprocess}
            )
    assert (jobs["fcos_head"].distill.ckd_weight, jobs["fcos_head"].distill.ckd_epochs) == (1.0, milestones[-1])
    for rois in (64, 128, 256):
        assert jobs[f"head_inline_{rois}"].distill.rois == "student"
        assert jobs[f"head_inline_{rois}"].distill.assistant == roi.replace({"sampler.size": rois})
        for row in (f"head_rois_{rois}", f"head_cache_{rois}_fp16", f"head_cache_{rois}_int8"):
            assert (jobs[row].distill.rois, jobs[row].distill.roi_budget) == ("teacher", rois)
            assert _teacher(jobs[row]).placement == ("cache" if "cache" in row else "inline")
            assert "cache" not in row or row.endswith(_teacher(jobs[row]).cache.dtype)


def test_tiers_differ_in_size_alone():
    """Both tiers have the same rows, with the same methods and keys except for the heads."""
    micro, standard = ROWS["micro"], ROWS["standard"]
    for row in micro.keys() & standard.keys():
        assert replace(micro[row], keys="") == replace(standard[row], keys="")
        assert micro[row].keys.count("=") == standard[row].keys.count("=")


def test_the_pretrained_rows_differ_in_the_method_and_the_distance_alone(tmp_path: Path, data: Path):
    weights = tmp_path / "data" / "weights"
    weights.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (tmp_path / "data" / split).symlink_to(data / split, target_is_directory=True)
    for model in ("lite0", "lite2"):
        save_file(timm.create_model(f"tf_efficientnet_{model}").state_dict(), weights / f"efficientnet_{model}.safetensors")
    bench = real_rows("pretrained", tmp_path, tmp_path / "data")
    jobs = {row: plan(bench, row, 1).job for row in bench.rows}
    assert list(jobs) == [
        *("teacher", "baseline", "akd", "head", "tf_head", "akd_pearson", "head_pearson", "tf_head_pearson"),
    ]
    for row, job in jobs.items():
        assert warnings(job) == []
        assert job.student.backbone.weights == str(weights / f"efficientnet_lite{2 if row == 'teacher' else 0}.safetensors")
        if row != "teacher":
            own, alone = plan(bench, row, 1), plan(bench, "baseline", 1)
            assert own.matched == alone.matched and job.optim.epochs == job.eval.every_epochs
            assert job.distill.distance == ("pearson" if row.endswith("_pearson") else "mse")
            assert job.method == {"baseline": "supervised"}.get(row, row.removesuffix("_pearson"))
            assert job.method != "tf_head" or job.distill.ckd_epochs == job.optim.milestones[0]
    keys = {row: plan(bench, row, 1).key for row in jobs}
    moved = replace(bench, data=(tmp_path / "data").rename(tmp_path / "moved"))
    assert {row: plan(moved, row, 1).key for row in jobs} == keys, "where the weights lie does not matter"
    teacher = build_detector(plan(moved, "teacher", 0).job.student, 17)
    for row in ("head", "tf_head"):
        build_training_model(plan(moved, row, 0).job, 17, teacher if row == "head" else None, steps_per_epoch=10)


def test_micro_models_are_as_small_as_they_are_called(micro: Bench):
    jobs = {row: plan(micro, row, 0).job for row in micro.rows}
    teachers = {row: build_detector(jobs[row].student, 17) for row in micro.teachers}
    assert all(0.5e6 < sum(p.numel() for p in teacher.parameters()) < 2e6 for teacher in teachers.values())
    for row in ("baseline", "fcos_baseline"):  # every other row has one of these students
        assert 0.1e6 < sum(p.numel() for p in build_detector(jobs[row].student, 17).parameters()) < 0.25e6


def test_every_row_can_be_built(tier: Bench):
    """Widths fit: heads are copied and adapters are made. (Without the memory, which would take seconds to fill.)"""
    with torch.device("meta"):
        jobs = {row: plan(tier, row, 0).job for row in tier.rows}
        teachers = {row: build_detector(jobs[row].student, 17) for row in tier.teachers}
        for row in students(tier):
            if row in DETR:
                continue  # below
            if row.startswith("head") and any(str(rois) in row for rois in (128, 256)):
                continue  # as wide as the heads for 64 RoIs
            teacher = None if tier.rows[row].predicted else tier.rows[row].teacher
            build_training_model(jobs[row], 17, teachers[teacher] if teacher else None, steps_per_epoch=10)


def test_a_detr_teaches_the_rows_that_are_called_so(micro: Bench):
    """Its export is read by the loader of transformers' detectors, and the assistant compares itself with its states."""
    pytest.importorskip("transformers")
    jobs = {row: plan(micro, row, 0).job for row in DETR}
    made = plan(micro, "detr_teacher", 0).job
    classes = tuple("abcdefghijklmnopq")
    for job in jobs.values():
        assert job.teacher is not None and job.teacher.kind == "transformers" and job.distill.rois == "teacher"
        assert job.teacher.checkpoint == str(Path(made.run.storage) / made.run.name / "student")
    save_detector(Path(made.run.storage, made.run.name, "student"), build_detector(made.student, 17), classes, {})
    for job in jobs.values():
        model = build_training_model(job, 17, teacher_of(job, classes), steps_per_epoch=10)
        assert model.student is not None


def test_teachers_are_as_the_methods_need_them(tier: Bench):
    teacher, retina, student = (plan(tier, row, 0).job for row in ("teacher", "retina_teacher", "baseline"))
    assert (teacher.data, teacher.optim, teacher.eval) == (retina.data, retina.optim, retina.eval)
    assert teacher.data == student.data
    assert teacher.student.backbone.model_dump() == retina.student.backbone.model_dump()
    assert isinstance(retina.student, RetinaNetSpec) and isinstance(student.student, RetinaNetSpec)
    assert (retina.student.neck, retina.student.head) == (student.student.neck, student.student.head)
    assert teacher.student.neck.channels == student.student.neck.channels


def test_seeds_share_a_cache_and_other_rows_do_not(micro: Bench):
    rows = [row for row in micro.rows if "cache" in row]
    paths = {row: {_teacher(plan(micro, row, seed).job).cache.path for seed in (0, 1)} for row in rows}
    assert [len(own) for own in paths.values()] == [1] * len(rows)
    assert paths.pop("head_cache_64_int8_pearson") == paths["head_cache_64_int8"], "how features are compared does not matter"
    assert len(set().union(*paths.values())) == len(paths) == 6


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
    edit(micro.jobs / "teacher.yaml", "epochs: 36", "epochs: 48")
    taught = plan(micro, "head", 0)
    assert taught.key != one.key and taught.matched == one.matched
    assert taught.job.teacher and one.job.teacher and taught.job.teacher.checkpoint != one.job.teacher.checkpoint
    edit(micro.jobs / "retinanet.yaml", "epochs: 12", "epochs: 18")
    assert plan(micro, "head", 0).matched != one.matched
    assert plan(micro, "baseline", 0).matched == plan(micro, "head", 0).matched


def test_data_that_was_not_prepared_is_told(micro: Bench, tmp_path: Path):
    with pytest.raises(DataError, match=r"evidence\.py prepare"):
        plan(replace(micro, data=tmp_path / "nowhere"), "baseline", 0)


def _roi(job: Job) -> Any:
    assert isinstance(job.student, FasterRCNNSpec)
    return job.student.roi


def _teacher(job: Job) -> Any:
    assert job.teacher is not None
    return job.teacher


def test_predictions_are_made_by_a_teacher_that_has_not_seen_the_labels(micro: Bench):
    """The unlabelled half is not what its teacher was trained on, and every seed has the same predictions."""
    rows, jobs = micro.rows, {row: plan(micro, row, 0).job for row in micro.rows}
    half = rows["pseudo_unlabelled"]
    assert half.teacher is not None and rows[half.teacher].train == half.train == rows["baseline_half"].train
    assert half.unlabelled == half.predicted != half.train
    files = {row: _teacher(jobs[row]).predictions for row in ("pseudo", "pseudo_unlabelled")}
    assert len(set(files.values())) == 2 and _teacher(plan(micro, "pseudo", 3).job).predictions == files["pseudo"]
    assert jobs["pseudo"].data == jobs["baseline"].data and _teacher(jobs["pseudo"]).labelled_iou == 0.5
    long, short = jobs["baseline_half_long"].optim, jobs["baseline_half"].optim
    assert (long.epochs, long.milestones) == (2 * short.epochs, tuple(2 * each for each in short.milestones))
