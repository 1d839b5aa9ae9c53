"""Describe how mmdet's files hold a detector's heads: there is a conversion for each family, which a kind fills in."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from headkd_ray.detectors.conversions import shapes
from headkd_ray.detectors.conversions.conversion import Conversion
from headkd_ray.detectors.conversions.shapes import State
from headkd_ray.job import BoxHeadSpec, DenseHeadSpec, RPNSpec

_BOX_HEAD = {"shared_fcs": "fcs", "fc_cls": "cls_out", "fc_reg": "box_out"}
_RPN = {"rpn_cls": "cls_out", "rpn_reg": "box_out"}
_TOWERS = {"cls_convs": "cls_tower", "reg_convs": "box_tower"}


class MMDetConversion(Conversion, ABC):
    """A conversion of mmdet's files; backbone, neck and distillation adapters are the same for all kinds."""

    @abstractmethod
    def names(self, keys: Collection[str]) -> dict[str, str]:
        """Return {mmdet key: our name} of the heads' tensors among ``keys``; keys that this kind does not have are left out."""

    @abstractmethod
    def detection_head(self, state: State, in_channels: int) -> tuple[Any, int]:
        """Return the spec of the head that detects, as in :meth:`sections`, and the number of classes."""

    @abstractmethod
    def sections(self, state: State, in_channels: int) -> tuple[dict[str, Any], int]:
        """Return the heads' specs by their keys in the detector's spec (head; rpn, roi), and the number of classes.

        Args:
            state: tensors under our names.
            in_channels: width of the pyramid.

        Raises:
            ShapeError: a tensor that is needed is missing, or there is no such head here.
        """


def _as_it_is(spec: Any, said: Mapping[str, Any]) -> Any:
    return spec


@dataclass(frozen=True, kw_only=True)
class DenseFromMMDet(MMDetConversion):
    """A conversion of a dense head: ``bbox_head`` in plain mmdet, and ``rpn_head`` in HEAD's students that propose RoIs."""

    layers: Mapping[str, str]
    """{mmdet's name: ours} of the layers behind the towers."""
    others: Mapping[str, str] = field(default_factory=dict)
    """{regular expression: replacement} of the head's tensors that belong to no conv."""
    head: Callable[[State], tuple[DenseHeadSpec, int]]
    """Makes the head's spec and its number of classes of tensors under our names."""
    switches: Callable[[Any, Mapping[str, Any]], Any] = _as_it_is
    """Sets in the head's spec what no tensor's shape tells, from the head's section of the training config."""
    norms: bool = True
    """Whether the towers may have norms."""
    relu_before_p7: bool = False
    """Whether mmdet's own files without a config have a ReLU before P7 where P6 is on P5."""

    def names(self, keys: Collection[str]) -> dict[str, str]:
        is_normed = self.norms and any(re.match(r"(?:bbox|rpn)_head\.cls_convs\.\d+\.gn\.", key) for key in keys)
        named = ((key, self._name(key, is_normed)) for key in keys)
        return {key: name for key, name in named if name is not None}

    def _name(self, key: str, is_normed: bool) -> str | None:
        room, _, rest = key.partition(".")
        if room not in ("bbox_head", "rpn_head"):
            return None
        if match := re.fullmatch(r"(cls_convs|reg_convs)\.(\d+)\.(conv|gn)\.(weight|bias)", rest):
            if match[3] == "gn" and not is_normed:
                return None
            place = (3 if is_normed else 2) * int(match[2]) + (match[3] == "gn")  # conv, norm if any, ReLU
            return f"head.{_TOWERS[match[1]]}.{place}.{match[4]}"
        if match := re.fullmatch(r"(\w+)\.(weight|bias)", rest):
            return f"head.{self.layers[match[1]]}.{match[2]}" if match[1] in self.layers else None
        matches = ((re.fullmatch(pattern, rest), replacement) for pattern, replacement in self.others.items())
        return next((f"head.{match.expand(replacement)}" for match, replacement in matches if match), None)

    def detection_head(self, state: State, in_channels: int) -> tuple[DenseHeadSpec, int]:
        return self.head(state)

    def sections(self, state: State, in_channels: int) -> tuple[dict[str, Any], int]:
        head, num_classes = self.head(state)
        return {"head": head}, num_classes


@dataclass(frozen=True, kw_only=True)
class TwoStageFromMMDet(MMDetConversion):
    """A conversion of an RPN, ``rpn_head``, and of a RoI head, ``roi_head.bbox_head`` or a numbered one for each stage."""

    roi: Callable[[State, int], tuple[BoxHeadSpec, int]]
    """Makes the RoI head's spec and its number of classes of tensors under our names and the pyramid's width."""
    rpn: type[RPNSpec] = RPNSpec
    """Class of the RPN's spec."""

    def names(self, keys: Collection[str]) -> dict[str, str]:
        named = ((key, self._name(key)) for key in keys)
        return {key: name for key, name in named if name is not None}

    def _name(self, key: str) -> str | None:
        if match := re.fullmatch(r"roi_head\.bbox_head\.(?:(\d+)\.)?(.+)", key):
            return box_head_name(match[2], "roi." if match[1] is None else f"roi.stages.{match[1]}.")
        if match := re.fullmatch(r"rpn_head\.rpn_conv\.(?:(\d+)\.conv\.)?(weight|bias)", key):
            return f"rpn.tower.{2 * int(match[1] or 0)}.{match[2]}"
        if match := re.fullmatch(r"rpn_head\.(rpn_cls|rpn_reg)\.(weight|bias)", key):
            return f"rpn.{_RPN[match[1]]}.{match[2]}"
        return None

    def detection_head(self, state: State, in_channels: int) -> tuple[BoxHeadSpec, int]:
        return self.roi(state, in_channels)

    def sections(self, state: State, in_channels: int) -> tuple[dict[str, Any], int]:
        rpn = shapes.rpn(state, self.rpn)
        roi, num_classes = self.roi(state, in_channels)
        return {"rpn": rpn, "roi": roi}, num_classes


def box_head_name(rest: str, prefix: str) -> str | None:
    """Return our name, under ``prefix``, of the tensor ``rest`` of one of mmdet's box heads; None if ours has none."""
    match = re.fullmatch(r"(\w+?)((?:\.\d+)?\.(?:weight|bias))", rest)
    return f"{prefix}{_BOX_HEAD[match[1]]}{match[2]}" if match and match[1] in _BOX_HEAD else None


def type_name(said: object) -> str:
    """Return the class that a training config's dict ``said`` names in ``type``; empty if it names none.

    3.x may put the class's module in front, which is left out.
    """
    return str(said.get("type", "")).rpartition(".")[2] if isinstance(said, Mapping) else ""


def number(value: object, default: float) -> float:
    """Return ``value`` of a training config if it is a number, else ``default``."""
    return float(value) if isinstance(value, int | float) else default
