"""Check the rules across keys of ``student``, and of the heads of TF-HEAD's assistants; see ``checks.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headkd_ray.job.assistant_specs import AssistantsSpec
from headkd_ray.job.detection_limits import below
from headkd_ray.job.detector_spec import SPECS
from headkd_ray.job.job import MAX_DETECTIONS
from headkd_ray.job.keys import sections
from headkd_ray.job.module_specs import DenseDetectorSpec, PixelSpec, PyramidDetectorSpec, Spec
from headkd_ray.job.two_stage_specs import TwoStageDetectorSpec

Get = Callable[[str], Any]


def random_weights_must_learn(get: Get) -> Iterator[tuple[str, str]]:
    """Yield layers that would keep random initial weights or statistics."""
    if get("student.backbone.weights") != "none" or get("student.checkpoint") is not None:
        return
    frozen = get("student.backbone.frozen_stages")
    remedy = "set student.backbone.weights (timm, or a file) or"
    if frozen > 0:
        yield "student.backbone.frozen_stages", f"{frozen} would freeze random initial weights; {remedy} frozen_stages: 0"
    if get("student.backbone.norm_eval"):
        yield "student.backbone.norm_eval", f"true would keep BatchNorm from learning its statistics; {remedy} norm_eval: false"


def start(get: Get) -> Iterator[tuple[str, str]]:
    """Yield what student.checkpoint contradicts, or what has no effect without it."""
    if get("student.checkpoint") is None:
        if get("student.classes") is not None:
            yield "student.classes", "names the outputs of student.checkpoint, which is not given; the data has its own names"
        return
    weights, method = get("student.backbone.weights"), get("method")
    if weights != "none":
        yield (
            "student.backbone.weights",
            f"{weights} and student.checkpoint both give the backbone's initial weights; use none here, or remove the other",
        )
    if method == "fitnet" and get("distill.copy_head"):
        yield "distill.copy_head", "true would replace the head of student.checkpoint with the teacher's; use false"


def whole_network(get: Get) -> Iterator[tuple[str, str]]:
    """Check that an architecture outside this package is given once: by its own keys, or by student.checkpoint."""
    if issubclass(SPECS[get("student.kind")], PyramidDetectorSpec) or get("student.model") is not None:
        return
    if get("student.checkpoint") is None:
        yield "student.model", "missing: name an architecture (rt_detr, ...), or give student.checkpoint, whose it then is"
    elif PixelSpec.model_validate(get("student.pixels")) != PixelSpec():
        yield "student.pixels", "comes with student.checkpoint; remove the key, or also give student.model"


def pyramid(get: Get) -> Iterator[tuple[str, str]]:
    """Yield an extra level that the detector cannot use."""
    kind, extra = get("student.kind"), get("student.neck.extra")
    if issubclass(SPECS[kind], DenseDetectorSpec) and extra == "pool":
        yield "student.neck.extra", f"pool makes no P7; {kind} needs conv_c5 or conv_p5"
    if issubclass(SPECS[kind], TwoStageDetectorSpec) and extra != "pool":
        yield "student.neck.extra", f"{kind} needs pool, got {extra}"


def cascade_stages(get: Get) -> Iterator[tuple[str, str]]:
    """Yield lists that do not have a value for each stage."""
    for section in _sections_with(get, "positive_ious"):
        stages = len(get(f"{section}.positive_ious"))
        for key in ("stds", "weights"):
            given = len(get(f"{section}.{key}"))
            if given != stages:
                yield f"{section}.{key}", f"{given} values for the {stages} stages of {section}.positive_ious"


def regress_ranges(get: Get) -> Iterator[tuple[str, str]]:
    """Yield ranges that do not ascend."""
    for head in _sections_with(get, "regress_ranges"):
        ranges = list(get(f"{head}.regress_ranges"))
        if ranges != sorted(set(ranges)):
            yield f"{head}.regress_ranges", f"{ranges} is not in ascending order"


def norm_groups(get: Get) -> Iterator[tuple[str, str]]:
    """Yield groups that do not divide the channels."""
    for section in _sections_with(get, "norm_groups", "channels"):
        groups, channels = get(f"{section}.norm_groups"), get(f"{section}.channels")
        if groups and channels % groups and (section != "student.neck" or get("student.neck.norm") == "group"):
            yield f"{section}.norm_groups", f"{groups} does not divide {section}.channels ({channels})"


def iou_thresholds(get: Get) -> Iterator[tuple[str, str]]:
    """Yield thresholds that contradict each other."""
    for section in _sections_with(get, "negative_iou", "positive_iou"):
        low, high = get(f"{section}.negative_iou"), get(f"{section}.positive_iou")
        if low > high:
            yield f"{section}.negative_iou", f"{low} is above positive_iou ({high})"


def _sections_with(get: Get, *keys: str) -> Iterator[str]:
    """Yield the sections of the student and of TF-HEAD's assistants that have all of ``keys``, whatever their kind."""
    places: list[tuple[str, type[Spec]]] = [("student", SPECS[get("student.kind")])]
    for name, field in AssistantsSpec.model_fields.items():
        if get(f"distill.assistants.{name}") is not None:
            places += [(f"distill.assistants.{name}", spec) for spec in sections(field)]
    for place, spec in places:
        for name, field in spec.model_fields.items():
            for section in sections(field):
                if all(key in section.model_fields for key in keys):
                    yield f"{place}.{name}"


def max_detections(get: Get) -> Iterator[tuple[str, str]]:
    """Yield limits of the student below those of the evaluation."""
    most = get("eval.max_detections")
    keys = [".".join(("student", *path)) for path in below(get("student"), most)] if most > MAX_DETECTIONS else []
    for key in keys:
        yield key, f"keeps {get(key)} per image, but eval.max_detections counts {most}; set it to at least {most}"
