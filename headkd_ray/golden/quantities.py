"""Comparison of every quantity of a golden file with its replay, one row each; nothing in the file goes unmentioned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from headkd_ray.detectors import Detections
from headkd_ray.detectors.build import AnyDetector
from headkd_ray.golden.compare import GRADIENTS, VALUES, Row, compare, compare_number, failure, merge
from headkd_ray.golden.file import Golden
from headkd_ray.golden.replay import Replay, replay
from headkd_ray.golden.rows import compare_detections, compare_proposals, positions


def check(golden: Golden, run: Replay) -> Iterator[Row]:
    """Compare all quantities, in the order of the computation."""
    yield from _best(
        _pyramid(golden, "student", f, note) for note, f in [("", run.features), *((n, f) for n, f, _ in run.evaluations)]
    )
    yield from _pyramid(golden, "teacher", run.teacher_features)
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


def _pyramid(golden: Golden, who: str, features: list[Tensor], note: str = "") -> list[Row]:
    rows = []
    levels = {int(key.rsplit("P", 1)[1]): key for key in golden.keys(rf"{who}_fpn/P\d+")}
    finest = min(levels, default=0)
    for level, key in sorted(levels.items()):
        place = level - finest
        wanted = golden.tensor(key)
        if place < len(features):
            rows.append(compare(key, features[place], wanted, note=note))
        else:
            rows.append(failure(key, f"we have {len(features)} levels"))
    return rows


def _proposals(golden: Golden, run: Replay) -> Iterator[Row]:
    if run.proposed is None:
        return
    for i, wanted in enumerate(golden.per_image("proposals", len(run.proposed.boxes)) or []):
        yield compare_proposals(f"proposals/{i}", run.proposed, i, wanted)


def _rois(golden: Golden, run: Replay) -> Iterator[Row]:
    """Compare the RoIs and everything with one row per RoI, after reordering ours by identity to match the golden's."""
    rois = run.rois
    if rois is None:
        return
    ids = torch.cat([rois.image[:, None], rois.cells], dim=1)
    place = torch.arange(len(ids))
    if golden.has("roi_ids"):
        wanted = golden.tensor("roi_ids").long()
        found = positions(ids, wanted)
        if found is None or (found < 0).any() or len(wanted) != len(ids):
            absent = len(wanted) if found is None else int((found < 0).sum())
            yield failure("roi_ids", f"{absent} of {len(wanted)} golden RoIs are not among our {len(ids)}")
            for key in golden.keys(r"rois/\d+|tensor/.+"):
                golden.tensor(key)
                yield failure(key, "not comparable: the RoIs differ")
            return
        moved = int((found != place).sum())
        yield compare("roi_ids", ids[found], wanted, note=f"{moved} rows in another order" if moved else "")
        place = found
    boxes, image = rois.boxes[place], rois.image[place]
    for i, wanted in enumerate(golden.per_image("rois", int(golden.tensor("images").shape[0])) or []):
        yield compare(f"rois/{i}", boxes[image == i], wanted)

    ours = _tensors(run, ids, place)
    for key in golden.keys(r"tensor/.+"):
        name = key.removeprefix("tensor/")
        if name in ours:
            yield compare(key, ours[name], golden.tensor(key))


def _tensors(run: Replay, ids: Tensor, place: Tensor) -> dict[str, Tensor]:
    """Name our tensors as the official code does, with RoI rows taken at ``place``; ``ids`` are in our order."""
    tensors = {"bbox_ids": ids[place]}
    if run.roi_outputs is not None and run.roi_outputs.taps:
        taps = run.roi_outputs.taps
        tensors |= {"rcnn_bbox_aux": taps[0][place], "rcnn_bbox": taps[-1][place]}
    if run.teacher_taps:
        tensors |= {"teacher_rcnn_bbox_aux": run.teacher_taps[0][place], "teacher_rcnn_bbox": run.teacher_taps[-1][place]}
    if run.akd_adapted:
        tensors |= {"rcnn_bbox_aux_adapted": run.akd_adapted[0][place], "rcnn_bbox_adapted": run.akd_adapted[-1][place]}
    if run.ckd_rows is not None and run.ckd_adapted is not None:
        own = ids[:, 1] >= 0  # rows of S: RoIs that came from a cell, in our order
        kept = place[own[place]]
        row = (own.cumsum(0) - 1)[kept]
        image, level, y, x, anchor = ids[kept].unbind(1)
        tensors |= {
            "teacher_rcnn_bbox_filtered": run.teacher_taps[-1][kept],
            "bbox_poses": torch.stack([level, image, y, x], dim=1),
            "anchor_ids": anchor,
            "retina_cls_indexed": run.ckd_rows[row],
            "retina_cls_decoupled": run.ckd_adapted[row],
        }
    return tensors


def _losses(golden: Golden, run: Replay) -> Iterator[Row]:
    for name, wanted in golden.scalars("losses_json").items():
        if name == "acc" and run.rois is not None and run.roi_outputs is not None:
            yield _accuracy(run, wanted)
        elif name in run.losses:
            yield compare_number(f"loss {name}", run.losses[name], wanted, VALUES, note=run.notes.get(name, ""))
        else:
            yield failure(f"loss {name}", "unknown loss, not compared")


def _accuracy(run: Replay, wanted: float) -> Row:
    """Compare the percentage of RoIs whose most likely class is right; a tie of the two most likely may count either way."""
    assert run.rois is not None and run.roi_outputs is not None
    logits = run.roi_outputs.logits.detach()
    count = max(len(logits), 1)
    ours = 100.0 * float((logits.argmax(1) == run.rois.labels).sum()) / count
    best = logits.topk(2, dim=1).values
    ties = int(((best[:, 0] - best[:, 1]) <= 1e-5 * best[:, 0].abs()).sum())
    return compare_number("loss acc", ours, wanted, VALUES, floor=100.0 * ties / count, note=f"{ties} ties" if ties else "")


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
