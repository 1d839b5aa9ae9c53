from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.backbone_names import backbone_names, mmdet_name
from headkd_ray.detectors.build import load_backbone
from headkd_ray.errors import CheckpointError, JobError
from headkd_ray.job import BackboneSpec

NARROW = {"stem_width": 8, "channels": [8, 16, 32, 64]}


def backbone(name: str, **keys: Any) -> Backbone:
    return Backbone(BackboneSpec.model_validate({"name": name, "frozen_stages": 0, "norm_eval": False, **keys}))


@pytest.mark.parametrize(
    ("name", "keys", "channels"),
    [
        ("resnet18", {}, [64, 128, 256, 512]),
        ("resnet18", {"kwargs": NARROW}, [8, 16, 32, 64]),
        ("resnet50", {"kwargs": NARROW}, [32, 64, 128, 256]),
        ("resnet10t", {"kwargs": {"stem_width": 8, "channels": [16, 24, 48, 64]}}, [16, 24, 48, 64]),
        ("mobilenetv2_100", {}, [24, 32, 96, 320]),
        ("mobilenetv2_100", {"final_conv": True, "leaky_slope": 0.1}, [24, 32, 96, 1280]),
        (
            "mobilenetv2_100",
            {"final_conv": True, "kwargs": {"stem_width": 8, "channels": [8, 8, 16, 16, 24, 40, 80], "head_width": 96}},
            [8, 16, 24, 96],
        ),
        ("mobilenetv2_100", {"kwargs": {"channels": [8, 8, 16, 16, 24, 40, 80], "layers": [1] * 7}}, [8, 16, 24, 80]),
        ("convnext_atto", {}, [40, 80, 160, 320]),
        ("swin_tiny_patch4_window7_224", {"kwargs": {"img_size": [64, 96], "depths": [1] * 4}}, [96, 192, 384, 768]),
    ],
)
def test_taps_lie_at_strides_4_to_32(name: str, keys: dict[str, Any], channels: list[int]) -> None:
    net = backbone(name, **keys).eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 64, 96))
    assert net.channels == channels
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]


def test_a_narrow_stem_is_the_wide_nets_own_architecture() -> None:
    wide, same = backbone("resnet18"), backbone("resnet18", kwargs={"stem_width": 64})
    assert {k: v.shape for k, v in wide.state_dict().items()} == {k: v.shape for k, v in same.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto"])
@pytest.mark.parametrize("stages", [0, 1, 2, 4])
def test_frozen_stages_are_exactly_what_the_tap_depends_on(name: str, stages: int) -> None:
    net = backbone(name, frozen_stages=stages)
    taps = net(torch.randn(1, 3, 64, 64))
    if stages == 4:
        assert not any(p.requires_grad for p in net.parameters())
        return
    assert [t.requires_grad for t in taps] == [i >= stages for i in range(4)]
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    # A copy without freezing tells which parameters the last frozen tap depends on.
    twin = backbone(name)
    if stages:
        twin(torch.randn(1, 3, 64, 64))[stages - 1].sum().backward()
    assert frozen == {n for n, p in twin.named_parameters() if p.grad is not None}


def test_norm_modes() -> None:
    def norms(net: Backbone) -> dict[str, bool]:
        return {n: m.training for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}

    paper = backbone("resnet18", frozen_stages=1, norm_eval=True).train()
    assert not any(norms(paper).values())
    assert paper.body.layer4.training
    assert not paper.body.layer1.training
    partly = norms(backbone("resnet18", frozen_stages=1).train())
    assert {n for n, training in partly.items() if not training} == {
        n for n in partly if n.startswith(("body.bn1", "body.layer1"))
    }
    assert all(norms(backbone("mobilenetv2_100").train()).values())
    assert not any(norms(backbone("mobilenetv2_100").eval()).values())
    before = paper.body.bn1.running_mean.clone()
    paper(torch.randn(2, 3, 32, 32) + 5)
    assert torch.equal(before, paper.body.bn1.running_mean)


def test_norm_eps() -> None:
    net = backbone("resnet18", norm_eps=0.0)
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.0}


def test_leaky_mobilenet_equals_torchvisions_with_the_same_activation() -> None:
    # The paper's MobileNetV2: LeakyReLU 0.1 throughout, BatchNorm in train mode, last tap after the final conv.
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(weights=None).features
    activations = [name for name, module in theirs.named_modules() if isinstance(module, nn.ReLU6)]
    for name in activations:
        theirs.set_submodule(name, nn.LeakyReLU(0.1))
    ours = backbone("mobilenetv2_100", final_conv=True, leaky_slope=0.1).train()
    state = {f"features.{key}": value for key, value in theirs.state_dict().items()}
    ours.body.load_state_dict({name: state[key] for key, name in backbone_names(state).items()})
    x = torch.randn(2, 3, 64, 64)
    expected, hidden = [], x
    for i, stage in enumerate(theirs.train()):
        hidden = stage(hidden)
        if i in (3, 6, 13, 18):
            expected.append(hidden)
    for mine, wanted in zip(ours(x), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.body.bn2.running_mean, theirs[18][1].running_mean, rtol=1e-4, atol=1e-6)


def test_mmdet_mobilenet_names() -> None:
    assert mmdet_name("conv1.conv.weight") == "conv_stem.weight"
    assert mmdet_name("conv2.bn.running_mean") == "bn2.running_mean"
    assert mmdet_name("layer1.0.depthwise_conv.bn.bias") == "blocks.0.0.bn1.bias"
    assert mmdet_name("layer1.0.linear_conv.conv.weight") == "blocks.0.0.conv_pw.weight"
    assert mmdet_name("layer4.2.expand_conv.conv.weight") == "blocks.3.2.conv_pw.weight"
    assert mmdet_name("layer4.2.depthwise_conv.bn.weight") == "blocks.3.2.bn2.weight"
    assert mmdet_name("layer4.2.linear_conv.bn.weight") == "blocks.3.2.bn3.weight"
    assert mmdet_name("layer1.0.conv1.weight") == "layer1.0.conv1.weight"


@pytest.mark.parametrize("source", ["torchvision", "timm", "mmcls"])
def test_initial_weights_from_a_classification_net(source: str, tmp_path: Path) -> None:
    reference = backbone("resnet18")
    state = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in reference.body.state_dict().items()}
    file = {**state, "fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}
    path = tmp_path / "net.pth"
    if source == "mmcls":
        torch.save(
            {"state_dict": {f"backbone.{k}": v for k, v in state.items()} | {"head.fc.weight": torch.zeros(5, 512)}}, path
        )
    elif source == "timm":
        path = path.with_suffix(".safetensors")
        save_file({k: v.contiguous() for k, v in file.items()}, path)
    else:
        torch.save(file, path)
    net = backbone("resnet18")
    load_backbone(net, path)
    assert all(torch.equal(net.body.state_dict()[n], t) for n, t in state.items())


def test_initial_weights_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    state = {f"{k}": v for k, v in backbone("resnet18").body.state_dict().items()}
    del state["conv1.weight"]
    state |= {"layer9.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1, 2)}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone(backbone("resnet18"), tmp_path / "net.pth")
    text = str(caught.value)
    assert "missing: conv1.weight" in text
    assert "unexpected: layer9.weight" in text
    assert "layer1.0.conv1.weight: 1x2 in the file, 64x64x3x3" in text


def test_unknown_and_unfit_backbones_are_job_errors() -> None:
    with pytest.raises(JobError, match=r"did you mean.*resnet18"):
        backbone("resnet-18")
    with pytest.raises(JobError, match=r"backbone\.kwargs\.dims: timm cannot build resnet18 with \[1\]"):
        backbone("resnet18", kwargs={"stem_width": 8, "dims": [1]})
    with pytest.raises(JobError, match="no feature map at stride"):
        backbone("vit_tiny_patch16_224")


def test_stride_in_the_first_1x1_conv() -> None:
    torch.manual_seed(0)
    plain, caffe = (backbone("resnet50", kwargs=NARROW, frozen_stages=2, stride_in_1x1=value).eval() for value in (False, True))
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's zeros at the ends of blocks would hide what happens inside
    caffe.load_state_dict(plain.state_dict())  # the same tensors fit both
    strides = {name: m.stride[0] for name, m in caffe.body.named_modules() if isinstance(m, nn.Conv2d)}
    moved = {f"layer{stage}.0.{conv}" for stage in (2, 3, 4) for conv in ("conv1", "downsample.0")}
    assert {name for name, stride in strides.items() if stride == 2} == {"conv1", *moved}
    x = torch.randn(1, 3, 70, 96)
    for level, (a, b) in enumerate(zip(plain(x), caffe(x), strict=True)):
        assert a.shape == b.shape
        assert torch.equal(a, b) == (level == 0)
    assert [tap.requires_grad for tap in caffe.train()(x)] == [False, False, True, True]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "resnetaa50"])
def test_stride_in_the_first_1x1_conv_needs_bottlenecks(name: str) -> None:
    with pytest.raises(JobError, match=rf"backbone\.stride_in_1x1: {name} has no ResNet bottlenecks .* use false"):
        backbone(name, stride_in_1x1=True)


def test_activation_reaches_every_layer() -> None:
    net = backbone("mobilenetv2_100", leaky_slope=0.1)
    kinds = {type(m) for m in net.modules() if isinstance(m, nn.ReLU | nn.ReLU6 | nn.LeakyReLU)}
    assert kinds == {nn.LeakyReLU}
    assert net.body.bn1.act.negative_slope == 0.1
