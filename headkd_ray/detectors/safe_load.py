"""Safe loading of weight files from elsewhere, which never runs code from them (``weights_only``)."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from headkd_ray.errors import CheckpointError


class _Inert:
    """An empty stand-in for the logging objects in mmdet 3.x files (mmengine's HistoryBuffer)."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _nothing(*args: object) -> None:
    """Do nothing, in place of the ``getattr`` with which HistoryBuffer pickles its own methods."""


def _allowed() -> list[Any]:
    """Return what a file may hold besides tensors and plain Python values: NumPy numbers and inert stand-ins."""
    multiarray = np.core.multiarray if np.lib.NumpyVersion(np.__version__) < "2.0.0" else np._core.multiarray  # type: ignore[attr-defined]
    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"}]
    for name in ("_reconstruct", "scalar"):
        # Files name the module as the NumPy that wrote them did: numpy.core before 2.0, numpy._core since.
        allowed += [(getattr(multiarray, name), f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    allowed += [(_Inert, "mmengine.logging.history_buffer.HistoryBuffer"), (_Inert, "argparse.Namespace")]
    return [*allowed, (_nothing, "builtins.getattr")]


def read_file(path: Path) -> dict[str, Any]:
    """Read the content of a .pth/.pt file (a dict) or the tensors of a .safetensors file, onto the CPU.

    Raises CheckpointError if the file is missing, damaged, or holds objects that cannot be read without running code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    mistaken = mistaken_for(path)
    if mistaken is not None:
        raise CheckpointError(f"{path}: not a readable weight file: it is {mistaken}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals(_allowed()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "invalid load key" in str(error):  # not a pickle at all
            raise CheckpointError(f"{path}: not a readable weight file: torch.save did not write it") from error
        # torch's own message is not passed on: it explains how to load the file regardless of the risk.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: holds objects{f' ({found.group(1)})' if found else ''} that are not loaded, because that could run code; "
            "use a file that holds only tensors, as torch.save(model.state_dict(), ...) or safetensors writes it"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: not a readable weight file: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def mistaken_for(path: Path, may_be_json: bool = False) -> str | None:
    """Describe the file if it is something that is often downloaded in place of the weights; else return None."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file that it stands for; run git lfs pull in the repository that it came from"
    if start.startswith(b"\x1f\x8b"):
        return "a compressed archive (gzip); unpack it first"
    text = start.decode("utf-8", errors="ignore").lstrip()
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    if re.match(r"<(!doctype|html|head|\?xml)", text, re.IGNORECASE):
        return "a web page (HTML), as a link that asks for a login or a click returns; download the file itself"
    return "JSON text" if text.startswith(("{", "[")) and not may_be_json else None
