"""RepPoints from mmdet, with and without GroupNorm, agrees with mmdet's own computation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from headkd_ray.detectors import RepPoints, RepPointsHead, build_detector
from headkd_ray.detectors.weights import load_mmdet
from headkd_ray.detectors.weights.mmdet_names import mmdet_names
from headkd_ray.errors import CheckpointError
from headkd_ray.job import RepPointsSpec

BACKBONE = {"name": "resnet18", "kwargs": {"stem_width": 8, "channels": [8, 16, 16, 48]}}
WIDTH, POINT_WIDTH, CLASSES = 32, 24, 5


def drawn_mmdet(normed: bool, prefix: str = "bbox_head", convs: int = 3) -> dict[str, Tensor]:
    """Return a state dict as mmdet writes it: ConvModules have a bias, or a GroupNorm and no bias."""
    torch.manual_seed(0)
    neck = {"kind": "reppoints", "backbone": BACKBONE, "neck": {"channels": WIDTH}, "head": {"channels": WIDTH}}
    backbone = build_detector(RepPointsSpec.model_validate(neck), 1).state_dict()
    state = {k.replace("backbone.body.", "backbone."): v for k, v in backbone.items() if k.startswith("backbone.")}

    def module(name: str, into: int, out: int, kernel: int) -> None:
        state[f"{name}.conv.weight"] = torch.randn(out, into, kernel, kernel) * (into * kernel * kernel) ** -0.5
        if normed:
            state[f"{name}.gn.weight"] = torch.rand(out) + 0.5
            state[f"{name}.gn.bias"] = torch.randn(out) * 0.3
        else:
            state[f"{name}.conv.bias"] = torch.randn(out) * 0.3

    for number, channels in enumerate((16, 16, 48)):
        module(f"neck.lateral_convs.{number}", channels, WIDTH, 1)
    for number in range(5):
        module(f"neck.fpn_convs.{number}", 48 if number == 3 else WIDTH, WIDTH, 3)
    for tower in ("cls_convs", "reg_convs"):
        for number in range(convs):
            module(f"{prefix}.{tower}.{number}", WIDTH, WIDTH, 3)
    for layer, into, out, kernel, biased in (
        ("cls_conv", WIDTH, POINT_WIDTH, 3, False),
        ("cls_out", POINT_WIDTH, CLASSES, 1, True),
        ("pts_init_conv", WIDTH, POINT_WIDTH, 3, True),
        ("pts_init_out", POINT_WIDTH, 18, 1, True),
        ("pts_refine_conv", WIDTH, POINT_WIDTH, 3, False),
        ("pts_refine_out", POINT_WIDTH, 18, 1, True),
    ):
        state[f"{prefix}.reppoints_{layer}.weight"] = torch.randn(out, into, kernel, kernel) * (into * kernel * kernel) ** -0.5
        if biased:
            state[f"{prefix}.reppoints_{layer}.bias"] = torch.randn(out) * 0.3
    state[f"{prefix}.moment_transfer"] = torch.tensor([0.4, -0.3])
    return state


def conv_module(state: dict[str, Tensor], name: str, x: Tensor, **keys: Any) -> Tensor:
    x = F.conv2d(x, state[f"{name}.conv.weight"], state.get(f"{name}.conv.bias"), **keys)
    if f"{name}.gn.weight" in state:
        x = F.group_norm(x, 32, state[f"{name}.gn.weight"], state[f"{name}.gn.bias"])
    return x


def pyramid(state: dict[str, Tensor], maps: list[Tensor]) -> list[Tensor]:
    """Apply mmdet's FPN with ``add_extra_convs='on_input'`` to C3 to C5."""
    laterals = [conv_module(state, f"neck.lateral_convs.{i}", m) for i, m in enumerate(maps)]
    for i in (1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[-2:], mode="nearest")
    levels = [conv_module(state, f"neck.fpn_convs.{i}", m, padding=1) for i, m in enumerate(laterals)]
    levels.append(conv_module(state, "neck.fpn_convs.3", maps[-1], stride=2, padding=1))
    levels.append(conv_module(state, "neck.fpn_convs.4", levels[-1], stride=2, padding=1))
    return levels


def on_level(state: dict[str, Tensor], x: Tensor, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, initial and refined points of mmdet's head on one level."""
    w = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    cls_feat = pts_feat = x
    for number in range(3):
        cls_feat = conv_module(w, f"cls_convs.{number}", cls_feat, padding=1).relu()
        pts_feat = conv_module(w, f"reg_convs.{number}", pts_feat, padding=1).relu()
    hidden = F.conv2d(pts_feat, w["reppoints_pts_init_conv.weight"], w["reppoints_pts_init_conv.bias"], padding=1).relu()
    initial = F.conv2d(hidden, w["reppoints_pts_init_out.weight"], w["reppoints_pts_init_out.bias"])
    rest = torch.tensor([-1.0, -1, -1, 0, -1, 1, 0, -1, 0, 0, 0, 1, 1, -1, 1, 0, 1, 1]).view(1, 18, 1, 1)
    offset = initial - rest
    hidden = deform_conv2d(cls_feat, offset, w["reppoints_cls_conv.weight"], padding=1).relu()
    logits = F.conv2d(hidden, w["reppoints_cls_out.weight"], w["reppoints_cls_out.bias"])
    hidden = deform_conv2d(pts_feat, offset, w["reppoints_pts_refine_conv.weight"], padding=1).relu()
    refined = F.conv2d(hidden, w["reppoints_pts_refine_out.weight"], w["reppoints_pts_refine_out.bias"]) + initial
    return logits, initial, refined


@pytest.mark.parametrize("prefix", ["bbox_head", "rpn_head"])
@pytest.mark.parametrize("normed", [True, False])
@torch.no_grad()
def test_an_mmdet_file_gives_mmdets_outputs(normed: bool, prefix: str) -> None:
    state = drawn_mmdet(normed, prefix)
    loaded = load_mmdet(state, {"CLASSES": tuple("abcde")})
    assert (loaded.source, loaded.classes) == ("mmdet", tuple("abcde"))
    detector = loaded.detector.eval()
    assert isinstance(detector, RepPoints)
    spec = detector.spec
    assert (spec.neck.norm, spec.neck.extra, spec.neck.relu_before_p7) == ("group" if normed else "none", "conv_c5", False)
    assert (spec.head.convs, spec.head.channels, spec.head.point_channels) == (3, WIDTH, POINT_WIDTH)
    assert spec.head.norm_groups == (32 if normed else None)

    x = torch.randn(1, 3, 160, 256)
    levels = pyramid(state, detector.backbone(x)[1:])
    outputs = detector.head(detector.features(x))
    for level, features in enumerate(levels):
        logits, initial, refined = on_level(state, features, prefix)
        torch.testing.assert_close(outputs.logits[level], logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs.initial[level], initial, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs.refined[level], refined, rtol=1e-4, atol=1e-5)
    assert detector.head.moment_transfer.tolist() == pytest.approx([0.4, -0.3])


def test_the_published_models_are_recognised_without_kwargs() -> None:
    """mmdet's R50 with GroupNorm has the default values of ``kind: reppoints``."""
    ours = build_detector(RepPointsSpec(), 80).state_dict()
    back = {"init_conv": "pts_init_conv", "init_out": "pts_init_out", "refine_conv": "pts_refine_conv"}
    back |= {"refine_out": "pts_refine_out", "cls_conv": "cls_conv", "cls_out": "cls_out"}
    state = {}
    for name, tensor in ours.items():
        first, part, *rest = name.split(".")
        if first == "backbone":
            key = name.replace("backbone.body.", "backbone.")
        elif first == "neck":
            number = int(rest[0]) + (3 if part == "extra" else 0)
            key = f"neck.{'lateral' if part == 'lateral' else 'fpn'}_convs.{number}.{('conv', 'gn')[int(rest[1])]}.{rest[2]}"
        elif part.endswith("_tower"):
            number, place = divmod(int(rest[0]), 3)
            key = f"bbox_head.{'cls' if part == 'cls_tower' else 'reg'}_convs.{number}.{('conv', 'gn')[place]}.{rest[1]}"
        else:
            key = "bbox_head.moment_transfer" if part == "moment_transfer" else f"bbox_head.reppoints_{back[part]}.{rest[0]}"
        state[key] = tensor
    loaded = load_mmdet(state).detector
    assert loaded.spec == RepPointsSpec()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), ours.values(), strict=True))


def test_every_mmdet_key_that_does_not_match_is_listed() -> None:
    state = drawn_mmdet(normed=True)
    more = {
        "bbox_head.reppoints_cls_conv.bias_": torch.zeros(1),
        "bbox_head.reppoints_new.weight": torch.zeros(1),
        "bbox_head.cls_convs.0.bn.weight": torch.zeros(1),
        "neck.fpn_convs.0.ln.weight": torch.zeros(1),
        "bbox_head.scales.0.scale": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_mmdet({**state, **more})
    assert caught.value.problems == [f"unexpected: {key}" for key in more]
    del state["bbox_head.reppoints_cls_conv.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_mmdet(state)
    assert caught.value.problems == ["missing: head.cls_conv.weight"]
    state = drawn_mmdet(normed=True) | {"bbox_head.reppoints_cls_conv.bias": torch.zeros(POINT_WIDTH)}
    del state["bbox_head.reg_convs.2.gn.bias"], state["neck.fpn_convs.4.gn.weight"]
    state["bbox_head.moment_transfer"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        load_mmdet(state)
    assert sorted(caught.value.problems) == [
        "missing: head.box_tower.7.bias",
        "missing: neck.extra.1.1.weight",
        "shape of bbox_head.moment_transfer: 3 in the file, 2 in the model",
        "unexpected: bbox_head.reppoints_cls_conv.bias",
    ]


def test_other_kinds_of_reppoints_are_refused() -> None:
    state = drawn_mmdet(normed=False)
    minmax = {key: value for key, value in state.items() if key != "bbox_head.moment_transfer"}
    grid = state | {"bbox_head.reppoints_pts_refine_out.weight": torch.zeros(4, POINT_WIDTH, 1, 1)}
    for other in (minmax, grid):
        with pytest.raises(CheckpointError, match="another kind than moment with 9 points"):
            load_mmdet(other)
    with pytest.raises(CheckpointError, match="a RepPoints head with GroupNorm on 48 channels"):
        load_mmdet(drawn_mmdet(normed=True) | {"bbox_head.reppoints_cls_conv.weight": torch.zeros(POINT_WIDTH, 48, 3, 3)})
    with pytest.raises(CheckpointError, match="a pyramid with GroupNorm on 16 channels"):
        load_mmdet(drawn_mmdet(normed=True) | {"neck.lateral_convs.2.conv.weight": torch.zeros(16, 48, 1, 1)})


def test_norms_are_no_part_of_a_retinanet_tower() -> None:
    keys = ["bbox_head.retina_cls.weight", "bbox_head.cls_convs.0.conv.weight", "bbox_head.cls_convs.0.gn.weight"]
    assert list(mmdet_names(keys)) == keys[:2]
    assert isinstance(load_mmdet(drawn_mmdet(normed=True)).detector.head, RepPointsHead)
