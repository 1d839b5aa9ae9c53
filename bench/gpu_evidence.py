"""The part "evidence" of ``bench/gpu.sh``: rows of ``bench/evidence.py --tier standard`` in the time that is left.

Records go to ``<out>/evidence.jsonl``, which starts as a copy of the committed docs/gpu/evidence.jsonl: what is recorded there
is not made again, so the work can continue another day. Weights do not travel, so the teacher is trained again. The photos are
those in data/evidence (``bench/evidence.py prepare``); without them drawn images take their place, and such rows are comparable
only with each other.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_results import Setting, setting
from revision import ROOT

from headkd_ray.data.packing import prepare_split
from headkd_ray.data.synthetic import draw_dataset

ROWS = (
    *("baseline", "head_pearson", "head", "akd_pearson", "akd", "tf_head_pearson", "tf_head", "assist"),
    *("head_detr", "akd_detr"),
)
"""Rows besides the teachers, in this order."""
SEEDS = ("0", "1", "2")
START = 20
"""Seconds that ``bench/evidence.py`` needs to start and stop."""
OUT_OF_TIME = 3
"""Exit code of ``bench/evidence.py`` when there is more to do, which is expected here."""


def data(folder: Path, place: Setting) -> Path:
    """Return a folder with the prepared splits train, val and test."""
    photos = ROOT / "data" / "evidence"
    if photos.is_dir() and not place.rehearsal:
        return photos
    drawn = draw_dataset(folder / "seen", train=32 if place.tiny else 1200, val=8 if place.tiny else 260)
    test = draw_dataset(folder / "unseen", train=1, val=8 if place.tiny else 260, seed=1)
    splits = {"train": (drawn, drawn.train), "val": (drawn, drawn.val), "test": (test, test.val)}
    for name, (source, file) in splits.items():
        prepare_split(str(file), str(source.images), str(folder / "splits" / name), shard_images=128)
    return folder / "splits"


def main() -> int:
    """Train rows until time is up; return 0 unless a process failed."""
    place = setting()
    place.out.mkdir(parents=True, exist_ok=True)
    results = place.out / "evidence.jsonl"
    committed = ROOT / "docs" / "gpu" / "evidence.jsonl"
    if committed.exists() and not place.rehearsal and not results.exists():
        shutil.copy(committed, results)
    with tempfile.TemporaryDirectory() as scratch:
        splits = data(Path(scratch), place)
        command = [sys.executable, str(ROOT / "bench" / "evidence.py"), "--tier", "micro" if place.tiny else "standard"]
        command += ["--data", str(splits), "--storage", str(Path(scratch) / "runs"), "--results", str(results)]
        # A process waits for rows that another works on, and for the teacher while another trains it.
        rows, seeds = (ROWS[:1], SEEDS[:1]) if place.tiny else (ROWS, SEEDS)
        command += ["run", *rows, "--seeds", *seeds]
        command += ["--minutes", f"{max(0.0, place.left() - START) / 60:.2f}"]
        processes = [subprocess.Popen(command) for _ in range(1 if place.tiny else 3)]  # a single one leaves the GPU idle
        codes = [process.wait() for process in processes]
    return int(any(code not in (0, OUT_OF_TIME) for code in codes))


if __name__ == "__main__":
    sys.exit(main())
