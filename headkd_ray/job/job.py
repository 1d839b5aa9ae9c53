"""The Job: every key of a job file with its type, unit, default and meaning (the field's docstring).

A Job checks types and ranges of its keys. What keys get wrong together is in ``headkd_ray.job.checks``; ``load_job`` runs both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from headkd_ray.job.assistant_specs import AssistantsSpec
from headkd_ray.job.detector_spec import DetectorSpec, RetinaNetSpec
from headkd_ray.job.method_terms import Method
from headkd_ray.job.module_specs import Spec, Text
from headkd_ray.job.numbers import (
    Batch,
    Boxes,
    Epochs,
    Factor,
    Fraction,
    Images,
    Limit,
    Multiple,
    Pixels,
    Processes,
    ProcessesOrNone,
    Rate,
    Restarts,
    Seconds,
    Seed,
    Share,
    Steps,
    StepsOrNone,
    Threads,
    Weight,
)
from headkd_ray.job.teacher_spec import TeacherSpec
from headkd_ray.job.two_stage_specs import RoIHeadSpec

NUMBER, RANGE = "<number>", "<range>"


def _number_or_range(value: Any) -> str:
    return RANGE if isinstance(value, list | tuple) else NUMBER


Workers = Annotated[
    Annotated[ProcessesOrNone, Tag(NUMBER)] | Annotated[tuple[Processes, Processes], Tag(RANGE)],
    Discriminator(_number_or_range),  # so that an error is about the one that was meant
]


class RunSpec(Spec):
    """What the run is called and where it writes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run: its folder under storage. Letters, digits, dot, dash and underscore, a letter or digit first.
    Starting the same name again resumes it."""
    storage: Text = "runs"
    """Folder or URI (file, s3, gs, hdfs) under which the run writes its checkpoints, logs and results.
    A relative path starts at the command's current folder."""
    seed: Seed = 0
    """Seeds the initial weights, the data order, the views and the RoI sampling; 0 to 2^32 - 1."""


class DataSpec(Spec):
    """Prepared shards (python -m headkd_ray.prepare) and how they become batches."""

    train: Text
    """Folder or URI of the prepared training split. A relative path starts at the command's current folder."""
    val: Text
    """Folder or URI of the prepared validation split. A relative path starts at the command's current folder."""
    batch_size: Batch = 2
    """Images per worker and forward pass."""
    short_side: tuple[Pixels, Pixels] = (640, 800)
    """Training views: the short side is drawn uniformly from this closed range, in pixels."""
    long_side: Pixels = 1333
    """Longest side of any view, in pixels; the short side shrinks to respect it."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip of a training view."""
    eval_short_side: Pixels = 800
    """Short side at evaluation, in pixels; long_side holds here too."""
    pad: Multiple = 32
    """Batches are zero-padded on the right and bottom to a multiple of this, in pixels."""
    keep_empty: bool = False
    """Train on images without ground truth too (paper: false)."""
    shuffle_window: Images = 256
    """Images read together and shuffled among themselves; their row groups are drawn at random from the whole epoch."""
    views: Epochs | None = None
    """Distinct augmented views per image: epoch e shows view e mod views; null = a new one each epoch."""
    view_seed: Seed | None = None
    """Seeds the views alone, so that runs of several run.seed share a cache of soft targets; null = run.seed."""


class DistillSpec(Spec):
    """Loss weights and the assistant."""

    assistant: RoIHeadSpec | None = None
    """The assistant's RoI head; null = the teacher's architecture (the paper's for method assist). A section given here is
    complete: keys left out take the paper's values, not the teacher's."""
    assistant_weight: Weight = 1.0
    """Weight of the assistant's ground-truth losses."""
    warm_assistant: bool = False
    """Let assistant_weight rise over warmup_steps too, as the research branch does for all but the R-CNN teacher; method
    tf_head always does."""
    copy_head: bool = True
    """Start the assistant (fitnet: the student's head) from the teacher's head weights. Needs the same widths on both sides,
    the pyramid's channels included."""
    akd_weight: Weight = 2.0
    """Weight of each AKD term, one per fully connected layer of the assistant (methods akd, head)."""
    ckd_weight: Weight = 2.0
    """Weight of the CKD term (method head)."""
    fitnet_weight: Weight = 1.0
    """Weight of each pyramid level's feature loss (method fitnet)."""
    fitnet_levels: Annotated[int, Field(ge=1, le=5)] = 5
    """Pyramid levels that are imitated, P3 the first (method fitnet). Fewer where no object is large enough for the last
    ones: their features then grow without bound, and are all of the loss."""
    pkd_weight: Weight = 0.0
    """Weight of the PKD term, which lets the student's pyramid imitate the teacher's on the levels whose strides both have, by
    Pearson's correlation; any method with a teacher of the same student.neck.channels, placed inline. 0 = no such term; its
    authors use 6 to 12."""
    assistants: AssistantsSpec = AssistantsSpec()
    """The assistants of method tf_head: at least one, best of other kinds than the student."""
    ckd_epochs: Epochs | None = None
    """Epochs with CKD (methods head, tf_head); its weight is 0 in the later ones, while the assistants go on. The research
    branch stops it at the first drop of the learning rate. null = never."""
    rois: Literal["student", "teacher"] = "student"
    """Whose RoIs AKD and CKD compare: student = those that the student proposes in the step (the paper); teacher = the
    ground-truth boxes and the teacher's own proposals, sampled once for each view, so that what the teacher says about them
    depends on the view alone and can be computed elsewhere or kept. (The assistant's ground-truth losses are at the student's
    RoIs either way.) Dense student, Faster R-CNN teacher."""
    roi_budget: Boxes = 128
    """RoIs a view with rois: teacher."""
    warmup_steps: StepsOrNone = 2000
    """Optimizer steps over which the AKD and CKD weights rise linearly from 0 (step 0) to full; for method tf_head the weights
    of the assistants' ground-truth losses too."""


class OptimSpec(Spec):
    """SGD and its schedule."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (the paper's), or adamw, which gets micro models without normalisation layers going in a few hundred steps."""
    lr: Rate = 0.01
    """Peak learning rate at a global batch of lr_batch images."""
    lr_batch: Images | None = 16
    """Global batch that lr is meant for. The actual lr scales linearly with the actual global batch, which is
    cluster.workers (at least 1; of a range the most) x data.batch_size x optim.accumulate. null = no scaling."""
    momentum: Fraction = 0.9
    """SGD momentum (adamw: unused)."""
    weight_decay: Weight = 1e-4
    """L2 decay on all parameters."""
    clip_norm: Limit | None = 20.0
    """Gradient norm above which gradients are scaled down; null = never."""
    epochs: Epochs = 12
    """Passes over the training images."""
    milestones: tuple[Epochs, ...] = (8, 11)
    """Epochs after which the learning rate is multiplied by gamma, ascending and below epochs; [] = never."""
    gamma: Factor = 0.1
    """Factor at each milestone."""
    warmup_steps: StepsOrNone = 500
    """Optimizer steps of linear learning-rate warm-up."""
    warmup_ratio: Fraction = 0.001
    """Learning rate at step 0 as a share of the peak."""
    accumulate: Batch = 1
    """Forward passes whose gradients are averaged into one optimizer step."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of an exponential moving average of the student's weights, which is then what is evaluated and exported;
    null = no average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast on forward passes; weights and losses stay fp32."""


MAX_DETECTIONS = 100
"""COCO's own number of detections an image."""


class EvalSpec(Spec):
    """COCO evaluation on data.val."""

    every_epochs: Epochs = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: Batch = 2
    """Images per worker and forward pass."""
    max_detections: Boxes = MAX_DETECTIONS
    """Detections of a class that count in an image, the best first; 100 is COCO's number. For images with more objects set it
    to the most that one has, and the student's postprocess.max_detections (and a two-stage student's
    rpn.test_proposals.post_nms) to at least as many."""


class CheckpointSpec(Spec):
    """Training state, for resuming."""

    every_steps: Steps | None = None
    """Optimizer steps between checkpoints within an epoch; null = only at epoch ends."""


class LogSpec(Spec):
    """What a run tells while it goes."""

    every_steps: Steps = 50
    """Optimizer steps per log line."""
    tensorboard: bool = True
    """Also write TensorBoard events."""


class ClusterSpec(Spec):
    """Where it runs."""

    workers: Workers = 1
    """Ray Train workers; 0 = the same loop in this process, without Ray. [fewest, most] = as many of them as the cluster has
    room for at any time: the run goes on with fewer when nodes are lost, and with more when they come. Steps, global batch,
    learning rate and order of images are those of the most; with fewer each takes the batches of several in turn."""
    address: str | None = None
    """Ray cluster address (auto, host:port, ray://host:port); null = RAY_ADDRESS, else the cluster running
    on this machine, else one that lives as long as the command."""
    gpus_per_worker: Fraction | None = None
    """GPUs per worker: 1 trains on a GPU, 0 on the CPU; null = 1 if the cluster has GPUs for all workers, else 0."""
    cpus_per_worker: Share = 1.0
    """CPUs that Ray reserves for a worker."""
    data_cpus: Share = 1.0
    """CPUs left free for each worker's data tasks (decode and augmentation), one CPU a task."""
    threads_per_worker: Threads | None = None
    """torch CPU threads of a worker; null = cpus_per_worker (without Ray: torch's own choice)."""
    max_failures: Restarts = 3
    """Losses of a worker or of Ray Train's controller after which the run gives up; each resumes from the last checkpoint."""
    resize_seconds: Seconds = 60.0
    """With a range of workers: seconds between looks whether there is room for more. Each change goes back to the last
    checkpoint."""

    @property
    def fewest_workers(self) -> int:
        """With how many workers the run may start and go on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Of how many workers the run's steps are."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Job(Spec):
    """One training run."""

    run: RunSpec
    """What the run is called and where it writes."""
    method: Method
    """supervised = student (or teacher) from labels alone; assist = with a fresh assistant; copy_only = assistant copied from
    the teacher, no distillation loss; akd = + assistant distillation; head = + cross distillation; fitnet = feature
    distillation from a RetinaNet teacher; tf_head = assistants of other kinds instead of a teacher."""
    data: DataSpec
    """Prepared shards and how they become batches."""
    student: DetectorSpec = RetinaNetSpec()
    """The detector that is trained and exported."""
    teacher: TeacherSpec | None = None
    """The teacher; needed by copy_only, akd, head and fitnet, and by these alone; null = none."""
    distill: DistillSpec = DistillSpec()
    """Loss weights and the assistant; without effect for method supervised."""
    optim: OptimSpec = OptimSpec()
    """Optimizer and schedule."""
    eval: EvalSpec = EvalSpec()
    """COCO evaluation on data.val."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Training state, for resuming. The last one and the best by AP are kept; two at least."""
    log: LogSpec = LogSpec()
    """What the run tells while it goes."""
    cluster: ClusterSpec = ClusterSpec()
    """Where it runs."""
