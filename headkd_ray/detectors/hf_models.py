"""Detectors of the package ``transformers``: reading one from a folder or the Hub, and running its decoder.

A folder holds what ``save_pretrained`` writes for a model and its image processor: ``config.json``, ``model.safetensors`` (or
shards of it) and ``preprocessor_config.json``. Whoever writes a trained detector as such a folder can have it read here.
Only safetensors are read, and no code of a repository is run.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headkd_ray import hub
from headkd_ray.detectors.state_dict import add_to_digest
from headkd_ray.errors import CheckpointError
from headkd_ray.job import PixelSpec
from headkd_ray.storage import Folder

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
EXTRA = 'python -m pip install "headkd-ray[teachers]"'
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""Keys of a config that say nothing about what the model answers."""


class Resizing(NamedTuple):
    """How an image processor resizes an image; one of the first three, or none of them if it does not resize."""

    fixed: tuple[int, int] | None = None
    """Height and width in pixels, whatever the image's ratio."""
    edges: tuple[int, int] | None = None
    """Length of the shorter side and limit of the longer side in pixels; the ratio is kept."""
    inside: tuple[int, int] | None = None
    """Height and width in pixels into which the image is fitted; the ratio is kept."""


class DecoderAnswer(NamedTuple):
    """What a model's decoder says about B images; Q queries, L layers of width D, C classes."""

    states: Tensor
    """The queries' hidden states after each layer, float32 (L, B, Q, D). The last ones are those that the boxes and classes are
    predicted from, after the decoder's final normalisation if it has one."""
    boxes: Tensor
    """float32 (B, Q, 4): centre x, centre y, width and height in shares of the image's width and height, without padding."""
    logits: Tensor
    """float32 (B, Q, C), or (B, Q, C + 1) if the model is a softmax over the classes and "no object", the last."""


@dataclass(frozen=True)
class HFModel:
    """A detector of ``transformers``, on the CPU, in float32 and eval mode, and what is known of it."""

    module: nn.Module
    """An ``AutoModelForObjectDetection``."""
    processor: Any
    """Its image processor, which makes ``pixel_values`` of images uint8 (3, h, w), and ``pixel_mask`` for some models."""
    kind: str
    """Its ``model_type``, such as ``rt_detr_v2``."""
    classes: tuple[str, ...] | None
    """Class names in the order of the outputs, "N/A" for unused ones; None if the config does not name them."""
    num_classes: int
    softmax: bool
    """Whether the scores are a softmax over the classes and "no object", the last; otherwise each class is a sigmoid."""
    layers: int
    """Number L of the decoder's layers up to that which predicts."""
    queries: int
    width: int
    """Width D of a hidden state."""
    pixels: PixelSpec
    """The statistics by which the processor normalises RGB values 0..255."""
    resizing: Resizing
    fingerprint: str
    """SHA-256 of weights, config and preprocessing, in hexadecimal."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the class probabilities (B, Q, C) of a DecoderAnswer's ``logits``."""
        return logits.softmax(-1)[..., :-1] if self.softmax else logits.sigmoid()

    def inputs(self, images: list[Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the model's input on ``device`` for ``images``, uint8 RGB (3, h, w), as its own processor makes it."""
        made = self.processor(images=images, return_tensors="pt", input_data_format="channels_first", device=device)
        return {name: made[name].to(device) for name in ("pixel_values", "pixel_mask") if name in made}


def read_hf_model(source: str) -> HFModel:
    """Read a detector from a folder, a URI of one, or ``hf://owner/name[@revision]``.

    Raises:
        CheckpointError: transformers is not installed; files are missing or damaged; it is no detector whose decoder gives
            hidden states; its weights do not fit its config; or its image processor changes images so that boxes in its input
            cannot be turned into boxes in the image.
        StorageError: a store or the hub refuses access or cannot be reached.
    """
    _transformers(source)
    if source.startswith(hub.SCHEME):
        return _read(hub.download(source, (CONFIG, PROCESSOR), also=WEIGHTS, what="model of transformers"), source)
    folder = Folder.open(source, CheckpointError)
    if not folder.remote:
        return _read(Path(folder.path), source)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model"
        try:
            Folder.open(copy).copy_from(folder)
        except OSError as error:
            raise CheckpointError(f"{source}: cannot be read ({error})") from error
        return _read(copy, source)


@torch.no_grad()
def decoder_states(module: nn.Module, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DecoderAnswer:
    """Run a detector of ``transformers`` on normalised images ``pixel_values`` (B, 3, H, W).

    ``pixel_mask`` (B, H, W) is 1 on the images and 0 on their padding; None = there is no padding. Hidden states are found by
    their shape: they are the sequence of tensors (B, Q, D) that the model returns, whose first is the queries' input.

    Raises CheckpointError if the model returns none.
    """
    masked = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
    output = module(pixel_values=pixel_values, **masked, output_hidden_states=True, return_dict=True)
    logits, boxes = output.get("logits"), output.get("pred_boxes")
    found = [value for name, value in output.items() if "encoder" not in name and _are_states(value, logits)]
    if boxes is None or not found:
        raise CheckpointError(
            f"a {_kind(module)} gives no hidden states of a decoder, one for each box, which distillation compares; use a "
            "DETR, for example an rt_detr_v2, d_fine, deformable_detr or detr"
        )
    config: Any = module.config
    # D-FINE and DEIMv2 may predict from an earlier layer than the last.
    last = getattr(config, "eval_idx", -1)
    states = torch.stack(found[0][1:])
    states = states if last in (-1, len(states) - 1) else states[: last % len(states) + 1]
    return DecoderAnswer(states.float(), boxes.float(), logits.float())


def _are_states(value: object, logits: Tensor | None) -> bool:
    """Return whether ``value`` is a sequence of at least two equally shaped tensors (B, Q, D) for ``logits`` (B, Q, C)."""
    if logits is None or not isinstance(value, list | tuple) or len(value) < 2:
        return False
    shapes = {tuple(tensor.shape) if isinstance(tensor, Tensor) else () for tensor in value}
    (shape, *others) = shapes
    return not others and len(shape) == 3 and shape[:2] == tuple(logits.shape[:2])


def _kind(module: nn.Module) -> str:
    config: Any = module.config
    return str(config.model_type)


def _read(folder: Path, source: str) -> HFModel:
    """Read a local ``folder``, which the user knows as ``source``."""
    _check_files(folder, source)
    transformers = _transformers(source)
    with quiet(transformers):
        config = _config(transformers, folder, source)
        processor = _image_processor(transformers, folder, source)
        resizing, pixels = _resizing(processor, source), _pixels(processor)
        module = _module(transformers, config, folder, source)
    model = HFModel(
        module=module,
        processor=processor,
        kind=str(config.model_type),
        classes=_class_names(config),
        num_classes=int(config.num_labels),
        softmax=False,
        layers=0,
        queries=0,
        width=0,
        pixels=pixels,
        resizing=resizing,
        fingerprint=_fingerprint(module, config, processor),
    )
    return _measured(model, source)


def _measured(model: HFModel, source: str) -> HFModel:
    """Run the model once on a grey image, and return it with the sizes of what it answers."""
    try:
        answer = decoder_states(model.module, **model.inputs([torch.full((3, 96, 128), 128, dtype=torch.uint8)]))
    except CheckpointError as error:
        raise CheckpointError([f"{source}: {problem}" for problem in error.problems]) from error
    except Exception as error:
        raise CheckpointError(
            f"{source}: the model cannot be run on what its {PROCESSOR} makes of an image ({_said(error)})"
        ) from error
    (layers, _, queries, width), outputs = answer.states.shape, answer.logits.shape[-1]
    if outputs not in (model.num_classes, model.num_classes + 1):
        raise CheckpointError(f"{source}: has {outputs} outputs for classes, but {CONFIG} has {model.num_classes} labels")
    return replace(model, layers=layers, queries=queries, width=width, softmax=outputs > model.num_classes)


def _check_files(folder: Path, source: str) -> None:
    if not folder.is_dir():
        named = not folder.exists() and hub.is_repository(source)
        hint = f"; for a model of the Hugging Face Hub write {hub.SCHEME}{source}" if named else ""
        raise CheckpointError(f"{source}: {'is a file, not a folder' if folder.exists() else 'no such folder'}{hint}")
    if (folder / "model.json").is_file() and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{source}: is a checkpoint of headkd_ray, not a model of transformers")
    missing = [name for name in (CONFIG, PROCESSOR) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{source}: has no {' and no '.join(missing)}; a model of transformers needs {CONFIG}, {PROCESSOR} and "
            "model.safetensors (save_pretrained of the model, and of its image processor)"
        )
    if not any(folder.glob(WEIGHTS[0])):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt"))
        reason = "has its weights as a pickle, which may run code and is not read" if pickled else "has no model.safetensors"
        raise CheckpointError(f"{source}: {reason}; save them with model.save_pretrained(folder) of transformers 5")


def _transformers(source: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(f"{source}: a model of transformers needs that package ({error}); install it: {EXTRA}") from error
    return transformers


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from printing progress bars and warnings, which are checked here and told in our words."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _config(transformers: Any, folder: Path, source: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:
        raise CheckpointError(f"{source}: {CONFIG} cannot be read ({_said(error)})") from error
    if type(config) not in transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING:
        raise CheckpointError(
            f"{source}: {CONFIG} describes a {config.model_type}, which is no detector of transformers "
            f"{transformers.__version__} (AutoModelForObjectDetection)"
        )
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False  # its weights are in the folder
    return config


def _module(transformers: Any, config: Any, folder: Path, source: str) -> nn.Module:
    """Build the model and load its weights. Raises CheckpointError if that fails, or if any weight is missing."""
    try:
        module, info = transformers.AutoModelForObjectDetection.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are reported below
            output_loading_info=True,
            **LOCAL,
        )
    except Exception as error:
        raise CheckpointError(f"{source}: cannot be loaded ({_said(error)})") from error
    problems = [f"{name}: missing in the file" for name in info["missing_keys"]]
    problems += [
        f"{name}: {tuple(there)} in the file, {tuple(here)} in the model" for name, there, here in info["mismatched_keys"]
    ]
    if problems:
        raise CheckpointError(sorted(problems)[:20], f"{source}: tensors that do not fit {CONFIG} ({len(problems)} in all):")
    module.eval().requires_grad_(False)
    return module


def _image_processor(transformers: Any, folder: Path, source: str) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, **LOCAL)
    except Exception as error:
        raise CheckpointError(f"{source}: {PROCESSOR} cannot be read ({_said(error)})") from error


def _resizing(processor: Any, source: str) -> Resizing:
    """Return how ``processor`` resizes. Raises CheckpointError if boxes cannot be turned back."""
    if getattr(processor, "do_center_crop", None):
        raise CheckpointError(
            f"{source}: {PROCESSOR} crops images (do_center_crop), so boxes in the model's input do not cover the image; save "
            "it with do_center_crop: false and the size that the model was trained on"
        )
    if getattr(processor, "do_pad", None) and getattr(processor, "pad_size", None):
        raise CheckpointError(
            f"{source}: {PROCESSOR} pads images to a fixed size (pad_size), and whether boxes are then shares of the image or "
            "of the padded one depends on how the model was trained; save it without pad_size"
        )
    if not getattr(processor, "do_resize", False):
        return Resizing()
    size = {key: value for key, value in dict(processor.size).items() if value}
    for form, keys in (
        ("fixed", ("height", "width")),
        ("edges", ("shortest_edge", "longest_edge")),
        ("inside", ("max_height", "max_width")),
    ):
        if size.keys() == set(keys):
            return Resizing(**{form: (int(size[keys[0]]), int(size[keys[1]]))})
    raise CheckpointError(
        f"{source}: {PROCESSOR} resizes to {size}, but needs height and width, shortest_edge and longest_edge, or max_height "
        "and max_width"
    )


def _pixels(processor: Any) -> PixelSpec:
    scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return PixelSpec(mean=tuple(m / scale for m in mean), std=tuple(s / scale for s in std))  # type: ignore[arg-type]


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Return the names of ``id2label``, or None if they are those that transformers makes up."""
    names = tuple(str(config.id2label[place]) for place in range(config.num_labels))
    return None if names == tuple(f"LABEL_{place}" for place in range(len(names))) else names


def _fingerprint(module: nn.Module, config: Any, processor: Any) -> str:
    described = [{key: value for key, value in part.to_dict().items() if key not in _VOLATILE} for part in (config, processor)]
    found = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    add_to_digest(found, module.state_dict())
    return found.hexdigest()


def _said(error: Exception) -> str:
    """Return what an error says, in one line of at most 300 characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:296]} ..."
