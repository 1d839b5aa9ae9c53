"""Whole detectors, from pixels to losses and detections."""

import pytest
import torch
from torch import Tensor, nn

from headkd_ray.detectors import Detector, FasterRCNN, TwoStageDetector, build_detector
from headkd_ray.detectors.fpn import FPN
from headkd_ray.job import FasterRCNNSpec, FPNSpec, RetinaNetSpec
from tests.detectors.micro import (
    BACKBONE,
    SPECS,
    batch,
    faster_rcnn_spec,
    liven,
    truth_of,
)

NAMES = {
    "retinanet": {"loss_cls", "loss_box"},
    "fcos": {"loss_cls", "loss_box", "loss_centerness"},
    "gfl": {"loss_cls", "loss_box", "loss_dfl"},
    "reppoints": {"loss_cls", "loss_init", "loss_refine"},
    "faster_rcnn": {"loss_rpn_cls", "loss_rpn_box", "loss_roi_cls", "loss_roi_box"},
    "cascade_rcnn": {"loss_rpn_cls", "loss_rpn_box"} | {f"loss_roi_s{i}_{name}" for i in range(3) for name in ("cls", "box")},
}


def micro(kind: str) -> Detector:
    torch.manual_seed(0)
    return build_detector(SPECS[kind](), 3)


def losses(detector: Detector, data: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    features = detector.features(detector.normalise(data["images"], data["sizes"]))
    generator = torch.Generator().manual_seed(seed)
    return detector.losses(features, truth_of(data), generator)


def test_normalise_and_zero_padding() -> None:
    detector, data = micro("retinanet"), batch()
    x = detector.normalise(data["images"], data["sizes"])
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    for i, (h, w) in enumerate(data["sizes"].tolist()):
        pixels = data["images"][i, :, :h, :w].float()
        torch.testing.assert_close(x[i, :, :h, :w], (pixels - mean[:, None, None]) / std[:, None, None])
        assert (x[i, :, h:] == 0).all()
        assert (x[i, :, :, w:] == 0).all()


@pytest.mark.parametrize("kind", SPECS)
def test_a_step_gives_finite_losses_and_gradients_everywhere(kind: str) -> None:
    detector, data = micro(kind).train(), batch()
    found = losses(detector, data)
    assert found.keys() == NAMES[kind]
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss > 0 for loss in found.values())
    torch.stack(list(found.values())).sum().backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("truths", [0, 2])
def test_a_batch_without_any_object(kind: str, truths: int) -> None:
    detector, data = micro(kind).train(), batch()
    data |= {"boxes": torch.zeros(3, truths, 4), "labels": torch.full((3, truths), -1)}
    found = losses(detector, data)
    torch.stack(list(found.values())).sum().backward()
    assert all(found[name].item() == 0 for name in found if name.endswith(("box", "init", "refine", "dfl")))
    assert all(found[name].item() > 0 for name in found if "cls" in name)
    assert [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("kind", SPECS)
def test_the_generator_decides_the_samples(kind: str) -> None:
    detector, data = micro(kind).train(), batch()
    liven(detector)
    first, again, other = (losses(detector, data, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (not kind.endswith("rcnn")) == all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", SPECS)
def test_padding_and_neighbours_do_not_change_detections(kind: str) -> None:
    # Padding is zero either way, so an image alone and the same image in a batch have the same detections.
    detector, data = micro(kind).eval(), batch()
    liven(detector)
    together = detector(data["images"], data["sizes"])
    assert (together.labels >= 0).any(1).all()
    for i in range(3):
        alone = detector(data["images"][i : i + 1], data["sizes"][i : i + 1])
        real = together.labels[i] >= 0
        torch.testing.assert_close(together.boxes[i][real], alone.boxes[0], rtol=1e-4, atol=1e-3)
        assert together.labels[i][real].tolist() == alone.labels[0].tolist()
        assert (together.scores[i].diff() <= 0).all()
        height, width = data["sizes"][i].tolist()
        limit = torch.tensor([width, height, width, height])
        assert (alone.boxes[0] >= 0).all()
        assert (alone.boxes[0] <= limit).all()


@pytest.mark.parametrize("kind", SPECS)
def test_no_detection_at_all(kind: str) -> None:
    detector, data = micro(kind).eval(), batch()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.endswith("cls_out.bias"):
                parameter.fill_(-20.0)
                if name.startswith("roi."):
                    parameter[-1] = 20.0
    found = detector(data["images"], data["sizes"])
    assert found.boxes.shape == (3, 0, 4)
    assert found.labels.shape == (3, 0)


def test_rpn_proposes_by_train_rules_only_in_train_mode() -> None:
    proposals = {"train_proposals": {"pre_nms": 60, "post_nms": 30}, "test_proposals": {"pre_nms": 60, "post_nms": 5}}
    spec = FasterRCNNSpec.model_validate({**faster_rcnn_spec().model_dump(), "rpn": proposals})
    detector, data = build_detector(spec, 3), batch()
    assert isinstance(detector, FasterRCNN)
    outputs = detector.rpn(detector.features(detector.normalise(data["images"], data["sizes"])))
    assert detector.train().rpn.proposals(outputs, data["sizes"]).boxes.shape[1] > 5
    assert detector.eval().rpn.proposals(outputs, data["sizes"]).boxes.shape[1] == 5


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn"])
def test_a_two_stage_detector_hands_back_what_its_losses_saw(kind: str) -> None:
    detector, data = micro(kind).train(), batch()
    assert isinstance(detector, TwoStageDetector)
    liven(detector)
    features = detector.features(detector.normalise(data["images"], data["sizes"]))
    generator = torch.Generator().manual_seed(0)
    found, outputs = detector.losses_and_stages(features, truth_of(data), generator)
    alone = losses(detector, data)
    assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in found)
    assert len(outputs) == len(detector.roi.stages) == {"faster_rcnn": 1, "cascade_rcnn": 3}[kind]
    again = detector.roi.losses(outputs)
    assert all(torch.equal(found[f"loss_roi_{name}"], loss) for name, loss in again.items())
    for stage, (rois, said) in zip(detector.roi.stages, outputs, strict=True):
        assert torch.equal(stage(features, rois.boxes, rois.image).logits, said.logits)


def test_rpn_loss_is_normalised_by_the_samples_of_the_batch() -> None:
    detector, data = micro("faster_rcnn").train(), batch()
    assert isinstance(detector, FasterRCNN)
    outputs = detector.rpn(detector.features(detector.normalise(data["images"], data["sizes"])))
    with torch.no_grad():
        flat = type(outputs)([torch.zeros_like(m) for m in outputs.logits], outputs.deltas)
    found = detector.rpn.losses(flat, truth_of(data))
    # 32 anchors per image, each costing log 2; the image without objects counts one positive more than it has.
    torch.testing.assert_close(found["loss_rpn_cls"], torch.tensor(2.0).log() * 96 / 97)


@pytest.mark.parametrize("extra", ["conv_c5", "conv_p5"])
def test_p6_reads_what_its_spec_says(extra: str) -> None:
    neck = {"channels": 16, "extra": extra, "relu_before_p7": extra == "conv_p5"}
    spec = RetinaNetSpec.model_validate({"backbone": BACKBONE, "neck": neck, "head": {"convs": 1, "channels": 16}})
    detector = build_detector(spec, 3).eval()
    x = torch.randn(1, 3, 64, 96)
    maps, levels = detector.backbone(x), detector.features(x)
    p6 = detector.neck.extra[0](maps[-1] if extra == "conv_c5" else levels[2])
    torch.testing.assert_close(levels[3], p6)
    torch.testing.assert_close(levels[4], detector.neck.extra[1](p6.relu() if extra == "conv_p5" else p6))
    assert [tuple(f.shape[-2:]) for f in levels] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


@pytest.mark.parametrize(("norm", "normed"), [("none", ""), ("batch", "lateral output"), ("group", "lateral output extra")])
def test_convs_of_the_pyramid_have_a_bias_or_a_norm(norm: str, normed: str) -> None:
    neck = FPN(FPNSpec.model_validate({"channels": 16, "norm": norm, "norm_groups": 4}), (8, 16, 16))
    kind = nn.BatchNorm2d if norm == "batch" else nn.GroupNorm
    for part, count in (("lateral", 3), ("output", 3), ("extra", 2)):
        blocks = list(neck.get_submodule(part).children())
        assert len(blocks) == count
        for block in blocks:
            conv, *rest = block.children() if isinstance(block, nn.Sequential) else (block,)
            assert isinstance(conv, nn.Conv2d) and (conv.bias is None) == (part in normed.split())
            assert [type(layer) for layer in rest] == [kind] * (part in normed.split())
    levels = neck([torch.randn(2, c, 8 // s, 12 // s) for c, s in ((8, 1), (16, 2), (16, 4))])
    assert [tuple(f.shape[-2:]) for f in levels] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def test_a_micro_student_is_small() -> None:
    spec = RetinaNetSpec.model_validate(
        {
            "backbone": {**BACKBONE, "kwargs": {"stem_width": 8, "channels": [16, 24, 48, 64]}},
            "neck": {"channels": 32},
            "head": {"convs": 2, "channels": 32},
        }
    )
    assert sum(p.numel() for p in build_detector(spec, 12).parameters()) < 300_000
