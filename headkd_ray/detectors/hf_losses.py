"""The losses of a network of transformers: its targets, and its own loss as named addends.

transformers' loss functions return a total and its parts; whether the parts are weighted depends on the architecture. Here they
always are, so that their plain sum is the total.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from headkd_ray.detectors.ground_truth import GroundTruth

Losses = dict[str, Tensor]


def targets_of(truth: GroundTruth) -> list[dict[str, Tensor]]:
    """Return transformers' ``labels``: for each image its ``class_labels`` (G,) and ``boxes`` (G, 4), which may be none.

    Boxes are centre x, centre y, width, height as shares of the image without its padding.
    """
    sides = truth.sizes.flip(1).repeat(1, 2).unsqueeze(1)  # w, h, w, h
    shares = box_convert(truth.boxes / sides, "xyxy", "cxcywh")
    rows = zip(truth.labels, shares, truth.present, strict=True)
    return [{"class_labels": labels[present], "boxes": boxes[present]} for labels, boxes, present in rows]


def in_float32(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a loss function compute in float32 what a network returned in less."""

    def raised(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value

    def compute(logits: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(logits.device.type, enabled=False):
            return loss_function(
                raised(logits), *map(raised, arguments), **{name: raised(value) for name, value in named.items()}
            )

    return compute


def named_losses(total: Tensor, parts: Mapping[str, Tensor]) -> Losses:
    """Split ``total`` into weighted addends ``loss_*``: those of the last layer, of the others (``_aux``), of denoising, ...

    The weight of a part is the derivative of the total, which is linear in its parts; a part without weight is only for show.
    """
    differentiable = {name: part for name, part in parts.items() if part.requires_grad}
    weights = torch.autograd.grad(total, list(differentiable.values()), retain_graph=True, allow_unused=True)
    losses: Losses = {}
    for (name, part), weight in zip(differentiable.items(), weights, strict=True):
        if weight is not None:
            group = _group(name)
            losses[group] = losses.get(group, 0.0) + weight * part
    return losses


def _group(name: str) -> str:
    """Return the name under which a part is summed: ``loss_bbox_aux_1`` and ``loss_bbox_1`` are of ``loss_bbox_aux``."""
    bare = re.sub(r"_\d+$", "", name)
    return f"{bare}_aux" if bare != name and re.fullmatch(r"loss_[a-z]+", bare) else bare


@contextmanager
def drawn_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's default generators, of which transformers draws, follow ``generator``; None = leave them as they are."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[generator.device] if generator.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
