"""Every mistake in a job file is named at once, with its line and what was probably meant."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from headkd_ray.errors import JobError
from headkd_ray.job import CascadeRCNNSpec, FasterRCNNSpec, Job, RetinaNetSpec, load_job, render_job
from headkd_ray.tuning.search_spec import SearchSpec

KINDS = "retinanet, fcos, gfl, reppoints, faster_rcnn, cascade_rcnn, transformers"

MINIMAL = """\
run:
  name: x
method: supervised
data:
  train: data/train
  val: data/val
student:
  kind: retinanet
  backbone: {frozen_stages: 0, norm_eval: false}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes job.yaml into the current folder, so that messages begin with ``job.yaml``."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str | bytes) -> str:
        Path("job.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return "job.yaml"

    return _write


def mistakes(path: str, *overrides: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    return caught.value.problems


def test_minimal_job_takes_the_paper_s_defaults(write):
    job = load_job(write(MINIMAL))
    assert isinstance(job, Job)
    assert (job.optim.lr, job.optim.milestones, job.optim.epochs) == (0.01, (8, 11), 12)
    assert job.data.train == "data/train"  # as written, relative to the command's folder and not to the job file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: 0.1", "lr: unknown key; did you mean optim.lr?"),
        ("optim: {lrr: 0.1}", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("optimizer: {lr: 0.1}", "optimizer: unknown key; did you mean optim?"),
        ("optimizer: sgd", "optimizer: unknown key; did you mean optim.optimizer?"),
        ("batch_size: 2", "batch_size: unknown key; did you mean data.batch_size or teacher.batch_size or eval.batch_size?"),
        ("log: {every_step: 2}", "log.every_step: unknown key; did you mean log.every_steps?"),
        (
            "distill: {assistant: {fcss: 2}}",
            "distill.assistant.fcss: unknown key; did you mean distill.assistant.fcs?",
        ),
        (
            "distill: {assistant: {sampler: {sizes: 2}}}",
            "distill.assistant.sampler.sizes: unknown key; did you mean distill.assistant.sampler.size?",
        ),
        ("cluster: {qqq: 2}", "cluster.qqq: unknown key; cluster has workers, address, gpus_per_worker"),
        ("<<: {lr: 2}", "<<: unknown key; a job has run, method, data, student"),
    ],
)
def test_misspelt_key_at_every_depth(write, line, message):
    (problem,) = mistakes(write(MINIMAL + line + "\n"))
    assert problem.startswith(f"job.yaml:10: {message}")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("backbone.frozen_stage=0", "student.backbone.frozen_stage: unknown key; did you mean student.backbone.frozen_stages?"),
        ("head.anchors.ratio=[1]", "student.head.anchors.ratio: unknown key; did you mean student.head.anchors.ratios?"),
        (
            "head.proposals.pre_nsm=3",
            "student.head.proposals.pre_nsm: unknown key; did you mean student.head.proposals.pre_nms?",
        ),
    ],
)
def test_misspelt_key_in_the_student_shows_no_trace_of_the_union(write, key, message):
    assert mistakes(write(MINIMAL), f"student.{key}") == [f"override student.{key}: {message}"]


def test_label_selectors_are_those_of_ray(write):
    for value in ("spot", "!spot", "in(spot)", "in(a100, h100)", "!in(a,b)", "v1.2_x-y"):
        job = load_job(write(MINIMAL + f'cluster: {{labels: {{market: "{value}"}}}}\n'))
        assert job.cluster.labels == {"market": value}
    for value in ("in(spot", "a b", "", "!!spot", "in()", "in(a;b)", "-a"):
        (told,) = mistakes(write(MINIMAL + f'cluster: {{labels: {{market: "{value}"}}}}\n'))
        assert f"cluster.labels.market: {value!r} does not select labels; it must be a label's value" in told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=two", "'two' is not a whole number"),
        ("data.batch_size=2.5", "2.5 is not a whole number"),
        ("data.batch_size=1e1", "1e1 must be a whole number; write 10"),
        ("data.batch_size='2'", "'2' is not a whole number"),
        ("data.batch_size=true", "true is not a whole number"),
        ("data.batch_size=0", "0 must be above 0"),
        ("data.batch_size=null", "null is not a whole number"),
        ("data.batch_size=[2]", "[2] is not a whole number"),
        ("data.flip=1.5", "1.5 must be at most 1"),
        ("data.flip=yes", "'yes' is not a number"),
        ("data.keep_empty=yes", "'yes' is not true or false"),
        ("optim.lr=.inf", ".inf is not a finite number"),
        ("run.seed=-1", "-1 must be at least 0"),
        ("run.seed=4294967296", "4294967296 must be below 4294967296"),
        ("run.name=" + "n" * 300, f"'{'n' * 55} ... has 300 characters; at most 200 are allowed"),
        ("data.batch_size=1e300", "1e300 is not a whole number"),
        ("optim.lr=1e300", "1e300 must be at most 1000"),
        ("data.pad=100000", "100000 must be at most 4096"),
        ("data.eval_short_side=1000000", "1000000 must be at most 32768"),
        ("cluster.threads_per_worker=100000000", "100000000 must be at most 4096"),
        ("cluster.preemption_grace_s=-1", "-1 must be at least 0"),
        ("student.head.convs=10000000", "10000000 must be at most 100"),
        ("student.pixels.std=[1, 0, 1]", "0 must be at least 1e-06"),
        (
            "run.name=my run",
            "'my run' may contain only letters, digits, dots, dashes and underscores, and must start with a letter or digit",
        ),
        ("data.train=", "is empty (null); text is expected"),
        ("data.train=''", "is empty"),
        ("data.short_side=640", "640 is not a list; write [640, 640]"),
        ("data.short_side=640-800", "'640-800' is not a list; write [640, 800]"),
        ("data.short_side=(640, 800)", "'(640, 800)' is not a list; write [640, 800]"),
        ("optim.milestones=8", "8 is not a list; write [8]"),
        ("data.short_side=[1, 2, 3]", "[1, 2, 3] has 3 values; 2 are expected"),
        ("method=heads", "'heads' is not one of supervised, assist, akd, head, copy_only, fitnet, tf_head; did you mean head?"),
        ("optim.precision=int4", "'int4' is not one of fp32, bf16"),
        (
            "student.kind=retina",
            f"'retina' is not one of {KINDS}; did you mean retinanet?",
        ),
        ("student.kind=null", f"null is not one of {KINDS}"),
        ("student.head.anchors.ratios=[]", "the list is empty"),
        ("optim=3", "3 is not a section (a mapping of keys)"),
        ("optim=null", "is empty; give its keys or remove it"),
        ("student.backbone.kwargs=3", "3 is not a section (a mapping of keys)"),
        (
            "student.backbone.kwargs.pretrained=true",
            "is set by the detector itself; remove it (student.backbone.weights chooses the initial weights)",
        ),
        ("student.backbone.kwargs.features_only=true", "is set by the detector itself; remove it"),
        ("student.backbone.kwargs.chanels=[8]", "is not one of the arguments that shape a network; did you mean channels?"),
        (
            "student.backbone.kwargs.layers=[10000000]",
            "[10000000] is not a whole number from 1 to 256, or a list of such numbers, one per stage",
        ),
        ("student.backbone.kwargs.stem_width=8.5", "8.5 is not a whole number from 1 to 65536, or a list of such numbers"),
        ("student.backbone.kwargs.drop_path_rate=5", "5 is not a number from 0 to below 1"),
        ("student.backbone.kwargs.norm_layer=a/b.pth", "'a/b.pth' is not a short name of letters, digits and underscores"),
    ],
)
def test_wrong_value(write, override, message):
    key = override.split("=")[0]
    place = key + "[1]" if "[1, 0" in override else key
    assert mistakes(write(MINIMAL), override) == [f"override {override}: {place}: {message}"]


def test_the_spelling_is_that_of_the_last_place(write):
    assert mistakes(write(MINIMAL + "optim: {epochs: 1e1}\n")) == [
        "job.yaml:10: optim.epochs: 1e1 must be a whole number; write 10"
    ]
    assert mistakes("job.yaml", "optim.epochs=2.50") == ["override optim.epochs=2.50: optim.epochs: 2.50 is not a whole number"]


@pytest.mark.parametrize("top", [Job, SearchSpec])
def test_every_number_has_an_upper_bound(top):
    schema = top.model_json_schema()
    found = list(numbers(schema))
    assert len(found) > 20
    assert not [node for node in found if not node.keys() & {"maximum", "exclusiveMaximum"}]
    assert not [node for node in found if node["type"] == "number" and not node.keys() & {"minimum", "exclusiveMinimum"}]


def numbers(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the nodes of a JSON Schema that describe a number."""
    if isinstance(node, dict):
        if node.get("type") in ("integer", "number"):
            yield node
        for value in node.values():
            yield from numbers(value)
    elif isinstance(node, list):
        for value in node:
            yield from numbers(value)


def test_wrong_list_item_and_too_short_list(write):
    assert mistakes(write(MINIMAL), "optim.milestones=[1, x]", "data.short_side=[640]") == [
        "override optim.milestones=[1, x]: optim.milestones[1]: 'x' is not a whole number",
        "override data.short_side=[640]: data.short_side[1]: missing; the list needs one more value",
    ]


def test_all_mistakes_at_once_with_their_lines(write):
    text = """\
run: {nam: x}
data:
  train: a
  batch_size: two
optim:
  # a comment
  lrr: 1e-3
  epochs: 4
  milestones:
    - 2
    - 9
  clip_norm: -1
student:
  kind: retinanat
  head:
    channel: 64
teacher:
  checkpoint: c
method: supervised
lr: 3
"""
    assert mistakes(write(text), "eval.every=2", "data.long_side=700") == [
        "job.yaml:1: run.name: missing (Name of the run: its folder under storage)",
        "job.yaml:1: run.nam: unknown key; did you mean run.name?",
        "job.yaml:2: data.val: missing (Folder or URI of the prepared validation split)",
        "job.yaml:2: data.short_side: 800 is above data.long_side (700)",
        "job.yaml:2: data.eval_short_side: 800 is above data.long_side (700)",
        "job.yaml:4: data.batch_size: 'two' is not a whole number",
        "job.yaml:7: optim.lrr: unknown key; did you mean optim.lr?",
        "job.yaml:9: optim.milestones: [9] is not before the end of training (optim.epochs is 4)",
        "job.yaml:12: optim.clip_norm: -1 must be above 0",
        "job.yaml:13: student.backbone.frozen_stages: 1 would freeze random initial weights; "
        "set student.backbone.weights (timm, or a file) or frozen_stages: 0",
        "job.yaml:13: student.backbone.norm_eval: true would keep BatchNorm from learning its statistics; "
        "set student.backbone.weights (timm, or a file) or norm_eval: false",
        f"job.yaml:14: student.kind: 'retinanat' is not one of {KINDS}; did you mean retinanet?",
        "job.yaml:16: student.head.channel: unknown key; did you mean student.head.channels?",
        "job.yaml:17: teacher: method supervised uses no teacher; remove the section (or override teacher=null)",
        "job.yaml:20: lr: unknown key; did you mean optim.lr?",
        "override eval.every=2: eval.every: unknown key; did you mean eval.every_epochs?",
    ]


def test_missing_sections_are_named_at_the_top(write):
    problems = mistakes(write("# nothing\nlog: {}\n"))
    assert [line.split(" (")[0] for line in problems][:3] == [
        "job.yaml:1: run: missing",
        "job.yaml:1: method: missing",
        "job.yaml:1: data: missing",
    ]


def test_unknown_kind_is_guessed_so_that_its_section_is_checked(write):
    text = MINIMAL.replace("kind: retinanet", "roi: {fcss: 2}")
    assert mistakes(write(text)) == [
        f"job.yaml:7: student.kind: missing; one of {KINDS}",
        "job.yaml:8: student.roi.fcss: unknown key; did you mean student.roi.fcs?",
    ]


def test_keys_of_the_other_kind_are_unknown(write):
    (problem,) = mistakes(write(MINIMAL), "student.rpn={}")
    assert problem.startswith("override student.rpn={}: student.rpn: unknown key")


def test_repeated_key(write):
    text = MINIMAL + "optim:\n  lr: 0.1\n  epochs: 12\n  lr: 0.2\n"
    assert mistakes(write(text)) == ["job.yaml:13: optim.lr: written twice (first on line 11); keep one"]


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", "+.001", "1E-3", ".1e-2"])
def test_numbers_with_exponents(write, number):
    assert load_job(write(MINIMAL + f"optim: {{lr: {number}}}\n")).optim.lr == 0.001
    assert load_job("job.yaml", [f"optim.lr={number}"]).optim.lr == 0.001


def test_overrides_are_yaml_and_apply_in_order(write):
    job = load_job(
        write(MINIMAL + "teacher: {checkpoint: t}\n"),
        [
            "optim.milestones=[2, 3]",
            "optim.clip_norm=null",
            "optim.epochs=5",
            "optim.epochs=6",
            "student.neck={channels: 32}",
            "student.neck.extra=conv_p5",
            "student.backbone.kwargs.stem_width=8",
            'run.name="7"',
            "run.storage=s3://bucket/runs?region=eu",
            "teacher=null",
        ],
    )
    assert (job.optim.milestones, job.optim.clip_norm, job.optim.epochs) == ((2, 3), None, 6)
    assert isinstance(job.student, RetinaNetSpec)
    assert (job.student.neck.channels, job.student.neck.extra) == (32, "conv_p5")
    assert job.student.backbone.kwargs == {"stem_width": 8}
    assert (job.run.name, job.run.storage, job.teacher) == ("7", "s3://bucket/runs?region=eu", None)


TEXTS = [
    "2024",
    "1e3",
    "true",
    "photos #2/train",
    "exp: new",
    "[a",
    "{b}",
    "*c",
    "'d' e",
    'f"',
    "007",
    "- g",
    "!h",
    "x y ",
    "@",
    "a, b",
]


@pytest.mark.parametrize("key", ["data.train", "run.storage", "teacher.checkpoint", "teacher.cache.path", "cluster.address"])
def test_an_override_of_a_text_key_is_the_text_itself(write, key):
    path = write(MINIMAL.replace("supervised", "head") + "teacher: {checkpoint: t}\n")
    for text in TEXTS:
        job = load_job(path, [f"{key}={text}"])
        assert functools.reduce(getattr, key.split("."), job) == text
        Path("printed.yaml").write_text(render_job(job))
        assert load_job("printed.yaml") == job


def test_a_text_key_takes_quotes_and_null_as_yaml(write):
    overrides = ["data.train='it''s 007'", r'data.val="a\tb"', "cluster.address=auto", "cluster.address=null", "run.name=2024"]
    job = load_job(write(MINIMAL), overrides)
    assert (job.data.train, job.data.val, job.cluster.address, job.run.name) == ("it's 007", "a\tb", None, "2024")


def test_a_number_in_the_file_s_place_of_text(write):
    (problem,) = mistakes(write(MINIMAL.replace("name: ", "name: 3 # ")))
    assert problem.endswith('run.name: 3 is not text; write it in double quotes: "3"')


def test_a_replaced_key_is_checked_as_a_file_s_is(write):
    job = load_job(write(MINIMAL.replace("supervised", "head") + "teacher: {checkpoint: t}\n"))
    changed = job.replace(
        {"teacher.placement": "pool", "student.backbone.kwargs.stem_width": 8, "data": job.data, "data.flip": 0}
    )
    assert changed.teacher is not None and changed.teacher.placement == "pool" and changed.teacher.checkpoint == "t"
    assert changed.student.backbone.kwargs == {"stem_width": 8} and changed.data.flip == 0
    assert job.student.backbone.kwargs == {} and job.data.flip == 0.5, "the job itself stays as it is"
    same = {"teacher.placement": "inline", "student": job.student, "data": job.data}
    assert changed.replace(same) == job.replace({}) == job
    for wrong in ({"teacher.placment": "pool"}, {"optim.lr": -1}, {"method.kind": "x"}, {"optim.lr": 1e300}):
        with pytest.raises(ValidationError):
            job.replace(wrong)


def test_override_creates_a_section(write):
    path = write(MINIMAL.replace("supervised", "head") + "teacher:\n")  # an empty section is null
    job = load_job(path, ["teacher.checkpoint=t.pth", "distill.assistant.fcs=1"])
    assert job.teacher is not None
    assert job.teacher.checkpoint == "t.pth"
    assert job.distill.assistant is not None
    assert job.distill.assistant.fcs == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "write it as key.path=value, for example optim.lr=0.02"),
        ("=3", "write it as key.path=value, for example optim.lr=0.02"),
        ("optim..lr=3", "write it as key.path=value, for example optim.lr=0.02"),
        ("--optim.lr=3", "write it as key.path=value, for example optim.lr=0.02"),
        ("method.kind=3", "method is 'supervised', not a section of keys"),
        ("data.short_side=[1", "not valid YAML"),
        ("optim.lr=!!python/name:os.system x", "optim.lr: tag !!python/name:os.system does not fit here; remove it"),
        ("optim={lr: 1, lr: 2}", "optim.lr: written twice"),
    ],
)
def test_malformed_override(write, override, message):
    (problem,) = mistakes(write(MINIMAL), override)
    assert problem.startswith(f"override {override}: {message}")


def test_partial_sections_keep_the_defaults_of_their_place(write):
    job = load_job(
        write(MINIMAL.replace("retinanet", "faster_rcnn")),
        ["student.neck.channels=32", "student.rpn.sampler.size=64", "student.rpn.anchors.rounding=true"],
    )
    assert isinstance(job.student, FasterRCNNSpec)
    paper = FasterRCNNSpec()
    assert (job.student.neck.channels, job.student.neck.extra) == (32, "pool")
    assert job.student.backbone.name == "resnet50"
    assert job.student.rpn.sampler.positive_fraction == paper.rpn.sampler.positive_fraction == 0.5
    assert job.student.rpn.anchors.base_scale == paper.rpn.anchors.base_scale == 8.0


def test_a_cascade_s_lists_are_one_value_a_stage(write):
    path = write(MINIMAL.replace("retinanet", "cascade_rcnn"))
    keys = ["student.roi.fc_channels=32", "student.roi.positive_ious=[0.4, 0.6]", "student.roi.weights=[1, 1]"]
    job = load_job(path, [*keys, "student.roi.stds=[[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1]]"])
    assert isinstance(job.student, CascadeRCNNSpec)
    assert [stage.positive_iou for stage in job.student.roi.stages] == [0.4, 0.6]
    assert [stage.stds for stage in job.student.roi.stages] == [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1)]
    assert all((s.fc_channels, s.class_agnostic, s.box_beta) == (32, True, 1.0) for s in job.student.roi.stages)
    assert mistakes(path, *keys[1:]) == [
        f"override {keys[1]}: student.roi.stds: 3 values for the 2 stages of student.roi.positive_ious"
    ]
    assert mistakes(path, "student.roi.stds=[[0.1, 0.1, 0.2]]") == [
        "override student.roi.stds=[[0.1, 0.1, 0.2]]: student.roi.stds[0][3]: missing; the list needs one more value",
    ]
    assert mistakes(path, "student.roi.positive_ious=[]")[0].endswith("student.roi.positive_ious: the list is empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"job.yaml:1:1: is empty; a job has at least run, method and data"),
        ("# only a comment\n", r"job.yaml:1:1: is empty"),
        ("- a\n- b\n", r"job.yaml:1:1: is not a mapping of keys"),
        ("run:\n  name: x\n name: y\n", r"job.yaml:3:2: not valid YAML: "),
        ("run: {name: x\nmethod: y\n", r"job.yaml:2:\d+: not valid YAML: "),
        ("run:\n\tname: x\n", r"job.yaml:2:1: not valid YAML: .*; indent with spaces, not tabs"),
        ("a: 1\n---\nb: 2\n", r"job.yaml:2:1: not valid YAML: "),
        ("a: *nowhere\n", r"job.yaml:1:4: not valid YAML: found undefined alias"),
        ("a: 1\nb: \x07\n", r"job.yaml:2:4: the character U\+0007 is not text"),
        (b"a: 1\nb: \xff\xfe\x00\x01", r"job.yaml:2:4: not a text file \(byte 0xff is not UTF-8\)"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", r"job.yaml:1:1: not a text file \(byte 0x89 is not UTF-8\)"),
        pytest.param("x: " + "[" * 100_000, r"job.yaml:1:54: x\[0\]\[0\] is nested more than 50 deep", id="deep"),
        pytest.param("x:\n" + "".join(f"{' ' * i}y:\n" for i in range(1, 99)), r"job.yaml:51:51: x.y.y is nested", id="block"),
        pytest.param("".join(f"k{i}: 1\n" for i in range(10_001)), r"job.yaml:10000:8: more than 10000 keys", id="many"),
        pytest.param("# " + "x" * 2**20, r"job.yaml: has more than 1 MiB, so it is not a job file", id="large"),
        pytest.param(
            "a: &a [1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijkl")),
            r"job.yaml:1:4: e\[5\]\[2\]: its aliases expand to more than 10000 values",
            id="bomb",
        ),
    ],
)
def test_not_a_job_file(write, text, message):
    (problem,) = mistakes(write(text))
    assert re.match(message, problem), problem


def test_missing_file_and_folder(write):
    write(MINIMAL)
    assert mistakes("jobb.yaml") == ["jobb.yaml: no such file; did you mean job.yaml?"]
    assert mistakes("elsewhere/x.yaml") == ["elsewhere/x.yaml: no such file"]
    assert mistakes(".") == [".: is a folder; name a job file in it (job.yaml)"]


def test_byte_order_mark_and_anchors_are_fine(write):
    text = "\ufeff" + MINIMAL.replace("train: data/train", "train: &split data/train").replace("data/val", "*split")
    assert load_job(write(text)).data.val == "data/train"


def test_an_alias_that_contains_itself(write):
    (problem,) = mistakes(write(MINIMAL + "optim: &o\n  milestones: *o\n"))
    assert problem.startswith("job.yaml:10: optim.milestones: an alias that contains itself")


@pytest.mark.parametrize("escape", ["\\ud800", "\\0", "\\e[31m"])
def test_an_escape_for_what_is_not_text_is_told_with_its_key(write, escape):
    code = {"\\ud800": "D800", "\\0": "0000", "\\e[31m": "001B"}[escape]
    assert mistakes(write(MINIMAL + f'"{escape}": 1\n'), f'run.storage="a{escape}"', f'data.train="{escape}"') == [
        f"job.yaml:10: a key contains the character U+{code}, which is not text; remove it",
        f'override run.storage="a{escape}": run.storage: contains the character U+{code}, which is not text; remove it',
        f'override data.train="{escape}": data.train: contains the character U+{code}, which is not text; remove it',
    ]


def test_thousands_of_mistakes_are_told_soon_and_counted(write):
    started = time.process_time()
    problems = mistakes(write(MINIMAL + "".join(f"optim{i}: 1\n" for i in range(9000)) + "data2: 1\n"))
    assert time.process_time() - started < 20, "they took minutes"
    assert problems[0] == "job.yaml:10: optim0: unknown key; did you mean optim.optimizer?"
    assert len(problems) == 101 and problems[-1] == "… and 8901 more"


def test_one_problem_has_no_headline_several_do(write):
    with pytest.raises(JobError) as one:
        load_job(write(MINIMAL), ["optim.lrr=1"])
    assert str(one.value) == "override optim.lrr=1: optim.lrr: unknown key; did you mean optim.lr?"
    with pytest.raises(JobError, match=r"^job\.yaml has 2 problems:"):
        load_job("job.yaml", ["optim.lrr=1", "data.flipp=1"])


WORDS = st.sampled_from(["run", "method", "data", "student", "optim", "lr", "kind", "null", "1e-3", *"{}[]-:#&*!|>?,%@x"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(WORDS, st.sampled_from([" ", "\n", "\n  ", ": "]), st.text(max_size=3)), max_size=25).map("".join))
@example('"\\ud800": 1')
@example("student: {kind: [1]}")
@example("? [a]: b\n: 1\n")
@example("optim: {lr: " + "9" * 5000 + "}")
@example("!!int two: 1\nb: !!int two\n")
def test_any_text_gives_a_job_or_a_job_error(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(JobError) as caught:
        load_job(path, [text])
    assert caught.value.problems
