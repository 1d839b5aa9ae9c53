"""Writes golden files of pairs that no official file here holds, from our own modules under the official names.

Keys, names of losses and numbers of adapters are spelled out as the research branch's configs have them, and values come from
the training model of the promised job: such a file shows that its pair is read, named, weighted and timed as intended.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headkd_ray.detectors import DenseDetector, Detector, TwoStageDetector, build_detector
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.job import CascadeRCNNSpec, FasterRCNNSpec, FCOSSpec, Job, RepPointsSpec, RetinaNetSpec, load_job
from tests.detectors.micro import whole

JOBS = Path(__file__).parents[2] / "jobs"
CLASSES, STEP = 4, 1000
R18 = {"name": "resnet18", "kwargs": {"stem_width": 8, "channels": [8, 8, 16, 24]}}
R50 = {"name": "resnet50", "kwargs": {"stem_width": 8, "channels": [4, 4, 8, 12]}}
ALL = {"size": 1 << 16, "positive_fraction": 1.0}
ROI: dict[str, Any] = {"fc_channels": 40, "sampler": ALL}
FEW = {"pre_nms": 60, "post_nms": 40}
PLAIN = {"norm_on_bbox": False, "centerness_on_reg": False, "center_radius": None, "conv_bias": False}

RETINANET = RetinaNetSpec.model_validate({"backbone": R18, "neck": {"channels": 32}, "head": {"channels": 48}})
FCOS = FCOSSpec.model_validate(
    {
        "backbone": R18,
        "neck": {"channels": 32, "extra": "conv_c5", "relu_before_p7": False},
        "head": {"channels": 32, "box_loss": "iou", **PLAIN},
    }
)
FASTER_RCNN = FasterRCNNSpec.model_validate({"backbone": R50, "neck": {"channels": 32}, "roi": ROI, "rpn": {"sampler": ALL}})
SMALL_FASTER = FASTER_RCNN.replace({"backbone.name": "resnet18", "backbone.kwargs": R18["kwargs"]})
CASCADE = CascadeRCNNSpec.model_validate({"backbone": R50, "neck": {"channels": 32}, "roi": ROI})
REPPOINTS = RepPointsSpec.model_validate(
    {"backbone": R50, "neck": {"channels": 32}, "head": {"channels": 32, "point_channels": 24}}
)

Names = dict[str, str]
"""{our name: the official one}."""
_LAYERS = {
    "RetinaHead": {"cls_out": "retina_cls", "box_out": "retina_reg"},
    "FCOSHead": {"cls_out": "conv_cls", "box_out": "conv_reg", "centerness_out": "conv_centerness"},
    "RepPointsHead": {
        "init_conv": "reppoints_pts_init_conv",
        "init_out": "reppoints_pts_init_out",
        "cls_conv": "reppoints_cls_conv",
        "cls_out": "reppoints_cls_out",
        "refine_conv": "reppoints_pts_refine_conv",
        "refine_out": "reppoints_pts_refine_out",
    },
    "BoxHead": {"fcs": "shared_fcs", "cls_out": "fc_cls", "box_out": "fc_reg"},
}


def head_names(head: nn.Module) -> Names:
    """Return the official names of a head's tensors, without the head's own."""
    names, layers = {}, _LAYERS.get(type(head).__name__, {})
    for name in head.state_dict():
        first, _, rest = name.partition(".")
        if first in ("cls_tower", "box_tower"):
            place, last = rest.split(".")
            normed = head.spec.norm_groups is not None if hasattr(head.spec, "norm_groups") else False  # type: ignore[union-attr]
            number, layer = divmod(int(place), 3 if normed else 2)
            tower = "cls_convs" if first == "cls_tower" else "reg_convs"
            names[name] = f"{tower}.{number}.{('conv', 'gn')[layer]}.{last}"
        elif first == "stages":
            number_, _, inside = rest.partition(".")
            names[name] = f"{number_}.{head_names(head.stages[int(number_)])[inside]}"  # type: ignore[union-attr, index]
        elif first == "scales":
            names[name] = f"{name}.scale"
        else:
            names[name] = f"{layers.get(first, first)}{'.' if rest else ''}{rest}"
    return names


def detector_names(detector: Detector, dense_prefix: str) -> Names:
    """Return the official names of a detector's tensors; ``dense_prefix`` is that of a dense head."""
    names = {}
    norm = detector.spec.neck.norm == "group"
    for name in detector.state_dict():
        first, part, *rest = name.split(".")
        if first == "backbone":
            names[name] = name.replace("backbone.body.", "backbone.")
        elif first == "neck":
            number = int(rest[0]) + (3 if part == "extra" else 0)
            layer = ("conv", "gn")[int(rest[1])] if norm else "conv"
            names[name] = f"neck.{'lateral' if part == 'lateral' else 'fpn'}_convs.{number}.{layer}.{rest[-1]}"
        elif first == "rpn":
            names[name] = f"rpn_head.{ {'tower': 'rpn_conv', 'cls_out': 'rpn_cls', 'box_out': 'rpn_reg'}[part] }.{rest[-1]}"
    if isinstance(detector, DenseDetector):
        names |= {f"head.{name}": f"{dense_prefix}.{key}" for name, key in head_names(detector.head).items()}
    else:
        head = detector.detection_head
        names |= {f"roi.{name}": f"roi_head.bbox_head.{key}" for name, key in head_names(head).items()}
    return names


@dataclass
class Pair:
    """An official config: how its file is called, what is in it and how our parts correspond to it."""

    job: str
    """The promised job."""
    student: Any
    losses: Names
    helpers: Names
    """{our assistant: the prefix of its tensors}."""
    adapters: dict[str, str]
    """{our adapter in the training model: official key before weight or bias}."""
    prefix: str = "rpn_head"
    """Prefix of a dense student's head."""
    teacher: Any = None
    keys: dict[str, Any] = field(default_factory=dict)
    """Keys of the job that differ, besides the models."""
    features: Callable[[TrainingModel, StepForward], dict[str, Any]] = lambda model, forward: {}
    """Features for distillation by their official names: rows, or a list of maps."""
    anchors: int = 1
    """CKD's adapter in the file has this many times our outputs, of which the first are ours."""


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "images": torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator),
        "sizes": torch.tensor([[64, 96], [50, 60]]),
        "boxes": torch.tensor([[[4.0, 4, 40, 36], [50, 10, 90, 60]], [[8, 8, 50, 44], [0, 0, 0, 0]]]),
        "labels": torch.tensor([[0, 3], [1, -1]]),
    }


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Change all parameters a little, so that no copy equals its origin and no bias is 0, and scores so that they differ."""
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.02 * (1 + parameter.abs().mean()))
        if "cls_out.weight" in name:
            parameter.normal_(0, 0.2)
        if "head.cls_out.bias" in name:
            parameter.add_(2.5)


def model_of(pair: Pair, teacher: Detector | None) -> TrainingModel:
    """Return the training model of a pair's job with small models."""
    sections = load_job(JOBS / f"{pair.job}.yaml").model_dump()
    job = Job.model_validate(
        {**sections, "student": pair.student.model_dump(), "distill": {**sections["distill"], **pair.keys}}
    )
    torch.manual_seed(1)
    return build_training_model(job, CLASSES, teacher, steps_per_epoch=10**6)


def official_file(pair: Pair) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a golden file of one training step of ``pair``."""
    torch.manual_seed(0)
    teacher = None if pair.teacher is None else build_detector(pair.teacher, CLASSES)
    model, batch = model_of(pair, teacher), data()
    fresh = {key: value.detach().clone() for key, value in parameters(pair, model).items()}
    for each in (model, teacher):
        if each is not None:
            disturb(each)
    student, sizes = model.student, batch["sizes"]
    assert isinstance(student, Detector)
    x = student.normalise(batch["images"], sizes)
    detections = student.eval().detect(x, sizes)
    arrays: dict[str, Any] = {"images": x, "image_sizes": sizes, "step": torch.tensor(STEP)}
    arrays |= {f"student/{key}": value for key, value in state(pair, model).items()}
    if teacher is not None:
        arrays |= {f"teacher/{key}": teacher.state_dict()[name] for name, key in detector_names(teacher, "bbox_head").items()}
        arrays |= {f"teacher_fpn/{level}": f for level, f in enumerate(teacher.eval().features(x))}
    model.train()
    forward = model.run(whole(batch), torch.Generator().manual_seed(0))
    losses = {pair.losses[name]: loss for name, loss in model.losses(forward, STEP).items()}
    losses["total"] = torch.stack(list(losses.values())).sum()
    losses["total"].backward()
    names = {**pair.features(model, forward), **rois(forward, arrays)}
    for name, feature in names.items():
        if isinstance(feature, list):  # as in the official file, all levels but the first
            arrays |= {f"tensor/{name}/{level}": m for level, m in enumerate(feature) if level}
        else:
            arrays[f"tensor/{name}"] = feature
    arrays |= {f"student_fpn/{level}": f for level, f in enumerate(forward.student.pyramid)}
    for i in range(2):
        real, found = batch["labels"][i] >= 0, detections.labels[i] >= 0
        arrays[f"gt_boxes/{i}"], arrays[f"gt_labels/{i}"] = batch["boxes"][i][real], batch["labels"][i][real]
        rows = (detections.boxes[i], detections.scores[i][:, None], detections.labels[i][:, None])
        arrays[f"detections/{i}"] = torch.cat(rows, dim=1)[found]
    trained = parameters(pair, model)
    gradients = {key: float(p.grad.norm()) for key, p in trained.items() if p.grad is not None}
    texts: dict[str, Any] = {
        "losses_json": {name: float(loss.detach()) for name, loss in losses.items()},
        "grad_norms_json": gradients,
        "init_json": {k: [float(p.mean()), float(p.std(correction=0)), float(p.abs().max())] for k, p in fresh.items()},
        "frozen_json": [key for key, p in trained.items() if not p.requires_grad],
    }
    written = {key: value.detach().numpy() for key, value in arrays.items()}
    return written | {key: np.array(json.dumps(value)) for key, value in texts.items()}


def rois(forward: StepForward, arrays: dict[str, Any]) -> dict[str, Tensor]:
    """Add proposals and RoIs to ``arrays`` if the step has any, and return whose they are."""
    student = forward.student
    stages = [stage for name in forward._assistants for stage in forward.assistant(name).stages]
    if not stages:
        return {}
    own, count = stages[0].rois, len(student.truth.labels)
    arrays |= {f"rois/{i}": own.boxes[own.image == i] for i in range(count)}
    if isinstance(student.student, TwoStageDetector):
        proposals = student.student.rpn.proposals(student.student.rpn(student.pyramid), student.truth.sizes)
    else:
        assert isinstance(student.student, DenseDetector)
        proposals = student.student.head.proposals(student.outputs, student.truth.sizes)
    for i in range(count):
        real = proposals.valid[i]
        columns = [proposals.boxes[i][real], proposals.scores[i][real][:, None], proposals.cells[i][real]]
        arrays[f"proposals/{i}"] = torch.cat(columns if student.outputs else columns[:2], dim=1)
    if student.outputs is None:  # the official RPN keeps no cells, nor does anything that follows
        return {}
    ids = torch.cat([own.image[:, None], own.cells], dim=1).float()
    arrays["roi_ids"] = ids
    kept = own.from_proposal
    return {"bbox_ids": ids[:20], "bbox_poses": ids[kept][:, [1, 0, 2, 3]], "anchor_ids": ids[kept][:, 4]}


def state(pair: Pair, model: TrainingModel) -> dict[str, Tensor]:
    """Return the state dict under official names."""
    own = model.state_dict()
    return {key: wide(pair, key, own[name]) for name, key in official_names(pair, model).items()}


def parameters(pair: Pair, model: TrainingModel) -> dict[str, nn.Parameter]:
    own = dict(model.named_parameters())
    return {key: own[name] for name, key in official_names(pair, model).items() if name in own}


def wide(pair: Pair, key: str, tensor: Tensor) -> Tensor:
    """Return the tensor of an adapter with outputs for ``pair.anchors`` anchors; others are returned as they are."""
    return torch.cat([tensor, *[tensor + 0.1] * (pair.anchors - 1)]) if "._layer." in key else tensor


def official_names(pair: Pair, model: TrainingModel) -> Names:
    """Return the official names of all tensors of the training model."""
    assert isinstance(model.student, Detector)
    names = {f"student.{name}": key for name, key in detector_names(model.student, pair.prefix).items()}
    for assistant, prefix in pair.helpers.items():
        head = model.assistants[assistant].head
        assert isinstance(head, nn.Module)
        names |= {f"assistants.{assistant}.head.{name}": f"{prefix}.{key}" for name, key in head_names(head).items()}
    for adapter, key in pair.adapters.items():
        names |= {f"{adapter}.{last}": f"{key}.{last}" for last in ("weight", "bias")}
    return {name: key for name, key in names.items() if name in model.state_dict()}
