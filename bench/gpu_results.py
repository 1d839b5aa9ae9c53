"""What the parts of ``bench/gpu.sh`` share: their command line, and a JSON file that is complete after every row."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from revision import revision

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Options with which a part was started."""

    device: torch.device
    tiny: bool
    """Whether this is a rehearsal with micro models and few steps."""
    out: Path
    """Folder for the JSON files."""
    deadline: float
    """``time.monotonic()`` after which nothing new is started."""

    @property
    def rehearsal(self) -> bool:
        """Whether the figures say nothing about a GPU."""
        return self.tiny or self.device.type != "cuda"

    def left(self) -> float:
        """Return the seconds until the deadline, which may be negative."""
        return self.deadline - time.monotonic()


def setting(arguments: Sequence[str] | None = None) -> Setting:
    """Parse the command line of a part."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=480.0, help="time for this part (default %(default)g)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    return Setting(device, options.tiny, options.out, time.monotonic() + options.seconds)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all parts have."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="micro models and a few steps: a rehearsal in minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the JSON (default %(default)s)")


class Results:
    """The rows of one part, kept in ``<out>/<part>.json`` from the start: an interruption loses only the row in progress."""

    def __init__(self, part: str, place: Setting) -> None:
        self.path = place.out / f"{part}.json"
        self.content: Row = {"part": part, "rehearsal": place.rehearsal, **machine(place.device), "rows": []}
        self.write()

    def add(self, row: Row) -> None:
        """Record a row and print it."""
        self.content["rows"].append(row)
        self.write()
        print("  " + ", ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def machine(device: torch.device) -> Row:
    """Return what the figures depend on besides the code, and the code's revision."""
    on_gpu = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if on_gpu else None,
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if on_gpu else None,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32},
        "revision": revision(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
