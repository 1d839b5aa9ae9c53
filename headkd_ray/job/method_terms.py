"""Define what each method consists of: the loss terms added to the student's own losses, and whether it has a teacher.

``headkd_ray.distill.methods`` has the class of each term. This module needs no torch, so that mistakes in a job are reported at
once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from headkd_ray.job.job import Job

Method = Literal["supervised", "assist", "akd", "head", "copy_only", "fitnet", "tf_head"]


class MethodSpec(NamedTuple):
    """A distillation method: its loss terms and whether it has a teacher."""

    terms: tuple[str, ...]
    """Names of the terms, in the order in which they are computed: assistant = ground-truth losses of an assistant, akd =
    assistant distillation, ckd = cross distillation, fitnet = imitation of a pyramid. (One more, pkd, is added by its
    weight.)"""
    teacher: bool
    """Whether the job must name a teacher; otherwise it must not."""
    student: str | None = None
    """The only kind of student that the method is for; None = any."""


METHODS: dict[Method, MethodSpec] = {
    "supervised": MethodSpec((), teacher=False),
    "assist": MethodSpec(("assistant",), teacher=False),
    "copy_only": MethodSpec(("assistant",), teacher=True),
    "akd": MethodSpec(("assistant", "akd"), teacher=True),
    "head": MethodSpec(("assistant", "akd", "ckd"), teacher=True),
    "fitnet": MethodSpec(("fitnet",), teacher=True, student="retinanet"),
    "tf_head": MethodSpec(("assistant", "ckd"), teacher=False),
}


def terms_of(job: Job) -> tuple[str, ...]:
    """Return the names of a job's terms: its method's, and those that their own weight adds to any method with a teacher."""
    return METHODS[job.method].terms + (("pkd",) if job.distill.pkd_weight > 0 else ())
