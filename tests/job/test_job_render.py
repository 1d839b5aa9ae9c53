"""--print-config prints every key with its meaning, and reads back as the same job."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headkd_ray.job import CascadeRCNNSpec, FasterRCNNSpec, Job, RoIHeadSpec, load_job, render_job

TEXT = st.text(min_size=1, max_size=12).filter(
    lambda text: not yaml.reader.Reader.NON_PRINTABLE.search(text)
) | st.sampled_from(
    [
        "1e-3",
        "no",
        "null",
        "~",
        "1_000",
        "0x1F",
        "010",
        "3:30",
        "2024-01-01",
        "=",
        "a: b",
        "a #b",
        "- a",
        "s3://b/c?d=e",
        "é\u0085",
        "'\"\\",
    ]
)
NUMBERS = st.floats(min_value=1e-300, max_value=1000)
KWARGS = st.fixed_dictionaries(
    {},
    optional={
        "layers": st.lists(st.integers(1, 256), min_size=1, max_size=4),
        "stem_width": st.integers(1, 65536),
        "mlp_ratio": st.floats(0, 65536),
        "strict_img_size": st.booleans(),
        "norm_layer": st.from_regex(r"[A-Za-z0-9_]{1,40}", fullmatch=True)
        | st.sampled_from(["no", "null", "1e3", "010", "1_000"]),
    },
)
ROI = st.builds(RoIHeadSpec, fcs=st.integers(1, 4), finest_scale=NUMBERS)
RETINANET = st.fixed_dictionaries(
    {
        "kind": st.just("retinanet"),
        "backbone": st.fixed_dictionaries(
            {
                "name": TEXT,
                "kwargs": KWARGS,
                "weights": st.just("timm"),
                "leaky_slope": st.none() | NUMBERS,
            }
        ),
    }
)
TWO_STAGE = FasterRCNNSpec | CascadeRCNNSpec
STUDENTS = RETINANET | st.sampled_from([FasterRCNNSpec, CascadeRCNNSpec]).map(
    lambda kind: kind.model_validate({"backbone": {"weights": "timm"}, "neck": {"channels": 8}})
)


@st.composite
def jobs(draw: Any) -> Job:
    student = draw(STUDENTS)
    method = "supervised" if isinstance(student, TWO_STAGE) else draw(st.sampled_from(["head", "akd", "supervised", "assist"]))
    teacher = {"checkpoint": draw(TEXT), "classes": draw(st.none() | st.lists(TEXT, min_size=1, max_size=3))}
    return Job.model_validate(
        {
            "run": {"name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)), "storage": draw(TEXT)},
            "method": method,
            "data": {
                "train": draw(TEXT),
                "val": draw(TEXT),
                "flip": draw(st.floats(0, 1)),
                "views": draw(st.none() | st.integers(1, 9)),
            },
            "student": student,
            "teacher": teacher if method in ("head", "akd") else None,
            "distill": {"assistant": draw(st.none() | ROI)},
            "optim": {
                "lr": draw(NUMBERS),
                "clip_norm": draw(st.none() | NUMBERS),
                "milestones": draw(st.sampled_from([[], [1], [3, 7]])),
            },
        }
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(jobs())
def test_printed_config_loads_back_to_an_equal_job(tmp_path, job):
    path = tmp_path / "job.yaml"
    path.write_text(render_job(job), encoding="utf-8")
    assert load_job(path) == job


def test_printed_config_has_every_key_with_its_comment():
    job = Job.model_validate({"run": {"name": "x"}, "method": "supervised", "data": {"train": "a", "val": "b"}})
    text = render_job(job)
    assert yaml.safe_load(text) == job.model_dump(mode="json")  # readers of plain YAML 1.1 agree
    lines = text.splitlines()
    for number, line in enumerate(lines):
        assert len(line) <= 120
        if line and not line.lstrip().startswith("#"):
            assert lines[number - 1].lstrip().startswith("# "), f"no comment above {line!r}"
    assert "  # Peak learning rate at a global batch of lr_batch images.\n  lr: 0.01\n" in text
