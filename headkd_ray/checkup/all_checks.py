"""The list of all checks, and running them one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headkd_ray.checkup import box_findings, machine_findings, similarity_findings, size_findings
from headkd_ray.checkup import teacher_findings as teacher
from headkd_ray.checkup import training_findings as training
from headkd_ray.checkup.findings import Example, Finding, Level, gravest, skipped
from headkd_ray.checkup.subject import Subject
from headkd_ray.errors import UserError
from headkd_ray.text import printable

Check = Callable[[Subject], Finding]

CHECKS: dict[str, Check] = {
    "job": training.check_job,
    "files": box_findings.check_files,
    "images": box_findings.check_images,
    "classes": box_findings.check_classes,
    "tiny boxes": box_findings.check_tiny,
    "whole-image boxes": box_findings.check_whole,
    "double boxes": box_findings.check_double,
    "boxes of two classes": box_findings.check_double_class,
    "images without boxes": box_findings.check_empty,
    "near-duplicates": similarity_findings.check_near_duplicates,
    "leaks": similarity_findings.check_leaks,
    "vanishing boxes": size_findings.check_vanishing,
    "anchors": size_findings.check_anchors,
    "class lists": teacher.check_class_lists,
    "teacher": teacher.check_teacher,
    "learning rate": training.check_learning_rate,
    "steps": training.check_steps,
    "cache": teacher.check_cache,
    "storage": machine_findings.check_storage,
    "reading": machine_findings.check_reading,
    "cluster": machine_findings.check_cluster,
}
"""By name, in the order in which they are run and shown."""


def run_check(name: str, subject: Subject) -> Finding:
    """Make one check; the finding of one that cannot be made says why."""
    if name in subject.options.skip:
        return skipped(name, "left out (--skip)")
    try:
        found = CHECKS[name](subject)
    except UserError as error:
        found = skipped(name, f"not possible: {'; '.join(error.problems[:2])}")
    except OSError as error:  # of a disk or a network that failed meanwhile
        found = skipped(name, f"not possible: {error}")
    return _printable(found)


def _printable(finding: Finding) -> Finding:
    """Return the finding without control characters and secrets, which names and addresses may have."""
    return replace(finding, found=printable(finding.found), mend=None if finding.mend is None else printable(finding.mend))


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 2 if the job cannot start, 1 if something else is red, else 0."""
    red = {finding.check for finding in findings if finding.level == "red"}
    return 2 if "job" in red else 1 if red else 0


def as_json(findings: Sequence[Finding], subject: Subject) -> dict[str, Any]:
    """Return the findings as a JSON value."""
    names = file_names(findings, subject)
    return {
        "run": subject.job.run.name,
        "verdict": verdict(findings),
        "findings": [
            {
                "check": finding.check,
                "level": finding.level,
                "found": finding.found,
                "mend": finding.mend,
                "figures": finding.figures,
                "examples": [_example(example, subject, names) for example in finding.examples],
            }
            for finding in findings
        ],
    }


def verdict(findings: Sequence[Finding]) -> Level:
    """Return the gravest level of all findings."""
    return gravest([finding.level for finding in findings])


def file_names(findings: Sequence[Finding], subject: Subject) -> dict[tuple[str, int], str]:
    """Return the file name of each example's images, by split and row."""
    examples = [example for finding in findings for example in finding.examples]
    shown = {each for example in examples for each in (example, example.beside) if each is not None}
    return {
        (split, row): name
        for split in sorted({each.split for each in shown})
        for row, name in subject.split(split).names_at(each.row for each in shown if each.split == split).items()
    }


def _example(example: Example, subject: Subject, names: Mapping[tuple[str, int], str]) -> Mapping[str, Any]:
    shards = subject.split(example.split)
    beside = None if example.beside is None else _example(example.beside, subject, names)
    return {
        "split": example.split,
        "image_id": int(shards.index.image_id[example.row]),
        "file_name": names[example.split, example.row],
        "caption": example.caption,
        "boxes": [list(box) for box in example.boxes],
        "classes": [shards.meta.classes[label] for label in example.labels],
        **({} if beside is None else {"beside": beside}),
    }
