"""Each kind of detector describes its own foreign files, and nothing else asks for a kind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import headkd_ray
from headkd_ray.detectors import KINDS, RetinaNet, build_detector
from headkd_ray.detectors.conversions import retinanet_weights
from headkd_ray.detectors.conversions.from_mmdet import DenseFromMMDet
from headkd_ray.detectors.registry import Kind
from headkd_ray.detectors.weights import load_mmdet, load_torchvision, mmdet_names, torchvision_names
from headkd_ray.errors import CheckpointError
from headkd_ray.job import RetinaHeadSpec, RetinaNetSpec

NAMES = [kind.spec.model_fields["kind"].default for kind in KINDS]
MMDET = {
    "retinanet": ["bbox_head.retina_cls.weight", "bbox_head.cls_convs.0.conv.weight"],
    "fcos": ["bbox_head.conv_cls.weight", "bbox_head.conv_centerness.weight", "bbox_head.scales.0.scale"],
    "gfl": ["bbox_head.gfl_cls.weight", "bbox_head.cls_convs.0.gn.weight", "bbox_head.scales.0.scale"],
    "reppoints": ["bbox_head.reppoints_cls_out.weight", "bbox_head.moment_transfer"],
    "faster_rcnn": ["rpn_head.rpn_cls.weight", "roi_head.bbox_head.fc_cls.weight"],
    "cascade_rcnn": ["rpn_head.rpn_cls.weight", *(f"roi_head.bbox_head.{stage}.fc_cls.weight" for stage in range(3))],
}
BACKBONE = ["backbone.conv1.weight", "neck.lateral_convs.0.conv.weight"]
DENSE = ["head.classification_head.cls_logits.weight", "head.regression_head.bbox_reg.weight"]
TORCHVISION = {
    "retinanet": [*DENSE, "head.classification_head.conv.0.0.weight"],
    "fcos": [*DENSE, "head.regression_head.bbox_ctrness.weight"],
    "faster_rcnn": ["rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"],
}
ASSISTANT = ["roi_head.bbox_head.fc_cls.weight", "_distiller._adapts.0.weight"]


def test_there_are_files_of_every_kind_that_is_read() -> None:
    assert list(MMDET) == [name for name, kind in zip(NAMES, KINDS, strict=True) if kind.mmdet]
    assert list(TORCHVISION) == [name for name, kind in zip(NAMES, KINDS, strict=True) if kind.torchvision]


@pytest.mark.parametrize("name", MMDET)
def test_one_kind_recognises_an_mmdet_file_and_knows_all_its_tensors(name: str) -> None:
    files = [[*BACKBONE, *MMDET[name]]]
    if MMDET[name][0].startswith("bbox_head."):  # also as a student of the official HEAD, with an R-CNN head beside it
        files.append([*BACKBONE, *(key.replace("bbox_head.", "rpn_head.") for key in MMDET[name]), *ASSISTANT])
    for keys in files:
        found = [other for other, kind in zip(NAMES, KINDS, strict=True) if kind.mmdet and kind.mmdet.recognises(keys)]
        assert found == [name]
        assert list(mmdet_names.mmdet_names(keys)) == keys


@pytest.mark.parametrize("name", TORCHVISION)
def test_one_kind_recognises_a_torchvision_file_and_knows_all_its_tensors(name: str) -> None:
    keys = ["backbone.body.conv1.weight", "backbone.fpn.inner_blocks.0.0.weight", *TORCHVISION[name]]
    found = [other for other, kind in zip(NAMES, KINDS, strict=True) if kind.torchvision and kind.torchvision.recognises(keys)]
    assert found == [name]
    assert list(torchvision_names.torchvision_names(keys)) == keys


def small_retinanet() -> RetinaNet:
    backbone = {"name": "resnet18", "kwargs": {"stem_width": 8, "channels": [8, 16, 16, 48]}}
    spec = {"backbone": backbone, "neck": {"channels": 16}, "head": {"channels": 16, "convs": 1}}
    detector = build_detector(RetinaNetSpec.model_validate(spec), 3)
    assert isinstance(detector, RetinaNet)
    return detector


def as_mmdet(detector: RetinaNet, head: str) -> dict[str, Tensor]:
    """Return the detector's tensors under mmdet's names, with ``{head}_cls`` and ``{head}_reg`` behind the towers."""
    names = {"cls_tower": "cls_convs", "box_tower": "reg_convs", "cls_out": f"{head}_cls", "box_out": f"{head}_reg"}
    state = {}
    for name, tensor in detector.state_dict().items():
        room, part, *rest = name.split(".")
        if room == "backbone":
            key = name.replace("body.", "")
        elif room == "neck":
            number = int(rest[0]) + (3 if part == "extra" else 0)
            key = f"neck.{'lateral' if part == 'lateral' else 'fpn'}_convs.{number}.conv.{rest[1]}"
        elif len(rest) == 2:
            key = f"bbox_head.{names[part]}.{int(rest[0]) // 2}.conv.{rest[1]}"
        else:
            key = f"bbox_head.{names[part]}.{rest[0]}"
        state[key] = tensor
    return state


def test_one_line_in_the_registry_makes_another_head_s_files_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = small_retinanet()
    state = as_mmdet(detector, "new")
    with pytest.raises(CheckpointError, match="belong to no supported mmdet model"):
        load_mmdet(state)
    layers = {"new_cls": "cls_out", "new_reg": "box_out"}
    new = DenseFromMMDet(has=r"bbox_head\.new_cls\.", layers=layers, head=retinanet_weights.MMDET.head, norms=False)
    monkeypatch.setattr(mmdet_names, "KINDS", (*KINDS, Kind(RetinaNetSpec, RetinaHeadSpec, RetinaNet, new)))
    loaded = load_mmdet(state).detector
    assert loaded.num_classes == 3
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in detector.state_dict().items())


def test_what_is_wrong_with_a_head_is_told_with_the_file_s_name() -> None:
    state = as_mmdet(small_retinanet(), "retina")
    assert type(load_mmdet(state, source="a.pth").detector) is RetinaNet
    headless = {key: tensor for key, tensor in state.items() if not key.startswith("bbox_head.")}
    with pytest.raises(CheckpointError, match=r"^a\.pth: has no tensors of a head, only of backbone, neck"):
        load_mmdet(headless, source="a.pth")
    with pytest.raises(CheckpointError, match=r"^a\.pth: the architecture cannot .*\n.*head\.box_out\.weight"):
        load_mmdet({key: tensor for key, tensor in state.items() if "retina_reg" not in key}, source="a.pth")
    with pytest.raises(CheckpointError, match=r"^a\.pth: a dense head with 1 anchors a cell"):
        load_mmdet(state | {"bbox_head.retina_reg.weight": torch.zeros(4, 16, 3, 3)}, source="a.pth")
    with pytest.raises(CheckpointError, match=r"^b\.pth: has no tensors of a head, only of a backbone"):
        load_torchvision({"backbone.fpn.inner_blocks.0.0.weight": torch.zeros(1)}, source="b.pth")


PACKAGE = Path(headkd_ray.__file__).parent
CLASSES = {
    cls.__name__
    for kind in KINDS
    for cls in (kind.spec, kind.head_spec, kind.detector, getattr(kind.detector, "head_class", None))
    if cls is not None
}


def questions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield comparisons with a kind's name, and isinstance and issubclass checks of a kind's own classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.match_case):
            asks = any(isinstance(part, ast.Constant) and part.value in NAMES for part in parts(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asks = any(isinstance(part, ast.Name) and part.id in CLASSES for part in ast.walk(node.args[1]))
        else:
            asks = False
        if asks:
            yield node


def parts(node: ast.Compare | ast.match_case) -> Iterator[ast.AST]:
    return ast.walk(node.pattern if isinstance(node, ast.match_case) else node)


def test_nothing_asks_what_kind_a_detector_is() -> None:
    """The families may be told apart; everything else that differs between kinds is in the registry."""
    found = [
        f"{file.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in questions(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["kind == 'fcos'", "spec.kind in ('gfl', 'x')", "isinstance(head, (A, FCOSHead))", "issubclass(cls, RetinaNetSpec)"],
)
def test_the_test_above_sees_such_questions(text: str) -> None:
    assert len(list(questions(ast.parse(text)))) == 1
