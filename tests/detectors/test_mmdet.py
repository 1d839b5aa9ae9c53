"""Real-world mmdet files load: 2.x, 3.x with logging objects inside, HEAD's own; misfits are refused."""

import argparse
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headkd_ray.detectors import FasterRCNN, RetinaNet, build_detector
from headkd_ray.detectors.weights import load_checkpoint, load_mmdet
from headkd_ray.detectors.weights.mmdet import load_mmdet_model
from headkd_ray.errors import CheckpointError
from headkd_ray.job import FasterRCNNSpec
from tests.detectors.mmdet_mobilenet import MobileNetV2

GOLDEN = Path(__file__).parents[1] / "golden" / "official_head_r18.npz"
CLASSES = ("ant", "bee", "cat", "dog", "eel")


def golden_state(model: str) -> dict[str, Tensor]:
    """Return a state dict that the official code wrote."""
    with np.load(GOLDEN) as file:
        return {key.removeprefix(f"{model}/"): torch.from_numpy(file[key]) for key in file.files if key.startswith(f"{model}/")}


def plain_retinanet() -> dict[str, Tensor]:
    """Return the golden student as plain mmdet names it: the head is ``bbox_head``, and there is no assistant."""
    state = golden_state("student")
    kept = {key: value for key, value in state.items() if not key.startswith(("roi_head.", "_distiller."))}
    return {key.replace("rpn_head.", "bbox_head."): value for key, value in kept.items()}


def test_a_head_student_brings_assistant_and_adapters() -> None:
    loaded, assistants, adapters = load_mmdet_model(golden_state("student"))
    assert isinstance(loaded.detector, RetinaNet)
    assert loaded.detector.num_classes == 5
    assert {name: assistant.strides for name, assistant in assistants.items()} == {"rcnn": (8, 16, 32, 64)}
    assert {number: tuple(a.weight.shape) for number, a in adapters.items()} == {
        0: (32, 32),
        1: (32, 32),
        5: (32, 16),
    }
    assert not any("assistant" in name or "adapter" in name for name in loaded.detector.state_dict())


def test_plain_retinanet_is_the_same_detector() -> None:
    plain, head = load_mmdet(plain_retinanet()), load_mmdet(golden_state("student"))
    assert load_mmdet_model(plain_retinanet())[1:] == ({}, {})
    assert plain.detector.spec == head.detector.spec
    assert all(torch.equal(a, b) for a, b in zip(plain.detector.parameters(), head.detector.parameters(), strict=True))


def test_faster_rcnn() -> None:
    loaded = load_mmdet(golden_state("teacher"))
    assert isinstance(loaded.detector, FasterRCNN)
    assert (loaded.detector.spec.backbone.name, loaded.detector.spec.roi.fc_channels) == ("resnet50", 32)


def test_a_full_size_r50_is_recognised_without_kwargs() -> None:
    net = build_detector(FasterRCNNSpec(), 80)
    ours = net.state_dict()
    back = {"rpn.tower.0": "rpn_head.rpn_conv", "rpn.cls_out": "rpn_head.rpn_cls", "rpn.box_out": "rpn_head.rpn_reg"}
    back |= {"roi.cls_out": "roi_head.bbox_head.fc_cls", "roi.box_out": "roi_head.bbox_head.fc_reg"}
    state = {}
    for name, tensor in ours.items():
        module, _, last = name.rpartition(".")
        if name.startswith("backbone.body."):
            key = name.replace("backbone.body.", "backbone.")
        elif name.startswith("neck."):
            kind, number = name.split(".")[1:3]
            key = f"neck.{'lateral' if kind == 'lateral' else 'fpn'}_convs.{number}.conv.{last}"
        elif name.startswith("roi.fcs."):
            key = name.replace("roi.fcs.", "roi_head.bbox_head.shared_fcs.")
        else:
            key = f"{back[module]}.{last}"
        state[key] = tensor
    loaded = load_mmdet(state)
    assert loaded.detector.spec == FasterRCNNSpec()
    assert all(torch.equal(a, b) for a, b in zip(loaded.detector.state_dict().values(), ours.values(), strict=True))


def history_buffer(monkeypatch: pytest.MonkeyPatch) -> type:
    """Install a class like mmengine's in its pickles: numpy arrays, and its own methods, which pickle writes as ``getattr``."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.array([0.5, 0.25])
            self._count_history = np.array([1, 1])
            self.max_length = 10
            self.statistics_methods: dict[str, Callable[..., Any]] = {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            return float(self._log_history.mean())

        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__

        def __setstate__(self, state: dict[str, Any]) -> None:
            raise AssertionError("code from the file ran")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


def test_a_2x_file(tmp_path: Path) -> None:
    meta = {
        "mmdet_version": "2.20.0",
        "CLASSES": CLASSES,
        "config": "model = dict(backbone=dict(style='pytorch'))",
        "epoch": 12,
    }
    torch.save({"meta": meta, "state_dict": plain_retinanet(), "optimizer": {"lr": 0.1}}, tmp_path / "retina.pth")
    loaded = load_checkpoint(tmp_path / "retina.pth")
    assert (loaded.source, loaded.classes) == ("mmdet", CLASSES)


@pytest.mark.parametrize("key", ["classes", "CLASSES"])
def test_a_3x_file_with_logging_objects_inside(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = history_buffer(monkeypatch)
    config = "model = dict(backbone=dict(style='pytorch'))"
    content = {
        "meta": {"dataset_meta": {key: CLASSES, "palette": [(1, 2, 3)]}, "cfg": config, "best": np.float64(0.5)},
        "message_hub": {"log_scalars": {"train/loss": buffer()}, "runtime_info": {"iter": np.int64(7), "seed": 1}},
        "state_dict": golden_state("teacher"),
    }
    torch.save(content, tmp_path / "faster.pth")
    monkeypatch.undo()
    assert "mmengine" not in sys.modules
    loaded = load_checkpoint(str(tmp_path / "faster.pth"))
    assert (loaded.source, loaded.classes) == ("mmdet", CLASSES)


def test_ddp_prefix_and_training_scripts_arguments(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in plain_retinanet().items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "model.pth")
    assert load_checkpoint(tmp_path / "model.pth").classes is None


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": {f"model.{key}": value for key, value in state.items()}, "hyper_parameters": {"lr": 0.1}, "epoch": 3}


def compiled(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"ema": {f"_orig_mod.module.{key}": value for key, value in state.items()}, "step": 7}


def distilled(state: dict[str, Tensor]) -> dict[str, Any]:
    return {f"detector.student.{key}": value for key, value in state.items()}


def with_optimizer(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"net": state, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}}, "mean": torch.zeros(3)}


@pytest.mark.parametrize("wrap", [lightning, compiled, distilled, with_optimizer])
def test_wrappings_and_prefixes_come_off(wrap: Callable[[dict[str, Tensor]], dict[str, Any]], tmp_path: Path) -> None:
    torch.save(wrap(plain_retinanet()), tmp_path / "model.pth")
    loaded, plain = load_checkpoint(tmp_path / "model.pth"), load_mmdet(plain_retinanet())
    assert all(map(torch.equal, loaded.detector.parameters(), plain.detector.parameters()))


def test_which_of_several_models_is_meant_is_asked(tmp_path: Path) -> None:
    torch.save({"student": plain_retinanet(), "teacher": golden_state("teacher")}, tmp_path / "both.pth")
    with pytest.raises(
        CheckpointError, match=r"both\.pth: holds several models \(student, teacher\); save the one that you mean"
    ):
        load_checkpoint(tmp_path / "both.pth")
    torch.save({"ema": golden_state("teacher"), "state_dict": plain_retinanet()}, tmp_path / "usual.pth")
    assert isinstance(load_checkpoint(tmp_path / "usual.pth").detector, RetinaNet)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "args": {}}, "holds no tensors; its keys are epoch, args"),
        ({"run": {"nets": [{"weight": torch.zeros(2)}]}}, r"holds no state dict; its tensors are under run\.nets\.0\.weight"),
        ({"model": {"conv.weight": np.zeros(2)}}, r"holds NumPy arrays \(model\.conv\.weight, \.\.\.\), not tensors"),
    ],
)
def test_no_tensors_is_said_where_it_is_true(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer .* run git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", r"a web page \(HTML\), .*; download the file itself"),
        (b'{"error": "not found"}', "JSON text"),
        (b"\x1f\x8b\x08\x00rest", "a compressed archive"),
        (b"", "empty"),
        (b"some words", "torch.save did not write it|.*"),
    ],
)
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_what_a_download_put_in_the_files_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: not a readable weight file: (it is )?{message}") as caught:
        load_checkpoint(tmp_path / name)
    assert "could run code" not in str(caught.value)


def test_class_names_that_are_not_as_many_as_the_outputs_are_refused(tmp_path: Path) -> None:
    for meta in ({"CLASSES": [str(i) for i in range(80)]}, {"dataset_meta": {"classes": [str(i) for i in range(80)]}}):
        torch.save({"meta": meta, "state_dict": plain_retinanet()}, tmp_path / "retina.pth")
        with pytest.raises(CheckpointError, match=r"retina\.pth: its meta names 80 classes, but the network has 5 outputs"):
            load_checkpoint(tmp_path / "retina.pth")
    state = {key: value[:9] if "retina_cls" in key else value for key, value in plain_retinanet().items()}
    assert load_mmdet(state, {"CLASSES": "person"}).classes == ("person",), "a string is one name, not six"


@pytest.mark.parametrize(("mean", "is_bgr"), [((123.675, 116.28, 103.53), False), ((103.53, 116.28, 123.675), True)])
def test_a_3x_preprocessor_s_tensors_are_the_normalisation(mean: tuple[float, ...], is_bgr: bool) -> None:
    std = (58.395, 57.12, 57.375)
    state = plain_retinanet()
    for name, numbers in (("mean", mean), ("std", std[::-1] if is_bgr else std)):
        state[f"data_preprocessor.{name}"] = torch.tensor(numbers).view(3, 1, 1)
    detector = load_mmdet(state).detector
    assert (detector.spec.pixels.mean, detector.spec.pixels.std) == ((123.675, 116.28, 103.53), std)
    stem = state["backbone.conv1.weight"]
    assert torch.equal(detector.state_dict()["backbone.body.conv1.weight"], stem.flip(1) if is_bgr else stem)


def test_a_2x_file_s_second_set_of_weights_is_left_out_and_told() -> None:
    state = plain_retinanet()
    loaded = load_mmdet(
        {**state, **{f"ema_{key.replace('.', '_')}": value + 1 for key, value in state.items()}}, source="a.pth"
    )
    assert loaded.notes == (f"a.pth: {len(state)} ema_* tensors, mmdet's second set of weights, are not used",)
    assert torch.equal(loaded.detector.state_dict()["backbone.body.conv1.weight"], state["backbone.conv1.weight"])


def test_a_training_state_is_not_the_student(tmp_path: Path) -> None:
    trained = load_mmdet(plain_retinanet()).detector.state_dict()
    parts = {f"student.{name}": tensor for name, tensor in trained.items()} | {"terms.1.adapters.0.bias": torch.zeros(1)}
    torch.save({"step": 1, "model": parts}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"tensors of headkd_ray .* without their model\.json"):
        load_checkpoint(tmp_path / "a.pt")


class Evil:
    """An object that would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/nonexistent-folder/ran"),))


def test_files_that_cannot_be_read_safely_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": plain_retinanet(), "meta": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(tmp_path / "evil.pth")
    (tmp_path / "noise.pth").write_bytes(b"\x00\x01 not a checkpoint")
    with pytest.raises(CheckpointError, match=r"noise\.pth"):
        load_checkpoint(tmp_path / "noise.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a readable weight file"):
        load_checkpoint(tmp_path / "empty.pth")
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1], protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "list.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="not a state dict"):
        load_checkpoint(tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_checkpoint(tmp_path / "nothing.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"neither an mmdet nor a torchvision.*student\.backbone\.weights"):
        load_checkpoint(tmp_path / "net.pth")


def test_every_tensor_that_does_not_match_is_listed() -> None:
    state = plain_retinanet()
    with pytest.raises(CheckpointError) as caught:
        load_mmdet({**state, "bbox_head.retina_iou.weight": torch.zeros(1), "mask_head.x": torch.zeros(1)})
    assert caught.value.problems == ["unexpected: bbox_head.retina_iou.weight", "unexpected: mask_head.x"]
    del state["neck.fpn_convs.1.conv.bias"], state["backbone.layer3.0.bn1.weight"]
    state |= {"backbone.layer9.0.conv1.weight": torch.zeros(1), "bbox_head.retina_reg.bias": torch.zeros(2)}
    with pytest.raises(CheckpointError) as caught:
        load_mmdet(state)
    assert sorted(caught.value.problems) == [
        "missing: backbone.body.layer3.0.bn1.weight",
        "missing: neck.output.1.bias",
        "shape of bbox_head.retina_reg.bias: 2 in the file, 36 in the model",
        "unexpected: backbone.layer9.0.conv1.weight",
    ]


def test_other_architectures_are_refused() -> None:
    state = plain_retinanet()
    for key in ("backbone.layer3.0.conv2.conv_offset.weight", "bbox_head.cls_convs.3.conv.conv_offset.bias"):
        with pytest.raises(CheckpointError, match=rf"deformable convs \(dcn, dcn_on_last_conv\).*{key}"):
            load_mmdet({**state, key: torch.zeros(1)})
    state["bbox_head.retina_reg.weight"] = torch.zeros(12, 16, 3, 3)
    with pytest.raises(CheckpointError, match="3 anchors a cell"):
        load_mmdet(state)
    state = {k: v for k, v in plain_retinanet().items() if not k.startswith("backbone.layer4")}
    with pytest.raises(CheckpointError, match=r"missing: backbone\.body\.layer4"):
        load_mmdet(state)


def test_shapes_that_no_detector_has() -> None:
    for key in ("backbone.conv1.weight", "neck.lateral_convs.2.conv.weight", "bbox_head.retina_cls.weight"):
        with pytest.raises(CheckpointError, match="shapes are no detector's"):
            load_mmdet({**plain_retinanet(), key: torch.tensor(1.0)})


def test_mobilenet_is_mmdets_own_architecture() -> None:
    torch.manual_seed(0)
    theirs = MobileNetV2(stem=8, channels=(8, 8, 16, 16, 24, 40, 80), head=96).train()
    state = {key: value for key, value in plain_retinanet().items() if not key.startswith(("backbone.", "neck."))}
    state |= {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    for number, channels in enumerate((16, 24, 96)):
        state[f"neck.lateral_convs.{number}.conv.weight"] = torch.randn(16, channels, 1, 1)
        state[f"neck.lateral_convs.{number}.conv.bias"] = torch.zeros(16)
    for number in range(5):
        state[f"neck.fpn_convs.{number}.conv.weight"] = torch.randn(16, 96 if number == 3 else 16, 3, 3)
        state[f"neck.fpn_convs.{number}.conv.bias"] = torch.zeros(16)
    loaded = load_mmdet(state)
    spec = loaded.detector.spec.backbone
    assert (spec.frozen_stages, spec.norm_eval, spec.leaky_slope, spec.final_conv) == (0, False, 0.1, True)
    x = torch.randn(2, 3, 64, 96)
    for mine, wanted in zip(loaded.detector.train().backbone(x), theirs(x), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    for act, slope in (
        ("act_cfg=dict(type='LeakyReLU', negative_slope=0.2)", 0.2),
        ("act_cfg=dict(type='LeakyReLU')", 0.01),
        ("", None),
    ):
        config = f"model = dict(backbone=dict(type='MobileNetV2', {act}))"
        assert load_mmdet(state, {"config": config}).detector.spec.backbone.leaky_slope == slope
