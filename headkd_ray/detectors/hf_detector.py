"""Detectors of the package transformers, trained, evaluated and stored like our own.

Views keep their shape, with a mask of what is padding, or are stretched to the one size that the network takes. In both cases
boxes are shares of the view without its padding, as in the networks' own training, so that what is found in an image does not
depend on the others in its batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert
from typing_extensions import Self

from headkd_ray.detectors.backbone_trial import Size
from headkd_ray.detectors.base import Detector, Losses, Rules
from headkd_ray.detectors.fit import check_fit, fit
from headkd_ray.detectors.ground_truth import GroundTruth
from headkd_ray.detectors.hf_config import declared_values, last_line, library, network_config
from headkd_ray.detectors.hf_losses import drawn_from, in_float32, named_losses, targets_of
from headkd_ray.detectors.hf_models import EXTRA, PROCESSOR, HFModel, decoder_states, quiet, read_hf_model
from headkd_ray.detectors.ops.boxes import clip
from headkd_ray.detectors.ops.matching import gather_rows
from headkd_ray.detectors.ops.proposals import Detections
from headkd_ray.errors import CheckpointError, JobError
from headkd_ray.job import TransformersSpec

MASKED = {"detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer"}
"""The architectures that are told by a mask what is padding, and take views of any shape."""


class TransformersDetector(Detector):
    """A network of transformers' AutoModelForObjectDetection."""

    spec: TransformersSpec

    def __init__(self, spec: TransformersSpec, num_classes: int) -> None:
        """Build the network with random weights from torch's default generator.

        Raises JobError if transformers is missing, or cannot build it.
        """
        super().__init__(spec, num_classes)
        config = network_config(spec, num_classes)
        if spec.input_size is None and spec.model not in MASKED:
            raise JobError(
                f"input_size: {spec.model} has no mask for padding, so that it needs views of one size; give height and width, "
                "for example [640, 640]"
            )
        self.network = _fresh(config)
        self.network.loss_function = in_float32(self.network.loss_function)
        self.spec = spec.replace({"config": declared_values(config)})

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Return (pixel - mean) / std as the base class does, or of views that are stretched to ``spec.input_size``."""
        if self.spec.input_size is None:
            return super().normalise(images, sizes)
        return (stretched(images, sizes, self.spec.input_size) - self._mean) / self._std

    def supervised(self, x: Tensor, truth: GroundTruth, generator: torch.Generator | None = None) -> Losses:
        """Compute the network's own losses, those of auxiliary outputs and of denoising queries included."""
        with drawn_from(generator):
            answer = self.network(**self._inputs(x, truth.sizes), labels=targets_of(truth))
        losses = named_losses(answer.loss, answer.loss_dict)
        # A batch without boxes does not reach every parameter, but DDP expects a gradient for each.
        nothing = torch.stack([p.float().sum() for p in self.network.parameters() if p.requires_grad]).sum() * 0.0
        first = next(iter(losses))
        return {**losses, first: losses[first] + nothing}

    @torch.no_grad()
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        answer = self.network(**self._inputs(x, sizes))
        scores, query, labels = best_answers(answer.logits.float(), self.num_classes, self.spec.postprocess.max_detections)
        sides = sizes.flip(1).repeat(1, 2).unsqueeze(1)  # w, h, w, h
        boxes = clip(box_convert(gather_rows(answer.pred_boxes.float(), query), "cxcywh", "xyxy") * sides, sizes)
        passed = scores > self.spec.postprocess.score
        return Detections(
            boxes.masked_fill(~passed.unsqueeze(-1), 0.0), scores.masked_fill(~passed, 0.0), labels.masked_fill(~passed, -1)
        )

    @property
    def rules(self) -> Rules:
        return Rules(self.spec.postprocess.score, 1.0, self.spec.postprocess.max_detections)

    def backbone_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.network.named_parameters() if "backbone" in name.split(".")]

    def class_rows(self) -> Mapping[str, Tensor]:
        """Return the rows of the tensors that have one more in a network with one more class."""
        with torch.device("meta"):
            larger = _fresh(network_config(self.spec, self.num_classes + 1)).state_dict()
        return {
            f"network.{name}": torch.arange(len(tensor)).clamp(max=self.num_classes)  # one row more is background's
            for name, tensor in self.network.state_dict().items()
            if tensor.dim() and len(tensor) != len(larger[name])
        }

    def size_problems(self, sizes: Sequence[Size], changeable: bool = True) -> list[str]:
        """Take a training step's forward pass on a blank view: only that tells whether the parts of a config fit together."""
        try:
            import scipy  # noqa: F401
        except ImportError as error:
            return [f"kind: training a detector of transformers needs scipy ({error}); install it: {EXTRA}"]
        config = self.network.config
        if changeable and self.spec.checkpoint is None and getattr(config, "freeze_backbone_batch_norms", False):
            return [
                "config.freeze_backbone_batch_norms: true would keep the BatchNorms of random initial weights from learning "
                "their statistics; set it to false, or give student.checkpoint"
            ]
        height, width = min(sizes, key=lambda size: size[0] * size[1])
        boxes = torch.tensor([[[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]]])
        truth = GroundTruth.of(boxes, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[height, width]]))
        x = self.normalise(torch.zeros(1, 3, height, width, dtype=torch.uint8), truth.sizes)
        try:
            self.supervised(x, truth)
            decoder_states(self.network, **self._inputs(x, truth.sizes))  # whoever reads the checkpoint needs them
        except CheckpointError as error:
            return [f"model: {problem}" for problem in error.problems]
        except Exception as error:  # the networks raise anything
            shown = self.spec.input_size or (height, width)
            key = "config" if changeable else "model"
            return [f"{key}: {self.spec.model} cannot be trained on {shown[0]} x {shown[1]} px ({last_line(error)})"]
        return []

    def save(self, folder: Path, classes: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Write the folder as transformers' save_pretrained does, so that its from_pretrained reads it too."""
        self.network.config.id2label = dict(enumerate(classes))
        self.network.config.label2id = {name: number for number, name in enumerate(classes)}
        with quiet(library()):
            self.network.save_pretrained(folder, max_shard_size="1TB")
        content = preprocessor(self.spec, meta.get("data") or {})
        (folder / PROCESSOR).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, spec: TransformersSpec, num_classes: int, folder: Path) -> Self:
        return cls.holding(spec, num_classes, read_hf_model(str(folder)), str(folder))

    @classmethod
    def holding(cls, spec: TransformersSpec, num_classes: int, model: HFModel, source: str) -> Self:
        """Build the detector of ``spec`` with the tensors of ``model``, which came from ``source``; raise as :meth:`load`."""
        tensors = model.module.state_dict()
        with torch.device("meta"):
            check_fit(cls(spec, num_classes).network, tensors, source)
        detector = cls(spec, num_classes)
        fit(detector.network, tensors, source)
        return detector

    def _inputs(self, x: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        if self.spec.input_size is not None:
            return {"pixel_values": x}
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
        inside = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
        return {"pixel_values": x, "pixel_mask": inside.long()}


def stretched(images: Tensor, sizes: Tensor, to: Size) -> Tensor:
    """Resize each of ``images`` (B, 3, H, W) without its padding, ``sizes`` (B, 2), to the height and width ``to``.

    The result is float32; interpolation is bilinear with antialiasing, as for views.
    """
    views = [image[None, :, :height, :width] for image, (height, width) in zip(images, sizes.tolist(), strict=True)]
    return torch.cat(
        [
            view.float() if view.shape[2:] == to else F.interpolate(view.float(), size=to, mode="bilinear", antialias=True)
            for view in views
        ]
    )


def best_answers(logits: Tensor, num_classes: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, queries and classes, (B, N) each, of the best ``limit`` answers, best first.

    With an output for "no object" behind the classes in ``logits`` (B, Q, C + 1), a query answers with its most likely class by
    softmax; without it, (B, Q, C), with every class by sigmoid. These are the rules of transformers' image processors.
    """
    if logits.shape[2] > num_classes:
        best, classes = logits.softmax(-1)[..., :num_classes].max(-1)
        scores, query = best.topk(min(limit, best.shape[1]), dim=1)
        return scores, query, classes.gather(1, query)
    pairs = logits.sigmoid().flatten(1)
    scores, pair = pairs.topk(min(limit, pairs.shape[1]), dim=1)
    return scores, pair // num_classes, pair % num_classes


def preprocessor(spec: TransformersSpec, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of preprocessor_config.json for a network that sees views as the job's ``data`` keys say."""
    names = library().models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(spec.model)
    size = {"shortest_edge": data.get("eval_short_side", 800), "longest_edge": data.get("long_side", 1333)}
    if spec.input_size is not None:
        size = dict(zip(("height", "width"), spec.input_size, strict=True))
    return {
        "image_processor_type": "RTDetrImageProcessor" if names is None else next(iter(names.values())).removesuffix("Pil"),
        "do_resize": True,
        "size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,  # after the division by 255
        "image_mean": [value / 255 for value in spec.pixels.mean],
        "image_std": [value / 255 for value in spec.pixels.std],
        "do_pad": spec.input_size is None,
    }


def _fresh(config: Any) -> Any:
    """Return the network of ``config`` with random weights. Raises JobError if transformers cannot build it."""
    try:
        with quiet(library()):
            network = library().AutoModelForObjectDetection.from_config(config)
    except Exception as error:  # transformers' models raise anything
        raise JobError(f"config: transformers cannot build {config.model_type} ({last_line(error)})") from error
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # RT-DETR's are drawn close to 0, which only suits weights that are loaded
            nn.init.ones_(module.weight)
    return network.train()
