"""Check the rules across keys of ``data`` that concern augmentation, sampling and the batch size; see ``checks.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headkd_ray.job.augment_spec import AugmentSpec
from headkd_ray.job.job import DataSpec

SETTINGS = {"crop_side": "crop", "zoom_out_side": "zoom_out", "mosaic_epochs": "mosaic"}
"""Keys of data.augment that say how, and the key without which each has no effect."""


def augment(get: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield ranges that descend, settings without effect, and mosaics that would never end or never begin to."""
    for name in ("crop_side", "zoom_out_side"):
        low, high = get(f"data.augment.{name}")
        if low > high:
            yield f"data.augment.{name}", f"[{low}, {high}] is not [smallest, largest]"
    defaults = AugmentSpec()
    for name, needed in SETTINGS.items():
        given = get(f"data.augment.{name}")
        changed = (tuple(given) if isinstance(given, list | tuple) else given) != getattr(defaults, name)
        if changed and not get(f"data.augment.{needed}"):
            yield f"data.augment.{name}", f"has no effect, for data.augment.{needed} is 0; set that, or remove this key"
    if get("data.augment.min_visible") != defaults.min_visible and not (get("data.augment.crop") or get("data.augment.mosaic")):
        yield "data.augment.min_visible", "has no effect without data.augment.crop or data.augment.mosaic; remove the key"
    last, epochs = get("data.augment.mosaic_epochs"), get("optim.epochs")
    if last is not None and last >= epochs:
        yield (
            "data.augment.mosaic_epochs",
            f"{last} is not before the end of training (optim.epochs is {epochs}); null = mosaics in all epochs",
        )


def sampling(get: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield a threshold without effect, and a cache whose views cannot be numbered."""
    kind, threshold = get("data.sampling"), get("data.repeat_threshold")
    if kind != "repeat_factor" and threshold != DataSpec.model_fields["repeat_threshold"].default:
        yield "data.repeat_threshold", f"has no effect with data.sampling {kind}; use repeat_factor, or remove the key"
    cached = get("teacher") is not None and get("teacher.placement") == "cache"
    if kind != "all" and cached and get("data.views") is None:
        yield "data.views", f"data.sampling {kind} shows repeated images in further views; a cache needs a number of them"


def max_batch_size(get: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield a search for the batch size that has nothing to try, no GPU, or no learning rate that follows."""
    most, size = get("data.max_batch_size"), get("data.batch_size")
    if most is None:
        return
    if most < size:
        yield (
            "data.max_batch_size",
            f"{most} is less than data.batch_size ({size}), the smallest size; raise it, or set null",
        )
    if get("cluster.gpus_per_worker") == 0:
        yield (
            "data.max_batch_size",
            "is for GPUs, and cluster.gpus_per_worker is 0; set it to null, and data.batch_size to what you want",
        )
    if get("optim.lr_batch") is None:
        yield (
            "optim.lr_batch",
            "null would keep optim.lr whatever data.max_batch_size leads to; give the global batch that lr is meant for",
        )
