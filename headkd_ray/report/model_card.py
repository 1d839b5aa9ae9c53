"""Write the model card of a checkpoint: the README.md of its repository on the Hugging Face Hub."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from headkd_ray.report.tables import HEADLINE
from headkd_ray.text import printable

LIBRARY = "headkd_ray"
PAPER = "[HEAD: HEtero-Assists Distillation for Heterogeneous Object Detectors](https://arxiv.org/abs/2207.05345)"


def model_card(
    repository: str,
    model: Mapping[str, Any],
    job: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    licence: str | None = None,
) -> str:
    """Return the card in Markdown, with the metadata that the hub reads as YAML in front.

    Args:
        repository: ``owner/name``.
        model: content of the checkpoint's ``model.json``.
        job: the job of its run; None = unknown.
        data: fingerprint of each of the run's splits, by job key.
        licence: the hub's identifier of a licence (``apache-2.0``); None = the card names none.
    """
    meta, spec = model.get("meta", {}), model["spec"]
    kind, method = spec["kind"], _escaped(str(meta.get("method", "supervised")))
    if "backbone" in spec:
        network, extras = f"`{kind}` with the backbone `{spec['backbone']['name']}`", "hub"
    else:  # a whole network of another library, which reads the repository too
        network, extras = f"`{spec['model']}` of `{kind}`", "hub,teachers"
    distilled = method != "supervised"
    tags = [LIBRARY, "object-detection", kind, *(["knowledge-distillation"] if distilled else [])]
    front = {"library_name": LIBRARY, "pipeline_tag": "object-detection", "tags": tags}
    if licence is not None:
        front["license"] = licence
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_escaped(repository.rpartition('/')[2])}",
        f"An object detector: {network}, for {len(model['classes'])} classes. "
        f"Trained with {LIBRARY}" + (f" by the method {method}; see {PAPER}." if distilled else "."),
        "## Use\n\n```sh\n"
        f'python -m pip install "headkd-ray[{extras}]"\n'
        f"python -m headkd_ray.predict hf://{repository} photos --out found\n"
        f"python -m headkd_ray.evaluate hf://{repository} data/val\n```",
        "## Classes\n\n" + ", ".join(map(_escaped, model["classes"])),
        *_results(meta),
        *_training(meta, job, data or {}),
    ]
    return "\n\n".join(parts) + "\n"


def _results(meta: Mapping[str, Any]) -> Iterator[str]:
    metrics = meta.get("metrics")
    if not isinstance(metrics, Mapping):
        return
    yield "## Results\n\nCOCO box AP in percent, on " + (
        f"the {metrics['images']} images of the run's validation split:"
        if "images" in metrics
        else "the run's validation split:"
    )
    yield _table(HEADLINE, [[_number(metrics.get(name)) for name in HEADLINE]])
    per_class = metrics.get("per_class")
    if isinstance(per_class, Mapping) and per_class:
        yield _table(("class", "AP"), ([_escaped(name), _number(value)] for name, value in per_class.items()))


def _training(meta: Mapping[str, Any], job: Mapping[str, Any] | None, data: Mapping[str, str]) -> Iterator[str]:
    facts = {"step": meta.get("step"), **{f"fingerprint of {key}": value for key, value in data.items()}}
    versions = meta.get("versions")
    facts |= versions if isinstance(versions, Mapping) else {}
    lines = [f"- {_escaped(name)}: {_escaped(str(value))}" for name, value in facts.items() if value is not None]
    if lines or job is not None:
        yield "## Training"
    if lines:
        yield "\n".join(lines)
    if job is not None:
        written = yaml.safe_dump(dict(job), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        yield f"<details><summary>Job file</summary>\n\n{_fenced(written)}\n\n</details>"


def _table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"


def _escaped(text: str) -> str:
    """Return text from a file so that Markdown and HTML show it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", html.escape(" ".join(printable(text).split()), quote=False))


def _fenced(text: str) -> str:
    """Return YAML as a block of code, which nothing in the text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{printable(text)}{fence}"
