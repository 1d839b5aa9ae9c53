"""mmdet's Caffe-style files (stride in the 1x1 convs, BGR input) give the features of an independent computation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headkd_ray.detectors import FCOS
from headkd_ray.detectors.weights import load_checkpoint, load_mmdet
from headkd_ray.detectors.weights.native import load_detector, save_detector
from headkd_ray.errors import CheckpointError
from headkd_ray.job import FCOSSpec
from tests.detectors.mmdet_resnet import fpn_on_output, resnet
from tests.detectors.test_fcos_weights import as_mmdet
from tests.detectors.test_mmdet import plain_retinanet

CLASSES = tuple("abcde")
SPEC = {
    "backbone": {"name": "resnet50", "kwargs": {"stem_width": 8, "channels": [8, 8, 16, 16], "layers": [2, 1, 2, 1]}},
    "neck": {"channels": 32},
    "head": {"convs": 1, "channels": 32},
}
CAFFE, DETECTRON2 = [102.9801, 115.9465, 122.7717], [103.53, 116.28, 123.675]
"""BGR means of mmdet's two families of Caffe-style files."""

MODEL = """
    type='FCOS',
    backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True, style='{style}'),
    neck=dict(
        type='FPN', start_level=1, add_extra_convs='on_output', num_outs=5, relu_before_extra_convs=True),
    bbox_head=dict(
        type='FCOSHead', norm_on_bbox=True, centerness_on_reg=True, dcn_on_last_conv=False, center_sampling=True,
        conv_bias=True, loss_bbox=dict(type='GIoULoss', loss_weight=1.0)),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=100),
"""


def config_2x(mean: list[float], std: list[float], is_rgb: bool, style: str = "caffe") -> dict[str, Any]:
    """Return the meta of a 2.x file, with pipelines written out as mmcv's ``pretty_text`` does."""
    norm = f"mean={mean}, std={std}, to_rgb={is_rgb}"
    test = f"[dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', transforms=[dict(type='Normalize', {norm})])]"
    data = f"data = dict(samples_per_gpu=2, test=dict(type='CocoDataset', pipeline={test}))"
    text = (
        f"model = dict({MODEL.format(style=style)})\nimg_norm_cfg = dict(\n    {norm})\n{data}\nlr_config = dict(a=1.0 / 3)\n"
    )
    return {"mmdet_version": "2.20.0", "CLASSES": CLASSES, "config": text}


def config_3x(mean: list[float], std: list[float], is_rgb: bool, style: str = "caffe") -> dict[str, Any]:
    """Return the meta of a 3.x file."""
    pixels = f"type='DetDataPreprocessor', mean={mean}, std={std}, bgr_to_rgb={is_rgb}, pad_size_divisor=32"
    text = f"model = dict(data_preprocessor=dict(batch_augments=[dict(type='B')], {pixels}), {MODEL.format(style=style)})\n"
    return {"dataset_meta": {"classes": CLASSES}, "cfg": f"{text}test_cfg = dict(type='TestLoop')\n"}


@torch.no_grad()
def drawn() -> dict[str, Tensor]:
    """Return a small FCOS with bottlenecks under mmdet's names, with random values that keep its features in a sane range."""
    torch.manual_seed(0)
    detector = FCOS(FCOSSpec.model_validate(SPEC), len(CLASSES))
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
    detector.head.cls_out.bias.zero_()  # scores above the threshold
    detector.head.box_out.bias.fill_(2.0)
    return as_mmdet(detector)


def photo() -> Tensor:
    """Return (2, 3, 70, 102) uint8 RGB; no side is a multiple of 4."""
    return torch.randint(0, 256, (2, 3, 70, 102), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


SIZES = torch.tensor([[70, 102]] * 2)


@pytest.mark.parametrize("style", ["caffe", "pytorch"])
@pytest.mark.parametrize("version", [config_2x, config_3x])
@pytest.mark.parametrize(
    ("mean", "std", "is_rgb"),
    [
        (CAFFE, [1.0, 1.0, 1.0], False),
        (DETECTRON2, [1.0, 1.0, 1.0], False),
        ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395], False),
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], True),
        ([0, 10, 20], [255, 128, 64], True),
    ],
)
@torch.no_grad()
def test_features_equal_mmdets(style: str, version: Any, mean: list[float], std: list[float], is_rgb: bool) -> None:
    state, image = drawn(), photo()
    detector = load_mmdet(state, version(mean, std, is_rgb, style)).detector.eval()
    # mmdet reads images as BGR and reverses the channels if the config says so; mean and std are in that order.
    theirs = image if is_rgb else image[:, [2, 1, 0]]
    x = (theirs.float() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    wanted = resnet(state, x, style)
    mine = detector.normalise(image, SIZES)
    for ours, theirs in zip(detector.backbone(mine), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    for ours, theirs in zip(detector.features(mine), fpn_on_output(state, wanted[1:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("version", [config_2x, config_3x])
def test_the_spec_says_it(version: Any) -> None:
    state = drawn()
    loaded = load_mmdet(state, version(CAFFE, [1.0, 1.0, 1.0], False))
    assert isinstance(loaded.detector, FCOS)
    spec = loaded.detector.spec
    assert (spec.backbone.name, spec.backbone.stride_in_1x1, spec.backbone.frozen_stages) == ("resnet50", True, 1)
    assert (spec.pixels.mean, spec.pixels.std) == ((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0))
    assert (spec.neck.extra, spec.neck.relu_before_p7) == ("conv_p5", True)
    head = spec.head
    assert (head.center_radius, head.norm_on_bbox, head.centerness_on_reg, head.box_loss) == (1.5, True, True, "giou")
    assert (head.postprocess.nms_iou, head.postprocess.score, head.postprocess.max_detections) == (0.6, 0.05, 100)
    assert loaded.classes == CLASSES
    stem = loaded.detector.state_dict()["backbone.body.conv1.weight"]
    assert torch.equal(stem, state["backbone.conv1.weight"][:, [2, 1, 0]])


def test_frozen_stage_and_saved_file_keep_it(tmp_path: Path) -> None:
    torch.save({"state_dict": drawn(), "meta": config_2x(CAFFE, [1.0, 1.0, 1.0], False)}, tmp_path / "fcos.pth")
    loaded = load_checkpoint(tmp_path / "fcos.pth")
    body = loaded.detector.train().backbone.body
    assert (body.layer2[0].conv1.stride, body.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert not any(p.requires_grad for p in (*body.conv1.parameters(), *body.layer1.parameters()))
    assert all(p.requires_grad for p in body.layer2.parameters())
    save_detector(tmp_path / "ours", loaded.detector, CLASSES)
    again = load_detector(tmp_path / "ours")
    assert again.detector.spec == loaded.detector.spec
    with torch.no_grad():
        before, after = loaded.detector.eval()(photo(), SIZES), again.detector.eval()(photo(), SIZES)
    assert (before.labels >= 0).any()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_without_a_config_nothing_tells_caffe_from_pytorch() -> None:
    spec = load_mmdet(drawn()).detector.spec
    assert not spec.backbone.stride_in_1x1
    assert spec.pixels == FCOSSpec().pixels


def test_basic_blocks_are_the_same_in_both_styles() -> None:
    state = plain_retinanet()
    norm = "img_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6], to_rgb=False)"
    loaded = load_mmdet(state, {"config": f"model = dict(backbone=dict(style='caffe'))\n{norm}"}).detector
    assert (loaded.spec.backbone.name, loaded.spec.backbone.stride_in_1x1) == ("resnet18", False)
    assert (loaded.spec.pixels.mean, loaded.spec.pixels.std) == ((3, 2, 1), (6, 5, 4))
    assert torch.equal(loaded.state_dict()["backbone.body.conv1.weight"], state["backbone.conv1.weight"].flip(1))


def test_caffe_style_without_its_normalisation_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"f\.pth: the training config does not say how the input is normalised"):
        load_mmdet(drawn(), {"config": "model = dict(backbone=dict(style='caffe'))"}, "f.pth")
