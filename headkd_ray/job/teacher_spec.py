"""Define the teacher's keys: its detector, where it runs, and which of its outputs are stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headkd_ray.job.module_specs import Spec, Text
from headkd_ray.job.numbers import Batch, Fraction, Layers, Logits, Part, Processes
from headkd_ray.job.process_spec import ProcessSpec


class PoolSpec(ProcessSpec):
    """The teacher processes next to the train workers (placement pool; they also build a cache on a cluster)."""

    actors: tuple[Processes, Processes] = (1, 1)
    """[fewest, most] teacher processes per train worker; Ray starts more while batches wait for a teacher (with rois: student,
    the number stays at the fewest). A cache is built by the largest number."""


class CacheSpec(Spec):
    """The soft targets on disk (placement cache)."""

    path: Text | None = None
    """Folder or URI of the cache; null = the folder soft_targets in data.train."""
    dtype: Literal["fp16", "int8"] = "fp16"
    """Storage type of the features; int8 = 8 bits with a scale per channel."""
    logits: Logits = 0
    """Number of the largest class logits of each RoI to store as well, with their classes; 0 = none. No loss reads them: they
    are for your own code, and verify compares them."""


class TeacherSpec(Spec):
    """The frozen detector that the student is distilled from, or what it has found."""

    kind: Literal["ours", "transformers", "predictions"] = "ours"
    """What the teacher is: ours = a detector of this package, from its own files, mmdet's or torchvision's; transformers = a
    DETR of the package transformers (detr, deformable_detr, rt_detr, rt_detr_v2, d_fine, ...), whose hidden states are
    imitated. It needs pip install 'headkd-ray[teachers]', distill.rois: teacher and distill.copy_head: false. predictions = a
    file of detections, from anything that detects; they are pseudo labels for methods without distillation."""
    checkpoint: Text | None = None
    """Folder of a headkd_ray student or teacher (model.safetensors + model.json), or an mmdet or torchvision .pth file; with
    kind: transformers a folder that save_pretrained wrote (config.json, model.safetensors, preprocessor_config.json). A path,
    a URI, or hf://owner/name@revision on the Hugging Face Hub. A relative path is resolved against the command's current
    folder. Required by both kinds; with kind: predictions there is none."""
    predictions: Text | None = None
    """File or URI of the detections (kind predictions): COCO results, a list of {image_id, category_id, bbox, score}; or a COCO
    data set whose annotations have a score, as predict writes. Images are found by their ids or file names, classes by their
    category ids or names. A relative path is resolved against the command's current folder."""
    score_threshold: Fraction = 0.5
    """Score from which a prediction is a pseudo label; its losses are multiplied by its score (kind predictions)."""
    ignore_threshold: Fraction = 0.3
    """Score from which a prediction below score_threshold is ignored: it is not learnt, and what it covers is no background.
    Those below are background (kind predictions)."""
    labelled_iou: Part | None = None
    """Also add pseudo labels to labelled images, but for those whose IoU with a ground-truth box is at least this; null =
    labelled images have their ground truth alone (kind predictions)."""
    classes: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Class names in the order of the checkpoint's outputs, when the file does not name them; null = read from the file."""
    layers: Annotated[tuple[Layers, ...], Field(min_length=1)] | None = None
    """Decoder layers whose hidden states AKD compares, 1 = the first, ascending (kind transformers); CKD reads the last of
    them. null = the last ones, as many as the assistant has fully connected layers."""
    truth_iou: Fraction = 0.5
    """IoU that a query's box must have with a ground-truth box to answer for it; a ground-truth box that no query reaches is
    not compared (kind transformers)."""
    placement: Literal["inline", "pool", "cache"] = "inline"
    """Where the teacher runs: inline = in the train worker; pool = in its own processes, which with distill.rois: teacher add
    its outputs to each batch before it reaches the worker, and with rois: student hold its features and answer the worker's
    requests; cache = nowhere: its outputs are read from disk (python -m headkd_ray.cache build JOB), which needs distill.rois:
    teacher."""
    batch_size: Batch = 8
    """Views per forward pass of the teacher when a cache is built."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the teacher's forward passes; bf16 = autocast. (In the train worker with rois: student, optim.precision.)"""
    pool: PoolSpec = PoolSpec()
    """The teacher processes next to the train workers."""
    cache: CacheSpec = CacheSpec()
    """The soft targets on disk."""

    @property
    def answers_the_student(self) -> bool:
        """Whether the teacher can be asked about RoIs that the student chooses; a DETR only knows those of its queries."""
        return self.kind == "ours"

    @property
    def is_network(self) -> bool:
        """Whether the teacher is a network, which can be run, and has features."""
        return self.kind != "predictions"

    @property
    def source(self) -> tuple[str, str]:
        """The key that says where the teacher is, and its value."""
        key = "checkpoint" if self.is_network else "predictions"
        place = getattr(self, key)
        assert place is not None, "the job's own checks"
        return f"teacher.{key}", place
