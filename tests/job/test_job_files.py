"""The committed jobs all load, agree with the JSON Schema, and have the official recipe's numbers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from headkd_ray.job import (
    FasterRCNNSpec,
    FCOSAssistantSpec,
    FCOSHeadSpec,
    FCOSSpec,
    GFLSpec,
    Job,
    RetinaAssistantSpec,
    RetinaNetSpec,
    load_job,
)
from headkd_ray.job.load import read_file
from headkd_ray.job.schema import schema_text, write_schema

JOBS = Path(__file__).parents[2] / "jobs"
OWN = ["head_detr.yaml", "pseudo.yaml", "rtdetr_teacher.yaml", "teacher_coco.yaml"]
"""Jobs that are not the paper's recipes."""
PAPER = sorted(path.name for path in JOBS.glob("*.yaml") if not path.name.startswith("tune_") and path.name not in OWN)
FILES = sorted(str(path.relative_to(JOBS)) for path in JOBS.rglob("*.yaml") if not path.name.startswith("tune_"))
"""Job files without the search files, which tests/tuning covers."""


def test_every_promised_job_is_there():
    paper = ["akd", "akd_fcos_reppoints", "assist", "baseline", "copy_only", "fitnet", "head", "head_cascade"]
    paper += ["head_fcos", "head_gfl", "head_mnv2", "head_reppoints", "teacher"]
    paper += ["tf_head", "tf_head_fcos", "tf_head_fcos_r50", "tf_head_only_fcos", "tf_head_r50"]
    small = ["akd", "assist", "baseline", "copy_only", "head", "teacher", "tf_head"]
    assert [f"{name}.yaml" for name in paper] == PAPER
    evidence = ["detr_teacher", "fcos", "retina_teacher", "retinanet", "teacher"]
    folders = {
        "": paper,
        "small/": small,
        "evidence/micro/": evidence,
        "evidence/standard/": [*evidence, "mnv2"],
    }
    folders["evidence/pretrained/"] = ["retinanet", "teacher"]
    assert sorted([*OWN, *(f"{folder}{name}.yaml" for folder, names in folders.items() for name in names)]) == FILES


def test_schema_is_fresh(tmp_path, monkeypatch):
    committed = json.loads((JOBS / "job.schema.json").read_text(encoding="utf-8"))
    assert committed == json.loads(schema_text()), "run python -m headkd_ray.job.schema"  # versions of pydantic write 0 or 0.0
    monkeypatch.setattr("sys.argv", ["schema", str(tmp_path / "s.json")])
    write_schema(Job, "nowhere")
    assert (tmp_path / "s.json").read_text(encoding="utf-8") == schema_text()


def test_schema_describes_every_key():
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        assert all(key.get("description") or key["$ref"] for key in section["properties"].values())


@pytest.mark.parametrize("file", FILES)
def test_job_loads_and_fits_the_schema(file):
    path = JOBS / file
    load_job(path)
    values = read_file(path).values
    jsonschema.validate(values, json.loads(schema_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values | {"optim": {**values["optim"], "lrr": 1}}, json.loads(schema_text()))
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={'../' * file.count('/')}job.schema.json"
    assert (path.parent / first.split("=")[1]).resolve() == (JOBS / "job.schema.json").resolve()


@pytest.mark.parametrize("file", FILES)
def test_commands_in_a_job_s_comments_work(file):
    text = (JOBS / file).read_text(encoding="utf-8")
    commands = re.findall(r"^# (python -m headkd_ray\.train .*?)(?:   |$)", text, flags=re.MULTILINE)
    assert commands
    for command in commands:
        _, _, _, job, *overrides = shlex.split(command)
        assert job == f"jobs/{file}"
        load_job(JOBS.parent / job, overrides)


@pytest.mark.parametrize("file", PAPER)
def test_paper_schedule_is_the_official_one(file):
    """The official files are configs/_base_/schedules/schedule_1x.py and datasets/coco_detection_mstrain.py."""
    job = load_job(JOBS / file)
    teacher = file == "teacher.yaml"
    optim = job.optim
    assert (optim.lr, optim.lr_batch) == (0.02 if teacher else 0.01, 16)
    assert job.cluster.workers * job.data.batch_size * optim.accumulate == 16
    assert job.cluster.gpus_per_worker == 1
    assert (optim.momentum, optim.weight_decay, optim.clip_norm) == (0.9, 1e-4, 20)
    schedule = (24, (16, 22)) if file.endswith("_r50.yaml") else (12, (8, 11))
    assert (optim.epochs, optim.milestones, optim.gamma) == (*schedule, 0.1)
    assert (optim.warmup_steps, optim.warmup_ratio) == (500, 0.001)
    assert (optim.ema, optim.precision) == (None, "fp32")
    assert job.data.short_side == ((800, 800) if teacher else (640, 800))
    assert (job.data.long_side, job.data.eval_short_side, job.data.pad) == (1333, 800, 32)
    assert (job.data.flip, job.data.keep_empty, job.data.views) == (0.5, False, None)
    assert job.run.seed == 3407


@pytest.mark.parametrize("file", [file for file in PAPER if file not in ("teacher.yaml", "head_cascade.yaml", "head_gfl.yaml")])
def test_paper_student(file):
    student = load_job(JOBS / file).student
    mobile = file == "head_mnv2.yaml"
    assert isinstance(student, FCOSSpec if "fcos" in file and "only" not in file else RetinaNetSpec)
    backbone = student.backbone
    depth = "50" if file.endswith("_r50.yaml") else "18"
    assert backbone.name == ("mobilenetv2_100" if mobile else f"resnet{depth}.tv_in1k")
    assert backbone.weights == ("checkpoints/mobilenet_v2_batch256_imagenet-ff34753d.pth" if mobile else "timm")
    assert (backbone.frozen_stages, backbone.norm_eval) == ((0, False) if mobile else (1, True))
    assert (backbone.leaky_slope, backbone.final_conv) == ((0.1, True) if mobile else (None, False))
    assert (student.neck.channels, student.neck.extra, student.neck.relu_before_p7) == (256, "conv_c5", False)
    head = student.head
    assert (head.convs, head.channels, head.prior) == (4, 256, 0.01)
    assert (head.proposals.pre_nms, head.proposals.post_nms, head.proposals.nms_iou) == (2000, 1000, 0.7)
    post = head.postprocess
    assert (post.pre_nms, post.score, post.nms_iou, post.max_detections) == (1000, 0.05, 0.5, 100)
    if isinstance(head, FCOSHeadSpec):  # research branch, configs/kd/fcos_retina_faster_r18.py
        assert (head.norm_on_bbox, head.centerness_on_reg, head.center_radius, head.box_loss) == (False, False, None, "iou")
        assert not head.conv_bias
        return
    assert (head.anchors.base_scale, head.anchors.octave_scales, head.anchors.ratios) == (4, 3, (0.5, 1, 2))
    assert (head.positive_iou, head.negative_iou, head.focal_alpha, head.focal_gamma) == (0.5, 0.4, 0.25, 2)


def test_gfl_student_is_mmdet_s_with_a_smaller_backbone():
    """The source is mmdet, configs/gfl/gfl_r50_fpn_1x_coco.py."""
    student = load_job(JOBS / "head_gfl.yaml").student
    assert student == GFLSpec(backbone=load_job(JOBS / "head.yaml").student.backbone)
    assert (student.neck.channels, student.neck.extra, student.neck.relu_before_p7) == (256, "conv_p5", False)
    head = student.head
    assert (head.convs, head.channels, head.norm_groups, head.prior) == (4, 256, 32, 0.01)
    assert (head.base_scale, head.reg_max, head.topk) == (8, 16, 9)
    assert (head.quality_beta, head.box_weight, head.dfl_weight) == (2, 2, 0.25)
    post = head.postprocess
    assert (post.pre_nms, post.score, post.nms_iou, post.max_detections) == (1000, 0.05, 0.6, 100)


def test_paper_two_stage_student():
    student = load_job(JOBS / "head_cascade.yaml").student
    teacher = load_job(JOBS / "teacher.yaml").student
    backbone = {"name": "resnet18.tv_in1k"}
    assert student.model_dump() == {**teacher.model_dump(), "backbone": {**teacher.backbone.model_dump(), **backbone}}


def test_paper_teacher():
    teacher = load_job(JOBS / "teacher.yaml").student
    assert isinstance(teacher, FasterRCNNSpec)
    assert (teacher.backbone.name, teacher.backbone.weights) == ("resnet50.tv_in1k", "timm")
    assert (teacher.backbone.frozen_stages, teacher.backbone.norm_eval) == (1, True)
    assert (teacher.neck.channels, teacher.neck.extra) == (256, "pool")
    assert (teacher.rpn.anchors.base_scale, teacher.rpn.anchors.octave_scales) == (8, 1)
    assert (teacher.rpn.sampler.size, teacher.rpn.sampler.positive_fraction) == (256, 0.5)
    assert (teacher.rpn.positive_iou, teacher.rpn.negative_iou) == (0.7, 0.3)
    assert (teacher.rpn.train_proposals.pre_nms, teacher.rpn.train_proposals.post_nms) == (2000, 1000)
    assert (teacher.rpn.test_proposals.pre_nms, teacher.rpn.test_proposals.post_nms) == (1000, 1000)
    roi = teacher.roi
    assert (roi.convs, roi.fcs, roi.fc_channels, roi.pool, roi.sampling_ratio, roi.aligned) == (0, 2, 1024, 7, 0, True)
    assert (roi.sampler.size, roi.sampler.positive_fraction, roi.class_agnostic) == (512, 0.25, False)


R50_FASTER = "checkpoints/faster_rcnn_r50_fpn_mstrain_3x_coco_20210524_110822-e10bd31c.pth"
REPPOINTS = "checkpoints/reppoints_moment_r50_fpn_gn-neck+head_2x_coco_20200329-91babaa2.pth"
CASCADE = "checkpoints/cascade_rcnn_r50_fpn_mstrain_3x_coco.pth"
R50_RETINA = "checkpoints/retinanet_r50_fpn_mstrain_3x_coco_20210718_220633-88476508.pth"


@pytest.mark.parametrize(
    ("file", "method", "teacher", "distill"),
    [
        ("head.yaml", "head", R50_FASTER, {"copy_head": True, "akd_weight": 2.0, "ckd_weight": 2.0, "warmup_steps": 2000}),
        (
            "head_fcos.yaml",
            "head",
            R50_FASTER,
            {"copy_head": True, "warm_assistant": True, "akd_weight": 2.0, "ckd_weight": 1.0, "ckd_epochs": 11},
        ),
        ("akd_fcos_reppoints.yaml", "akd", REPPOINTS, {"copy_head": True, "warm_assistant": True, "akd_weight": 1.0}),
        ("head_gfl.yaml", "head", R50_FASTER, {"copy_head": True, "akd_weight": 2.0, "ckd_weight": 2.0, "warmup_steps": 2000}),
        ("head_mnv2.yaml", "head", R50_FASTER, {"copy_head": True, "akd_weight": 2.0, "ckd_weight": 2.0, "warmup_steps": 2000}),
        (
            "head_reppoints.yaml",
            "head",
            REPPOINTS,
            {"warm_assistant": True, "akd_weight": 1.0, "ckd_weight": 1.0, "ckd_towers": ("cls", "box"), "ckd_conv": 2},
        ),
        (
            "head_cascade.yaml",
            "head",
            CASCADE,
            {"warm_assistant": True, "akd_weight": 1.0, "ckd_weight": 2.0, "warm_ckd": False, "ckd_bias": False},
        ),
        ("akd.yaml", "akd", R50_FASTER, {"copy_head": True, "akd_weight": 2.0, "warmup_steps": 2000}),
        ("copy_only.yaml", "copy_only", R50_FASTER, {"copy_head": True}),
        ("assist.yaml", "assist", None, {}),
        ("fitnet.yaml", "fitnet", R50_RETINA, {"copy_head": True, "fitnet_weight": 1.0}),
        ("baseline.yaml", "supervised", None, {}),
        ("teacher.yaml", "supervised", None, {}),
    ],
)
def test_paper_method(file: str, method: str, teacher: str | None, distill: dict[str, Any]):
    job = load_job(JOBS / file)
    assert job.method == method
    assert (job.teacher and job.teacher.checkpoint) == teacher
    assert distill.items() <= job.distill.model_dump().items()
    assert job.distill.assistant_weight == 1.0
    if file == "assist.yaml":
        assert job.distill.assistant == FasterRCNNSpec().roi
    else:
        assert job.distill.assistant is None


@pytest.mark.parametrize("file", ["tf_head.yaml", "tf_head_fcos.yaml", "tf_head_r50.yaml", "tf_head_fcos_r50.yaml"])
def test_tf_head_weights_are_the_research_branch_s(file):
    """The source is branch dev, configs/kd/head_r18.py and fcos_retina_faster_r18_head.py."""
    job = load_job(JOBS / file)
    assert (job.method, job.teacher) == ("tf_head", None)
    assert job.distill.warmup_steps == 2000
    assert job.distill.ckd_epochs == job.optim.milestones[0]
    rcnn = job.distill.assistants.rcnn
    assert rcnn is not None
    assert (rcnn.gt_weight, rcnn.ckd_weight, rcnn.decouple) == (1.0, 1.3, "fcos" not in file)
    assert rcnn.head == FasterRCNNSpec().roi
    if "fcos" in file:
        assert job.distill.assistants.fcos is None
        assert job.distill.assistants.retinanet == RetinaAssistantSpec(gt_weight=1.0, ckd_weight=1.0)
    else:
        assert job.distill.assistants.retinanet is None
        assert job.distill.assistants.fcos == FCOSAssistantSpec(gt_weight=0.5, ckd_weight=1.0)
        head = job.distill.assistants.fcos.head
        assert (head.norm_on_bbox, head.centerness_on_reg, head.center_radius, head.box_loss) == (True, True, 1.5, "giou")
        assert (head.norm_groups, head.convs, head.channels, head.conv_bias) == (32, 4, 256, True)


def test_fcos_alone_is_a_plain_assistant_of_full_weight():
    """The source is branch dev, configs/kd/head_fcos_r18.py and retina_fcos_r18.py."""
    job, both = load_job(JOBS / "tf_head_only_fcos.yaml"), load_job(JOBS / "tf_head.yaml")
    plain = {"norm_on_bbox": False, "centerness_on_reg": False, "center_radius": None, "conv_bias": False}
    fcos = FCOSAssistantSpec(head=FCOSHeadSpec(box_loss="giou", **plain), gt_weight=1.0, ckd_weight=1.0)
    assert job.distill.assistants.model_dump() == {"fcos": fcos.model_dump(), "rcnn": None, "retinanet": None}
    assert (job.student, job.optim, job.data) == (both.student, both.optim, both.data)
    assert (job.distill.ckd_epochs, job.distill.warmup_steps) == (8, 2000)


def test_small_jobs_differ_only_in_what_they_compare():
    jobs = {
        name: load_job(JOBS / "small" / f"{name}.yaml")
        for name in ("baseline", "assist", "copy_only", "akd", "head", "tf_head")
    }
    for job in jobs.values():
        for section in ("data", "student", "optim", "eval", "log", "cluster"):
            assert getattr(job, section) == getattr(jobs["head"], section)
    teacher = load_job(JOBS / "small" / "teacher.yaml")
    assert isinstance(teacher.student, FasterRCNNSpec)
    assert jobs["head"].teacher is not None
    assert jobs["head"].teacher.checkpoint == f"{teacher.run.storage}/{teacher.run.name}/student"
    assert jobs["assist"].distill.assistant == teacher.student.roi
    # Copying the RoI head needs equal pyramids.
    assert teacher.student.neck.channels == jobs["head"].student.neck.channels
    assert teacher.data == jobs["head"].data
