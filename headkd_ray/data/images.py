"""Encoded image bytes -> pixels. The one place that decodes, so that prepare checks exactly what training will see.

Pillow, although torchvision decodes too (and gives the same pixels): its decoders are deprecated since 0.29, and importing it
takes several seconds, which every data process would pay, while Pillow costs 0.1 s and decodes a photo 0.3 ms slower. Pillow
releases the GIL while it decodes JPEG and PNG, but not WebP: there, threads do not help; Ray's processes do.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")


def decode(data: bytes) -> Tensor:
    """Pixels of a JPEG, PNG or WebP: uint8 (3, H, W), RGB, a view of interleaved memory (H, W, 3).

    Grey, palette and CMYK images become RGB, alpha is dropped, a 16-bit PNG keeps its high byte, an animation its first frame.
    EXIF orientation is *ignored*: COCO boxes are drawn on the stored pixels (pycocotools' tools do not rotate either).

    Raises:
        ValueError: the bytes are not such an image or are cut off.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it to 255
                grey = (np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)
                pixels = np.repeat(grey[:, :, None], 3, axis=2)
            else:
                pixels = np.array(image.convert("RGB"))  # a copy: torch wants writable memory
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a JPEG, PNG or WebP") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's for a broken PNG
        raise ValueError(f"cannot be decoded ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
