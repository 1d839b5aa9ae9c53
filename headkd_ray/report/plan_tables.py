"""The tables of a plan: the measured costs, and the predictions with one row per number of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def cost_table(costs: Mapping[str, float], device: str) -> Table:
    """Return the table of ``costs``, the fields of ``profiling.cost_model.Costs`` as measured on ``device``."""
    table = Table(title=f"measured here, one worker ({device})")
    table.add_column("part")
    table.add_column("ms", justify="right")
    rows = {
        "an image: read, decode and augment, on one CPU": "image_seconds",
        "a micro-batch: student and assistants": "student_seconds",
        "a micro-batch: teacher": "teacher_seconds",
        "a step: optimizer": "update_seconds",
        "an image: evaluate": "eval_seconds",
    }
    for what, name in rows.items():
        table.add_row(what, f"{costs[name] * 1e3:.1f}" if costs[name] else "–")
    return table


def plan_table(plans: Sequence[Mapping[str, Any]], with_money: bool) -> Table:
    """Return the table of ``plans``, the fields of ``profiling.cost_model.Plan``, with GPU hours if any, else CPU hours."""
    table = Table(title="the run, by number of workers", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    on_gpus = any(plan["gpu_hours"] for plan in plans)
    columns = {
        "workers": lambda plan: str(plan["workers"]),
        "steps": lambda plan: str(plan["steps"]),
        "s/step": lambda plan: f"{plan['step_seconds']:.3g}",
        "images/s": lambda plan: f"{plan['images_per_second']:.4g}",
        "hours": lambda plan: f"{plan['hours']:.3g}",
        "GPU-h" if on_gpus else "CPU-h": lambda plan: f"{plan['gpu_hours' if on_gpus else 'cpu_hours']:.4g}",
        **({"money": lambda plan: f"{plan['money']:.2f}"} if with_money else {}),
        "MB/step": lambda plan: f"{(plan['reduce_bytes'] + plan['pool_bytes']) / 1e6:.1f}",
        "bottleneck": lambda plan: plan["bottleneck"],
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "bottleneck" else "right")
    for plan in plans:
        table.add_row(*(cell(plan) for cell in columns.values()))
    return table
