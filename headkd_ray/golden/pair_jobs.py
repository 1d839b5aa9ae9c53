"""The training model of a golden file: the job of the official config whose step it holds, with the file's own modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray.detectors import DenseHead, PyramidDetector, RoIHead
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.detectors.weights import LoadedDetector
from headkd_ray.detectors.weights.mmdet import Adapter, MMDetModel
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.distill.akd import AKD
from headkd_ray.distill.ckd import CKD
from headkd_ray.distill.methods import ASSIST
from headkd_ray.errors import DataError, JobError
from headkd_ray.golden.official_names import Head
from headkd_ray.job import AssistantsSpec, Job

PAIRS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("fcos", "faster_rcnn"): {"warm_assistant": True, "ckd_weight": 1.0},
    ("retinanet", "reppoints"): {
        "warm_assistant": True,
        "akd_weight": 1.0,
        "ckd_weight": 1.0,
        "ckd_towers": ("cls", "box"),
        "ckd_conv": 2,
    },
    ("fcos", "reppoints"): {"warm_assistant": True, "akd_weight": 1.0},
    ("faster_rcnn", "cascade_rcnn"): {
        "warm_assistant": True,
        "akd_weight": 1.0,
        "ckd_weight": 2.0,
        "ckd_bias": False,
        "warm_ckd": False,
    },
}
"""The keys of ``distill`` by the kinds of student and teacher, where the official configs differ from the paper's pair."""
HEAD_KEYS: Mapping[str, Mapping[str, Any]] = {"fcos": {"box_loss": "giou"}}
"""The keys of TF-HEAD's assistants, by official name, that differ from those of a student of the same kind."""
GT_WEIGHTS: Mapping[str, Mapping[bool, float]] = {"fcos": {True: 0.5, False: 1.0}}
"""``gt_weight`` by official name and ``conv_bias``: FCOS beside an R-CNN has such biases, FCOS alone is a plain one without."""


class OfficialModel(NamedTuple):
    """A training model with a golden file's modules, and what the official config calls its parts."""

    model: TrainingModel
    assistants: dict[str, str]
    """{name in the model: official name} of the assistants."""
    initial: dict[str, Tensor]
    """Parameters as we initialise them, by the loader's names; without assistants that are a teacher's copies."""


def official_model(student: MMDetModel, teacher: LoadedDetector[AnyDetector] | None, source: str) -> OfficialModel:
    """Build the training model of a golden file's ``student`` and ``teacher``.

    Which official config it is follows from the kinds of detectors and from the assistants and adapters that there are.

    Raises:
        DataError: they are of no method here.
    """
    if teacher is None and len(student.adapters) not in (0, len(student.assistants)):
        count = f"{len(student.adapters)} adapters in student/_distiller._adapts.* for {len(student.assistants)} assistants"
        raise DataError(f"{source}: has {count}, which is not TF-HEAD, and no teacher/... to distill from")
    if teacher is not None and len(student.assistants) > 1:
        raise DataError(f"{source}: has a teacher, but {len(student.assistants)} assistants in student/...; HEAD has 1")
    names = _names(student, teacher)
    detector, heavy = student.loaded.detector, None if teacher is None else teacher.detector
    _check_assistants(student, heavy, names, source)
    try:
        job = Job.model_validate(_job(student, heavy, names))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.run.seed)
            model = build_training_model(job, detector.num_classes, heavy, steps_per_epoch=1)
    except JobError as error:
        raise DataError([f"{source}: {problem}" for problem in error.problems]) from error
    assistants = {official: _head(model, name) for name, official in names.items()}
    adapters = {}
    for number, place in _places(model, student, heavy, source).items():
        adapters[number] = place.replaced(student.adapters[number])
    initial = parameters(model.student, assistants if heavy is None else {}, adapters)
    model.student = detector
    for name, official in names.items():
        model.assistants[name].head = student.assistants[official]
    return OfficialModel(model, names, {name: parameter.detach() for name, parameter in initial.items()})


def _check_assistants(student: MMDetModel, teacher: PyramidDetector | None, names: Mapping[str, str], source: str) -> None:
    """Raise DataError unless the assistants are TF-HEAD's or, beside a teacher, of its kind."""
    known = {ASSIST, *AssistantsSpec.model_fields}
    if unknown := [official for name, official in names.items() if name not in known]:
        raise DataError(f"{source}: the assistant {unknown[0]} in student/... needs a teacher of its kind in teacher/...")
    for official, head in student.assistants.items() if teacher is not None else ():
        assert teacher is not None
        own, theirs = len(head.tap_channels), len(teacher.detection_head.tap_channels)
        if isinstance(head, RoIHead) != isinstance(teacher.detection_head, RoIHead) or own != theirs:
            kind = teacher.spec.kind
            raise DataError(
                f"{source}: the assistant {official} in student/... is not a head like that of the {kind} in teacher/..."
            )


def _head(model: TrainingModel, assistant: str) -> Head:
    head = model.assistants[assistant].head
    assert isinstance(head, DenseHead | RoIHead)
    return head


def parameters(
    student: nn.Module, assistants: Mapping[str, nn.Module], adapters: Mapping[int, nn.Module]
) -> dict[str, nn.Parameter]:
    """Return all parameters of a student and its helpers, by the names that mmdet's loader gives them."""
    found = dict(student.named_parameters())
    for assistant, head in assistants.items():
        found |= {f"assistants.{assistant}.{name}": p for name, p in head.named_parameters()}
    for number, adapter in adapters.items():
        found |= {f"adapters.{number}.{name}": p for name, p in adapter.named_parameters()}
    return found


def _names(student: MMDetModel, teacher: LoadedDetector[AnyDetector] | None) -> dict[str, str]:
    """Return {our name: official name} of the assistants."""
    official = list(student.assistants)
    if teacher is not None or (official == ["rcnn"] and not student.adapters):
        return dict(zip([ASSIST], official, strict=False))
    return {{"retina": "retinanet"}.get(name, name): name for name in official}


def _job(student: MMDetModel, teacher: PyramidDetector | None, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the sections of the job of the official config."""
    sections: dict[str, Any] = {
        "run": {"name": "parity"},
        "data": {"train": "none", "val": "none"},
        "method": "supervised",
        "student": student.loaded.detector.spec.replace({"backbone.weights": "none"}).model_dump(),
    }
    if teacher is not None and names:
        (assistant,) = student.assistants.values()
        adapters, layers = len(student.adapters), len(assistant.tap_channels)
        method = "copy_only" if adapters == 0 else "akd" if adapters <= layers else "head"
        keys = PAIRS.get((student.loaded.detector.spec.kind, teacher.spec.kind), {})
        sections |= {"method": method, "teacher": {"checkpoint": "none"}, "distill": dict(keys)}
    elif ASSIST in names:
        sections |= {"method": "assist", "distill": {"assistant": student.assistants["rcnn"].spec.model_dump()}}
    elif names:
        sections |= {"method": "tf_head", "distill": _tf_head(student, names)}
    return sections


def _tf_head(student: MMDetModel, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the distill section of TF-HEAD; without adapters the assistants only learn from labels, without warm-up."""
    assistants: dict[str, Any] = {}
    for name, official in names.items():
        head: Any = student.assistants[official]
        head.spec = head.spec.replace(HEAD_KEYS.get(official, {}))
        weights = GT_WEIGHTS.get(official, {})
        keys = {"gt_weight": weights[head.spec.conv_bias]} if weights else {}
        assistants[name] = {**keys, **({} if student.adapters else {"ckd_weight": 0.0}), "head": head.spec.model_dump()}
    return {"assistants": assistants, **({} if student.adapters else {"warmup_steps": 0})}


class Place(NamedTuple):
    """The place of an adapter in a training model."""

    term: AKD | CKD
    layer: int
    """Number of the layer in AKD; 0 in CKD."""
    own: int
    """Width of what it adapts."""
    target: int
    """Width of what it leads to."""

    def takes(self, adapter: Adapter) -> bool:
        """Return whether the shape of ``adapter`` is one for this place; CKD's may be for several anchors side by side."""
        theirs, own, *_ = adapter.weight.shape
        widths = theirs % self.target == 0 if isinstance(self.term, CKD) else theirs == self.target
        return own == self.own and widths and adapter.weight.dim() == self.adapter.weight.dim()

    @property
    def adapter(self) -> Any:
        return self.term.adapters[self.layer] if isinstance(self.term, AKD) else self.term.adapter

    def replaced(self, adapter: Adapter) -> nn.Module:
        """Put ``adapter`` here and return the one that was here."""
        before: nn.Module = self.adapter
        if isinstance(self.term, AKD):
            self.term.adapters[self.layer] = adapter
        else:
            self.term.adapter, self.term.anchors = adapter, adapter.weight.shape[0] // self.target
        return before


def _places(model: TrainingModel, student: MMDetModel, teacher: PyramidDetector | None, source: str) -> dict[int, Place]:
    """Return the place of each of the file's adapters, by its number.

    The official configs number them in one order, AKD's by layer. The release has CKD behind AKD, the research branch in front.
    In TF-HEAD, which has no AKD, the R-CNN's is last.

    Raises:
        DataError: they do not fit the model.
    """
    akd, ckd = [], []
    for term in model.terms:
        if isinstance(term, AKD):
            assert teacher is not None
            (assistant,) = student.assistants.values()
            widths = zip(assistant.tap_channels, teacher.detection_head.tap_channels, strict=True)
            akd += [Place(term, i, own, theirs) for i, (own, theirs) in enumerate(widths)]
        if isinstance(term, CKD):
            target = teacher.detection_head if teacher is not None else _head(model, term.assistant or ASSIST)
            ckd.append(Place(term, 0, student.loaded.detector.detection_head.lead_channels, target.lead_channels))
    ckd.sort(key=lambda place: place.adapter.weight.dim() == 2)
    is_branch = teacher is not None and (student.loaded.detector.spec.kind, teacher.spec.kind) in PAIRS
    orders = [akd + ckd, ckd + akd]
    for order in reversed(orders) if is_branch else orders:
        if len(order) == len(student.adapters) and all(map(Place.takes, order, student.adapters.values())):
            return dict(zip(student.adapters, order, strict=True))
    if not student.adapters:
        return {}
    shapes = "; ".join(f"{number}: {'x'.join(map(str, a.weight.shape))}" for number, a in student.adapters.items())
    raise DataError(f"{source}: the adapters in student/_distiller._adapts.* do not fit its heads ({shapes})")
