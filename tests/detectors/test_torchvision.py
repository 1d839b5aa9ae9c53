"""torchvision's own models on random weights give the same boxes, scores and labels through our detectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
    retinanet_resnet50_fpn,
)
from torchvision.ops import FrozenBatchNorm2d

from headkd_ray.detectors import FasterRCNN as OurFasterRCNN
from headkd_ray.detectors.weights import load_checkpoint, load_torchvision
from headkd_ray.detectors.weights.misfits import check_architecture
from headkd_ray.errors import CheckpointError
from headkd_ray.job import load_job

CLASSES = 7
"""Number of classes as torchvision counts them, background included."""
SHAPE = (64, 96)


def images() -> list[Tensor]:
    """Return blobs rather than noise, so that neighbouring cells differ and NMS has work to do."""
    torch.manual_seed(5)
    return list(nn.functional.interpolate(torch.rand(2, 3, 4, 6), size=SHAPE, mode="bicubic").clamp(0, 1))


@torch.no_grad()
def spread(layer: nn.Module, inputs: Tensor, std: float) -> None:
    """Give an output layer random weights such that each output varies over ``inputs`` with this deviation, around 0."""
    assert isinstance(layer.weight, Tensor)
    assert isinstance(layer.bias, Tensor)
    layer.weight.normal_()
    layer.bias.zero_()
    outputs = layer(inputs).transpose(0, 1).flatten(1)
    scale = std / outputs.std(1)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(-outputs.mean(1) * scale)


@torch.no_grad()
def random_model(build: Callable[..., Any]) -> Any:
    """Build a torchvision model with random weights whose detections are many, distinct and above the threshold.

    BatchNorm statistics are taken from the images, so that activations keep a sane scale, and the output layers are scaled to
    it; otherwise scores would saturate at 0 or 1 and tie, and any order of them would be right.
    """
    torch.manual_seed(0)
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES)
    model.transform.min_size, model.transform.max_size = (SHAPE[0],), SHAPE[1]  # pass the images through unresized
    x = model.transform(images())[0].tensors
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    boxes = [torch.tensor([[5.0, 5, 60, 60], [3, 4, 30, 58], [50, 30, 90, 60], [70, 2, 90, 40], [0, 0, 96, 64]])] * 2
    model.train()
    features = model.backbone(x)
    if isinstance(model, FasterRCNN):
        model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, boxes, [SHAPE] * 2))
    model.eval()
    features = model.backbone(x)
    finest = next(iter(features.values()))
    if isinstance(model, RetinaNet):
        cls_head, box_head = model.head.classification_head, model.head.regression_head
        spread(cls_head.cls_logits, cls_head.conv(finest), 1.0)
        spread(box_head.bbox_reg, box_head.conv(finest), 0.3)
        cls_head.cls_logits.bias.sub_(3.0)
        cls_head.cls_logits.bias.view(9, CLASSES)[:, 0] = -30.0  # background never scores, because no label trains it
    else:
        hidden = model.rpn.head.conv(finest)
        spread(model.rpn.head.cls_logits, hidden, 1.0)
        spread(model.rpn.head.bbox_pred, hidden, 0.3)
        hidden = model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, boxes, [SHAPE] * 2))
        spread(model.roi_heads.box_predictor.cls_score, hidden, 1.0)
        spread(model.roi_heads.box_predictor.bbox_pred, hidden, 1.0)
    return model


@pytest.mark.parametrize(
    ("build", "count"), [(fasterrcnn_resnet50_fpn, 2), (fasterrcnn_resnet50_fpn_v2, 1), (retinanet_resnet50_fpn, 2)]
)
def test_detections_equal_torchvisions_own(build: Callable[..., Any], count: int, tmp_path: Path) -> None:
    model = random_model(build)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth")
    assert (loaded.source, loaded.classes, loaded.detector.num_classes) == ("torchvision", None, CLASSES - 1)
    if isinstance(loaded.detector, OurFasterRCNN):
        rules = loaded.detector.rpn.spec.test_proposals
        assert (rules.pre_nms, rules.post_nms) == (model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"])
        # Fewer RoIs in both, for speed.
        model.rpn._pre_nms_top_n["testing"] = 100
        fewer = {"test_proposals": rules.replace({"pre_nms": 100})}
        loaded.detector.rpn.spec = loaded.detector.rpn.spec.replace(fewer)
    with torch.no_grad():
        wanted = model(images()[:count])
        x = model.transform(images()[:count])[0].tensors
        found = loaded.detector.eval().detect(x, torch.tensor([SHAPE] * count))
    for i, theirs in enumerate(wanted):
        assert len(theirs["boxes"]) >= 50
        assert len(theirs["labels"].unique()) >= 4
        real = found.labels[i] >= 0
        assert found.labels[i][real].tolist() == (theirs["labels"] - 1).tolist()
        torch.testing.assert_close(found.scores[i][real], theirs["scores"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.boxes[i][real], theirs["boxes"], rtol=1e-5, atol=1e-3)


def test_released_coco_models_have_class_names_and_epsilon_zero() -> None:
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}  # frozen norms have none
    loaded = load_torchvision(state)
    assert loaded.classes is not None
    assert len(loaded.classes) == loaded.detector.num_classes == 90
    assert loaded.classes[:3] == ("person", "bicycle", "car")
    assert loaded.detector.spec.backbone.norm_eps == 0.0
    check_architecture(load_job("jobs/teacher_coco.yaml").student, loaded.detector)  # the job that starts from it fits
    assert load_torchvision(model.state_dict()).detector.spec.backbone.norm_eps is None
    weight = loaded.detector.state_dict()["roi.cls_out.weight"]
    torch.testing.assert_close(weight[-1], state["roi_heads.box_predictor.cls_score.weight"][0])
    torch.testing.assert_close(weight[0], state["roi_heads.box_predictor.cls_score.weight"][1])


def test_frozen_norm_equals_ours() -> None:
    norm = FrozenBatchNorm2d(4, eps=0.0)
    mine = nn.BatchNorm2d(4, eps=0.0).eval()
    torch.manual_seed(0)
    state = {name: torch.rand(4) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    norm.load_state_dict(state)
    mine.load_state_dict(state, strict=False)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x), mine(x))


def test_names_from_before_torchvision_0_13() -> None:
    state = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES).state_dict()
    old = {}
    for key, value in state.items():
        if key.startswith(("backbone.fpn.inner_blocks.", "backbone.fpn.layer_blocks.", "rpn.head.conv.")):
            key = key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        old[key.replace("rpn.head.conv.0.", "rpn.head.conv.")] = value
    assert old.keys() != state.keys()
    new, before = load_torchvision(state).detector, load_torchvision(old).detector
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), before.state_dict().values(), strict=True))


def test_every_key_that_does_not_match_is_listed() -> None:
    state = dict(retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES).state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_torchvision({**state, "roi_heads.mask_head.weight": torch.zeros(1), "backbone.fpn.other": torch.zeros(1)})
    assert caught.value.problems == ["unexpected: roi_heads.mask_head.weight", "unexpected: backbone.fpn.other"]
    del state["backbone.fpn.layer_blocks.1.0.bias"]
    state["head.regression_head.conv.2.0.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        load_torchvision(state)
    assert caught.value.problems == [
        "missing: neck.output.1.bias",
        "shape of head.regression_head.conv.2.0.bias: 3 in the file, 256 in the model",
    ]
