"""Comparison of every quantity of a golden file with its replay, one row each; nothing in the file goes unmentioned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from headkd_ray.detectors import Detections, RoIs, StageOutput
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.golden.conventions import places_of_rois
from headkd_ray.golden.file import Golden
from headkd_ray.golden.initial import compare_frozen, compare_initial
from headkd_ray.golden.replay import Replay, replay
from headkd_ray.golden.rows import compare_detections, compare_proposals, positions
from headkd_ray.golden.tolerances import GRADIENTS, VALUES, Row, compare, compare_number, failure, merge


def check(golden: Golden, run: Replay) -> Iterator[Row]:
    """Compare all quantities, in the order of the computation."""
    yield from _initial(golden, run)
    student, teacher = run.student.detector, run.teacher.detector if run.teacher else None
    pyramids = [("", run.step.features), *((note, features) for note, features, _ in run.evaluations)]
    yield from _best(_pyramid(golden, "student", student, features, note) for note, features in pyramids)
    if teacher is not None:
        yield from _pyramid(golden, "teacher", teacher, run.teacher_features)
    yield from _proposals(golden, run)
    yield from _rois(golden, run)
    yield from _losses(golden, run)
    yield from _gradients(golden, run)
    yield from _detections(golden, run)
    for key in golden.unused():
        if golden.is_text(key):
            yield Row(key, 0.0, 0.0, VALUES, True, "text, nothing to compare")
        else:
            yield failure(key, "unknown quantity, not compared")


def _best(attempts: Iterable[list[Row]]) -> list[Row]:
    """Return the rows of the first convention under which all pass, or else of the first convention."""
    tried = []
    for rows in attempts:
        if all(row.passed for row in rows):
            return rows
        tried.append(rows)
    return tried[0] if tried else []


def _initial(golden: Golden, run: Replay) -> Iterator[Row]:
    wanted = golden.json("init_json")
    if wanted is not None:
        copied = [] if run.teacher is None else [key for key in run.assistants if key not in run.initial]
        yield compare_initial(wanted, run.initial, copied)
    wanted = golden.json("frozen_json")
    if wanted is not None:
        yield compare_frozen(wanted, run.frozen)


def _pyramid(golden: Golden, who: str, detector: AnyDetector, features: list[Tensor], note: str = "") -> list[Row]:
    """Compare the levels that the file has, named by their number from 0 or, as P3, by the logarithm of their stride."""
    rows, finest = [], int(math.log2(detector.strides[0]))
    levels = {}
    for key in golden.keys(rf"{who}_fpn/P?\d+"):
        name = key.rpartition("/")[2]
        levels[int(name[1:]) - finest if name.startswith("P") else int(name)] = key
    for place, key in sorted(levels.items()):
        wanted = golden.tensor(key)
        if 0 <= place < len(features):
            rows.append(compare(key, features[place], wanted, note=note))
        else:
            rows.append(failure(key, f"we have {len(features)} levels"))
    return rows


def _proposals(golden: Golden, run: Replay) -> Iterator[Row]:
    proposed = run.step.proposed
    if proposed is None:
        return
    for i, wanted in enumerate(golden.per_image("proposals", len(proposed.boxes)) or []):
        yield compare_proposals(f"proposals/{i}", proposed, i, wanted)


def _rois(golden: Golden, run: Replay) -> Iterator[Row]:
    """Compare the RoIs, ours against the file's, and then what is computed at the file's: all features, row by row or level by
    level."""
    own, rois = run.step.own_rois, run.step.rois
    if own is not None and rois is not None:
        place = places_of_rois(golden, own)
        if place is None:
            yield from _other_rois(golden, own)
            return
        if golden.has("roi_ids"):
            moved = int((place != torch.arange(len(place))).sum())
            ids = torch.cat([own.image[:, None], own.cells], dim=1)
            note = f"{moved} rows in another order" if moved else ""
            yield compare("roi_ids", ids[place], golden.tensor("roi_ids").long(), note=note)
        for i, wanted in enumerate(golden.per_image("rois", int(golden.tensor("images").shape[0])) or []):
            yield compare(f"rois/{i}", own.boxes[place][own.image[place] == i], wanted[:, :4])
    for key in golden.keys(r"tensor/.+"):
        name, _, level = key.removeprefix("tensor/").partition("/")
        ours = _named(run, name, level)
        if ours:
            yield min((_rows(key, each, golden.tensor(key)) for each in ours), key=lambda row: not row.passed)


def _other_rois(golden: Golden, own: RoIs) -> Iterator[Row]:
    """Say that the file has RoIs that are not among ours, and that nothing at RoIs can be compared."""
    if golden.has("roi_ids"):
        wanted = golden.tensor("roi_ids").long()
        found = positions(torch.cat([own.image[:, None], own.cells], dim=1), wanted)
        absent = len(wanted) if found is None else int((found < 0).sum())
        yield failure("roi_ids", f"{absent} of {len(wanted)} golden RoIs are not among our {len(own.image)}")
    for key in golden.keys(r"rois/\d+|tensor/.+"):
        golden.tensor(key)
        yield failure(key, "not comparable: the RoIs differ")


def _named(run: Replay, name: str, level: str) -> list[Tensor]:
    """Return our tensors of an official name; the configs use a few names for two, of which the file has one."""
    step = run.step
    if level:
        return [maps[int(level)] for maps in step.maps.get(name, []) if level.isdecimal() and int(level) < len(maps)]
    return [*step.rows.get(name, []), *step.cell_rows.get(name, [])]


def _rows(key: str, ours: Tensor, golden: Tensor) -> Row:
    """Compare a tensor, of which a file may have the first rows only."""
    if ours.shape == golden.shape or "/" in key.removeprefix("tensor/") or not 0 < len(golden) < len(ours):
        return compare(key, ours, golden)
    return compare(key, ours[: len(golden)], golden, note=f"the first {len(golden)} of {len(ours)} rows")


def _losses(golden: Golden, run: Replay) -> Iterator[Row]:
    losses = run.losses
    for name, wanted in golden.scalars("losses_json").items():
        if name in run.step.accuracies:
            yield _accuracy(f"loss {name}", run.step.accuracies[name], wanted)
        elif name in losses:
            yield compare_number(f"loss {name}", losses[name], wanted, VALUES, note=run.step.notes.get(name, ""))
        else:
            yield failure(f"loss {name}", "unknown loss, not compared")


def _accuracy(name: str, stage: StageOutput, wanted: float) -> Row:
    """Compare the percentage of RoIs whose most likely class is right; a tie of the two most likely may count either way."""
    logits = stage.outputs.logits.detach()
    count = max(len(logits), 1)
    ours = 100.0 * float((logits.argmax(1) == stage.rois.labels).sum()) / count
    best = logits.topk(2, dim=1).values
    ties = int(((best[:, 0] - best[:, 1]) <= 1e-5 * best[:, 0].abs()).sum())
    return compare_number(name, ours, wanted, VALUES, floor=100.0 * ties / count, note=f"{ties} ties" if ties else "")


def _gradients(golden: Golden, run: Replay) -> Iterator[Row]:
    wanted = golden.scalars("grad_norms_json")
    if not wanted:
        return
    name = f"gradient norms ({len(wanted)})"
    if wanted.keys() != run.gradients.keys():
        only = [f"only golden: {k}" for k in wanted if k not in run.gradients]
        only += [f"only ours: {k}" for k in run.gradients if k not in wanted]
        yield failure(name, f"{len(only)} parameters differ: " + ", ".join(only[:4]))
        return
    norms = {key: float(gradient.norm()) for key, gradient in run.gradients.items()}
    rows = [compare_number(key, norms[key], value, GRADIENTS) for key, value in wanted.items()]
    if not all(row.passed for row in rows):
        rounding = _rounding(golden, run)
        rows = [compare_number(key, norms[key], value, GRADIENTS, rounding[key]) for key, value in wanted.items()]
    worst = max(rows, key=lambda row: (not row.passed, row.relative))
    failed = [row.name for row in rows if not row.passed]
    note = f"{len(failed)} fail: {', '.join(failed[:4])}" if failed else f"worst: {worst.name}"
    yield merge(name, rows, [note])


def _rounding(golden: Golden, run: Replay) -> dict[str, float]:
    """Estimate how far each gradient's norm may be off by rounding alone.

    Where a gradient cancels out (as for a bias in front of a BatchNorm in train mode), its norm is nothing but rounding error
    on both sides. Other convolution kernels round differently, which shows how large that error is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setting the flags warns of TF32 on GPUs that this build does not support
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            again = replay(golden, run.device).gradients
    return {key: 3 * float((again[key] - gradient).norm()) for key, gradient in run.gradients.items()}


def _detections(golden: Golden, run: Replay) -> Iterator[Row]:
    batch = int(golden.tensor("images").shape[0])
    wanted = golden.per_image("detections", batch)
    if wanted:
        detector = run.student.detector
        yield from _best(_compare_images("detections", detector, found, wanted, note) for note, _, found in run.evaluations)
    wanted = golden.per_image("teacher_detections", batch)
    if wanted and run.teacher is not None and run.teacher_detections is not None:
        yield from _compare_images("teacher_detections", run.teacher.detector, run.teacher_detections, wanted)


def _compare_images(name: str, detector: AnyDetector, ours: Detections, wanted: list[Tensor], note: str = "") -> list[Row]:
    rules = detector.detection_head.spec.postprocess
    rows = []
    for i, golden in enumerate(wanted):
        real = ours.labels[i] >= 0
        mine = (ours.boxes[i][real], ours.scores[i][real], ours.labels[i][real])
        row = compare_detections(f"{name}/{i}", mine, golden, rules.nms_iou, rules.score, rules.max_detections)
        rows.append(merge(row.name, [row], [note]))
    return rows
