"""Whether the job starts, whether its learning rate and schedule fit its length, and what a step needs."""

from __future__ import annotations

import math
import os

from headkd_ray.checkup.findings import Finding, Level, gravest
from headkd_ray.checkup.subject import Subject
from headkd_ray.checkup.teacher_findings import gigabytes
from headkd_ray.data.epoch_order import steps_per_epoch
from headkd_ray.data.repeats import sampling_of
from headkd_ray.engine.loop import smaller_steps
from headkd_ray.engine.optim import peak_lr
from headkd_ray.engine.preflight import preflight
from headkd_ray.errors import DeviceMemoryError, UserError
from headkd_ray.job import Job, OptimSpec, warnings
from headkd_ray.job.method_terms import terms_of
from headkd_ray.text import rounded
from headkd_ray.trackers import tracker_problems

STRETCH = 8.0
"""Factor, up or down, beyond which scaling the learning rate with the batch is called out (Goyal et al. 2017 went up to 32,
with a warm-up of 5 epochs)."""
LONG_WARMUP = 0.5
"""Share of a run's steps from which a warm-up is called too long."""
TIGHT = 0.9
"""Share of the memory from which a peak is called out."""


def check_job(subject: Subject) -> Finding:
    """Run the checks that ``train`` makes before it starts, without starting anything."""
    try:
        subject.job = preflight(subject.job, tracker_problems(subject.job))
    except UserError as error:
        lines = [line for problem in error.problems for line in problem.splitlines()]
        found = "it cannot start: " + "; ".join(line.strip().removeprefix("- ") for line in lines)
        return Finding("job", "red", found, "Mend these first; train would stop with the same message.", {"problems": lines})
    told = warnings(subject.job)
    if told:
        return Finding("job", "yellow", "; ".join(told), "Change the keys if it is not what you mean.", {"warnings": told})
    return Finding("job", "green", "train would start it")


def check_learning_rate(subject: Subject) -> Finding:
    """Compare the learning rate with the batch, and the warm-ups with the length of the run."""
    job, optim = subject.job, subject.job.optim
    batch = max(1, job.cluster.most_workers) * job.data.batch_size * optim.accumulate
    steps = total_steps(subject)
    told, levels, mends = [], list[Level](["green"]), list[str]()
    factor: float | None
    if optim.lr_batch is not None:
        factor = batch / optim.lr_batch
        told.append(
            f"{peak_lr(optim, batch):.3g} for {batch} images a step: optim.lr {optim.lr:g} at {optim.lr_batch} images, scaled "
            f"linearly by {factor:.3g}"
        )
    else:
        factor = _against_paper(optim, batch)
        told.append(f"{optim.lr:g} for {batch} images a step, not scaled (optim.lr_batch is null)")
        if factor is not None:
            told.append(f"{factor:.3g} times the paper's for such a batch")
    if factor is not None and not 1 / STRETCH <= factor <= STRETCH:
        levels.append("yellow")
        mends.append(
            "So far from the batch that it is meant for, the linear rule is a guess: try a few values of optim.lr (headkd tune)"
            + (", and a longer optim.warmup_steps." if factor > 1 else ", or make batches larger with optim.accumulate.")
        )
    warmups = {"optim.warmup_steps": optim.warmup_steps}
    if terms_of(job) and not set(terms_of(job)) <= {"fitnet"}:
        warmups["distill.warmup_steps"] = job.distill.warmup_steps
    for key, length in warmups.items():
        if length > LONG_WARMUP * steps:
            levels.append("red" if length >= steps else "yellow")
            told.append(f"{key} {length} of {steps} steps in all")
            mends.append(f"Lower {key}, to a tenth of the steps for example, or train longer (optim.epochs).")
    figures = {"lr": peak_lr(optim, batch), "global_batch": batch, "factor": factor, "steps": steps}
    return Finding("learning rate", gravest(levels), "; ".join(told), " ".join(mends) or None, figures)


def _against_paper(optim: OptimSpec, batch: int) -> float | None:
    """Return the learning rate as a multiple of the paper's for such a batch; None for AdamW, which the paper does not use."""
    paper = OptimSpec()
    return optim.lr / peak_lr(paper, batch) if optim.optimizer == paper.optimizer else None


def total_steps(subject: Subject) -> int:
    """Return the optimizer steps of the whole run."""
    job = subject.job
    images = sampling_of(subject.split("train"), job.data).images
    micro = steps_per_epoch(images, job.data.batch_size, max(1, job.cluster.most_workers), job.optim.accumulate)
    return micro // job.optim.accumulate * job.optim.epochs


def check_steps(subject: Subject) -> Finding:
    """Take two optimizer steps on the largest batch that the job can meet, and evaluate its largest one."""
    try:
        trial = subject.trial()
    except DeviceMemoryError as error:
        return Finding("steps", "red", str(error), "Ask for less, as the message says, or train where there is more memory.")
    on_gpu = trial.device.type == "cuda"
    peak = max(trial.peak_bytes, trial.eval_peak_bytes)
    here = 1 if on_gpu else _workers_here(subject.job)
    broken = [losses for losses in trial.losses if not all(map(math.isfinite, losses.values()))]
    figures = {
        "device": trial.device.type,
        "height": trial.size[0],
        "width": trial.size[1],
        "images": trial.images,
        "seconds": round(trial.seconds, 4),
        "peak_bytes": trial.peak_bytes,
        "eval_peak_bytes": trial.eval_peak_bytes,
        "memory_bytes": trial.total_bytes,
        "losses": [{name: value if math.isfinite(value) else None for name, value in each.items()} for each in trial.losses],
    }
    place = "the GPU" if on_gpu else "this process (CPU)"
    found = (
        f"{trial.images} images of {trial.size[1]} x {trial.size[0]} px with up to {trial.boxes} boxes: "
        f"{rounded(trial.seconds)} s a step, peak of {place} {gigabytes(peak)} of {gigabytes(trial.total_bytes)}"
    )
    if trial.teacher_inside:
        found += ", with the teacher, which the job has in processes of its own"
    if not on_gpu and subject.job.cluster.gpus_per_worker:
        found += "; the job asks for GPUs, which need other amounts"
    if broken:
        found += f"; the loss is not finite: {broken[0]}"
        mend = "Lower optim.lr or optim.clip_norm, or raise optim.warmup_steps; check the weights that training starts from."
        return Finding("steps", "red", found, mend, figures)
    if peak * here > TIGHT * trial.total_bytes:
        found += "" if here == 1 else f", and {here} workers would run here"
        return Finding("steps", "yellow", found, _sentence(smaller_steps(subject.job)), figures)
    return Finding("steps", "green", found, None, figures)


def _workers_here(job: Job) -> int:
    """Return how many workers a machine like this one would get."""
    each = job.cluster.cpus_per_worker + job.cluster.data_cpus
    return max(1, min(job.cluster.most_workers, int((os.cpu_count() or 1) / each)))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
