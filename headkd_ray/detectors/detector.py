"""What every detector is: pixels in, a pyramid, losses on it, detections out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from headkd_ray.detectors.backbone import Backbone
from headkd_ray.detectors.fpn import FPN
from headkd_ray.detectors.proposals import Detections
from headkd_ray.job import DetectorSpec


class Detector(nn.Module, ABC):
    """Backbone and neck, with the heads that a subclass adds; the module tree is exactly what a checkpoint holds."""

    _mean: Tensor
    _std: Tensor

    def __init__(self, spec: DetectorSpec, num_classes: int, finest: int) -> None:
        """``finest``: index in C2, C3, C4, C5 of the finest map that the pyramid uses."""
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self._finest = finest
        self.backbone = Backbone(spec.backbone)
        self.neck = FPN(spec.neck, self.backbone.channels[finest:])
        self.register_buffer("_mean", torch.tensor(spec.pixels.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(spec.pixels.std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) uint8 RGB to float32 (pixel - mean) / std, zero outside each image's (h, w) in ``sizes``."""
        x = (images.float() - self._mean) / self._std
        h, w = sizes[:, 0, None, None], sizes[:, 1, None, None]
        rows = torch.arange(images.shape[2], device=images.device)[None, :, None]
        columns = torch.arange(images.shape[3], device=images.device)[None, None, :]
        return x.masked_fill_(~((rows < h) & (columns < w)).unsqueeze(1), 0.0)

    def features(self, x: Tensor) -> list[Tensor]:
        """Pyramid levels (B, channels, H, W), finest first, of normalised images ``x`` (B, 3, H, W)."""
        return self.neck(self.backbone(x)[self._finest :])

    @abstractmethod
    def losses(
        self,
        features: list[Tensor],
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Supervised losses, float32 scalars by name, on one pyramid.

        ``sizes`` (B, 2) unpadded (h, w); ``boxes`` (B, G, 4) pixels of the network input; ``labels`` (B, G), -1 = padding.
        ``generator`` (on the tensors' device; None = torch's default) draws samples where the detector samples.
        """

    @abstractmethod
    def detect(self, x: Tensor, sizes: Tensor) -> Detections:
        """Detections of normalised images ``x`` (B, 3, H, W); call in eval mode. Carries no gradient."""

    def forward(self, images: Tensor, sizes: Tensor) -> Detections:
        """Detections of ``images`` (B, 3, H, W) uint8 RGB."""
        return self.detect(self.normalise(images, sizes), sizes)
