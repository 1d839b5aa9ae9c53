"""Keys that contradict each other are reported, and the schema keeps to its own rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from headkd_ray.job import Job, problems, warnings
from headkd_ray.job.keys import dotted, sections
from headkd_ray.job.module_specs import Spec

DETR = {"kind": "transformers", "checkpoint": "t"}
FASTER_RCNN = {"kind": "faster_rcnn", "backbone": {"weights": "timm"}}
OF_DETR = "a teacher of kind transformers has"
ANSWERED = {"rois": "teacher", "copy_head": False}
PREDICTIONS = {"kind": "predictions", "predictions": "p.json"}
UNLABELLED = {"train": "a", "val": "b", "unlabelled": "c"}


def job(**changes: Any) -> Job:
    """Return a sound job, with sections replaced."""
    sound: dict[str, Any] = {
        "run": {"name": "x"},
        "method": "head",
        "data": {"train": "a", "val": "b"},
        "teacher": {"checkpoint": "t"},
        "student": {"kind": "retinanet", "backbone": {"weights": "timm"}},
    }
    return Job.model_validate(sound | changes)


def found(**changes: Any) -> list[tuple[str, str]]:
    return [(dotted(problem.path), problem.message) for problem in problems(job(**changes))]


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"method": "fitnet", "teacher": None}, "teacher", "method fitnet needs a teacher"),
        ({"method": "assist"}, "teacher", "method assist uses no teacher"),
        (
            {"method": "supervised", "teacher": None, "student": DETR, "losses": {"class_weights": "balanced"}},
            "losses.class_weights",
            "a detector of transformers computes its losses itself, without them; remove the key",
        ),
        (
            {"losses": {"class_weights": {"cat": 2.0}, "effective_beta": 0.9}},
            "losses.effective_beta",
            "has no effect without losses.class_weights: effective_number; use that, or remove it",
        ),
        (
            {"method": "fitnet", "student": {"kind": "faster_rcnn", "backbone": {"weights": "timm"}}},
            "student.kind",
            "method fitnet needs a retinanet student",
        ),
        *(
            (
                {"method": method, "teacher": teacher, "student": {"kind": "transformers", "model": "rt_detr"}},
                "student.kind",
                f"transformers has no feature pyramid for the assistants and losses of method {method}; use method supervised",
            )
            for method, teacher in (("head", {"checkpoint": "t"}), ("assist", None))
        ),
        (
            {"method": "supervised", "teacher": None, "student": {"kind": "transformers"}},
            "student.model",
            "missing: name an architecture (rt_detr, ...), or give student.checkpoint, whose it then is",
        ),
        (
            {
                "method": "supervised",
                "teacher": None,
                "student": {"kind": "transformers", "checkpoint": "c", "pixels": {"mean": [0, 0, 0]}},
            },
            "student.pixels",
            "comes with student.checkpoint; remove the key, or also give student.model",
        ),
        ({"method": "copy_only", "distill": {"copy_head": False}}, "distill.copy_head", "method copy_only copies"),
        ({"optim": {"milestones": [8, 8]}}, "optim.milestones", r"[8, 8] is not in ascending order"),
        ({"optim": {"milestones": [8, 12]}}, "optim.milestones", r"[12] is not before the end"),
        (
            {"data": {"train": "a", "val": "b", "short_side": [800, 640]}},
            "data.short_side",
            "[800, 640] is not [smallest, largest]",
        ),
        (
            {"data": {"train": "a", "val": "b", "short_side": [9, 2000]}},
            "data.short_side",
            "2000 is above data.long_side (1333)",
        ),
        (
            {"data": {"train": "a", "val": "b", "eval_short_side": 1334}},
            "data.eval_short_side",
            "1334 is above data.long_side (1333)",
        ),
        (
            {"data": {"train": "a", "val": "b", "augment": {"crop": 0.5, "crop_side": [0.9, 0.4]}}},
            "data.augment.crop_side",
            "[0.9, 0.4] is not [smallest, largest]",
        ),
        (
            {"data": {"train": "a", "val": "b", "augment": {"zoom_out_side": [2, 3]}}},
            "data.augment.zoom_out_side",
            "has no effect, for data.augment.zoom_out is 0; set that, or remove this key",
        ),
        (
            {"data": {"train": "a", "val": "b", "augment": {"mosaic": 0.5, "mosaic_epochs": 12}}},
            "data.augment.mosaic_epochs",
            "12 is not before the end of training (optim.epochs is 12); null = mosaics in all epochs",
        ),
        (
            {"data": {"train": "a", "val": "b", "augment": {"zoom_out": 0.5, "min_visible": 0.5}}},
            "data.augment.min_visible",
            "has no effect without data.augment.crop or data.augment.mosaic",
        ),
        (
            {"data": {"train": "a", "val": "b", "batch_size": 4, "max_batch_size": 2}},
            "data.max_batch_size",
            "2 is less than data.batch_size (4), the smallest size",
        ),
        (
            {"data": {"train": "a", "val": "b", "max_batch_size": 8}, "cluster": {"gpus_per_worker": 0}},
            "data.max_batch_size",
            "is for GPUs, and cluster.gpus_per_worker is 0",
        ),
        (
            {"data": {"train": "a", "val": "b", "max_batch_size": 8}, "optim": {"lr_batch": None}},
            "optim.lr_batch",
            "null would keep optim.lr whatever data.max_batch_size leads to",
        ),
        (
            {"data": {"train": "a", "val": "b", "repeat_threshold": 0.1}},
            "data.repeat_threshold",
            "has no effect with data.sampling all; use repeat_factor, or remove the key",
        ),
        (
            {"eval": {"max_detections": 300}},
            "student.head.postprocess.max_detections",
            "keeps 100 per image, but eval.max_detections counts 300; set it to at least 300",
        ),
        (
            {"student": {"kind": "retinanet", "backbone": {"norm_eval": False}}},
            "student.backbone.frozen_stages",
            "1 would freeze",
        ),
        ({"student": {"kind": "retinanet", "backbone": {"frozen_stages": 0}}}, "student.backbone.norm_eval", "true would keep"),
        (
            {"student": {"kind": "retinanet", "checkpoint": "c.pth", "backbone": {"weights": "timm"}}},
            "student.backbone.weights",
            "timm and student.checkpoint both give the backbone's initial weights; use none",
        ),
        (
            {"student": {"kind": "retinanet", "classes": ["a"], "backbone": {"weights": "timm"}}},
            "student.classes",
            "names the outputs of student.checkpoint, which is not given",
        ),
        (
            {"method": "fitnet", "student": {"kind": "retinanet", "checkpoint": "c.pth"}},
            "distill.copy_head",
            "true would replace the head of student.checkpoint with the teacher's; use false",
        ),
        (
            {"student": {"kind": "retinanet", "backbone": {"weights": "timm"}, "neck": {"extra": "pool"}}},
            "student.neck.extra",
            "pool makes no P7",
        ),
        (
            {"student": {"kind": "retinanet", "backbone": {"weights": "timm"}, "head": {"negative_iou": 0.6}}},
            "student.head.negative_iou",
            "0.6 is above positive_iou (0.5)",
        ),
        (
            {"method": "copy_only", "distill": {"rois": "teacher"}},
            "distill.rois",
            "method copy_only does not compare RoIs with a teacher; use student, or method akd or head",
        ),
        (
            {"student": {"kind": "faster_rcnn", "backbone": {"weights": "timm"}}, "distill": {"rois": "teacher"}},
            "distill.rois",
            "a faster_rcnn student uses its own RoIs; use student",
        ),
        (
            {"student": {"kind": "cascade_rcnn", "backbone": {"weights": "timm"}}, "distill": {"rois": "teacher"}},
            "distill.rois",
            "a cascade_rcnn student uses its own RoIs; use student",
        ),
        ({"teacher": {"checkpoint": "t", "layers": [1, 2]}}, "teacher.layers", "is for kind: transformers"),
        ({"teacher": {"checkpoint": "t", "truth_iou": 0.4}}, "teacher.truth_iou", "is for kind: transformers"),
        (
            {"teacher": DETR, "distill": {"copy_head": False}},
            "distill.rois",
            "a teacher of kind transformers only knows the boxes of its own queries; use teacher",
        ),
        ({"teacher": DETR, "distill": {"rois": "teacher"}}, "distill.copy_head", f"{OF_DETR} no head"),
        ({"teacher": {**DETR, "layers": [2, 1]}, "distill": ANSWERED}, "teacher.layers", "[2, 1] is not in ascending order"),
        ({"teacher": DETR, "distill": {**ANSWERED, "ckd_towers": ["box"]}}, "distill.ckd_towers", f"{OF_DETR} no box tower"),
        ({"teacher": DETR, "distill": {**ANSWERED, "pkd_weight": 1.0}}, "distill.pkd_weight", f"{OF_DETR} no pyramid"),
        ({"method": "fitnet", "teacher": DETR}, "teacher.kind", "method fitnet needs a teacher of ours"),
        (
            {"teacher": DETR, "distill": {"copy_head": False}, "student": FASTER_RCNN},
            "student.kind",
            "a two-stage student uses its own RoIs, of which a teacher of kind transformers knows nothing",
        ),
        (
            {"method": "fitnet", "teacher": {"checkpoint": "t", "placement": "pool"}},
            "teacher.placement",
            "method fitnet has no teacher queries that could run elsewhere; use inline",
        ),
        (
            {"method": "copy_only", "teacher": {"checkpoint": "t", "placement": "cache"}},
            "teacher.placement",
            "method copy_only has no teacher queries that could run elsewhere; use inline",
        ),
        (
            {"teacher": {"checkpoint": "t", "placement": "cache"}},
            "teacher.placement",
            "the student's RoIs change in every step, so no cache can hold the teacher's outputs for them",
        ),
        (
            {"teacher": {"checkpoint": "t", "placement": "pool"}, "distill": {"rois": "teacher"}, "cluster": {"workers": 0}},
            "teacher.placement",
            "pool needs Ray; use cluster.workers of at least 1",
        ),
        (
            {"eval": {"placement": "task"}, "cluster": {"workers": 0}},
            "eval.placement",
            "task needs Ray; use cluster.workers of at least 1, or placement trainers",
        ),
        (
            {"eval": {"placement": "task", "patience": 3}},
            "eval.patience",
            "would end training by metrics that are known only later with eval.placement task; use null",
        ),
        (
            {"eval": {"task": {"gpus": 1}}},
            "eval.task",
            "has no effect with eval.placement trainers; set that to task, or remove this section",
        ),
        (
            {
                "teacher": {"checkpoint": "t", "placement": "pool", "pool": {"actors": [3, 2]}},
                "distill": {"rois": "teacher"},
            },
            "teacher.pool.actors",
            "[3, 2] is not [fewest, most]",
        ),
        (
            {"cluster": {"workers": [1, 2], "gpus_per_worker": 0.5}},
            "cluster.gpus_per_worker",
            "with 0.5, train workers would share a GPU, which NCCL refuses; use 1, or cluster.workers: 1",
        ),
        (
            {"method": "akd", "distill": {"ckd_conv": 2}},
            "distill.ckd_conv",
            "method akd has no CKD; remove the key, or use method head",
        ),
        ({"distill": {"ckd_conv": 5}}, "distill.ckd_conv", "5 is above student.head.convs (4)"),
        ({"distill": {"ckd_towers": ["box", "box"]}}, "distill.ckd_towers", "['box', 'box'] names a tower twice"),
        (
            {"student": {"kind": "faster_rcnn", "backbone": {"weights": "timm"}}, "distill": {"ckd_towers": ["cls", "box"]}},
            "distill.ckd_towers",
            "a faster_rcnn student has no towers; remove the key",
        ),
        (
            {
                "method": "tf_head",
                "teacher": None,
                "distill": {"assistants": {"rcnn": {}, "fcos": {}}, "ckd_towers": ["cls", "box"]},
            },
            "distill.ckd_towers",
            "the rcnn assistant has no box tower to imitate; use [cls], or remove that assistant",
        ),
        ({"teacher": {"kind": "ours"}}, "teacher.checkpoint", "missing; a teacher of kind ours needs it"),
        (
            {"teacher": {"checkpoint": "t", "score_threshold": 0.9}},
            "teacher.score_threshold",
            "is for kind: predictions; remove the key, or set teacher.kind",
        ),
        (
            {"teacher": PREDICTIONS, "data": UNLABELLED},
            "teacher.kind",
            "predictions are boxes without features, which method head needs; use method supervised, assist or tf_head, or a ",
        ),
        (
            {"method": "supervised", "teacher": {"kind": "predictions"}, "data": UNLABELLED},
            "teacher.predictions",
            "missing; a teacher of kind predictions needs it",
        ),
        (
            {"method": "supervised", "teacher": {**PREDICTIONS, "checkpoint": "t"}, "data": UNLABELLED},
            "teacher.checkpoint",
            "is for kind: ours or transformers; remove the key, or set teacher.kind",
        ),
        (
            {"method": "supervised", "teacher": {**PREDICTIONS, "ignore_threshold": 0.7}, "data": UNLABELLED},
            "teacher.ignore_threshold",
            "0.7 is above teacher.score_threshold (0.5); lower it",
        ),
        (
            {"method": "supervised", "teacher": PREDICTIONS},
            "teacher.predictions",
            "would not be used: labelled images have their own boxes; give data.unlabelled, or teacher.labelled_iou",
        ),
        (
            {
                "method": "supervised",
                "teacher": PREDICTIONS,
                "data": UNLABELLED,
                "student": {"kind": "transformers", "model": "rt_detr"},
            },
            "student.kind",
            "the losses of transformers have no weights for pseudo labels; use a student of another kind",
        ),
        (
            {"method": "supervised", "teacher": None, "data": UNLABELLED},
            "data.unlabelled",
            "method supervised learns nothing from images without labels; give predictions (teacher.kind: predictions), or ",
        ),
        (
            {"method": "copy_only", "data": UNLABELLED},
            "data.unlabelled",
            "method copy_only learns nothing from images without labels",
        ),
        (
            {"data": {"train": "a", "val": "b", "unlabelled_share": 0.5}},
            "data.unlabelled_share",
            "has no effect without data.unlabelled; remove the key",
        ),
    ],
)
def test_each_contradiction_alone(changes, key, message):
    ((found_key, found_message),) = found(**changes)
    assert found_key == key
    assert found_message.startswith(message)


def test_a_student_from_a_checkpoint_may_freeze_stages_and_norms():
    assert (
        found(student={"kind": "retinanet", "checkpoint": "c.pth", "backbone": {"frozen_stages": 4, "norm_eval": True}}) == []
    )


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn"])
def test_a_supervised_two_stage_detector_may_not_have_another_pyramid(kind):
    student = {"kind": kind, "backbone": {"weights": "timm"}, "neck": {"extra": "conv_c5"}}
    assert found(method="supervised", teacher=None, student=student) == [
        ("student.neck.extra", f"{kind} needs pool, got conv_c5")
    ]
    student = {"kind": kind, "backbone": {"weights": "timm"}, "rpn": {"positive_iou": 0.2}}
    assert found(method="supervised", teacher=None, student=student) == [
        ("student.rpn.negative_iou", "0.3 is above positive_iou (0.2)")
    ]


def test_a_supervised_cascade():
    student = {"kind": "cascade_rcnn", "backbone": {"weights": "timm"}}
    assert found(method="supervised", teacher=None, student=student) == []
    student |= {"roi": {"positive_ious": [0.5, 0.6]}}
    assert found(method="supervised", teacher=None, student=student) == [
        ("student.roi.stds", "3 values for the 2 stages of student.roi.positive_ious"),
        ("student.roi.weights", "3 values for the 2 stages of student.roi.positive_ious"),
    ]


def test_a_supervised_fcos():
    student = {"kind": "fcos", "backbone": {"weights": "timm"}}
    assert found(method="supervised", teacher=None, student=student) == []
    student |= {"neck": {"extra": "pool"}, "head": {"regress_ranges": [64.0, 32.0, 256.0, 512.0], "channels": 48}}
    assert found(method="supervised", teacher=None, student=student) == [
        ("student.neck.extra", "pool makes no P7; fcos needs conv_c5 or conv_p5"),
        ("student.head.regress_ranges", "[64.0, 32.0, 256.0, 512.0] is not in ascending order"),
        ("student.head.norm_groups", "32 does not divide student.head.channels (48)"),
    ]


def test_a_supervised_reppoints():
    student = {"kind": "reppoints", "backbone": {"weights": "timm"}}
    assert found(method="supervised", teacher=None, student=student) == []
    student |= {"neck": {"extra": "pool", "channels": 48}, "head": {"channels": 40, "negative_iou": 0.6}}
    assert found(method="supervised", teacher=None, student=student) == [
        ("student.neck.extra", "pool makes no P7; reppoints needs conv_c5 or conv_p5"),
        ("student.neck.norm_groups", "32 does not divide student.neck.channels (48)"),
        ("student.head.norm_groups", "32 does not divide student.head.channels (40)"),
        ("student.head.negative_iou", "0.6 is above positive_iou (0.5)"),
    ]
    student |= {"neck": {"norm": "none", "channels": 48}, "head": {"norm_groups": None, "channels": 40}}
    assert found(method="supervised", teacher=None, student=student) == []


def test_tf_head():
    rcnn = {"assistants": {"rcnn": {}}}
    assert found(method="tf_head", teacher=None, distill=rcnn) == []
    (path, message), *rest = found(method="tf_head", distill=rcnn)
    assert (path, rest) == ("teacher", []) and "uses no teacher" in message
    (path, message), *rest = found(method="tf_head", teacher=None, distill={})
    assert (path, rest) == ("distill.assistants", []) and "at least one assistant" in message
    (path, message), *rest = found(distill={"assistants": {"rcnn": {"ckd_weight": 1.0}}})
    assert (path, rest) == ("distill.assistants", []) and "use method tf_head" in message
    assert found(method="tf_head", teacher=None, distill={**rcnn, "ckd_epochs": 12}) == [
        ("distill.ckd_epochs", "12 is not before the end of training (optim.epochs is 12); null = never stop")
    ]
    assert found(method="assist", teacher=None, distill={"ckd_epochs": 3}) == [
        ("distill.ckd_epochs", "method assist has no CKD to stop; remove the key")
    ]
    assert found(method="tf_head", teacher=None, distill={**rcnn, "ckd_weight": 0.0}) == [
        ("distill.ckd_weight", "is not used by method tf_head; its assistants have their own heads and weights")
    ]
    swapped = {"assistants": {"retinanet": {"head": {"negative_iou": 0.9}}}}
    assert found(method="tf_head", teacher=None, distill=swapped) == [
        ("distill.assistants.retinanet.head.negative_iou", "0.9 is above positive_iou (0.5)")
    ]
    heads = {"fcos": {"head": {"channels": 48}}}
    assert found(method="tf_head", teacher=None, distill={"assistants": heads}) == [
        ("distill.assistants.fcos.head.norm_groups", "32 does not divide distill.assistants.fcos.head.channels (48)")
    ]


@pytest.mark.parametrize("method", ["akd", "head"])
@pytest.mark.parametrize("placement", ["inline", "pool", "cache"])
@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_a_teacher_that_chooses_its_own_rois_may_be_anywhere(method, placement, kind):
    teacher = {"checkpoint": "t", "placement": placement}
    student = {"kind": kind, "backbone": {"weights": "timm"}}
    assert found(method=method, teacher=teacher, student=student, distill={"rois": "teacher"}) == []
    if placement == "cache":
        assert found(method=method, teacher=teacher, distill={"rois": "teacher"}, cluster={"workers": 0}) == []
    else:
        assert found(method=method, teacher=teacher, student=student) == []


def test_an_assistant_of_the_student_s_own_kind_is_warned_about():
    keys = {"run": {"name": "r"}, "data": {"train": "t", "val": "v"}, "method": "tf_head"}
    own, other = ({"assistants": {name: {}}} for name in ("retinanet", "fcos"))
    (warning,) = warnings(Job.model_validate({**keys, "distill": own}))
    assert warning.startswith("distill.assistants.retinanet: is of the student's own kind")
    assert warnings(Job.model_validate({**keys, "distill": other})) == []


def test_all_limits_of_a_two_stage_detector_are_named():
    student = {"kind": "faster_rcnn", "backbone": {"weights": "timm"}}
    sections = {"method": "supervised", "teacher": None, "student": student}
    assert [key for key, _ in found(**sections, eval={"max_detections": 1500})] == [
        "student.rpn.test_proposals.post_nms",
        "student.roi.postprocess.max_detections",
    ]
    few = {**student, "roi": {"postprocess": {"max_detections": 50}}}
    assert not found(**sections | {"student": few}), "COCO's 100 is a most, not a least"


def test_sound_jobs_have_no_problems():
    assert found() == []
    assert found(method="assist", teacher=None) == []
    assert found(optim={"milestones": []}) == []


def models(model: type[Spec]) -> Iterator[type[Spec]]:
    yield model
    for field in model.model_fields.values():
        for section in sections(field):
            yield from models(section)


@pytest.mark.parametrize("model", sorted(set(models(Job)), key=lambda model: model.__name__), ids=lambda model: model.__name__)
def test_every_key_is_documented_and_sections_own_their_defaults(model):
    """A default like ``anchors: AnchorSpec = AnchorSpec(base_scale=8)`` would be lost if a job named another key of it."""
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no docstring"
        if isinstance(field.default, Spec):
            assert field.default == type(field.default)(), f"{model.__name__}.{name}: make a subclass with this default"
            assert type(field.default) in sections(field)


@pytest.mark.parametrize("method", ["supervised", "assist", "tf_head"])
def test_predictions_teach_any_method_without_a_network(method):
    distill = {"assistants": {"rcnn": {}}} if method == "tf_head" else {}
    assert found(method=method, teacher=PREDICTIONS, data=UNLABELLED, distill=distill) == []
    assert found(method=method, teacher={**PREDICTIONS, "labelled_iou": 0.5}, distill=distill) == []
