"""Check the rules across keys that concern predictions as a teacher and unlabelled images; see ``checks.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headkd_ray.job.detector_spec import SPECS
from headkd_ray.job.job import DataSpec
from headkd_ray.job.method_terms import METHODS
from headkd_ray.job.module_specs import PyramidDetectorSpec

Get = Callable[[str], Any]


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
