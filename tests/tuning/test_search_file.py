"""Every mistake in a search file is named at once, with its line; every searched key is tried before a cluster starts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from headkd_ray.errors import JobError
from headkd_ray.job.schema import schema_text
from headkd_ray.tuning.search_file import load_search
from headkd_ray.tuning.search_spec import SearchSpec
from headkd_ray.tuning.space import Search, base_values, contains

JOB: dict[str, Any] = {
    "run": {"name": "base", "seed": 7},
    "method": "tf_head",
    "data": {"train": "data/train", "val": "data/val"},
    "student": {"kind": "retinanet", "backbone": {"frozen_stages": 0, "norm_eval": False}},
    "distill": {"assistants": {"fcos": {}, "rcnn": {}}, "ckd_epochs": 8},
}
SEARCH = """\
run: {name: s}
job: base.yaml
space:
  optim.lr: {loguniform: [1e-3, 1e-1]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the test's folder, with base.yaml in it, the current one."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump(JOB))
    return tmp_path


def load(text: str, *overrides: str) -> Search:
    Path("search.yaml").write_text(text)
    return load_search("search.yaml", ["budget.trials=4", *overrides])


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        load(text, *overrides)
    return caught.value.problems


def test_a_search_knows_its_base_job(here: Path) -> None:
    search = load(SEARCH + "overrides: {optim.epochs: 6, optim.milestones: [4], distill.ckd_epochs: 4}\n")
    assert (search.base.optim.epochs, search.base.optim.milestones, search.base.distill.ckd_epochs) == (6, (4,), 4)
    assert search.seeds == (7,)
    assert load(SEARCH, "seeds=[1, 2]").seeds == (1, 2)


@pytest.mark.parametrize("nested", ["space: {optim.gamma: {uniform: [0, 1]}}", "space: {optim: {gamma: {uniform: [0, 1]}}}"])
def test_keys_may_be_dotted_or_nested(here: Path, nested: str) -> None:
    head = "run: {name: s}\njob: base.yaml\n"
    assert list(load(head + nested.replace("[0,", "[0.1,")).spec.space) == ["optim.gamma"]
    (problem,) = mistakes(head + nested.replace("gamma", "gama").replace("[0,", "[0.1,"))
    assert problem == "search.yaml:3: space.optim.gama: unknown key; did you mean optim.gamma?"


def test_what_a_searcher_and_an_objective_cannot_do(here: Path) -> None:
    (problem,) = mistakes(SEARCH, "searcher.warm_start=runs/earlier", "searcher.kind=random")
    assert problem.endswith("searcher.warm_start: random learns from no trials; use tpe, or remove the key")
    detr = {**JOB, "method": "supervised", "student": {"kind": "transformers", "checkpoint": "hf://a/b"}}
    del detr["distill"]
    Path("base.yaml").write_text(yaml.safe_dump(detr))
    (problem,) = mistakes(SEARCH, "objective.cost=onnx_latency")
    assert "objective.cost: a student of kind transformers cannot be exported to ONNX; use latency" in problem


def test_overrides_replace_add_and_remove(here: Path) -> None:
    search = load(SEARCH, "space.optim.momentum={uniform: [0.5, 0.9]}", "space.optim.lr=null", "overrides.optim.epochs=13")
    assert list(search.spec.space) == ["optim.momentum"]
    assert search.base.optim.epochs == 13
    assert load(SEARCH, "space.optim.lr.uniform=[0.1, 0.2]").spec.space["optim.lr"].uniform == (0.1, 0.2)


def test_an_override_of_a_text_key_is_the_text_itself(here: Path) -> None:
    search = load(SEARCH, "run.name=2024", "run.storage=runs #2", "overrides.data.train=photos #2/train")
    assert (search.spec.run.name, search.spec.run.storage) == ("2024", "runs #2")
    assert search.base.data.train == "photos #2/train"


def test_all_mistakes_at_once_with_their_lines(here: Path) -> None:
    text = """\
run: {nam: s}
job: base.yaml
space:
  optim.lrr: {uniform: [0.1, 1]}
  optim.lr: {loguniform: [1e-2, 1e-3]}
  data.flip: {uniform: [0, 1.5]}
  distill.warmup_steps: {uniform: [0, 10]}
  distill.ckd_epochs: {choice: [4, 12, null]}
  run.seed: {randint: [0, 4]}
  cluster.workers: {choice: [1, 2]}
  optim.gamma: {uniform: [0.1, 0.2], choice: [1]}
  optim.weight_decay: {unifrm: [0.1, 0.2]}
  optim.momentum: 0.9
  distill.assistants.fcos.gt_weight: {uniform: [0.1, 0.2], when: {optim.optimiser: sgd}}
searcher: {kind: tp}
"""
    kinds = "uniform, loguniform, randint, lograndint, choice"
    assert mistakes(text, "budget.trial=3") == [
        "search.yaml:1: run.name: missing (Name of the search and of its folder under storage)",
        "search.yaml:1: run.nam: unknown key; did you mean run.name?",
        "search.yaml:4: space.optim.lrr: unknown key; did you mean optim.lr?",
        "search.yaml:5: space.optim.lr.loguniform: [0.01, 0.001] is not [lowest, highest]",
        "search.yaml:6: space.data.flip at 1.5: data.flip: 1.5 must be at most 1",
        "search.yaml:7: space.distill.warmup_steps at 0.0: distill.warmup_steps: 0.0 must be a whole number; write 0",
        "search.yaml:7: space.distill.warmup_steps at 10.0: distill.warmup_steps: 10.0 must be a whole number; write 10",
        "search.yaml:8: space.distill.ckd_epochs at 12: distill.ckd_epochs: 12 is not before the end of training "
        "(optim.epochs is 12); null = never stop",
        "search.yaml:9: space.run.seed: cannot be searched: the search sets names and seeds of its runs",
        "search.yaml:10: space.cluster.workers: cannot be searched: it decides where a trial runs",
        f"search.yaml:11: space.optim.gamma: has uniform and choice; give exactly one of {kinds}",
        "search.yaml:12: space.optim.weight_decay.unifrm: unknown key; did you mean uniform?",
        "search.yaml:13: space.optim.momentum: 0.9 is not a range; write for example {uniform: [0, 1]} or {choice: [1, 2]}",
        "search.yaml:14: space.distill.assistants.fcos.gt_weight.when: optim.optimiser: unknown key; "
        "did you mean optim.optimizer?",
        "search.yaml:15: searcher.kind: 'tp' is not one of random, grid, tpe; did you mean tpe?",
        "override budget.trial=3: budget.trial: unknown key; did you mean budget.trials?",
    ]


def test_the_base_job_s_mistakes_are_named_too(here: Path) -> None:
    assert mistakes(SEARCH, "job=bas.yaml") == ["override job=bas.yaml: job: bas.yaml: no such file; did you mean base.yaml?"]
    Path("base.yaml").write_text(yaml.safe_dump({**JOB, "lr": 1}))
    own, of_override, of_job = mistakes(SEARCH + "overrides:\n  optim.epochs: 0\n", "searcher.kind=grid")
    assert own.startswith("search.yaml:4: space.optim.lr: a grid needs")
    assert of_override == "search.yaml:6: optim.epochs: 0 must be above 0"
    assert of_job.startswith("base.yaml:") and of_job.endswith("lr: unknown key; did you mean optim.lr?")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space=null", "space: is empty; give its keys or remove it"),
        ("space.optim.lr=null", "space: is empty; name at least one job key, for example optim.lr"),
        ("searcher.kind=grid", "space.optim.lr: a grid needs values to list; give loguniform a step, or use choice"),
        ("budget.trials=null", "budget.trials: searcher tpe never ends by itself; give a number, or budget.minutes"),
        ("seeds=[1, 1]", "seeds: [1, 1] has a seed twice"),
        ("space.optim.lr.step=0.1", "space.optim.lr: has no values; give exactly one of"),
        ("space.optim.lr={lograndint: [1, 4], step: 2}", "space.optim.lr.step: lograndint takes no step"),
        ("space.optim.epochs={randint: [12, 20], step: 1.5}", "space.optim.epochs.step: 1.5 is not a whole number"),
        (
            "space.optim.lr={uniform: [0.1, 0.2], step: 1e-12}",
            "space.optim.lr.step: 1e-12 splits the range into more than 1000000 values",
        ),
        ("budget.minutes=1e300", "budget.minutes: 1e300 must be at most 1000000000"),
        ("space.optim.lr.loguniform=[1e-3, 1e300]", "space.optim.lr.loguniform[1]: 1e300 must be at most 1e+15"),
        ("space.optim.lr={uniform: 0.1}", "space.optim.lr.uniform: 0.1 is not a list; write [0.1, 0.1]"),
        (f"overrides.{'a.' * 60}b=1", "no key has more than 50 parts"),
        ("overrides.eval.every_epochs=12", None),
    ],
)
def test_contradictions(here: Path, override: str, message: str | None) -> None:
    if message is None:
        assert (
            "the job evaluates only at its end (eval.every_epochs 12 of 12 epochs)"
            in mistakes(SEARCH, override, "scheduler.kind=asha")[0]
        )
        return
    assert message in mistakes(SEARCH, override)[0]


def test_a_search_that_is_too_large(here: Path) -> None:
    wide = "{uniform: [0.1, 0.2], step: 0.001}"
    (problem,) = mistakes(SEARCH, f"space.optim.lr={wide}", f"space.optim.momentum={wide}", "searcher.kind=grid")
    assert problem.endswith("space: a grid of 10201 values; at most 10000 can be tried: take larger steps or fewer keys")
    many = SEARCH + "".join(f"  optim.key{number}: {{uniform: [0, 1]}}\n" for number in range(300))
    (problem,) = mistakes(many)
    assert problem == "search.yaml:3: space: has 301 keys; at most 200 can be searched"


def test_conditions_in_a_circle(here: Path) -> None:
    circle = (
        "  optim.gamma: {uniform: [0.1, 1], when: {optim.ema: 0.9}}\n  optim.ema: {choice: [0.9], when: {optim.gamma: 1.0}}\n"
    )
    assert mistakes(SEARCH + circle) == ["search.yaml:3: space: circular conditions (when): optim.gamma, optim.ema"]


def test_two_objectives_need_every_trial_whole(here: Path) -> None:
    assert "asha ranks trials by one objective" in mistakes(SEARCH, "objective.cost=params", "scheduler.kind=asha")[0]
    load(SEARCH, "objective.cost=params")


def test_trials_have_one_batch_size(here: Path) -> None:
    (found,) = mistakes(SEARCH + "overrides: {data.max_batch_size: 64}\n")
    assert found.startswith("search.yaml:2: job: data.max_batch_size would give trials different batch sizes")


def test_trials_evaluate_their_own_students(here: Path) -> None:
    """Workers of several trials, each of which waits for its evaluation, could take all that an evaluation needs."""
    (problem,) = mistakes(SEARCH, "overrides.eval.placement=task", "overrides.cluster.workers=1")
    assert "several trials could wait for each other's resources with eval.placement task; override it: trainers" in problem


def test_pbt_changes_only_what_may_change_in_training(here: Path) -> None:
    problems = mistakes(SEARCH + "  student.head.convs: {choice: [2, 4]}\n", "scheduler.kind=pbt")
    assert [problem.split(": ", 1)[1][:40] for problem in problems] == [
        "space.student.head.convs: pbt changes va",
        "scheduler.kind: pbt copies states betwee",
    ]


def test_an_empty_file_says_what_a_search_needs(here: Path) -> None:
    assert mistakes("") == ["search.yaml:1:1: is empty; a search has at least run, job and space"]


ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "jobs").rglob("tune_*.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_the_committed_searches_load_and_fit_the_schema(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    search = load_search(file)
    values = base_values(search)
    assert values.keys() == search.spec.space.keys(), "trial 0 has them all"
    assert all(contains(search.spec.space[key], value) for key, value in values.items()), "the searcher learns from trial 0"
    text = Path(file).read_text(encoding="utf-8")
    assert f"# python -m headkd_ray.tune {file}" in text
    schema = text.splitlines()[0].split("=")[1]
    assert (Path(file).parent / schema).resolve() == ROOT / "jobs/search.schema.json"
    jsonschema.validate(yaml.load(text, yaml.CSafeLoader), json.loads(schema_text(SearchSpec)))


def test_schema_is_fresh_and_describes_every_key() -> None:
    committed = json.loads((ROOT / "jobs/search.schema.json").read_text(encoding="utf-8"))
    assert committed == json.loads(schema_text(SearchSpec)), "run python -m headkd_ray.tuning.search_schema"
    for section in [committed, *committed["$defs"].values()]:
        assert section["additionalProperties"] is False
        assert all(key.get("description") or key["$ref"] for key in section["properties"].values())


def test_the_page_s_search_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```yaml\n(run: .*?)```", (ROOT / "docs/tuning.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "search.yaml").write_text(block)
    shown, committed = (load_search(file).spec for file in (tmp_path / "search.yaml", ROOT / "jobs/small/tune_tf_head.yaml"))
    assert (shown.run, shown.budget, shown.searcher.kind) == (committed.run, committed.budget, committed.searcher.kind)
