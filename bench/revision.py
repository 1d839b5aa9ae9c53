"""Identify the code that figures were measured with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def revision() -> str:
    """Return the short hash of the checkout, with -dirty if code or jobs differ from it (results, tables and choices may)."""
    code = ("headkd_ray", "bench", "jobs", ":!jobs/evidence/*/choices.json")
    try:
        done = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--", *code])
        ]
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HEADKD_REVISION", "unknown")  # a copy without git
    return done[0] + ("-dirty" if done[1] else "")
