"""Check the rules that involve two or more keys of a Job; each problem names the key to change.

The checks read the job through a ``Get``, so that ``load_job`` can run them on a file that has mistakes elsewhere: a check that
needs an invalid key is skipped, all others run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from headkd_ray.job import data_checks, student_checks, teacher_checks
from headkd_ray.job.assistant_specs import AssistantsSpec
from headkd_ray.job.detector_spec import SPECS
from headkd_ray.job.job import DistillSpec, Job, OptimSpec
from headkd_ray.job.keys import Path
from headkd_ray.job.losses_spec import LossesSpec
from headkd_ray.job.method_terms import METHODS
from headkd_ray.job.module_specs import PyramidDetectorSpec
from headkd_ray.job.process_spec import ProcessSpec
from headkd_ray.job.two_stage_specs import TwoStageDetectorSpec

Get = Callable[[str], Any]
"""Returns the value of a dotted key; a section is a dict. Raises UnreadableError."""


class Problem(NamedTuple):
    """One mistake in a job."""

    path: Path
    """The key to change."""
    message: str


class UnreadableError(Exception):
    """The key is missing or itself invalid."""


def problems(job: Job) -> list[Problem]:
    """Return the rules across keys that ``job`` breaks; none for a job that can be run."""
    return problems_in(job.model_dump(), broken=())


def problems_in(values: Mapping[str, Any], broken: Collection[Path]) -> list[Problem]:
    """Check a job's plain values, with defaults filled in; checks that read a ``broken`` key are skipped."""

    whole = set(broken)
    parts = {bad[:count] for bad in broken for count in range(1, len(bad))}

    def get(key: str) -> Any:
        path = tuple(key.split("."))
        if path in parts or any(path[:count] in whole for count in range(len(path) + 1)):
            raise UnreadableError(key)
        value: Any = values
        for part in path:
            if not isinstance(value, Mapping) or part not in value:
                raise UnreadableError(key)
            value = value[part]
        return value

    found: list[Problem] = []
    for check in CHECKS:
        try:
            found.extend(Problem(tuple(key.split(".")), message) for key, message in check(get))
        except UnreadableError:
            continue
    return found


Check = Callable[[Get], Iterator[tuple[str, str]]]


def warnings(job: Job) -> list[str]:
    """Return a line for each setting that is allowed but probably unintended."""
    own = "rcnn" if isinstance(job.student, TwoStageDetectorSpec) else job.student.kind
    if job.method == "tf_head" and getattr(job.distill.assistants, own, None) is not None:
        return [f"distill.assistants.{own}: is of the student's own kind; the method relies on assistants of other kinds"]
    if job.method == "assist" and own == "rcnn":
        return ["method assist: its R-CNN assistant is of the student's own kind; the method relies on another kind"]
    return []


def _method_and_teacher(get: Get) -> Iterator[tuple[str, str]]:
    method, teacher = get("method"), get("teacher")
    needed = METHODS[method].teacher
    if needed and teacher is None:
        yield "teacher", f"method {method} needs a teacher; give teacher.checkpoint"
    if teacher is None:
        return
    predicts = get("teacher.kind") == "predictions"
    if needed and predicts:
        yield (
            "teacher.kind",
            f"predictions are boxes without features, which method {method} needs; use method supervised, assist or tf_head, "
            "or a network as the teacher (teacher.checkpoint)",
        )
    elif not needed and not predicts:
        yield "teacher", f"method {method} uses no teacher; remove the section (or override teacher=null)"


def _method_and_student(get: Get) -> Iterator[tuple[str, str]]:
    method, kind = get("method"), get("student.kind")
    needed = METHODS[method].student
    if needed is not None and kind != needed:
        yield "student.kind", f"method {method} needs a {needed} student, got {kind}"
    elif METHODS[method].terms and not issubclass(SPECS[kind], PyramidDetectorSpec):
        yield (
            "student.kind",
            f"{kind} has no feature pyramid for the assistants and losses of method {method}; use method supervised (and the "
            "trained detector as a teacher), or a student of another kind",
        )


def _tf_assistants(get: Get) -> Iterator[tuple[str, str]]:
    method = get("method")
    given = [name for name, spec in get("distill.assistants").items() if spec is not None]
    if method == "tf_head" and not given:
        yield (
            "distill.assistants",
            f"method tf_head needs at least one assistant ({', '.join(AssistantsSpec.model_fields)}); "
            "give one, for example rcnn: {}",
        )
    if method != "tf_head" and given:
        yield (
            "distill.assistants",
            f"method {method} has no such assistants ({', '.join(given)}); use method tf_head or remove them",
        )


def _ckd_epochs(get: Get) -> Iterator[tuple[str, str]]:
    stop, epochs, method = get("distill.ckd_epochs"), get("optim.epochs"), get("method")
    if stop is None:
        return
    if "ckd" not in METHODS[method].terms:
        yield "distill.ckd_epochs", f"method {method} has no CKD to stop; remove the key"
    elif stop >= epochs:
        yield "distill.ckd_epochs", f"{stop} is not before the end of training (optim.epochs is {epochs}); null = never stop"


def _ckd_places(get: Get) -> Iterator[tuple[str, str]]:
    """Check which layers CKD reads: towers and their convs are a dense student's, and a box tower a dense target's."""
    conv, method, kind = get("distill.ckd_conv"), get("method"), get("student.kind")
    towers = tuple(get("distill.ckd_towers"))  # a list as a file has it, a tuple if it is the default
    values = {"ckd_towers": towers, **{key: get(f"distill.{key}") for key in ("ckd_conv", "ckd_bias", "warm_ckd")}}
    defaults = DistillSpec()
    changed = [key for key, value in values.items() if value != getattr(defaults, key)]
    if "ckd" not in METHODS[method].terms:
        yield from ((f"distill.{key}", f"method {method} has no CKD; remove the key, or use method head") for key in changed)
        return
    if len(set(towers)) < len(towers):
        yield "distill.ckd_towers", f"{list(towers)} names a tower twice"
    if issubclass(SPECS[kind], TwoStageDetectorSpec):
        places = [key for key in ("ckd_towers", "ckd_conv") if key in changed]
        yield from ((f"distill.{key}", f"a {kind} student has no towers; remove the key") for key in places)
        return
    if conv is not None and conv > (depth := get("student.head.convs")):
        yield "distill.ckd_conv", f"{conv} is above student.head.convs ({depth})"
    if "box" in towers and method == "tf_head" and get("distill.assistants.rcnn") is not None:
        yield "distill.ckd_towers", "the rcnn assistant has no box tower to imitate; use [cls], or remove that assistant"


def _copy_only_copies(get: Get) -> Iterator[tuple[str, str]]:
    if get("method") == "copy_only" and not get("distill.copy_head"):
        yield "distill.copy_head", "method copy_only copies the teacher's head; use true, or method assist for a fresh one"


def _milestones(get: Get) -> Iterator[tuple[str, str]]:
    if get("optim.schedule") != "milestones":
        return
    if get("optim.final_ratio") != OptimSpec().final_ratio:
        yield "optim.final_ratio", "the schedule milestones has no such end; remove the key, or use cosine or one_cycle"
    milestones = list(get("optim.milestones"))
    if milestones != sorted(set(milestones)):
        yield "optim.milestones", f"{milestones} is not in ascending order"
    epochs = get("optim.epochs")
    late = [milestone for milestone in milestones if milestone >= epochs]
    if late:
        yield "optim.milestones", f"{late} is not before the end of training (optim.epochs is {epochs})"


def _short_sides(get: Get) -> Iterator[tuple[str, str]]:
    low, high = get("data.short_side")
    if low > high:
        yield "data.short_side", f"[{low}, {high}] is not [smallest, largest]"
    long_side = get("data.long_side")
    if max(low, high) > long_side:
        yield "data.short_side", f"{max(low, high)} is above data.long_side ({long_side})"


def _eval_short_side(get: Get) -> Iterator[tuple[str, str]]:
    short_side, long_side = get("data.eval_short_side"), get("data.long_side")
    if short_side > long_side:
        yield "data.eval_short_side", f"{short_side} is above data.long_side ({long_side})"


def _tf_head_weights(get: Get) -> Iterator[tuple[str, str]]:
    if get("method") != "tf_head":
        return
    defaults = DistillSpec()
    for key in ("assistant", "assistant_weight", "akd_weight", "ckd_weight", "copy_head"):
        if get(f"distill.{key}") != getattr(defaults, key):
            yield (
                f"distill.{key}",
                "is not used by method tf_head; its assistants have their own heads and weights",
            )


def _evaluation_task(get: Get) -> Iterator[tuple[str, str]]:
    if get("eval.placement") == "trainers":
        if ProcessSpec.model_validate(get("eval.task")) != ProcessSpec():
            yield "eval.task", "has no effect with eval.placement trainers; set that to task, or remove this section"
        return
    if get("cluster.workers") == 0:
        yield "eval.placement", "task needs Ray; use cluster.workers of at least 1, or placement trainers"
    if get("eval.patience") is not None:
        yield (
            "eval.patience",
            "would end training by metrics that are known only later with eval.placement task; use null, or placement trainers",
        )


def _workers(get: Get) -> Iterator[tuple[str, str]]:
    workers = get("cluster.workers")
    if not isinstance(workers, int) and workers[0] > workers[1]:
        yield "cluster.workers", f"[{workers[0]}, {workers[1]}] is not [fewest, most]"
    share, most = get("cluster.gpus_per_worker"), workers if isinstance(workers, int) else workers[1]
    if share is not None and 0 < share <= 0.5 and most > 1:
        yield (
            "cluster.gpus_per_worker",
            f"with {share:g}, train workers would share a GPU, which NCCL refuses; use 1, or cluster.workers: 1",
        )


def _idle_weights(get: Get) -> Iterator[tuple[str, str]]:
    method = get("method")
    for term in ("akd", "ckd"):
        idle = term not in METHODS[method].terms and method != "tf_head"  # tf_head has its own check
        if idle and get(f"distill.{term}_weight") != getattr(DistillSpec(), f"{term}_weight"):
            yield f"distill.{term}_weight", f"method {method} has no such loss; remove the key, or use method head"


def _pkd(get: Get) -> Iterator[tuple[str, str]]:
    if not get("distill.pkd_weight") > 0:
        return
    method, teacher = get("method"), get("teacher")
    if not METHODS[method].teacher:
        yield "distill.pkd_weight", f"method {method} has no teacher to imitate; remove the key, or use method head"
    elif teacher is not None and get("teacher.placement") != "inline":
        yield (
            "teacher.placement",
            "distill.pkd_weight reads the teacher's pyramid in every step; use inline, or remove that key",
        )


def _class_weights(get: Get) -> Iterator[tuple[str, str]]:
    weights = get("losses.class_weights")
    if weights is not None and not issubclass(SPECS[get("student.kind")], PyramidDetectorSpec):
        yield "losses.class_weights", "a detector of transformers computes its losses itself, without them; remove the key"
    if weights != "effective_number" and get("losses.effective_beta") != LossesSpec().effective_beta:
        yield (
            "losses.effective_beta",
            "has no effect without losses.class_weights: effective_number; use that, or remove it",
        )


CHECKS: tuple[Check, ...] = (
    _pkd,
    _idle_weights,
    _class_weights,
    _workers,
    _evaluation_task,
    _method_and_teacher,
    teacher_checks.placement,
    teacher_checks.kind,
    teacher_checks.predictions,
    teacher_checks.unlabelled,
    _method_and_student,
    _tf_assistants,
    _tf_head_weights,
    _ckd_epochs,
    _ckd_places,
    _copy_only_copies,
    _milestones,
    _short_sides,
    _eval_short_side,
    data_checks.augment,
    data_checks.sampling,
    data_checks.max_batch_size,
    student_checks.max_detections,
    student_checks.random_weights_must_learn,
    student_checks.start,
    student_checks.whole_network,
    student_checks.pyramid,
    student_checks.cascade_stages,
    student_checks.regress_ranges,
    student_checks.norm_groups,
    student_checks.iou_thresholds,
)
