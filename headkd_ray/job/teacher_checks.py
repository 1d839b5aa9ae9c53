"""Check the rules across keys that concern the teacher, its predictions and unlabelled images; see ``checks.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headkd_ray.job.detector_spec import SPECS
from headkd_ray.job.job import DataSpec
from headkd_ray.job.method_terms import METHODS
from headkd_ray.job.module_specs import PyramidDetectorSpec
from headkd_ray.job.teacher_spec import TeacherSpec
from headkd_ray.job.two_stage_specs import TwoStageDetectorSpec

Get = Callable[[str], Any]
OF_TEACHERS = {
    "checkpoint": ("ours", "transformers"),
    "classes": ("ours", "transformers"),
    "layers": ("transformers",),
    "truth_iou": ("transformers",),
    "predictions": ("predictions",),
    "score_threshold": ("predictions",),
    "ignore_threshold": ("predictions",),
    "labelled_iou": ("predictions",),
}
"""Keys of the teacher that are only for some kinds, which read nothing else's."""


def predictions(get: Get) -> Iterator[tuple[str, str]]:
    """Yield thresholds that contradict each other, and predictions that nothing would learn from."""
    if get("teacher") is None or get("teacher.kind") != "predictions":
        return
    low, high = get("teacher.ignore_threshold"), get("teacher.score_threshold")
    if low > high:
        yield "teacher.ignore_threshold", f"{low:g} is above teacher.score_threshold ({high:g}); lower it"
    if get("data.unlabelled") is None and get("teacher.labelled_iou") is None:
        yield (
            "teacher.predictions",
            "would not be used: labelled images have their own boxes; give data.unlabelled, or teacher.labelled_iou (0.5, for "
            "example) to add what the ground truth lacks",
        )
    if not issubclass(SPECS[kind := get("student.kind")], PyramidDetectorSpec):
        yield (
            "student.kind",
            f"the losses of {kind} have no weights for pseudo labels; use a student of another kind",
        )


def unlabelled(get: Get) -> Iterator[tuple[str, str]]:
    """Yield unlabelled images that nothing is learnt from, and keys without effect."""
    if get("data.unlabelled") is None:
        if get("data.unlabelled_share") != DataSpec.model_fields["unlabelled_share"].default:
            yield "data.unlabelled_share", "has no effect without data.unlabelled; remove the key"
        return
    method, teacher = get("method"), get("teacher")
    predicts = teacher is not None and get("teacher.kind") == "predictions"
    compares = {"akd", "fitnet"} & {*METHODS[method].terms} or (METHODS[method].teacher and get("distill.pkd_weight") > 0)
    if not predicts and not compares:
        yield (
            "data.unlabelled",
            f"method {method} learns nothing from images without labels; give predictions (teacher.kind: predictions), or "
            "use a method with distillation (akd, head, fitnet)",
        )


def placement(get: Get) -> Iterator[tuple[str, str]]:
    """Yield places and RoIs of the teacher that the method cannot use."""
    method, rois = get("method"), get("distill.rois")
    if rois == "teacher" and "akd" not in METHODS[method].terms:
        yield "distill.rois", f"method {method} does not compare RoIs with a teacher; use student, or method akd or head"
    if rois == "teacher" and issubclass(SPECS[get("student.kind")], TwoStageDetectorSpec):
        yield "distill.rois", f"a {get('student.kind')} student uses its own RoIs; use student"
    if get("teacher") is None or (placement := get("teacher.placement")) == "inline":
        return
    if "akd" not in METHODS[method].terms:
        yield "teacher.placement", f"method {method} has no teacher queries that could run elsewhere; use inline"
    elif rois == "student" and placement == "cache":
        yield (
            "teacher.placement",
            "the student's RoIs change in every step, so no cache can hold the teacher's outputs for them; "
            "use distill.rois: teacher, or placement inline",
        )
    if placement == "pool" and get("cluster.workers") == 0:
        yield "teacher.placement", "pool needs Ray; use cluster.workers of at least 1, or placement inline or cache"
    low, high = get("teacher.pool.actors")
    if low > high:
        yield "teacher.pool.actors", f"[{low}, {high}] is not [fewest, most]"


def kind(get: Get) -> Iterator[tuple[str, str]]:
    """Yield keys that a teacher of this kind does not have, and what a teacher without a head or pyramid cannot teach."""
    if get("teacher") is None:
        return
    kind, method = get("teacher.kind"), get("method")
    for key, kinds in OF_TEACHERS.items():
        if kind not in kinds and get(f"teacher.{key}") != TeacherSpec.model_fields[key].default:
            yield f"teacher.{key}", f"is for kind: {' or '.join(kinds)}; remove the key, or set teacher.kind"
    source = "predictions" if kind == "predictions" else "checkpoint"
    if get(f"teacher.{source}") is None:
        yield f"teacher.{source}", f"missing; a teacher of kind {kind} needs it"
    if kind in ("ours", "predictions"):
        return
    layers = list(get("teacher.layers") or ())
    if layers != sorted(set(layers)):
        yield "teacher.layers", f"{layers} is not in ascending order"
    if "akd" not in METHODS[method].terms:
        yield "teacher.kind", f"method {method} needs a teacher of ours, whose head or pyramid it reads; use method akd or head"
        return
    if issubclass(SPECS[get("student.kind")], TwoStageDetectorSpec):
        yield (
            "student.kind",
            f"a two-stage student uses its own RoIs, of which a teacher of kind {kind} knows nothing; use a dense one",
        )
    elif get("distill.rois") != "teacher":
        yield "distill.rois", f"a teacher of kind {kind} only knows the boxes of its own queries; use teacher"
    if get("distill.copy_head"):
        yield "distill.copy_head", f"a teacher of kind {kind} has no head that an assistant could start from; use false"
    if "box" in get("distill.ckd_towers"):
        yield "distill.ckd_towers", f"a teacher of kind {kind} has no box tower to imitate; use [cls]"
    if get("distill.pkd_weight") > 0:
        yield "distill.pkd_weight", f"a teacher of kind {kind} has no pyramid to imitate; remove the key"
