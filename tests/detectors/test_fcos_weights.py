"""FCOS from torchvision gives its own model's detections on random weights; FCOS from mmdet survives a round trip."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos_resnet50_fpn

from headkd_ray.detectors import FCOS, Detector, build_detector
from headkd_ray.detectors.conversions.fcos_weights import PLAIN
from headkd_ray.detectors.weights import load_mmdet, load_torchvision
from headkd_ray.detectors.weights.torchvision import COCO
from headkd_ray.errors import CheckpointError
from headkd_ray.job import FCOSSpec
from tests.detectors.test_torchvision import SHAPE, images, spread

SPEC = {
    "backbone": {"name": "resnet18", "kwargs": {"stem_width": 8, "channels": [8, 16, 16, 32]}},
    "neck": {"channels": 32},
    "head": {"convs": 2, "channels": 32},
}
NECK = "neck=dict(add_extra_convs='on_output', relu_before_extra_convs=True)"
SWITCHES = "center_sampling=True, norm_on_bbox=True, centerness_on_reg=True, loss_bbox=dict(type='GIoULoss', loss_weight=1.0)"


@torch.no_grad()
def random_fcos(num_classes: int) -> Any:
    """Return torchvision's FCOS with random weights whose detections are many, distinct and above the threshold."""
    torch.manual_seed(0)
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=num_classes)
    model.transform.min_size, model.transform.max_size = (SHAPE[0],), SHAPE[1]  # pass the images through unresized
    x = model.transform(images())[0].tensors
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    model.train()
    model.backbone(x)
    finest = next(iter(model.eval().backbone(x).values()))
    cls_head, box_head = model.head.classification_head, model.head.regression_head
    spread(cls_head.cls_logits, cls_head.conv(finest), 1.0)
    spread(box_head.bbox_reg, box_head.conv(finest), 1.0)
    spread(box_head.bbox_ctrness, box_head.conv(finest), 1.0)
    box_head.bbox_reg.bias.add_(2.0)
    cls_head.cls_logits.bias.sub_(3.0)
    cls_head.cls_logits.bias[0] = -30.0  # background never scores, because no label trains it
    return model


@pytest.mark.parametrize("num_classes", [7, 91])
def test_detections_equal_torchvisions_own(num_classes: int) -> None:
    model = random_fcos(num_classes)
    loaded = load_torchvision(model.state_dict())
    assert isinstance(loaded.detector, FCOS)
    assert loaded.classes == (COCO if num_classes == 91 else None)
    with torch.no_grad():
        wanted = model(images())
        x = model.transform(images())[0].tensors
        found = loaded.detector.eval().detect(x, torch.tensor([SHAPE] * 2))
    for i, theirs in enumerate(wanted):
        assert len(theirs["boxes"]) >= 50
        assert len(theirs["labels"].unique()) >= 4
        real = found.labels[i] >= 0
        assert found.labels[i][real].tolist() == (theirs["labels"] - 1).tolist()
        torch.testing.assert_close(found.scores[i][real], theirs["scores"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.boxes[i][real], theirs["boxes"], rtol=1e-5, atol=1e-3)


def test_every_torchvision_key_that_does_not_match_is_listed() -> None:
    state = dict(fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7).state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_torchvision({**state, "head.regression_head.scale": torch.zeros(1)})
    assert caught.value.problems == ["unexpected: head.regression_head.scale"]
    del state["head.classification_head.conv.4.bias"]
    state["head.regression_head.bbox_ctrness.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        load_torchvision(state)
    assert sorted(caught.value.problems) == [
        "missing: head.cls_tower.4.bias",
        "shape of head.regression_head.bbox_ctrness.bias: 3 in the file, 1 in the model",
    ]


def drawn(**head: Any) -> Detector:
    """Return a small FCOS with random values in every tensor."""
    torch.manual_seed(0)
    detector = build_detector(FCOSSpec.model_validate({**SPEC, "head": SPEC["head"] | head}), 5)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.normal_()
    return detector


def as_mmdet(detector: Detector, prefix: str = "bbox_head", outputs: str = "conv") -> dict[str, Tensor]:
    """Return the state dict under mmdet's names."""
    parts = {"cls_tower": "cls_convs", "box_tower": "reg_convs"}
    parts |= {"cls_out": f"{outputs}_cls", "box_out": f"{outputs}_reg", "centerness_out": f"{outputs}_centerness"}
    step = 2 if detector.spec.head.norm_groups is None else 3  # type: ignore[union-attr]
    state = {}
    for name, tensor in detector.state_dict().items():
        first, part, *rest = name.split(".")
        if first == "backbone":
            key = name.replace("backbone.body.", "backbone.")
        elif first == "neck":
            number, last = int(rest[0]) + (3 if part == "extra" else 0), rest[1]
            key = f"neck.{'lateral' if part == 'lateral' else 'fpn'}_convs.{number}.conv.{last}"
        elif part == "scales":
            key = f"{prefix}.scales.{rest[0]}.scale"
        elif part in ("cls_tower", "box_tower"):
            number, place = divmod(int(rest[0]), step)
            key = f"{prefix}.{parts[part]}.{number}.{('conv', 'gn')[place]}.{rest[1]}"
        else:
            key = f"{prefix}.{parts[part]}.{rest[0]}"
        state[key] = tensor
    return state


@pytest.mark.parametrize("prefix", ["bbox_head", "rpn_head"])
@pytest.mark.parametrize("groups", [32, None])
def test_mmdet_names_there_and_back(groups: int | None, prefix: str) -> None:
    ours = drawn(norm_groups=groups)
    config = f"model = dict({NECK}, {prefix}=dict({SWITCHES}))"
    for outputs in ("conv", "fcos"):
        loaded = load_mmdet(as_mmdet(ours, prefix, outputs), {"config": config, "CLASSES": tuple("abcde")})
        assert (loaded.source, loaded.classes) == ("mmdet", tuple("abcde"))
        assert isinstance(loaded.detector, FCOS)
        assert loaded.detector.spec.head == ours.spec.head  # type: ignore[union-attr]
        assert loaded.detector.spec.neck == ours.spec.neck
        mine, wanted = loaded.detector.state_dict(), ours.state_dict()
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_what_no_shape_tells_comes_from_the_config_or_is_the_papers() -> None:
    state = as_mmdet(drawn())

    def spec(neck: str = "", head: str = "", more: str = "") -> FCOSSpec:
        config = f"model = dict(type='FCOS', neck=dict({neck}), bbox_head=dict({head}), {more})"
        found = load_mmdet(state, {"config": config}).detector.spec
        assert isinstance(found, FCOSSpec)
        return found

    plain = spec()  # mmdet's defaults
    head = plain.head
    assert (head.center_radius, head.norm_on_bbox, head.centerness_on_reg, head.box_loss) == (None, False, False, "iou")
    assert (plain.neck.extra, plain.neck.relu_before_p7) == ("conv_c5", False)  # C5 and P5 are equally wide
    assert head.postprocess == FCOSSpec().head.postprocess

    assert spec(head="center_sampling=True").head.center_radius == 1.5
    assert spec(head="center_sampling=True, center_sample_radius=2").head.center_radius == 2.0
    assert spec(head="center_sampling=False, center_sample_radius=2").head.center_radius is None
    assert spec(head="loss_bbox=dict(type='IoULoss')").head.box_loss == "iou"
    assert spec(head="loss_bbox=dict(type='mmdet.models.losses.GIoULoss')").head.box_loss == "giou"
    assert spec("add_extra_convs='on_input'").neck.extra == "conv_c5"
    assert spec("add_extra_convs=True").neck.extra == "conv_c5"
    assert spec("add_extra_convs=True, extra_convs_on_inputs=False").neck.extra == "conv_p5"  # mmdet 1.x
    with pytest.raises(CheckpointError, match="on_lateral"):
        spec("add_extra_convs='on_lateral'")
    rules = spec(more="test_cfg=dict(nms_pre=900, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=-1)")
    assert rules.head.postprocess.model_dump() == {
        **head.postprocess.model_dump(),
        "pre_nms": 900,
        "score": 0.1,
        "nms_iou": 0.6,
    }
    with pytest.raises(CheckpointError, match=r"test_cfg cannot be used.*'score': 5"):
        spec(more="test_cfg=dict(score_thr=5)")

    without = load_mmdet(state).detector.spec
    assert isinstance(without, FCOSSpec)
    head = without.head
    assert (head.center_radius, head.norm_on_bbox, head.centerness_on_reg, head.box_loss) == (1.5, True, True, "giou")


def test_tower_convs_have_biases_where_the_file_s_have() -> None:
    """Without them, and without a config, it is the plain FCOS: mmdet's configs have them with the later improvements."""
    state = {k: v for k, v in as_mmdet(drawn()).items() if not k.endswith(".conv.bias") or "bbox_head" not in k}
    loaded = load_mmdet(state).detector
    assert not [name for name in loaded.state_dict() if re.fullmatch(r"head\.\w+_tower\.[03]\.bias", name)]
    head = loaded.spec.head  # type: ignore[union-attr]
    assert not head.conv_bias  # type: ignore[union-attr]
    assert head == drawn(conv_bias=False, **PLAIN).spec.head  # type: ignore[union-attr]
    improved = load_mmdet(state, {"config": f"model = dict({NECK}, bbox_head=dict({SWITCHES}))"}).detector
    assert improved.spec.head == drawn(conv_bias=False).spec.head  # type: ignore[union-attr]
    del state["bbox_head.cls_convs.1.gn.bias"]
    with pytest.raises(CheckpointError) as caught:
        load_mmdet(state)
    assert caught.value.problems == ["missing: head.cls_tower.4.bias"]


def test_every_mmdet_key_that_does_not_match_is_listed() -> None:
    state = as_mmdet(drawn())
    with pytest.raises(CheckpointError) as caught:
        load_mmdet({**state, "bbox_head.conv_offset.weight": torch.zeros(1), "bbox_head.cls_convs.0.bn.bias": torch.zeros(1)})
    assert caught.value.problems == ["unexpected: bbox_head.conv_offset.weight", "unexpected: bbox_head.cls_convs.0.bn.bias"]
    del state["bbox_head.scales.2.scale"], state["bbox_head.cls_convs.0.conv.bias"]
    state["bbox_head.conv_centerness.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError) as caught:
        load_mmdet(state)
    assert sorted(caught.value.problems) == [
        "missing: head.cls_tower.0.bias",
        "missing: head.scales.2",
        "shape of bbox_head.conv_centerness.bias: 2 in the file, 1 in the model",
    ]


def test_shapes_that_no_fcos_has() -> None:
    state = as_mmdet(drawn())
    with pytest.raises(CheckpointError, match="2 boxes a cell"):
        load_mmdet({**state, "bbox_head.conv_reg.weight": torch.zeros(8, 32, 3, 3)})
    with pytest.raises(CheckpointError, match="GroupNorm on 48 channels"):
        load_mmdet({**state, "bbox_head.conv_cls.weight": torch.zeros(5, 48, 3, 3)})
    with pytest.raises(CheckpointError, match="shapes are no detector's"):
        load_mmdet({**state, "bbox_head.conv_cls.weight": torch.tensor(1.0)})
