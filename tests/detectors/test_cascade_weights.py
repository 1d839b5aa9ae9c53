"""Cascade R-CNN from mmdet: its tensors survive a round trip under mmdet's names, and misfits are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import CascadeRCNN, build_detector
from headkd_ray.detectors.weights import load_checkpoint, load_mmdet
from headkd_ray.errors import CheckpointError
from headkd_ray.job import CascadeRCNNSpec
from tests.detectors.test_mmdet import golden_state

SPEC = {
    "backbone": {"name": "resnet18", "kwargs": {"stem_width": 8, "channels": [8, 16, 16, 32]}},
    "neck": {"channels": 16},
    "roi": {"fc_channels": 12, "pool": 3},
}
NAMES = {"rpn.tower.0": "rpn_head.rpn_conv", "rpn.cls_out": "rpn_head.rpn_cls", "rpn.box_out": "rpn_head.rpn_reg"}
PARTS = {"fcs": "shared_fcs", "cls_out": "fc_cls", "box_out": "fc_reg"}
CLASSES = tuple("abcde")


def drawn(classes: int = 5, **roi: Any) -> CascadeRCNN:
    """Return a small cascade with random values in every tensor."""
    torch.manual_seed(0)
    detector = build_detector(CascadeRCNNSpec.model_validate({**SPEC, "roi": SPEC["roi"] | roi}), classes)
    assert isinstance(detector, CascadeRCNN)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.normal_()
    return detector


def as_mmdet(detector: CascadeRCNN) -> dict[str, Tensor]:
    """Return the state dict under mmdet's names."""
    state = {}
    for name, tensor in detector.state_dict().items():
        module, _, last = name.rpartition(".")
        first, second, *rest = name.split(".")
        if first == "backbone":
            key = name.replace("backbone.body.", "backbone.")
        elif first == "neck":
            key = f"neck.{'lateral' if second == 'lateral' else 'fpn'}_convs.{rest[0]}.conv.{last}"
        elif first == "roi":
            stage, part, *rest = rest
            key = ".".join(["roi_head.bbox_head", stage, PARTS[part], *rest])
        else:
            key = f"{NAMES[module]}.{last}"
        state[key] = tensor
    return state


@pytest.mark.parametrize("classes", [5, 1])
@pytest.mark.parametrize("agnostic", [True, False])
def test_mmdet_names_there_and_back(agnostic: bool, classes: int, tmp_path: Any) -> None:
    ours = drawn(classes, class_agnostic=agnostic or classes == 1)
    state = as_mmdet(ours)
    assert state["roi_head.bbox_head.2.shared_fcs.1.weight"].shape == (12, 12)
    assert state["roi_head.bbox_head.0.fc_reg.bias"].shape == (4 if agnostic else 4 * classes,)
    torch.save({"state_dict": state, "meta": {"CLASSES": CLASSES[:classes]}}, tmp_path / "cascade.pth")
    loaded = load_checkpoint(tmp_path / "cascade.pth")
    assert (loaded.source, loaded.classes) == ("mmdet", CLASSES[:classes])
    assert isinstance(loaded.detector, CascadeRCNN)
    assert loaded.detector.spec == ours.spec
    mine, wanted = loaded.detector.state_dict(), ours.state_dict()
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_masks_are_refused_by_name() -> None:
    masks = [f"roi_head.mask_head.{stage}.convs.0.conv.weight" for stage in range(3)]
    with pytest.raises(CheckpointError) as caught:
        load_mmdet({**as_mmdet(drawn()), **{key: torch.zeros(1) for key in masks}})
    assert caught.value.problems == [f"unexpected: {key}" for key in masks]


def test_every_tensor_that_does_not_match_is_listed() -> None:
    state = as_mmdet(drawn())
    del state["roi_head.bbox_head.1.shared_fcs.1.bias"]
    state["roi_head.bbox_head.2.fc_cls.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        load_mmdet(state)
    assert sorted(caught.value.problems) == [
        "missing: roi.stages.1.fcs.1.bias",
        "shape of roi_head.bbox_head.2.fc_cls.bias: 7 in the file, 6 in the model",
    ]
    with pytest.raises(CheckpointError) as caught:
        load_mmdet({**state, "roi_head.bbox_head.1.fc_iou.bias": torch.zeros(1)})
    assert caught.value.problems == ["unexpected: roi_head.bbox_head.1.fc_iou.bias"]


def test_a_cascade_has_three_stages_also_as_an_assistant() -> None:
    state = {key: tensor for key, tensor in as_mmdet(drawn()).items() if not key.startswith("roi_head.bbox_head.2.")}
    with pytest.raises(CheckpointError, match="2 stages"):
        load_mmdet(state)
    alone = {key: tensor for key, tensor in golden_state("student").items() if not key.startswith("roi_head.")}
    stages = {key: tensor for key, tensor in state.items() if key.startswith("roi_head.")}
    with pytest.raises(CheckpointError, match="assistant rcnn: a cascade of 2 stages; only 3 are supported"):
        load_mmdet({**alone, **stages})
