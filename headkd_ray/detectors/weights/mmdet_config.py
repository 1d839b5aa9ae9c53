"""Read from an mmdet file's training config what no tensor's shape tells: strides, input, switches, test settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from torch import Tensor

from headkd_ray.detectors.conversions.from_mmdet import number, type_name
from headkd_ray.detectors.weights.config_text import read_config, section
from headkd_ray.errors import CheckpointError
from headkd_ray.job import FPNSpec, PixelSpec, PostprocessSpec, ProposalSpec

_Rules = TypeVar("_Rules", bound=PostprocessSpec | ProposalSpec)


@dataclass(frozen=True)
class MMDetConfig:
    """The training config in an mmdet file, or none."""

    values: Mapping[str, Any]
    """The config's variables; empty = the file has no config."""
    source: str
    """The file, for messages."""

    @classmethod
    def of(cls, meta: Mapping[str, Any], source: str) -> MMDetConfig:
        """Read the config that a file's ``meta`` keeps as text: 2.x in ``config``, 3.x in ``cfg``.

        Raises CheckpointError if there is one, but without a readable ``model``: defaults in its place could be silently wrong.
        """
        text = meta.get("config") or meta.get("cfg")
        if not text:
            return cls({}, source)
        try:
            values = dict(text) if isinstance(text, Mapping) else read_config(str(text))
        except ValueError as error:
            raise CheckpointError(f"{source}: the training config in the file's meta is not Python: {error}") from error
        if not section(values, "model"):
            raise CheckpointError(f"{source}: the training config in the file's meta has no model = dict(...)")
        return cls(values, source)

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def is_caffe(self) -> bool:
        """Return whether the backbone's bottlenecks have their stride in the first 1x1 conv."""
        return self._model("backbone").get("style") == "caffe"

    @property
    def leaky_slope(self) -> float | None:
        """Return the negative slope of the backbone's LeakyReLU; None = another activation."""
        activation = self._model("backbone", "act_cfg")
        return number(activation.get("negative_slope"), 0.01) if type_name(activation) == "LeakyReLU" else None

    def pixels(self, buffers: Mapping[str, Tensor] | None = None) -> tuple[PixelSpec, bool]:
        """Return the input normalisation in RGB order, and whether the network itself reads BGR.

        3.x says it in ``data_preprocessor``, 2.x in the test pipeline's ``Normalize`` (usually a copy of ``img_norm_cfg``).
        Where neither does, it is mmdet's usual one for pytorch style; raises CheckpointError for others.

        Args:
            buffers: ``mean`` and ``std`` of 3.x's preprocessor, if the file has them; they take precedence. Without a config
                their order tells BGR, for in photos red is the brightest and blue the darkest.
        """
        preprocessor = self._model("data_preprocessor") or section(self.values, "data_preprocessor")
        if buffers:
            numbers = {name: [round(value, 4) for value in tensor.flatten().tolist()] for name, tensor in buffers.items()}
            is_rgb = bool(self) or numbers.get("mean", [0.0])[0] >= numbers.get("mean", [0.0])[-1]
            preprocessor = {**({} if self else {"bgr_to_rgb": is_rgb}), **preprocessor, **numbers}
        if preprocessor.get("mean") is not None:
            said, is_rgb = preprocessor, bool(preprocessor.get("bgr_to_rgb") or preprocessor.get("rgb_to_bgr"))
        else:
            places = [section(self.values, "data").get("test")]
            places += [self.values.get(name) for name in ("test_dataloader", "test_pipeline", "img_norm_cfg")]
            said = next(_normalisations(places), {})
            is_rgb = bool(said.get("to_rgb", True))
        if not said:
            if preprocessor or self.is_caffe:
                raise CheckpointError(f"{self.source}: the training config does not say how the input is normalised")
            return PixelSpec(), False
        mean, std = said.get("mean"), said.get("std")
        try:
            spec = PixelSpec(mean=mean, std=std)  # type: ignore[arg-type]  # whatever the file says: checked here
        except ValidationError as error:
            message = f"{self.source}: the training config normalises the input with mean {mean} and std {std}"
            raise CheckpointError(f"{message}; three numbers each are needed") from error
        if is_rgb:
            return spec, False
        return PixelSpec(mean=spec.mean[::-1], std=spec.std[::-1]), True

    def dense_neck(self, neck: FPNSpec, relu_before_p7: bool) -> FPNSpec:
        """Return ``neck`` with P6 and the ReLU before P7 as the config has them.

        Without a config P6 stays where the tensors' shapes have it, and ``relu_before_p7`` applies if that is on P5.
        """
        if not self:
            return neck.replace({"relu_before_p7": relu_before_p7 and neck.extra == "conv_p5"})
        said = self._model("neck")
        convs = said.get("add_extra_convs")
        if convs == "on_lateral":
            raise CheckpointError(f"{self.source}: a pyramid with add_extra_convs='on_lateral' is not supported")
        on_output = convs == "on_output" or (convs is True and said.get("extra_convs_on_inputs") is False)  # mmdet 1.x
        return neck.replace(
            {
                "extra": "conv_p5" if on_output else neck.extra,
                "relu_before_p7": said.get("relu_before_extra_convs") is True,
            }
        )

    @property
    def dense_head(self) -> dict[str, Any]:
        """Return the section of the dense head, ``rpn_head`` in HEAD's two-headed students; empty if there is none."""
        return self._model("bbox_head") or self._model("rpn_head")

    def rules(self, spec: _Rules, part: str) -> _Rules:
        """Return ``spec`` with the thresholds and limits of the config's ``test_cfg`` or of its ``part`` (rpn, rcnn).

        What our specs cannot express stays as it is in ``spec``: a limit of -1 (none), and NMS where the config has Soft-NMS.
        """
        said = self._model("test_cfg") or section(self.values, "test_cfg")  # the latter before mmdet 2.4
        said = section(said, part) or said
        nms = section(said, "nms")
        limits = {
            "pre_nms": said.get("nms_pre"),
            "post_nms": said.get("max_per_img", said.get("max_num")),
            "score": said.get("score_thr"),
            "nms_iou": nms.get("iou_threshold", nms.get("iou_thr", said.get("nms_thr"))),
            "max_detections": said.get("max_per_img"),
        }
        kind = type(spec)
        known = {name: value for name, value in limits.items() if name in kind.model_fields and value not in (None, -1)}
        try:
            return cast(_Rules, kind.model_validate(spec.model_dump() | known))
        except ValidationError as error:
            raise CheckpointError(f"{self.source}: the training config's test_cfg cannot be used: {known}") from error

    def _model(self, *path: str) -> dict[str, Any]:
        return section(self.values, "model", *path)


def _normalisations(value: object) -> Iterator[dict[str, Any]]:
    """Yield every dict at any depth of ``value`` that is an ``img_norm_cfg`` or a pipeline's ``Normalize``."""
    if isinstance(value, Mapping):
        if "mean" in value and "std" in value:
            yield dict(value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _normalisations(item)
