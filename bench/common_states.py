"""Ask how much the targets of AKD say about a RoI: ``python bench/common_states.py head_detr head_rois_64``.

For rows of the micro evidence whose teacher chooses the RoIs: after the standardisation of Pearson's distance a target has mean
square 1. Printed is how much of that belongs to the mean over all RoIs, which an adapter's bias can imitate without looking at
the image, and how many RoIs are ground truth. The teacher is that of ``bench/evidence.py run``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from evidence_plan import Bench, plan
from evidence_rows import ROWS
from evidence_run import have_teacher
from revision import ROOT
from torch import Tensor

from headkd_ray.cli import user_errors
from headkd_ray.data.batch_stream import BatchMaker, PendingBatch, load_samples
from headkd_ray.data.shards import ShardSet
from headkd_ray.distill.distances import standardised
from headkd_ray.errors import JobError
from headkd_ray.soft_targets import SoftTargets
from headkd_ray.teacher import soft_teacher
from headkd_ray.teacher.loading import teacher_of


def answers(bench: Bench, row: str, images: int) -> SoftTargets:
    """Return what a row's teacher answers for ``images`` photos, spread over the training split."""
    have_teacher(bench, row)
    job = plan(bench, row, 0).job
    if job.teacher is None or job.distill.rois != "teacher":
        raise JobError(f"{row}: its teacher does not choose the RoIs")
    shards = ShardSet.open(job.data.train)
    maker = BatchMaker(job.data, job.run.seed, train=True)
    rows = torch.linspace(0, len(shards.index) - 1, images).long().tolist()
    numbers = (0,) * images
    batch = maker(PendingBatch(0, tuple(load_samples(shards, rows, numbers, maker)), numbers))
    return soft_teacher(job, teacher_of(job, shards.meta.classes), torch.device("cpu"))(batch)


def common_share(features: Tensor) -> float:
    """Return which part of the mean square of the standardised rows (n, c) is that of their mean (c,)."""
    rows = standardised(features)
    return float(rows.mean(0).square().mean() / rows.square().mean())


def main() -> int:
    """Print a line for each row, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--data", type=Path, default=Path("data/evidence"))
    parser.add_argument("--storage", type=Path, default=Path("runs/evidence"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = ROOT / "docs" / "results.jsonl"
    bench = Bench("micro", ROWS["micro"], ROOT / "jobs/evidence/micro", options.data, options.storage / "micro", results)
    with user_errors():
        for row in options.rows:
            found = answers(bench, row, options.images)
            shares = [common_share(found.taps[:, layer][found.valid].float()) for layer in range(found.taps.shape[1])]
            truth, all_of_them = int(found.truth.sum()), int(found.valid.sum())
            print(f"{row}: common to all RoIs {', '.join(f'{share:.0%}' for share in shares)}; ", end="")
            print(f"{truth} of {all_of_them} RoIs are ground truth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
