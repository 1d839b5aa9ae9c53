"""Detectors of transformers: what is read of a folder, what their decoder answers, and which folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from headkd_ray.detectors.hf_models import CONFIG, PROCESSOR, decoder_states, read_hf_model
from headkd_ray.errors import CheckpointError
from tests.detectors.hf_micro import KINDS, hf_folder

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = hf_folder(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoders_answer_is_that_of_transformers(folders: Callable[[str], Path], kind: str) -> None:
    import transformers

    folder = folders(kind)
    model, theirs = read_hf_model(str(folder)), transformers.AutoModelForObjectDetection.from_pretrained(folder).eval()
    # As many images as layers, so that no shape tells the two axes apart.
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images)
    answer = decoder_states(model.module, images)
    torch.testing.assert_close(answer.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(answer.boxes, expected.pred_boxes, rtol=0, atol=0)
    assert answer.states.shape == (3, 3, 20, 32) == (model.layers, 3, model.queries, model.width)
    torch.testing.assert_close(answer.states[-1], expected.last_hidden_state, rtol=0, atol=0)
    by_layer = expected.get("intermediate_hidden_states")
    if by_layer is not None:
        axis = {"rt_detr_v2": 1, "deformable_detr": 1, "d_fine": 0, "deimv2": 0, "rf_detr": 0}[kind]
        rounding = 1e-5 if kind == "rf_detr" else 0  # it normalises all layers' states together
        torch.testing.assert_close(answer.states, by_layer.movedim(axis, 0), rtol=0, atol=rounding)
    assert model.softmax == (kind == "detr")
    assert model.probabilities(answer.logits).shape == (3, 20, 3)


@pytest.mark.parametrize("kind", ["detr", "rt_detr_v2"])
def test_pixel_statistics_are_those_of_the_processor(folders: Callable[[str], Path], kind: str) -> None:
    model = read_hf_model(str(folders(kind)))
    side = 96 if kind == "rt_detr_v2" else 64  # so that nothing is resized
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.pixels.mean, model.pixels.std))
    torch.testing.assert_close(model.inputs([image])["pixel_values"][0], (image - mean) / std, rtol=1e-5, atol=1e-5)
    assert (model.resizing.fixed, model.resizing.edges) == {"rt_detr_v2": ((96, 96), None), "detr": (None, (64, 128))}[kind]


def test_the_fingerprint_follows_weights_config_and_preprocessing(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[Path], None]) -> str:
        folder = Path(shutil.copytree(folders("rt_detr_v2"), tmp_path / name))
        change(folder)
        return read_hf_model(str(folder)).fingerprint

    same = changed("same", lambda folder: None)
    assert same == read_hf_model(str(folders("rt_detr_v2"))).fingerprint
    others = [
        changed("weights", lambda folder: _edit_weights(folder, lambda state: next(iter(state.values())).add_(1))),
        changed("config", lambda folder: _edit(folder / CONFIG, eos_coefficient=0.5)),
        changed("size", lambda folder: _edit(folder / PROCESSOR, size={"height": 128, "width": 128})),
    ]
    assert len({same, *others}) == 4


def _edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no processor": (lambda folder: (folder / PROCESSOR).unlink(), "has no preprocessor_config.json; a model of transformers"),
    "pickle": (_pickled, "has its weights as a pickle, which may run code and is not read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors; save them with"),
    "damaged weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"abc"), "cannot be loaded"),
    "damaged config": (lambda folder: (folder / CONFIG).write_text("{"), "config.json cannot be read"),
    "no detector": (
        lambda folder: (folder / CONFIG).write_text('{"model_type": "bert"}'),
        "config.json describes a bert, which is no detector of transformers",
    ),
    "unknown": (lambda folder: (folder / CONFIG).write_text('{"model_type": "yolo99"}'), "config.json cannot be read"),
    "crop": (lambda folder: _edit(folder / PROCESSOR, do_center_crop=True), "crops images (do_center_crop)"),
    "pad": (
        lambda folder: _edit(folder / PROCESSOR, do_pad=True, pad_size={"height": 256, "width": 256}),
        "pads images to a fixed size (pad_size)",
    ),
    "size": (
        lambda folder: _edit(folder / PROCESSOR, size={"shortest_edge": 64}),
        "resizes to {'shortest_edge': 64}, but needs",
    ),
    "missing tensor": (
        lambda folder: _edit_weights(folder, lambda state: state.pop("model.enc_score_head.weight")),
        "tensors that do not fit config.json (1 in all):\n  - model.enc_score_head.weight: missing in the file",
    ),
    "other shape": (lambda folder: _edit(folder / CONFIG, decoder_ffn_dim=48), "(32, 48) in the model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_folder_is_refused_in_one_sentence(
    folders: Callable[[str], Path], tmp_path: Path, mistake: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change, message = MISTAKES[mistake]
    folder = Path(shutil.copytree(folders("rt_detr_v2"), tmp_path / "model"))
    change(folder)
    capfd.readouterr()
    with pytest.raises(CheckpointError) as found:
        read_hf_model(str(folder))
    assert str(found.value).startswith(f"{folder}: ") and message in str(found.value)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_a_decoder_is_refused_by_name(folders: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="a yolos gives no hidden states of a decoder"):
        read_hf_model(str(folders("yolos")))


def test_a_name_of_the_hub_without_its_scheme_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder; for a model of the Hugging Face Hub write hf://owner/name"):
        read_hf_model("owner/name")
