"""Detectors of transformers learn, detect and are stored as transformers itself would have it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import build_detector
from headkd_ray.detectors.hf_config import declared_values
from headkd_ray.detectors.hf_detector import TransformersDetector
from headkd_ray.detectors.hf_losses import targets_of
from headkd_ray.detectors.weights import load_checkpoint, load_detector, save_detector, with_classes
from headkd_ray.errors import CheckpointError, JobError
from headkd_ray.job import PixelSpec, TransformersSpec
from tests.detectors.hf_micro import hf_config, hf_folder
from tests.detectors.micro import RT_DETR, batch, transformers_spec, truth_of

CLASSES = ("a", "b", "c")
MASKED = ("detr", "deformable_detr")
KINDS = (*MASKED, "rt_detr", "rt_detr_v2", "d_fine")


def detector_of(kind: str) -> TransformersDetector:
    """Return a detector in eval mode whose scores differ between queries and classes."""
    config = declared_values(hf_config(kind, CLASSES))
    size = None if kind in MASKED else (96, 96)
    torch.manual_seed(0)
    detector = build_detector(TransformersSpec(model=kind, config=config, input_size=size), len(CLASSES))
    assert isinstance(detector, TransformersDetector)
    for name, weight in detector.named_parameters():
        if "class_embed" in name or "class_labels" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return detector.eval()


def processor_of(kind: str) -> Any:
    import transformers

    names = {"detr": "DetrImageProcessor", "deformable_detr": "DeformableDetrImageProcessor"}
    pixels = PixelSpec()
    statistics = {"image_mean": [v / 255 for v in pixels.mean], "image_std": [v / 255 for v in pixels.std]}
    made = getattr(transformers, names.get(kind, "RTDetrImageProcessor"))
    return made(size={"height": 96, "width": 96}, do_normalize=True, **statistics)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_the_network_s_own_and_their_sum_is_its_total(kind: str) -> None:
    detector, data = detector_of(kind), batch()
    detector.network.config.auxiliary_loss = True
    detector.train()
    x, truth = detector.normalise(data["images"], data["sizes"]), truth_of(data)
    losses = detector.supervised(x, truth, torch.Generator().manual_seed(0))
    torch.manual_seed(int(torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(0))))
    mask = torch.zeros(3, 64, 96, dtype=torch.int64)
    for image, (height, width) in enumerate(data["sizes"].tolist()):
        mask[image, :height, :width] = 1
    given = {"pixel_mask": mask} if kind in MASKED else {}
    total = detector.network(pixel_values=x, labels=targets_of(truth), **given).loss
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), total)
    last = {"loss_ce"} if kind in MASKED else {"loss_vfl", "loss_bbox_dn", "loss_giou_dn"}
    assert {*last, "loss_bbox", "loss_giou", "loss_bbox_aux"} <= losses.keys() and len(losses) < 16


def test_targets_are_shares_of_the_image_without_its_padding() -> None:
    first, second, third = targets_of(truth_of(batch()))
    assert first["class_labels"].tolist() == [0, 2] and second["class_labels"].tolist() == [1]
    torch.testing.assert_close(second["boxes"], torch.tensor([[19 / 60, 26 / 50, 22 / 60, 36 / 50]]))
    assert third["boxes"].shape == (0, 4)


@pytest.mark.parametrize("kind", ["detr", "deformable_detr", "rt_detr"])
def test_detections_are_those_of_transformers_own_pipeline(kind: str) -> None:
    """An image of 50 x 60 in a padded batch: with a mask, or stretched by the processor, and post-processed by its rule."""
    detector, data = detector_of(kind), batch()
    found = detector(data["images"], data["sizes"])
    image, size = data["images"][1, :, :50, :60], data["sizes"][1:2]
    processor = processor_of(kind)
    if kind in MASKED:
        x = detector.normalise(data["images"][1:2], size)
        mask = (torch.arange(64)[:, None] < 50) & (torch.arange(96) < 60)
        inputs = {"pixel_values": x, "pixel_mask": mask[None].long()}
    else:
        inputs = {"pixel_values": processor(images=image, return_tensors="pt")["pixel_values"]}
    with torch.no_grad():
        answer = detector.network(**inputs)
    limit = {"top_k": 300} if kind == "deformable_detr" else {}
    (theirs,) = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=size, **limit)
    assert 20 <= len(theirs["scores"]) <= (found.labels[1] >= 0).sum()  # of RT-DETR, it keeps as many as there are queries
    boxes = theirs["boxes"].clamp(min=0).minimum(size.flip(1).repeat(1, 2))
    apart = (boxes[:, None] - found.boxes[1]).abs().amax(-1) / 0.5  # px: the processor rounds stretched pixels
    apart = torch.maximum(apart, (theirs["scores"][:, None] - found.scores[1]).abs() / 5e-3)
    assert (apart.where(theirs["labels"][:, None] == found.labels[1], torch.inf).amin(1) < 1).all()


def test_what_is_found_does_not_depend_on_the_others_in_the_batch() -> None:
    detector, data = detector_of("rt_detr"), batch()
    together = detector(data["images"], data["sizes"])
    alone = detector(data["images"][1:2, :, :50, :60], data["sizes"][1:2])
    torch.testing.assert_close(alone.boxes[0], together.boxes[1], atol=1e-3, rtol=0)


def logits(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = network.eval()(pixel_values=x).logits
    return found


@pytest.mark.parametrize("kind", ["deformable_detr", "rt_detr_v2"])  # in the first, layers share their weights
def test_transformers_reads_the_checkpoint(kind: str, tmp_path: Path) -> None:
    import transformers

    detector = detector_of(kind)
    save_detector(tmp_path, detector, CLASSES, {"data": {"eval_short_side": 100, "long_side": 200, "pad": 32}})
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(logits(theirs, x), logits(detector.network, x))
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    size = dict(transformers.AutoImageProcessor.from_pretrained(tmp_path).size)
    assert {key: value for key, value in size.items() if value} == (
        {"shortest_edge": 100, "longest_edge": 200} if kind in MASKED else {"height": 96, "width": 96}
    )
    (tmp_path / "model.json").unlink()  # what is left is a folder of transformers
    loaded = load_checkpoint(tmp_path)
    assert loaded.detector.spec == detector.spec and loaded.classes == CLASSES and loaded.source == "transformers"


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    detector = detector_of("rt_detr")
    save_detector(tmp_path, detector, CLASSES)
    card = json.loads((tmp_path / "model.json").read_text())
    card["spec"]["config"]["decoder_ffn_dim"] = 64
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"18 tensors do not fit|shape of .*decoder\.layers\.0\.mlp"):
        load_detector(tmp_path)


@pytest.mark.parametrize("kind", ["detr", "rt_detr_v2"])
def test_classes_follow_their_names(kind: str, tmp_path: Path) -> None:
    """With "no object" and without, in the head and in the embeddings of denoising labels."""
    loaded = load_checkpoint(hf_folder(tmp_path, kind, ("ant", "bee", "cat")))
    torch.manual_seed(1)
    other = with_classes(loaded, ["dog", "cat", "ant", "eel"])
    x = torch.randn(1, 3, 96, 96)
    assert isinstance(loaded.detector, TransformersDetector) and isinstance(other.detector, TransformersDetector)
    if kind == "detr":
        mine, theirs = logits(other.detector.network, x), logits(loaded.detector.network, x)
        torch.testing.assert_close(mine[..., [1, 2, 4]], theirs[..., [2, 0, 3]])
        assert not torch.equal(mine[..., 0], mine[..., 3])
    else:
        mine, theirs = (each.detector.network.model.denoising_class_embed.weight for each in (other, loaded))
        assert torch.equal(mine[[1, 2, 4]], theirs[[2, 0, 3]])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "rtdetr"}, r"student\.model: transformers [\d.]+ has no detector 'rtdetr'; did you mean rt_detr\?"),
        ({"model": None}, r"student\.model: missing: name an architecture of transformers, for example rt_detr"),
        ({"input_size": None}, r"student\.input_size: rt_detr has no mask for padding, .* for example \[640, 640\]"),
        ({"config": {"d_modell": 64}}, r"student\.config\.d_modell: rt_detr has no such argument; did you mean d_model\?"),
        ({"config": {"d_model": "wide"}}, r"student\.config\.d_model: Field 'd_model' expected int, got str"),
        ({"config": {"auto_map": {"x": "y"}}}, r"student\.config\.auto_map: rt_detr has no such argument"),
        ({"config": {"num_labels": 4}}, r"student\.config\.num_labels: rt_detr has no such argument"),
        ({"config": {"backbone_config": "resnet50"}}, r"student\.config\.backbone_config: is not a mapping with a model_type"),
        (
            {"config": {"backbone_config": {"model_type": "resnett"}}},
            r"backbone_config\.model_type: transformers has no backbone 'resnett'; did you mean resnet\?",
        ),
        (
            {"config": {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf_hub:who/ever"}}},
            r"backbone_config\.backbone: timm has no model 'hf_hub:who/ever'",
        ),
        (
            {"config": {"backbone_config": {"model_type": "resnet", "depth": [1]}}},
            r"backbone_config\.depth: resnet has no such argument; did you mean depths\?",
        ),
        (
            {"config": {**RT_DETR["config"], "decoder_attention_heads": 3}},
            r"student\.config: transformers cannot build rt_detr \(",
        ),
    ],
)
def test_what_transformers_cannot_build_is_told_with_its_key(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(JobError, match=problem) as told:
        build_detector(TransformersSpec.model_validate({**RT_DETR, **changes}), 3)
    assert len(told.value.problems) == 1


def test_all_wrong_keys_of_a_config_are_told_at_once() -> None:
    with pytest.raises(JobError) as told:
        build_detector(transformers_spec(d_modell=1, decoder_layers="x"), 3)
    assert len(told.value.problems) == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        (
            {"freeze_backbone_batch_norms": True},
            "config.freeze_backbone_batch_norms: true would keep the BatchNorms of random initial weights from learning their "
            "statistics; set it to false, or give student.checkpoint",
        ),
        ({"encoder_in_channels": [12, 16, 20]}, "config: rt_detr cannot be trained on 64 x 64 px (Sizes of tensors must match"),
        ({"num_queries": 400}, "config: rt_detr cannot be trained on 64 x 64 px ("),
    ],
)
def test_a_config_whose_parts_do_not_fit_together_is_told(changes: dict[str, Any], problem: str | None) -> None:
    found = build_detector(transformers_spec(**changes), 3).size_problems([(64, 96), (96, 64)])
    assert len(found) == (problem is not None) and all(each.startswith(str(problem)) for each in found)


def test_a_detector_without_a_decoder_is_refused_before_it_is_trained() -> None:
    spec = {
        "kind": "transformers",
        "model": "yolos",
        "input_size": [64, 64],
        "config": declared_values(hf_config("yolos", CLASSES)),
    }
    (problem,) = build_detector(TransformersSpec.model_validate(spec), 3).size_problems([(64, 96)])
    assert problem.startswith("model: a yolos gives no hidden states of a decoder")


def test_a_missing_package_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        JobError, match=r'student\.kind: transformers needs .*; install it: .*pip install "headkd-ray\[teachers\]"'
    ):
        build_detector(transformers_spec(), 3)


def test_norms_of_fresh_weights_let_the_signal_through() -> None:
    """transformers draws RT-DETR's from N(0, 0.01), which suits only weights that are then loaded."""
    norms = [module for module in build_detector(transformers_spec(), 3).modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all((norm.weight == 1).all() for norm in norms)


def test_loss_in_float32_of_a_network_in_bfloat16() -> None:
    detector, data = detector_of("rt_detr").train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.supervised(detector.normalise(data["images"], data["sizes"]), truth_of(data))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
