"""A student starts from a whole trained detector: ours, mmdet's and torchvision's, of every kind that is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from headkd_ray.detectors import DenseDetector, Detector, build_detector
from headkd_ray.detectors.weights import load_checkpoint, misfits, save_detector
from headkd_ray.distill import build_training_model
from headkd_ray.distill.start import Start, load_start
from headkd_ray.errors import UserError
from headkd_ray.job import FCOSSpec, Job
from tests.detectors import test_cascade_weights, test_conversions, test_fcos_weights, test_gfl, test_reppoints_weights
from tests.detectors.micro import SPECS, batch, cascade_spec, faster_rcnn_spec, fcos_spec, liven, retinanet_spec
from tests.detectors.test_mmdet import golden_state
from tests.support import micro_job

NAMES = tuple("abcde")
"""The classes of our own and mmdet's files."""
DATA = ("new", "d", "E", "a")
"""The data's classes: two that these files know, in another order, and two that they do not."""


def job_from(checkpoint: Path, student: Any, **keys: Any) -> Job:
    """Return a job whose student, a spec or plain keys, starts from a checkpoint; its data does not exist."""
    section = student if isinstance(student, dict) else student.model_dump()
    section = {**section, "checkpoint": str(checkpoint), **keys}
    return micro_job(checkpoint.parent, {"train": "t", "val": "v"}, student=section)


def started(job: Job, classes: tuple[str, ...] = DATA) -> tuple[Detector, Start]:
    torch.manual_seed(5)
    start = load_start(job, classes)
    assert start is not None
    torch.manual_seed(7)
    model = build_training_model(job, len(classes), None, steps_per_epoch=1, start=start)
    return model.student.eval(), start


def refused(job: Job, classes: tuple[str, ...] = DATA) -> str:
    with pytest.raises(UserError) as caught:
        load_start(job, classes)
    return str(caught.value)


@torch.no_grad()
def class_outputs(detector: Detector) -> list[Tensor]:
    """Return class-specific outputs (N, classes) or (N, classes, 4), background last where there is one, on a drawn batch."""
    data = batch()
    features = detector.eval().features(detector.normalise(data["images"], data["sizes"]))
    if isinstance(detector, DenseDetector):
        logits = detector.head(features).logits
        return [level.unflatten(1, (-1, detector.num_classes)).transpose(0, 2).flatten(1).T for level in logits]
    boxes, image = torch.tensor([[4.0, 4, 40, 36], [8, 8, 30, 44]]), torch.tensor([0, 2])
    outputs = [stage(features, boxes, image) for stage in detector.roi.stages]  # type: ignore[union-attr, attr-defined]
    found = []
    for stage, output in zip(detector.roi.stages, outputs, strict=True):  # type: ignore[union-attr, arg-type, attr-defined]
        found += [output.logits] + ([] if stage.spec.class_agnostic else [output.deltas])
    return found


def assert_taken(student: Detector, theirs: Detector, names: tuple[str, ...], classes: tuple[str, ...] = DATA) -> None:
    """Assert that outputs for common classes are equal, and that the others are not those of any class of the checkpoint."""
    for mine, wanted in zip(class_outputs(student), class_outputs(theirs), strict=True):
        assert wanted.std() > 0
        for place, name in enumerate(classes):
            if name in names:
                torch.testing.assert_close(mine[:, place], wanted[:, names.index(name)], rtol=0, atol=0)
            else:
                assert not (mine[:, place, None] == wanted).flatten(2 if wanted.dim() == 3 else 1).all(0).all(-1).any()
        if wanted.dim() == 2 and wanted.shape[1] == len(names) + 1:
            torch.testing.assert_close(mine[:, -1], wanted[:, -1], rtol=0, atol=0, msg="background")


OWN: dict[str, Callable[[], Any]] = {
    **SPECS,
    "faster_rcnn, agnostic": lambda: faster_rcnn_spec(class_agnostic=True),
    "cascade_rcnn, boxes of each class": lambda: cascade_spec(class_agnostic=False),
}


@pytest.mark.parametrize("kind", OWN)
def test_outputs_follow_class_names_and_everything_else_stays(kind: str, tmp_path: Path) -> None:
    spec = OWN[kind]()
    torch.manual_seed(0)
    theirs = build_detector(spec, len(NAMES))
    liven(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
    save_detector(tmp_path / "own", theirs, NAMES)
    student, start = started(job_from(tmp_path / "own", spec))
    assert_taken(student, theirs, NAMES)
    changed = {
        name for name, tensor in student.state_dict().items() if not torch.equal(tensor, theirs.state_dict().get(name, tensor))
    }
    assert all("cls_out" in name or "box_out" in name for name in changed) and changed
    assert start.note.split("; ") == [
        f"the student starts from {tmp_path}/own (headkd_ray)",
        "its outputs for 2 of 4 classes are taken: 'd', 'a'",
        "new weights for classes that the checkpoint does not know: 'new', 'E'",
        "warning: not matched because the letter case differs: 'E' (the checkpoint's 'e')",
        "left out because the data does not have them: 'b', 'c', 'e'",
    ]


def test_fresh_outputs_are_those_of_the_seed(tmp_path: Path) -> None:
    """They start as in a run without a checkpoint, whatever reading the file drew."""
    spec = retinanet_spec()
    save_detector(tmp_path / "own", build_detector(spec, len(NAMES)), NAMES)
    student, _ = started(job_from(tmp_path / "own", spec))
    torch.manual_seed(7)
    fresh = build_detector(spec, len(DATA))
    mine, seeded = (net.state_dict()["head.cls_out.weight"].unflatten(0, (9, -1)) for net in (student, fresh))
    assert torch.equal(mine[:, [0, 2]], seeded[:, [0, 2]]) and not torch.equal(mine[:, 1], seeded[:, 1])


def mmdet_states() -> dict[str, Callable[[], dict[str, Tensor]]]:
    def gfl() -> dict[str, Tensor]:
        keys = {"backbone": {"name": "resnet18"}, "neck": {"channels": 32}, "head": {"channels": 32, "convs": 1}}
        return test_gfl.mmdet_state(build_detector(test_gfl.GFLSpec.model_validate(keys), len(NAMES)))  # type: ignore[arg-type]

    def retinanet() -> dict[str, Tensor]:
        small = test_conversions.small_retinanet()
        return test_conversions.as_mmdet(build_detector(small.spec, len(NAMES)), "retina")  # type: ignore[arg-type]

    return {
        "retinanet": retinanet,
        "fcos": lambda: test_fcos_weights.as_mmdet(test_fcos_weights.drawn()),
        "gfl": gfl,
        "reppoints": lambda: test_reppoints_weights.drawn_mmdet(True, "bbox_head"),
        "faster_rcnn": lambda: golden_state("teacher"),
        "cascade_rcnn": lambda: test_cascade_weights.as_mmdet(test_cascade_weights.drawn(len(NAMES), class_agnostic=False)),
    }


@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_of_mmdet_s_starts_a_student(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mmdet.pth"
    torch.save({"state_dict": mmdet_states()[kind](), "meta": {"CLASSES": NAMES}}, file)
    theirs = load_checkpoint(file)
    assert (theirs.source, theirs.detector.spec.kind) == ("mmdet", kind)
    student, start = started(job_from(file, theirs.detector.spec))
    for tensor in student.state_dict().values():
        assert tensor.isfinite().all()
    assert "(mmdet); its outputs for 2 of 4 classes are taken: 'd', 'a'" in start.note
    for name, tensor in theirs.detector.state_dict().items():
        if name.startswith(("head.cls_out", "roi.cls_out")) or (name.startswith("roi.stages") and "cls_out" in name):
            groups = tensor.shape[0] // len(NAMES) if isinstance(theirs.detector, DenseDetector) else 1
            mine, wanted = (t.unflatten(0, (groups, -1)) for t in (student.state_dict()[name], tensor))
            assert torch.equal(mine[:, [1, 3]], wanted[:, [3, 0]])
        elif not name.startswith("roi.") or "box_out" not in name:
            assert torch.equal(student.state_dict()[name], tensor), name


def torchvision_model(kind: str, classes: int = 91) -> nn.Module:
    """Build torchvision's detector on a ResNet-18 with a narrow pyramid, with random weights."""
    stages, top = ([1, 2, 3, 4], LastLevelMaxPool()) if kind == "faster_rcnn" else ([2, 3, 4], LastLevelP6P7(32, 32))
    layers = {f"layer{stage}": str(stage) for stage in stages}
    widths = [32 * 2**stage for stage in stages]
    backbone = BackboneWithFPN(resnet18(weights=None), layers, widths, 32, extra_blocks=top)
    makers = {"retinanet": detection.RetinaNet, "fcos": detection.FCOS, "faster_rcnn": detection.FasterRCNN}
    model: nn.Module = makers[kind](backbone, classes)
    return model


COCO_AND_MORE = ("gnu", "zebra", "person")


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "faster_rcnn"])
def test_torchvision_s_coco_models_start_a_student_by_class_name(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "coco.pth"
    torch.save(torchvision_model(kind).state_dict(), file)
    theirs = load_checkpoint(file)
    assert theirs.classes is not None and len(theirs.classes) == 90
    student, start = started(job_from(file, theirs.detector.spec), COCO_AND_MORE)
    assert "taken: 'zebra', 'person'; new weights for classes that the checkpoint does not know: 'gnu'; left out" in start.note
    layer = "roi.cls_out" if kind == "faster_rcnn" else "head.cls_out"
    file_key = {"faster_rcnn": "roi_heads.box_predictor.cls_score"}.get(kind, "head.classification_head.cls_logits")
    raw = torch.load(file, weights_only=True)
    groups = 9 if kind == "retinanet" else 1
    for part in ("weight", "bias"):
        mine = student.state_dict()[f"{layer}.{part}"].unflatten(0, (groups, -1))
        wanted = raw[f"{file_key}.{part}"].unflatten(0, (groups, -1))
        assert torch.equal(mine[:, 2], wanted[:, 1]), "person is COCO's first class, behind the background"
        assert torch.equal(mine[:, 1], wanted[:, 24]), "zebra"
        if kind == "faster_rcnn":
            assert torch.equal(mine[:, 3], wanted[:, 0]), "background"
    if kind == "faster_rcnn":
        boxes = student.state_dict()["roi.box_out.weight"]
        assert torch.equal(boxes[8:12], raw["roi_heads.box_predictor.bbox_pred.weight"][4:8])


def test_classes_of_a_file_without_names(tmp_path: Path) -> None:
    """``student.classes`` names them, as ``teacher.classes`` does; each mistake in it is told."""
    file = tmp_path / "mine.pth"
    torch.save(mmdet_states()["retinanet"](), file)
    spec = load_checkpoint(file).detector.spec
    assert refused(job_from(file, spec)) == (
        f"student.checkpoint: {file} does not name its 5 classes; list them in order in student.classes"
    )
    start = load_start(job_from(file, spec, classes=NAMES), DATA)
    assert start is not None and "taken: 'd', 'a'" in start.note
    assert "student.classes: names 2 classes, but" in refused(job_from(file, spec, classes=("a", "b")))
    assert "student.classes: 'a' is there more than once" in refused(job_from(file, spec, classes=tuple("abcda")))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    save_detector(tmp_path / "own", build_detector(fcos_spec(), len(NAMES)), NAMES)
    return tmp_path / "own"


def test_all_keys_that_do_not_fit_are_named_with_the_values_that_would(own: Path) -> None:
    """What decides how a detector is trained, or how its outputs become detections, may differ."""
    backbone = {"name": "resnet10t", "kwargs": {"stem_width": 4, "channels": [8, 8, 16, 32]}, "norm_eps": 0.001}
    training = {"proposals": {"pre_nms": 7}, "box_loss": "iou", "center_radius": None, "prior": 0.1, "score": "sqrt"}
    head = {**training, "convs": 2, "channels": 16, "norm_groups": 4, "points": "corner"}
    student = {"kind": "fcos", "backbone": backbone, "neck": {"channels": 24}, "head": head, "pixels": {"std": [1, 1, 1]}}
    assert refused(job_from(own, student), ("x", "A")).splitlines() == [
        f"student.checkpoint: the student cannot start from {own}:",
        '  - student.backbone.kwargs: {"stem_width": 4, "channels": [8, 8, 16, 32]} in the job, '
        '{"stem_width": 4, "channels": [8, 8, 16, 16]} in the checkpoint',
        "  - student.backbone.norm_eps: 0.001 in the job, null in the checkpoint",
        "  - student.neck.channels: 24 in the job, 16 in the checkpoint",
        "  - student.head.convs: 2 in the job, 1 in the checkpoint",
        "  - student.head.points: corner in the job, centre in the checkpoint",
        "  - student.pixels.std: [1.0, 1.0, 1.0] in the job, [58.395, 57.12, 57.375] in the checkpoint",
        "  - to start from it, set "
        """'student.backbone.kwargs={"stem_width": 4, "channels": [8, 8, 16, 16]}' student.backbone.norm_eps=null """
        "student.neck.channels=16 student.head.convs=1 student.head.points=centre 'student.pixels.std=[58.395, 57.12, 57.375]'",
        "  - the checkpoint has 5 classes, data.train (t) has 2; only in data.train (t): 'x', 'A'; only in the checkpoint: "
        "'a', 'b', 'c', 'd', 'e'; only the letter case differs for 'A' (the detector's 'a'); it must know at least one class "
        "of the data (student.classes can name its outputs otherwise)",
    ]
    fitting = {**student, "backbone": fcos_spec().backbone.model_dump(), "neck": {"channels": 16}, "pixels": {}}
    assert load_start(job_from(own, {**fitting, "head": {**training, "convs": 1, "channels": 16, "norm_groups": 4}}), DATA)


def test_a_backbone_may_be_written_in_other_words(tmp_path: Path) -> None:
    """What counts is the network: depths and widths that timm has anyway, a tag, dropout in training."""
    narrow = {"stem_width": 8, "channels": [8, 8, 16, 16]}
    spec = retinanet_spec().replace({"backbone.name": "resnet26", "backbone.kwargs": narrow})
    save_detector(tmp_path / "own", build_detector(spec, 5), NAMES)
    same = {"name": "resnet50.tv_in1k", "kwargs": {**narrow, "layers": [2, 2, 2, 2], "drop_path_rate": 0.1}, "norm_eps": 1e-5}
    same |= {"frozen_stages": 2, "norm_eval": True}
    student, _ = started(job_from(tmp_path / "own", spec, backbone=same))
    assert not student.backbone.body.layer1[0].conv1.weight.requires_grad, "frozen as the job says"
    other = {**same, "name": "resnetblur50"}
    assert "student.backbone.name: resnetblur50 in the job, resnet26 in the ch" in refused(
        job_from(tmp_path / "own", spec, backbone=other)
    )


def test_a_key_without_effect_may_differ(tmp_path: Path) -> None:
    save_detector(tmp_path / "own", build_detector(fcos_spec(norm_groups=None), len(NAMES)), NAMES)
    started(job_from(tmp_path / "own", fcos_spec(norm_groups=None, conv_bias=False)))  # there is no norm


def test_another_kind_is_refused(own: Path) -> None:
    assert "student.kind: retinanet in the job, fcos in the checkpoint; a detector starts only from one of its own kind" in (
        refused(job_from(own, retinanet_spec()))
    )


def test_a_single_class_file_does_not_tell_if_its_boxes_are_agnostic(tmp_path: Path) -> None:
    spec = faster_rcnn_spec(class_agnostic=False)
    save_detector(tmp_path / "one", build_detector(spec, 1), ("a",))
    for agnostic in (True, False):
        student, _ = started(job_from(tmp_path / "one", faster_rcnn_spec(class_agnostic=agnostic)))
        boxes = student.state_dict()["roi.box_out.weight"]
        assert boxes.shape[0] == (4 if agnostic else 16)
        assert torch.equal(boxes[-4:], load_checkpoint(tmp_path / "one").detector.state_dict()["roi.box_out.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    spec = fcos_spec()
    assert isinstance(spec, FCOSSpec)
    detector = build_detector(spec, 5)
    with torch.no_grad():
        detector.head.cls_out.bias[0] = bad  # type: ignore[union-attr, index]
    save_detector(tmp_path / "bad", detector, NAMES)
    assert refused(job_from(tmp_path / "bad", spec)).splitlines() == [
        f"student.checkpoint: {tmp_path}/bad: its training has failed, or it is damaged; use another one:",
        "  - head.cls_out.bias: 1 of 5 values are NaN or infinite",
    ]


def test_a_file_that_is_no_detector(tmp_path: Path) -> None:
    gone = refused(job_from(tmp_path / "gone.pth", retinanet_spec()))
    assert gone == f"student.checkpoint: {tmp_path}/gone.pth: no such folder or file"
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "resnet.pth")
    told = refused(job_from(tmp_path / "resnet.pth", retinanet_spec()))
    assert told.startswith(f"student.checkpoint: {tmp_path}/resnet.pth: neither an mmdet nor a torchvision detector")


def test_these_keys_decide_what_weights_mean() -> None:
    """Beside the backbone's. A new key of a detector is among them, until it is declared to matter in training alone."""
    compared = {key for make in SPECS.values() for key in dict(misfits._flat(make().model_dump()))}
    anchors = {"anchors.base_scale", "anchors.octave_scales", "anchors.ratios", "anchors.rounding"}
    towers = {"convs", "channels", "norm_groups", "conv_bias"}
    roi = {"convs", "conv_channels", "conv_norm", "fcs", "fc_channels", "pool", "sampling_ratio", "aligned", "finest_scale"}
    sections = {
        "neck": {"channels", "extra", "relu_before_p7", "norm", "norm_groups"},
        "head": {*towers, *anchors, "points", "norm_on_bbox", "centerness_on_reg", "reg_max", "point_channels"},
        "rpn": {"convs", *anchors},
        "roi": {*roi, "class_agnostic", "stds"},
        "pixels": {"mean", "std"},
    }
    assert compared == {"kind", *(f"{section}.{key}" for section, keys in sections.items() for key in keys)}
