"""Ask what AKD and CKD do to a micro student: gradients, targets and RoIs over a training run. Written to docs/ckd.jsonl.

    python bench/ckd_study.py run [VARIANT ...]    train the variants (default: all) on the evidence's data, a run each
    python bench/ckd_study.py table                rewrite the tables of docs/ckd.md

A variant is a row of the evidence (``evidence_rows.py``) with some keys changed. Every 100 optimizer steps, the gradient of
each loss alone is taken, by a copy of the model on the step's own batch, with respect to the student's tap (the feature that
CKD trains) and to its backbone; neither enters the training. A variant that is recorded is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence_plan import Bench, plan
from evidence_rows import ROWS
from evidence_run import have_teacher
from evidence_tables import append, insert, read
from revision import ROOT, revision
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchvision.ops import box_iou

from headkd_ray.cli import user_errors
from headkd_ray.data.batch import Batch
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import RoIs
from headkd_ray.detectors.head_features import Tap
from headkd_ray.detectors.retinanet import RetinaHead
from headkd_ray.distill import TrainingModel, build_training_model
from headkd_ray.distill.assistant_loss import AssistantLoss
from headkd_ray.distill.step_forward import StepForward
from headkd_ray.distill.student import StudentForward
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.optim import lr_factor
from headkd_ray.engine.step import Learner, build_learner, train_step
from headkd_ray.engine.streams import Streams, decode_here
from headkd_ray.engine.validation import validate
from headkd_ray.teacher.loading import load_teacher

EVERY = 100
"""Optimizer steps between measurements."""


@dataclass(frozen=True)
class Variant:
    """A row of the evidence with some keys changed."""

    row: str
    keys: dict[str, Any]
    adapter_lr: float = 1.0
    """Factor on the learning rate of the adapters."""


RCNN = "distill.assistants.rcnn.decouple"
VARIANTS = {
    "head": Variant("head", {}),
    "head_pearson": Variant("head_pearson", {}),
    "tf_head": Variant("tf_head", {}),
    "tf_head_pearson": Variant("tf_head_pearson", {}),
    "head, no warm-up": Variant("head", {"distill.warmup_steps": 0}),
    "head, warm-up as in the paper (40 of 1,800 steps)": Variant("head", {"distill.warmup_steps": 40}),
    "head, warm-up of a third": Variant("head", {"distill.warmup_steps": 600}),
    "head, adapters at a tenth of the rate": Variant("head", {}, adapter_lr=0.1),
    "head, adapters at ten times the rate": Variant("head", {}, adapter_lr=10.0),
    "head, SGD at 0.02": Variant("head", {"optim.optimizer": "sgd", "optim.lr": 0.02}),
    "head_pearson, SGD at 0.02": Variant("head_pearson", {"optim.optimizer": "sgd", "optim.lr": 0.02}),
    "baseline, SGD at 0.02": Variant("baseline", {"optim.optimizer": "sgd", "optim.lr": 0.02}),
    "tf_head, one Linear for all anchors": Variant("tf_head", {RCNN: False}),
    "tf_head_pearson, one Linear for all anchors": Variant("tf_head_pearson", {RCNN: False}),
}


def train(bench: Bench, variant: Variant, seed: int) -> dict[str, Any]:
    """Train a variant to the end and return its measurements and its AP on val."""
    have_teacher(bench, variant.row)
    job = plan(bench, variant.row, seed).job.replace(variant.keys)
    distributed = Distributed.here(job.cluster)
    streams = Streams(job, distributed, ShardSet.open(job.data.train), ShardSet.open(job.data.val), decode_here)
    classes, steps = streams.train_set.meta.classes, streams.micro_batches_per_epoch
    torch.manual_seed(job.run.seed)
    teacher = load_teacher(job, classes)
    torch.manual_seed(job.run.seed)
    model = build_training_model(job, len(classes), teacher.detector if teacher else None, steps)
    learner = build_learner(job, model, distributed.device, job.data.batch_size, steps)
    if variant.adapter_lr != 1.0:
        adapters_apart(learner, variant.adapter_lr, partial(lr_factor, job.optim, steps_per_epoch=steps))
    measured = []
    with streams.train(0) as batches:
        for batch in batches:
            if learner.step % EVERY == EVERY - 1:
                measured.append(measure(model, batch, learner.step))
                print(json.dumps(measured[-1]), flush=True)
            train_step(learner, job, iter([batch]))
    return {"steps": learner.step, "val_AP": round(validate(job, distributed, streams, learner.student).AP, 3), "at": measured}


def adapters_apart(learner: Learner, factor: float, schedule: Callable[[int], float]) -> None:
    """Give the adapters ``factor`` times the learning rate of everything else."""
    adapters = [p for term in learner.model.terms for p in term.parameters()]
    apart = {id(p) for p in adapters}
    (group,) = learner.optimizer.param_groups
    group["params"] = [p for p in group["params"] if id(p) not in apart]
    peak = group["initial_lr"] * factor
    learner.optimizer.add_param_group({**group, "params": adapters, "lr": peak, "initial_lr": peak})
    learner.scheduler = LambdaLR(learner.optimizer, schedule)


def measure(model: TrainingModel, batch: Batch, step: int) -> dict[str, Any]:
    """Measure each loss on ``batch`` alone: its value, its gradients on the student's tap and backbone, and its targets."""
    twin = copy.deepcopy(model)  # BatchNorm's running statistics are not to count this batch twice
    torch.manual_seed(step)
    forward = twin.run(batch)
    losses = {"detection": torch.stack(list(forward.student.losses.values())).sum()}
    for term in twin.terms:
        for name, loss in term(forward, step).items():
            name = "assistant" if isinstance(term, AssistantLoss) else name.removeprefix("loss_")
            losses[name] = losses[name] + loss if name in losses else loss
    places: dict[str, list[Tensor]] = {
        "tap": _tensors(forward.student.lead),
        "backbone": list[Tensor](twin.student.backbone_parameters()),
    }
    found: dict[str, Any] = {"step": step, "losses": {name: _short(loss) for name, loss in losses.items()}}
    for place, tensors in places.items():
        gradients = {name: _gradient(loss, tensors) for name, loss in losses.items()}
        own = gradients["detection"]
        found[place] = {
            name: {"norm": _short(g.norm()), "cosine": _short(torch.cosine_similarity(g, own, dim=0)) if g.any() else None}
            for name, g in gradients.items()
        }
    return {**found, **_targets(twin, forward)}


def _gradient(loss: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(t).flatten() if g is None else g.flatten() for g, t in zip(found, tensors, strict=True)])


def _targets(model: TrainingModel, forward: StepForward) -> dict[str, Any]:
    """Describe what is imitated, and the RoIs at which.

    Of every target the mean square and the share of zeros; of the RoIs the share that is foreground, and the share whose anchor
    lies on background (IoU below 0.5 with every object), of all and of the foreground.
    """
    outputs = {name: forward.assistant(name) for name in model.assistants}
    if model.teacher is not None:
        targets = {f"teacher, layer {i}": tap for i, tap in enumerate(forward.comparison.teacher.taps, start=1)}
    else:
        targets = {name: output.features.lead for name, output in outputs.items()}
    described = {}
    for name, tap in targets.items():
        values = torch.cat([t.detach().flatten() for t in _tensors(tap)])
        described[name] = {"mean_square": _short(values.square().mean()), "zeros": _short((values == 0).float().mean())}
    found: dict[str, Any] = {"targets": described}
    head = model.student.detection_head
    rois = [output.stages[0].rois for output in outputs.values() if output.stages]
    if rois and isinstance(head, RetinaHead):
        best, foreground = _anchor_ious(head, forward.student, rois[0])
        found["foreground"] = _short(foreground.float().mean())
        found["anchor_background"] = _short((best < 0.5).float().mean())
        found["anchor_background_of_foreground"] = _short((best[foreground] < 0.5).float().mean())
    return found


def _anchor_ious(head: RetinaHead, student: StudentForward, rois: RoIs) -> tuple[Tensor, Tensor]:
    """Return the greatest IoU of each proposal's own anchor with an object (R',), and whether its RoI is foreground (R',)."""
    kept = rois.from_proposal
    grid = head.anchors.grid(student.pyramid)
    level, y, x, anchor = rois.cells[kept].unbind(1)
    first = torch.tensor([0, *grid.counts]).cumsum(0)
    widths = torch.tensor([shape[1] for shape in grid.shapes])
    anchors = grid.boxes[first[level] + (y * widths[level] + x) * head.anchors.per_cell + anchor]
    truth, best = student.truth, []
    for box, image in zip(anchors, rois.image[kept].tolist(), strict=True):
        objects = truth.boxes[image][truth.present[image]]
        best.append(box_iou(box[None], objects).max() if len(objects) else torch.zeros(()))
    return torch.stack(best), rois.labels[kept] < student.student.num_classes


def _short(value: Tensor) -> float:
    return float(f"{value.item():.4g}")


def _tensors(tap: Tap) -> list[Tensor]:
    return [tap] if isinstance(tap, Tensor) else list(tap)


# --- the document ---

BEGIN, END = "<!-- study: begin (python bench/ckd_study.py table) -->", "<!-- study: end -->"


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Return the tables of all recorded variants, in the order of VARIANTS."""
    found = {record["variant"]: record for record in records}
    found = {name: found[name] for name in VARIANTS if name in found}
    lines = [
        "| variant | AP on val |",
        "| --- | ---: |",
        *(f"| {name} | {record['val_AP']:.1f} |" for name, record in found.items()),
    ]
    for name in ("head", "head_pearson", "tf_head", "tf_head_pearson"):
        if name in found:
            lines += ["", f"### `{name}`", "", *_gradients(found[name]["at"])]
    return "\n".join(lines)


def _gradients(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of one run: means over its first third, the time before the rate drops, and the rest."""
    last = measured[-1]["step"]
    thirds = {"first third": (0, last / 3), "second third": (last / 3, 2 * last / 3), "last third": (2 * last / 3, last)}
    lines = ["| loss | part of training | loss | gradient on the tap | its cosine | gradient on the backbone | its cosine |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in measured[0]["losses"]:
        for part, (begin, end) in thirds.items():
            within = [m for m in measured if begin < m["step"] <= end]
            cells = [_mean([m["losses"][name] for m in within])]
            for place in ("tap", "backbone"):
                share = [m[place][name]["norm"] / m[place]["detection"]["norm"] for m in within]
                cells += [_mean(share), _mean([m[place][name]["cosine"] for m in within])]
            lines.append(f"| {name} | {part} | {' | '.join(cells)} |")
    lines.append("")
    for name in measured[0].get("targets", {}):
        scales, zeros = ([m["targets"][name][key] for m in measured] for key in ("mean_square", "zeros"))
        lines.append(f"- target *{name}*: mean square {_mean(scales)}, share of zeros {_mean(zeros)}")
    if "foreground" in measured[0]:
        shares = {key: _mean([m[key] for m in measured]) for key in ("foreground", "anchor_background")}
        own = _mean([m["anchor_background_of_foreground"] for m in measured])
        lines.append(
            f"- RoIs from proposals: share on an object {shares['foreground']}; share whose anchor lies on background "
            f"{shares['anchor_background']}, among those on an object {own}"
        )
    return lines


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and value == value]
    return f"{statistics.fmean(known):.2f}" if known else "–"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/evidence"))
    parser.add_argument("--storage", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "ckd.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("variants", nargs="*", metavar="VARIANT")
    commands.add_parser("table")
    options = parser.parse_args(arguments)
    document = ROOT / "docs" / "ckd.md"
    bench = Bench(
        "micro", ROWS["micro"], ROOT / "jobs/evidence/micro", options.data, options.storage / "micro", options.results
    )
    with user_errors():
        if options.command == "table":
            section = tables(read(options.results))
            document.write_text(insert(document.read_text(encoding="utf-8"), section, BEGIN, END), encoding="utf-8")
            return 0
        for name in options.variants or VARIANTS:
            if any(record["variant"] == name and record["seed"] == options.seed for record in read(options.results)):
                continue
            found = train(bench, VARIANTS[name], options.seed)
            append(options.results, {"variant": name, "seed": options.seed, "revision": revision(), **found})
            print(f"{name}: AP on val {found['val_AP']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
