"""Load any checkpoint: ours, mmdet's, torchvision's and transformers' are told apart by what is in them."""

from __future__ import annotations

from pathlib import Path

from headkd_ray.detectors.safe_load import read_file
from headkd_ray.detectors.state_dict import find_state_dict, meta_of
from headkd_ray.detectors.weights.hf_folder import is_hf_folder, load_hf_folder
from headkd_ray.detectors.weights.loaded import LoadedDetector
from headkd_ray.detectors.weights.mmdet import is_mmdet, load_mmdet
from headkd_ray.detectors.weights.native import CARD, WEIGHTS, load_detector
from headkd_ray.detectors.weights.torchvision import is_torchvision, load_torchvision
from headkd_ray.errors import CheckpointError


def load_checkpoint(path: str | Path) -> LoadedDetector:
    """Load the detector in ``path`` onto the CPU.

    ``path`` is a folder of ours or of transformers (or its model.safetensors), or an mmdet 2.x/3.x or torchvision .pth or
    .safetensors file. Files are read without running code from them.

    Raises CheckpointError if the file is missing, damaged, of an unknown origin, or any tensor does not match (all are listed).
    """
    path = Path(path)
    folder = path.parent if path.name == WEIGHTS else path
    if not (folder / CARD).is_file() and is_hf_folder(folder):
        return load_hf_folder(folder)
    if path.is_dir() or not path.exists() or (folder / CARD).is_file():
        return load_detector(folder)
    content = read_file(path)
    state = find_state_dict(content, str(path), lambda state: is_torchvision(state) or is_mmdet(state))
    if is_torchvision(state):
        return load_torchvision(state, str(path))
    if is_mmdet(state):
        return load_mmdet(state, meta_of(content), str(path))
    some = ", ".join(list(state)[:3])
    if any("neck.lateral." in name for name in state):
        raise CheckpointError(
            f"{path}: tensors of headkd_ray ({some}, ...) without their {CARD}, which describes the network; give the "
            "student's folder, which has both"
        )
    raise CheckpointError(
        f"{path}: neither an mmdet nor a torchvision detector (its tensors are named {some}, ...); a classification net goes"
        " into student.backbone.weights"
    )
