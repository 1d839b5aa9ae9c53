"""Check the rules that involve two or more keys of a Job; each problem names the key to change.

The checks read the job through a ``Get``, so that ``load_job`` can run them on a file that has mistakes elsewhere: a check that
needs an invalid key is skipped, all others run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from headkd_ray.job import data_checks, teacher_checks
from headkd_ray.job.assistant_specs import AssistantsSpec
from headkd_ray.job.detection_limits import below
from headkd_ray.job.detector_spec import SPECS
from headkd_ray.job.job import MAX_DETECTIONS, DistillSpec, Job, OptimSpec
from headkd_ray.job.keys import Path, sections
from headkd_ray.job.losses_spec import LossesSpec
from headkd_ray.job.method_terms import METHODS
from headkd_ray.job.module_specs import DenseDetectorSpec, PixelSpec, PyramidDetectorSpec, Spec
from headkd_ray.job.process_spec import ProcessSpec
from headkd_ray.job.teacher_spec import TeacherSpec
from headkd_ray.job.two_stage_specs import TwoStageDetectorSpec

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


def _random_weights_must_learn(get: Get) -> Iterator[tuple[str, str]]:
    if get("student.backbone.weights") != "none" or get("student.checkpoint") is not None:
        return
    frozen = get("student.backbone.frozen_stages")
    remedy = "set student.backbone.weights (timm, or a file) or"
    if frozen > 0:
        yield "student.backbone.frozen_stages", f"{frozen} would freeze random initial weights; {remedy} frozen_stages: 0"
    if get("student.backbone.norm_eval"):
        yield "student.backbone.norm_eval", f"true would keep BatchNorm from learning its statistics; {remedy} norm_eval: false"


def _start(get: Get) -> Iterator[tuple[str, str]]:
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


def _whole_network(get: Get) -> Iterator[tuple[str, str]]:
    """Check that an architecture outside this package is given once: by its own keys, or by student.checkpoint."""
    if issubclass(SPECS[get("student.kind")], PyramidDetectorSpec) or get("student.model") is not None:
        return
    if get("student.checkpoint") is None:
        yield "student.model", "missing: name an architecture (rt_detr, ...), or give student.checkpoint, whose it then is"
    elif PixelSpec.model_validate(get("student.pixels")) != PixelSpec():
        yield "student.pixels", "comes with student.checkpoint; remove the key, or also give student.model"


def _pyramid(get: Get) -> Iterator[tuple[str, str]]:
    kind, extra = get("student.kind"), get("student.neck.extra")
    if issubclass(SPECS[kind], DenseDetectorSpec) and extra == "pool":
        yield "student.neck.extra", f"pool makes no P7; {kind} needs conv_c5 or conv_p5"
    if issubclass(SPECS[kind], TwoStageDetectorSpec) and extra != "pool":
        yield "student.neck.extra", f"{kind} needs pool, got {extra}"


def _cascade_stages(get: Get) -> Iterator[tuple[str, str]]:
    for section in _sections_with(get, "positive_ious"):
        stages = len(get(f"{section}.positive_ious"))
        for key in ("stds", "weights"):
            given = len(get(f"{section}.{key}"))
            if given != stages:
                yield f"{section}.{key}", f"{given} values for the {stages} stages of {section}.positive_ious"


def _regress_ranges(get: Get) -> Iterator[tuple[str, str]]:
    for head in _sections_with(get, "regress_ranges"):
        ranges = list(get(f"{head}.regress_ranges"))
        if ranges != sorted(set(ranges)):
            yield f"{head}.regress_ranges", f"{ranges} is not in ascending order"


def _norm_groups(get: Get) -> Iterator[tuple[str, str]]:
    for section in _sections_with(get, "norm_groups", "channels"):
        groups, channels = get(f"{section}.norm_groups"), get(f"{section}.channels")
        if groups and channels % groups and (section != "student.neck" or get("student.neck.norm") == "group"):
            yield f"{section}.norm_groups", f"{groups} does not divide {section}.channels ({channels})"


def _iou_thresholds(get: Get) -> Iterator[tuple[str, str]]:
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


def _teacher_placement(get: Get) -> Iterator[tuple[str, str]]:
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


def _teacher_kind(get: Get) -> Iterator[tuple[str, str]]:
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


def _max_detections(get: Get) -> Iterator[tuple[str, str]]:
    most = get("eval.max_detections")
    keys = [".".join(("student", *path)) for path in below(get("student"), most)] if most > MAX_DETECTIONS else []
    for key in keys:
        yield key, f"keeps {get(key)} per image, but eval.max_detections counts {most}; set it to at least {most}"


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
    _teacher_placement,
    _teacher_kind,
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
    _max_detections,
    _random_weights_must_learn,
    _start,
    _whole_network,
    _pyramid,
    _cascade_stages,
    _regress_ranges,
    _norm_groups,
    _iou_thresholds,
)
