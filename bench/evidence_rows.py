"""Define the rows of the evidence, tier by tier. The command is ``bench/evidence.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evidence_plan import Row


@dataclass(frozen=True)
class Heads:
    """The assistants' heads of a tier, as values of job keys."""

    roi: str
    """The teacher's RoI head, with ``{}`` for the number of RoIs per image. A test compares it with the teacher's job file."""
    rois: int
    """Number of RoIs per image that the teacher itself trains on."""
    fcos: str
    """The FCOS student's head; a test compares it with the student's job file."""
    stop: int = 8
    """Epochs with CKD in TF-HEAD: until the learning rate drops first, as in the research branch."""

    def sampling(self, rois: int) -> str:
        return self.roi.format(rois)


VIEWS = "data.views=4 data.view_seed=0"
"""Overrides for four views of each image. They are the same for all seeds, so that these share a cache."""


def ladder(heads: Heads, job: str, suffix: str = "") -> Iterator[tuple[str, Row]]:
    """Yield the rows of the paper's table for a RetinaNet student, whose RoIs are its own proposals."""
    alone, akd = f"baseline{suffix}", f"akd{suffix}"
    yield alone, Row(job)
    yield f"assist{suffix}", Row(job, f"method=assist 'distill.assistant={heads.sampling(heads.rois)}'", (alone,))
    yield f"copy_only{suffix}", Row(job, "method=copy_only", (alone,), "teacher")
    yield akd, Row(job, "method=akd", (alone,), "teacher")
    yield f"head{suffix}", Row(job, "method=head", (alone, akd), "teacher")


def others(heads: Heads) -> Iterator[tuple[str, Row]]:
    """Yield the rows of FitNet, TF-HEAD and the FCOS student."""
    alone = ("baseline",)
    # No box of these small images is assigned to P6 or P7: nothing bounds their features, which would be most of the loss.
    yield "fitnet", Row("retinanet", "method=fitnet distill.fitnet_levels=3", alone, "retina_teacher")
    # The research branch's weights, and its stop of CKD at the first drop of the learning rate.
    fcos = f"'distill.assistants.fcos={{head: {heads.fcos}}}'"
    rcnn = f"'distill.assistants.rcnn={{head: {heads.sampling(heads.rois)}}}'"
    stopping = f"method=tf_head distill.ckd_epochs={heads.stop}"
    yield "tf_head_fcos", Row("retinanet", f"{stopping} {fcos}", alone, lr_of="tf_head")
    yield "tf_head_rcnn", Row("retinanet", f"{stopping} {rcnn}", alone, lr_of="tf_head")
    yield "tf_head", Row("retinanet", f"{stopping} {fcos} {rcnn}", (*alone, "tf_head_noes"))
    yield "tf_head_noes", Row("retinanet", f"method=tf_head {fcos} {rcnn}", alone, lr_of="tf_head")
    # The research branch halves this student's CKD, and stops it in the last epoch.
    yield "fcos_baseline", Row("fcos")
    yield "fcos_head", Row("fcos", "method=head distill.ckd_weight=1.0 distill.ckd_epochs=11", ("fcos_baseline",), "teacher")


def caches(heads: Heads) -> Iterator[tuple[str, Row]]:
    """Yield the rows that take the teacher out of the training step, with equal views and equal numbers of RoIs."""
    yield "baseline_views", Row("retinanet", VIEWS, lr_of="baseline")
    for rois in (64, 128, 256):
        own, theirs = f"head_inline_{rois}", f"head_rois_{rois}"
        budget = f"method=head {VIEWS} distill.roi_budget={rois} 'distill.assistant={heads.sampling(rois)}'"
        yield own, Row("retinanet", budget, ("baseline_views",), "teacher", "head")
        asked = f"{budget} distill.rois=teacher"
        yield theirs, Row("retinanet", asked, ("baseline_views", own), "teacher", "head")
        for dtype in ("fp16", "int8"):
            kept = f"{asked} teacher.placement=cache teacher.cache.dtype={dtype}"
            yield f"head_cache_{rois}_{dtype}", Row("retinanet", kept, ("baseline_views", own, theirs), "teacher", "head")


def ablations(heads: Heads) -> Iterator[tuple[str, Row]]:
    """Yield rows that ask whether CKD is too heavy for a small model, or acts too early or too long."""
    taught, alone = ("baseline", "akd", "head"), ("baseline", "assist", "tf_head_rcnn")
    yield "head_ckd_quarter", Row("retinanet", "method=head distill.ckd_weight=0.5", taught, "teacher", "head")
    yield "head_ckd_stop", Row("retinanet", "method=head distill.ckd_epochs=8", taught, "teacher", "head")
    stopping = "method=tf_head distill.ckd_epochs=8"
    lighter = f"'distill.assistants.rcnn={{head: {heads.sampling(heads.rois)}, ckd_weight: 0.325}}'"
    both = f"{lighter} 'distill.assistants.fcos={{head: {heads.fcos}, ckd_weight: 0.25}}'"
    later = f"'distill.assistants.rcnn={{head: {heads.sampling(heads.rois)}}}' distill.warmup_steps=600"
    yield "tf_head_rcnn_quarter", Row("retinanet", f"{stopping} {lighter}", alone, lr_of="tf_head")
    yield "tf_head_quarter", Row("retinanet", f"{stopping} {both}", ("baseline", "tf_head"), lr_of="tf_head")
    yield "tf_head_rcnn_warm", Row("retinanet", f"{stopping} {later}", alone, lr_of="tf_head")


def augmented() -> Iterator[tuple[str, Row]]:
    """Yield the baseline and HEAD with augmented views, to be read beside those with the paper's; the baseline longer, too.

    The longer one is without mosaics and zooming out, which leave little to see of objects in photos of 128 px. So are the last
    two, of a model of the teacher's size that learns half of the photos by heart.
    """
    colours = "brightness: 0.2, contrast: 0.2, saturation: 0.2, hue: 0.02"
    shrinking = "mosaic: 0.25, mosaic_epochs: 8, zoom_out: 0.4, zoom_out_side: [1.0, 2.0]"
    keys = f"'data.augment={{{shrinking}, crop: 0.4, crop_side: [0.5, 1.0], {colours}}}'"
    yield "baseline_augment", Row("retinanet", keys, lr_of="baseline")
    yield "head_augment", Row("retinanet", f"method=head {keys}", ("baseline_augment",), "teacher", "head")
    longer = "optim.epochs=36 optim.milestones=[24,33] eval.every_epochs=36"
    cropped = f"'data.augment={{crop: 0.5, crop_side: [0.5, 1.0], {colours}}}'"
    yield "baseline_long", Row("retinanet", longer, lr_of="baseline")
    yield "baseline_crop_long", Row("retinanet", f"{longer} {cropped}", lr_of="baseline")
    longest, half = "optim.epochs=48 optim.milestones=[32,44] eval.every_epochs=48", "halves/train"
    yield "large_half_long", Row("teacher", longest, lr_of="teacher", train=half)
    yield "large_half_crop_long", Row("teacher", f"{longest} {cropped}", lr_of="teacher", train=half)


def standardised(heads: Heads) -> Iterator[tuple[str, Row]]:
    """Yield rows that compare features in Pearson's distance, HEAD and TF-HEAD also at two other weights."""
    keys, taught = "distill.distance=pearson", ("baseline", "akd", "head")
    yield "akd_pearson", Row("retinanet", f"method=akd {keys}", taught[:2], "teacher", "akd")
    yield "head_pearson", Row("retinanet", f"method=head {keys}", (*taught, "akd_pearson"), "teacher", "head")
    for name, weight in {"half": 1.0, "double": 4.0}.items():
        weights = f"distill.akd_weight={weight} distill.ckd_weight={weight}"
        against = ("baseline", "head_pearson")
        yield f"head_pearson_{name}", Row("retinanet", f"method=head {keys} {weights}", against, "teacher", "head")
    fcos = f"'distill.assistants.fcos={{head: {heads.fcos}}}'"
    rcnn = f"'distill.assistants.rcnn={{head: {heads.sampling(heads.rois)}}}'"
    stopping = f"method=tf_head distill.ckd_epochs={heads.stop} {keys}"
    yield "tf_head_pearson", Row("retinanet", f"{stopping} {fcos} {rcnn}", ("baseline", "tf_head"), lr_of="tf_head")
    for name, (dense, pooled) in {
        "half": (0.5, 0.65),
        "quarter": (0.25, 0.325),
    }.items():  # of the research branch's 1.0 and 1.3
        weighed = (
            f"'distill.assistants.fcos={{head: {heads.fcos}, ckd_weight: {dense}}}' "
            f"'distill.assistants.rcnn={{head: {heads.sampling(heads.rois)}, ckd_weight: {pooled}}}'"
        )
        against = ("baseline", "tf_head_pearson")
        yield f"tf_head_pearson_{name}", Row("retinanet", f"{stopping} {weighed}", against, lr_of="tf_head")
    halved = f"method=head distill.ckd_weight=1.0 distill.ckd_epochs=11 {keys}"
    yield "fcos_head_pearson", Row("fcos", halved, ("fcos_baseline", "fcos_head"), "teacher", "fcos_head")
    asked = f"method=head {VIEWS} distill.roi_budget=64 'distill.assistant={heads.sampling(64)}' distill.rois=teacher {keys}"
    cached = f"{asked} teacher.placement=cache teacher.cache.dtype=int8"
    yield (
        "head_cache_64_int8_pearson",
        Row("retinanet", cached, ("baseline_views", "head_cache_64_int8"), "teacher", "head"),
    )


def detr(heads: Heads) -> Iterator[tuple[str, Row]]:
    """Yield a DETR of the package ``transformers``, and the rows whose assistant compares itself with its decoder's states.

    A DETR knows the boxes of its own queries only, and has no head that could be copied.
    """
    yield "detr_teacher", Row("detr_teacher")
    asked = "teacher.kind=transformers distill.rois=teacher distill.copy_head=false distill.distance=pearson"
    keys = f"{asked} distill.roi_budget={heads.rois} 'distill.assistant={heads.sampling(heads.rois)}'"
    yield "akd_detr", Row("retinanet", f"method=akd {keys}", ("baseline", "assist"), "detr_teacher", "akd")
    yield "head_detr", Row("retinanet", f"method=head {keys}", ("baseline", "assist", "akd_detr"), "detr_teacher", "head")


def predictions() -> Iterator[tuple[str, Row]]:
    """Yield rows that learn from a teacher's detections: on the labelled photos, and on a half whose labels nobody has seen.

    Each labelled photo is seen as often as by the matched baseline; ``baseline_half_long`` takes as many steps instead.
    """
    half, rest = "halves/train", "halves/val"
    found = "teacher.kind=predictions"
    added = f"{found} teacher.labelled_iou=0.5"
    yield "pseudo", Row("retinanet", added, ("baseline",), "teacher", "baseline", predicted="train")
    yield "teacher_half", Row("teacher", train=half)
    yield "baseline_half", Row("retinanet", lr_of="baseline", train=half)
    longer = "optim.epochs=24 optim.milestones=[16,22] eval.every_epochs=24"
    yield "baseline_half_long", Row("retinanet", longer, lr_of="baseline", train=half)
    yield (
        "pseudo_unlabelled",
        Row("retinanet", found, ("baseline_half",), "teacher_half", "baseline", train=half, unlabelled=rest, predicted=rest),
    )


def pretrained(heads: Heads) -> dict[str, Row]:
    """Return the rows of the tier whose backbones start from ImageNet weights: each method in both distances."""
    rows = {"teacher": Row("teacher"), **dict(ladder(heads, "retinanet")), **dict(standardised(heads))}
    rows["tf_head"] = dict(others(heads))["tf_head"]
    names = ("teacher", "baseline", "akd", "head", "tf_head", "akd_pearson", "head_pearson", "tf_head_pearson")
    kept = {name: rows[name] for name in names}
    return {name: replace(row, against=tuple(other for other in row.against if other in kept)) for name, row in kept.items()}


def _tier(heads: Heads) -> dict[str, Row]:
    teachers = {"teacher": Row("teacher"), "retina_teacher": Row("retina_teacher")}
    return teachers | dict([*ladder(heads, "retinanet"), *others(heads), *standardised(heads), *caches(heads), *detr(heads)])


MICRO = Heads(
    roi="{{fc_channels: 256, pool: 5, finest_scale: 28, sampler: {{size: {}}}}}",
    rois=64,
    fcos="{convs: 2, channels: 32, norm_groups: 8, tower_std: null, regress_ranges: [32, 64, 128, 256]}",
)
STANDARD = Heads(
    roi="{{finest_scale: 28, sampler: {{size: {}}}}}",
    rois=128,
    fcos="{regress_ranges: [32, 64, 128, 256]}",
)
PRETRAINED = Heads(
    roi="{{fc_channels: 512, finest_scale: 42, sampler: {{size: {}}}}}",
    rois=64,
    fcos="{convs: 2, channels: 64, norm_groups: 8, tower_std: null, regress_ranges: [48, 96, 192, 384]}",
    stop=5,
)
ROWS: dict[str, dict[str, Row]] = {
    "micro": _tier(MICRO) | dict(ablations(MICRO)) | dict(augmented()) | dict(predictions()),
    "pretrained": pretrained(PRETRAINED),
    "standard": _tier(STANDARD) | dict(ladder(STANDARD, "mnv2", "_mnv2")),
}
"""Tier -> rows, in the order in which they are trained and shown."""
