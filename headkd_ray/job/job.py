"""Define the Job: every key of a job file with its type, unit, default and meaning (the field's docstring).

A Job checks types and ranges of its keys. Rules across keys are in ``headkd_ray.job.checks``; ``load_job`` runs both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from headkd_ray.job.assistant_specs import AssistantsSpec
from headkd_ray.job.augment_spec import AugmentSpec
from headkd_ray.job.detector_spec import DetectorSpec, RetinaNetSpec
from headkd_ray.job.losses_spec import LossesSpec
from headkd_ray.job.method_terms import Method
from headkd_ray.job.module_specs import Labels, Spec, Text
from headkd_ray.job.numbers import (
    Batch,
    Boxes,
    Epochs,
    Factor,
    Fraction,
    Images,
    Layers,
    Limit,
    Momentum,
    Multiple,
    Part,
    Pixels,
    Processes,
    ProcessesOrNone,
    Rate,
    Restarts,
    Seconds,
    SecondsOrNone,
    Seed,
    Share,
    Steps,
    StepsOrNone,
    Threads,
    Weight,
)
from headkd_ray.job.process_spec import ProcessSpec
from headkd_ray.job.teacher_spec import TeacherSpec
from headkd_ray.job.two_stage_specs import RoIHeadSpec

NUMBER, RANGE = "<number>", "<range>"


def _number_or_range(value: Any) -> str:
    return RANGE if isinstance(value, list | tuple) else NUMBER


Workers = Annotated[
    Annotated[ProcessesOrNone, Tag(NUMBER)] | Annotated[tuple[Processes, Processes], Tag(RANGE)],
    Discriminator(_number_or_range),  # so that errors are about the form that the user wrote
]


class RunSpec(Spec):
    """The name of the run and where it writes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run: its folder under storage. Letters, digits, dots, dashes and underscores, a letter or digit first.
    Starting the same name again resumes it."""
    storage: Text = "runs"
    """Folder or URI (file, s3, gs, hdfs) under which the run writes its checkpoints, logs and results.
    A relative path is resolved against the command's current folder."""
    seed: Seed = 0
    """Seed of the initial weights, the data order, the views and the RoI sampling; 0 to 2^32 - 1."""


class DataSpec(Spec):
    """The prepared shards (python -m headkd_ray.prepare) and how they become batches."""

    train: Text
    """Folder or URI of the prepared training split. A relative path is resolved against the command's current folder."""
    val: Text
    """Folder or URI of the prepared validation split. A relative path is resolved against the command's current folder."""
    batch_size: Batch = 2
    """Images per worker and forward pass."""
    max_batch_size: Batch | None = None
    """Before a run starts on GPUs, find the largest multiple of batch_size, at most this, whose training steps fit into a GPU,
    and train with it; the learning rate follows (optim.lr_batch). The run keeps it when it resumes. null = batch_size."""
    short_side: tuple[Pixels, Pixels] = (640, 800)
    """Short side of training views, in pixels: drawn uniformly from this closed range."""
    long_side: Pixels = 1333
    """Longest side of any view, in pixels; the short side shrinks to respect it."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip of a training view."""
    eval_short_side: Pixels = 800
    """Short side at evaluation, in pixels; long_side applies here too."""
    pad: Multiple = 32
    """Batches are zero-padded on the right and bottom to a multiple of this, in pixels."""
    keep_empty: bool = False
    """Also train on images without ground truth (paper: false)."""
    shuffle_window: Images = 256
    """Images read together and shuffled among themselves; their row groups are drawn at random from the whole epoch."""
    views: Epochs | None = None
    """Distinct augmented views per image: epoch e shows view e mod views; null = a new view in each epoch."""
    view_seed: Seed | None = None
    """Seed of the views alone, so that runs with different run.seed can share a cache of soft targets; null = run.seed."""
    reduced_decode: bool = False
    """Decode a JPEG at half of its size or less where a training view needs no more pixels: up to twice as fast for large
    photos, whose pixels then differ a little. Evaluation and prediction always decode the whole."""
    augment: AugmentSpec = AugmentSpec()
    """Random changes of training views beyond their size and flip; none by default (the paper's views)."""
    sampling: Literal["all", "repeat_factor", "class_balanced"] = "all"
    """Which images make an epoch: all = each once; repeat_factor = images with rare classes several times (LVIS: the square
    root of repeat_threshold / the share of images with the class, at least 1, of the image's rarest class);
    class_balanced = as many images in all, but each class equally often. A repeated image shows another view each time."""
    repeat_threshold: Fraction = 0.001
    """Share of images below which repeat_factor repeats a class (0.001 is LVIS's, meant for 1,200 classes)."""
    unlabelled: Text | None = None
    """Folder or URI of a split of further training images without labels (prepare --unlabelled); labels that it has are not
    read. A teacher says what can be learnt from them: its predictions (teacher.kind: predictions), or its features (methods
    akd, head, fitnet). They give no ground-truth losses and are no negatives. null = none."""
    unlabelled_share: Part = 1.0
    """Share of the unlabelled images that an epoch shows, others in each epoch."""


class DistillSpec(Spec):
    """The loss weights of distillation, and the assistant."""

    assistant: RoIHeadSpec | None = None
    """The assistant's RoI head; null = the teacher's architecture (the paper's for method assist). In a section given here,
    omitted keys take the paper's values, not the teacher's."""
    assistant_weight: Weight = 1.0
    """Weight of the assistant's ground-truth losses."""
    warm_assistant: bool = False
    """Also let assistant_weight rise over warmup_steps, as the research branch does for every pair, but not the released HEAD
    (RetinaNet from Faster R-CNN); method tf_head always does."""
    copy_head: bool = True
    """Start the assistant (fitnet: the student's head) from the teacher's head weights. Needs the same widths on both sides,
    including the pyramid's channels."""
    distance: Literal["mse", "pearson"] = "mse"
    """How AKD and CKD compare a feature with its target. mse = their mean squared difference (the paper); pearson = that of
    features standardised over channels, so that a weight means the same for any teacher, layer and width."""
    akd_weight: Weight = 2.0
    """Weight of each AKD term, one per fully connected layer of the assistant (methods akd, head)."""
    ckd_weight: Weight = 2.0
    """Weight of each CKD term (method head)."""
    ckd_towers: Annotated[tuple[Literal["cls", "box"], ...], Field(min_length=1, max_length=2)] = ("cls",)
    """Towers of a dense student, each of which imitates the same tower of a dense teacher in a CKD term of its own (methods
    head, tf_head). The research branch has both, cls and box, for RetinaNet from RepPoints; other pairs have cls alone."""
    ckd_conv: Layers | None = None
    """Which conv of a dense student's towers CKD trains, 1 = the first (methods head, tf_head); null = the last, as the paper.
    The research branch takes the second for RetinaNet from RepPoints."""
    ckd_bias: bool = True
    """Whether CKD's adapters have a bias (methods head, tf_head). The research branch's for Faster R-CNN from Cascade R-CNN has
    none."""
    warm_ckd: bool = True
    """Let the CKD weight rise over warmup_steps (methods head, tf_head). The research branch does not for Faster R-CNN from
    Cascade R-CNN."""
    fitnet_weight: Weight = 1.0
    """Weight of each pyramid level's feature loss (method fitnet)."""
    fitnet_levels: Annotated[int, Field(ge=1, le=5)] = 5
    """Number of pyramid levels that are imitated, from P3 on (method fitnet). Use fewer if no object is large enough for the
    last ones: their features then grow without bound and dominate the loss."""
    pkd_weight: Weight = 0.0
    """Weight of the PKD term, by which the student's pyramid imitates the teacher's in Pearson correlation, on the levels whose
    strides both have; for any method with an inline teacher that has the same student.neck.channels. 0 = no such term; its
    authors use 6 to 12."""
    assistants: AssistantsSpec = AssistantsSpec()
    """The assistants of method tf_head: at least one, preferably of kinds other than the student's."""
    ckd_epochs: Epochs | None = None
    """Epochs with CKD (methods head, tf_head); its weight is 0 in later ones, while the assistants continue. The research
    branch stops it at the first drop of the learning rate. null = never stop."""
    rois: Literal["student", "teacher"] = "student"
    """RoIs that AKD and CKD compare: student = those that the student proposes in the step (the paper); teacher = the
    ground-truth boxes and the teacher's own proposals, sampled once for each view, so that the teacher's outputs depend on the
    view alone and can be computed elsewhere or cached. (The assistant's ground-truth losses use the student's RoIs in both
    cases.) teacher needs a dense student, and a Faster R-CNN teacher or one of transformers (whose own proposals are the boxes
    of the queries that it is surest of)."""
    roi_budget: Boxes = 128
    """RoIs per view with rois: teacher."""
    warmup_steps: StepsOrNone = 2000
    """Optimizer steps over which the AKD and CKD weights rise linearly from 0 (step 0) to full; for method tf_head, and with
    warm_assistant, also the weights of the assistants' ground-truth losses."""


class OptimSpec(Spec):
    """The optimizer and its schedule."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (the paper's), or adamw, which trains micro models without normalisation layers in a few hundred steps."""
    lr: Rate = 0.01
    """Peak learning rate at a global batch of lr_batch images."""
    lr_batch: Images | None = 16
    """Global batch that lr is meant for. The actual lr scales linearly with the actual global batch, which is
    cluster.workers (at least 1; the most of a range) x data.batch_size x optim.accumulate. null = no scaling."""
    momentum: Fraction = 0.9
    """SGD momentum (adamw: unused)."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decays of AdamW's moving averages of gradients and of their squares (sgd: unused)."""
    weight_decay: Weight = 1e-4
    """L2 decay of the weights (adamw: decoupled from the gradient)."""
    norm_decay: bool = True
    """Apply weight_decay to biases and normalisation layers too, as the paper does. false = only to parameters of two and more
    dimensions, the weights of convolutions and linear layers."""
    clip_norm: Limit | None = 20.0
    """Gradient norm above which gradients are scaled down; null = never."""
    epochs: Epochs = 12
    """Passes over the training images."""
    schedule: Literal["milestones", "cosine", "one_cycle"] = "milestones"
    """How the learning rate changes after warm-up: milestones = multiplied by gamma at each (the paper); cosine = falls along a
    cosine to final_ratio at the end of training; one_cycle = as cosine, and the warm-up also rises along one."""
    milestones: tuple[Epochs, ...] = (8, 11)
    """Epochs after which the learning rate is multiplied by gamma, ascending and below epochs; [] = never. The other schedules
    have none."""
    gamma: Factor = 0.1
    """Factor at each milestone."""
    final_ratio: Fraction = 0.0
    """Learning rate at the end as a share of the peak, with schedule cosine or one_cycle."""
    backbone_lr_factor: Factor = 1.0
    """Learning rate of the student's backbone as a share of lr; 1 = the same (paper). DETRs are usually trained with 0.1, if
    their backbone starts from trained weights."""
    warmup_steps: StepsOrNone = 500
    """Optimizer steps of learning-rate warm-up; a one_cycle often has 30 % of all steps here."""
    warmup_ratio: Fraction = 0.001
    """Learning rate at step 0 as a share of the peak."""
    accumulate: Batch = 1
    """Forward passes whose gradients are averaged into one optimizer step."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of an exponential moving average of the student's weights, which is then evaluated and exported in their
    place; null = no average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward passes; bf16 = autocast, with weights and losses in fp32."""
    compile: Literal["default", "reduce-overhead"] | None = None
    """Mode of torch.compile for backbones, pyramids and dense heads in training steps; null = they are not compiled.
    reduce-overhead also records CUDA graphs. The first steps then take minutes, as do the first ones with views of other sizes.
    It needs a C++ compiler on every machine that trains."""


LENGTH_KEYS = ("optim.epochs", "optim.milestones", "eval.patience")
"""The keys that may change if a run is trained longer: until its former end, nothing is different."""

MAX_DETECTIONS = 100
"""COCO's own number of detections per image."""


class EvalSpec(Spec):
    """COCO evaluation on data.val."""

    every_epochs: Epochs = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    patience: Epochs | None = None
    """Evaluations in a row without a better AP after which training ends early; null = train all epochs. The best checkpoint is
    exported in either case."""
    batch_size: Batch = 2
    """Images per worker and forward pass."""
    max_detections: Boxes = MAX_DETECTIONS
    """Detections per class and image that count, the best first; 100 is COCO's number. If images have more objects, set it to
    the largest number in one image, and the student's postprocess.max_detections (and a two-stage student's
    rpn.test_proposals.post_nms) to at least as many."""
    placement: Literal["trainers", "task"] = "trainers"
    """Who evaluates: trainers = the train workers, which train on when they have ended; task = a Ray task with resources of its
    own, while they train on. The metrics and the exported student are the same; the log has them when they are known, and the
    run ends when all are. Needs cluster.workers of at least 1 and patience null."""
    task: ProcessSpec = ProcessSpec()
    """What the task reserves, and where it may run (placement task). Evaluations are made one after the other."""


class CheckpointSpec(Spec):
    """Checkpoints of the training state, from which a run resumes."""

    every_steps: Steps | None = None
    """Optimizer steps between checkpoints within an epoch; null = only at epoch ends."""


Place = Annotated[str, Field(min_length=1, max_length=200)]
"""Name of an experiment or project of a tracking service."""


class LogSpec(Spec):
    """What a run reports while it trains."""

    every_steps: Steps = 50
    """Optimizer steps between log lines."""
    tensorboard: bool = True
    """Also write TensorBoard events."""
    report: bool | None = None
    """Keep a page on the run in its folder, report.html: curves, what the student gets right and wrong, and pictures, which
    TensorBoard and the trackers get, too. It is written at evaluations, but takes at most a twentieth of the time, and at the
    end. null = yes, if matplotlib is installed (pip install 'headkd-ray[report]')."""
    mlflow: Place | None = None
    """Also track the run in MLflow, in the experiment of this name; MLFLOW_TRACKING_URI in the environment names the server.
    Needs pip install 'headkd-ray[mlflow]'."""
    wandb: Place | None = None
    """Also track the run in Weights & Biases, in the project of this name; WANDB_MODE=offline, WANDB_ENTITY and the like belong
    into the environment. Needs pip install 'headkd-ray[wandb]'."""


class ClusterSpec(Spec):
    """Where the run is executed."""

    workers: Workers = 1
    """Ray Train workers; 0 = the same loop in this process, without Ray. [fewest, most] = as many as the cluster has room for
    at any time: the run continues with fewer when nodes are lost, and with more when they join. Steps, global batch, learning
    rate and order of images are those of the most; with fewer, each worker processes the batches of several in turn."""
    address: str | None = None
    """Ray cluster address (auto, host:port, ray://host:port); null = RAY_ADDRESS, else the cluster running
    on this machine, else a new one for the duration of the command."""
    gpus_per_worker: Fraction | None = None
    """GPUs per worker: 1 trains on a GPU, 0 on the CPU; null = 1 if the cluster has GPUs for all workers, else 0."""
    cpus_per_worker: Share = 1.0
    """CPUs that Ray reserves per worker."""
    labels: Labels = Field(default_factory=dict)
    """Labels that the nodes of train workers must have, for example {market: on-demand}; a value may also be !spot,
    in(a100, h100) or !in(...). Data tasks may run on any node."""
    accelerator_type: Text | None = None
    """Kind of GPU that train workers need, by the name that Ray gives it, such as A10G, L4, A100 or H100; null = any."""
    data_cpus: Share = 1.0
    """CPUs left free for each worker's data tasks (decoding and augmentation), one CPU per task."""
    threads_per_worker: Threads | None = None
    """PyTorch CPU threads per worker; null = cpus_per_worker (without Ray: PyTorch's own choice)."""
    max_failures: Restarts = 3
    """Restarts from the last checkpoint, after the loss of a worker or of Ray Train's controller, before the run gives up.
    Nodes that Ray knows to be taken away do not count here."""
    max_preemption_failures: Restarts | None = None
    """Restarts because a node of a worker was drained, as a spot machine is before its cloud takes it back; null = no limit. A
    drain is announced, so the workers write a checkpoint at once and no step is repeated."""
    preemption_grace_s: SecondsOrNone = 0.0
    """Seconds beyond the deadline of a drain for which the workers on other nodes may go on writing that checkpoint."""
    dashboard: bool = False
    """Start Ray's dashboard with a cluster that the command starts for itself, and print its address."""
    log_to_driver: bool = False
    """Also print what the processes of the run write to their standard output and error, which Ray keeps in its logs."""
    resize_seconds: Seconds = 60.0
    """With a range of workers: seconds between checks whether there is room for more. Each change resumes from the last
    checkpoint."""

    @property
    def fewest_workers(self) -> int:
        """The number of workers with which the run can start and continue."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers that defines the run's steps."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Job(Spec):
    """The configuration of one training run."""

    run: RunSpec
    """The name of the run and where it writes."""
    method: Method
    """The method: supervised = student (or teacher) from labels and pseudo labels alone; assist = with a fresh assistant;
    copy_only = assistant copied from the teacher, no distillation loss; akd = + assistant distillation; head = + cross
    distillation; fitnet = feature distillation from a RetinaNet teacher; tf_head = assistants of other kinds instead of a
    teacher."""
    data: DataSpec
    """The prepared shards and how they become batches."""
    student: DetectorSpec = RetinaNetSpec()
    """The detector that is trained and exported."""
    teacher: TeacherSpec | None = None
    """The teacher; required by copy_only, akd, head and fitnet. Other methods can only have one of kind predictions; null =
    none."""
    distill: DistillSpec = DistillSpec()
    """The loss weights of distillation, and the assistant; no effect for method supervised."""
    losses: LossesSpec = LossesSpec()
    """The classification losses."""
    optim: OptimSpec = OptimSpec()
    """The optimizer and its schedule."""
    eval: EvalSpec = EvalSpec()
    """COCO evaluation on data.val."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """Checkpoints of the training state, from which a run resumes. The latest and the best by AP are kept; at least two."""
    log: LogSpec = LogSpec()
    """What the run reports while it trains."""
    cluster: ClusterSpec = ClusterSpec()
    """Where the run is executed."""
