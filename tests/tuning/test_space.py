"""Which values a trial gets, and the job that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.errors import JobError
from headkd_ray.tuning.search_spec import ParameterSpec, SearchSpec
from headkd_ray.tuning.space import Search, base_values, contains, count, grid, nearest, with_values
from headkd_ray.tuning.study import distribution, propose, study_of
from headkd_ray.tuning.trial_records import SearchFolder, Trial
from headkd_ray.tuning.warm_start import earlier_trials
from tests.tuning.test_search_file import JOB

SPACE: dict[str, Any] = {
    "optim.lr": {"loguniform": [1e-3, 1e-1]},
    "optim.optimizer": {"choice": ["sgd", "adamw"]},
    "optim.momentum": {"uniform": [0.5, 0.9], "step": 0.2, "when": {"optim.optimizer": "sgd"}},
    "distill.ckd_epochs": {"choice": [4, 8, None]},
    "distill.warmup_steps": {"randint": [0, 2000], "step": 500},
    "optim.milestones": {"choice": [[8, 11], [6]]},
}


def make_search(space: dict[str, Any] = SPACE, **sections: Any) -> Search:
    spec = {"run": {"name": "s"}, "job": "base.yaml", "space": space, **sections}
    return Search(SearchSpec.model_validate(spec), JOB)


def ended(number: int, values: dict[str, Any], score: float) -> Trial:
    metrics = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), score)
    result: Any = {**metrics, "step": 5, "student": "s"}
    return Trial(number, values).with_end("finished", results={"0": result}, curve=[(1, score)], cost={"params": score})


def test_trial_0_has_the_base_job_s_values() -> None:
    values = propose(make_search(), [])
    assert values == {
        "optim.lr": 0.01,
        "optim.optimizer": "sgd",
        "optim.momentum": 0.9,
        "distill.ckd_epochs": 8,
        "distill.warmup_steps": 2000,
        "optim.milestones": [8, 11],
    }
    assert make_search().job(values, "base", "runs", 7) == make_search().base


def test_a_key_is_varied_only_under_its_condition() -> None:
    search = make_search(searcher={"kind": "random"})
    trials = [ended(0, base_values(search), 1.0)]
    for number in range(1, 30):
        values = propose(search, trials)
        assert values is not None
        trials.append(ended(number, values, 1.0))
        assert ("optim.momentum" in values) == (values["optim.optimizer"] == "sgd")
        assert all(contains(search.spec.space[key], value) for key, value in values.items())
        search.job(values, "x", "runs", 0)
    assert {trial.values["optim.optimizer"] for trial in trials} == {"sgd", "adamw"}
    assert all(trial.values.get("optim.momentum") in (None, 0.5, 0.7, 0.9) for trial in trials), "steps are round numbers"


def test_a_condition_may_be_on_a_key_that_is_not_searched() -> None:
    space = {"optim.momentum": {"uniform": [0.5, 0.9], "when": {"optim.optimizer": ["adamw"]}}, "optim.lr": SPACE["optim.lr"]}
    assert base_values(make_search(space)) == {"optim.lr": 0.01}


def test_a_grid_has_each_combination_once_and_the_base_job_first() -> None:
    space = {key: SPACE[key] for key in ("optim.optimizer", "optim.momentum", "distill.ckd_epochs")}
    search = make_search(space, searcher={"kind": "grid"})
    trials: list[Trial] = []
    while (values := propose(search, trials)) is not None:
        trials.append(ended(len(trials), values, 1.0))
    assert len(trials) == (3 + 1) * 3  # sgd has three momenta, adamw none; three times
    assert all(one.values != other.values for one in trials for other in trials if one is not other)
    assert trials[0].values == {"optim.optimizer": "sgd", "optim.momentum": 0.9, "distill.ckd_epochs": 8}
    assert len(list(grid(search))) == len(trials) - 1


def test_proposals_are_a_function_of_the_trials_so_far() -> None:
    """A resumed search therefore continues like one that was never stopped."""
    search = make_search(searcher={"kind": "tpe", "startup_trials": 2})
    trials = [ended(number, {**base_values(search), "optim.lr": 0.002 * (number + 1)}, number) for number in range(6)]
    assert propose(search, trials) == propose(search, list(trials))
    assert propose(search, trials) != propose(search, trials[:-1])
    other = make_search(searcher={"kind": "tpe", "startup_trials": 2}, run={"name": "s", "seed": 1})
    assert propose(other, trials) != propose(search, trials)


def test_tpe_goes_where_it_is_good() -> None:
    space = {"distill.assistants.fcos.ckd_weight": {"uniform": [0, 10]}}
    search = make_search(space, searcher={"kind": "tpe", "startup_trials": 5})
    trials: list[Trial] = []
    for number in range(40):
        values = propose(search, trials)
        assert values is not None
        trials.append(ended(number, values, -abs(values["distill.assistants.fcos.ckd_weight"] - 7)))
    late = [trial.values["distill.assistants.fcos.ckd_weight"] for trial in trials[20:]]
    assert sum(abs(value - 7) for value in late) / len(late) < 1.5, "random values are 2.9 off on average"


def test_a_new_search_learns_from_an_earlier_one(tmp_path: Path) -> None:
    """It goes at once where the earlier one ended, although that varied another key and a wider range."""
    key, other = "distill.assistants.fcos.ckd_weight", "optim.lr"
    space = {key: {"uniform": [0, 20]}, other: SPACE[other]}
    first = make_search(space, run={"name": "first", "storage": str(tmp_path)}, overrides={})
    folder = SearchFolder.open(str(tmp_path / "first"))
    folder.start(first)
    for number in range(40):
        folder.write(ended(number, {key: number / 2, other: 0.01}, -abs(number / 2 - 7)))
    folder.write(Trial(40, {key: 7.0, other: 0.01}))  # has not ended
    warm = {"kind": "tpe", "startup_trials": 10, "warm_start": str(tmp_path / "first")}
    narrow = {key: {"uniform": [0, 10]}, "optim.momentum": {"uniform": [0.5, 0.9]}}
    warnings: list[str] = []
    search = make_search(narrow, searcher=warm)
    earlier = earlier_trials(search, warnings.append)
    assert [trial.values for trial in earlier] == [{key: number / 2, "optim.momentum": 0.9} for number in range(21)]
    (warning,) = warnings
    assert "19 of 40 ended trials have values outside this space and are left out" in warning
    trials = [ended(0, base_values(search), -6.0)]
    for number in range(1, 6):
        values = propose(search, trials, earlier=earlier)
        assert values is not None
        trials.append(ended(number, values, -abs(values[key] - 7)))
    assert all(abs(trial.values[key] - 7) < 3 for trial in trials[1:]), [trial.values[key] for trial in trials]

    for changed, message in (
        ({"objective": {"metric": "AP50"}}, "is a search for AP, this one for AP50"),
        ({"space": {key: {"uniform": [100, 200]}}}, "none of its 40 ended trials has values in this space"),
        ({"searcher": {**warm, "warm_start": str(tmp_path / "none")}}, "searcher.warm_start: .*no search here"),
    ):
        with pytest.raises(JobError, match=message):
            earlier_trials(make_search(**{"space": narrow, "searcher": warm, **changed}), warnings.append)


def test_the_study_leaves_out_what_says_nothing_and_counts_the_stopped() -> None:
    search = make_search({"optim.lr": SPACE["optim.lr"]})
    lr = [{"optim.lr": value} for value in (0.5, 0.01, 0.02, 0.03, 0.04)]  # the first is outside the range
    trials = [ended(0, lr[0], 1.0), ended(1, lr[1], 2.0), Trial(2, lr[2]).with_end("failed", cause="x")]
    trials += [Trial(3, lr[3]).with_end("stopped", curve=[(1, 0.5), (2, None)]), Trial(4, lr[4])]
    study = study_of(search, trials)
    assert [(trial.user_attrs["number"], trial.state.name) for trial in study.trials] == [
        (1, "COMPLETE"),
        (3, "PRUNED"),
        (4, "RUNNING"),
    ]
    assert study.trials[1].intermediate_values == {1: 0.5}


def test_two_objectives() -> None:
    search = make_search({"optim.lr": SPACE["optim.lr"]}, objective={"cost": "params"}, searcher={"startup_trials": 1})
    trials = [ended(number, {"optim.lr": 0.002 * (number + 1)}, number) for number in range(4)]
    assert [direction.name for direction in study_of(search, trials).directions] == ["MAXIMIZE", "MINIMIZE"]
    assert propose(search, trials) is not None


def test_values_that_do_not_go_together_are_a_job_error() -> None:
    with pytest.raises(JobError, match=r"distill\.ckd_epochs: 8 is not before the end of training"):
        make_search().job({"optim.epochs": 6, "optim.milestones": [4]}, "x", "runs", 0)


@given(
    low=st.floats(0.001, 1),
    width=st.floats(0.01, 5),
    step=st.none() | st.floats(0.001, 1),
    kind=st.sampled_from(["uniform", "loguniform"]),
)
@settings(max_examples=60, deadline=None)
def test_what_optuna_may_propose_the_range_contains(low: float, width: float, step: float | None, kind: str) -> None:
    parameter = ParameterSpec.model_validate({kind: [low, low + width], "step": step if kind == "uniform" else None})
    space = distribution(parameter)
    assert contains(parameter, space.low) and contains(parameter, space.high)  # type: ignore[attr-defined]
    assert not contains(parameter, low - 0.01) and not contains(parameter, low + width + 0.01)


def test_files_of_a_search_come_back_as_they_were(tmp_path: Path) -> None:
    folder, search = SearchFolder.open(str(tmp_path / "s")), make_search()
    assert not folder.exists
    folder.start(search)
    trial = ended(3, base_values(search), 12.5)
    folder.write(trial)
    assert folder.exists
    assert folder.search() == search
    again = folder.trial(3)
    assert (again.values, again.state, again.mean("AP")) == (trial.values, "finished", 12.5)
    assert [trial.number for trial in folder.trials(search)] == [3]


def test_a_damaged_trial_is_named_and_left_out(tmp_path: Path) -> None:
    folder, search = SearchFolder.open(str(tmp_path / "s")), make_search()
    folder.start(search)
    good = ended(0, base_values(search), 12.5)
    files = folder.folder / "trials"
    folder.write(good)
    content = json.loads(files.read("0000.json"))
    changes: list[tuple[Any, str]] = [
        (b"{", "Invalid JSON: EOF while parsing"),
        (b"[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        (b"\xff\xfe", "Invalid JSON: expected value"),
        ([], "Input should be"),
        ({"number": "<b>2"}, "number: Input should be a valid integer"),
        ({"state": "<script>"}, "state: Input should be 'running', 'finished', 'stopped' or 'failed'"),
        ({"results": {"0": {**content["results"]["0"], "AP": "high"}}}, "results.0.AP: Input should be a valid number"),
        ({"results": {}}, "finished without results"),
        ({"curve": [[1, float("nan")]]}, "curve[0][1]: Input should be a finite number"),
        ({"values": {"optim.lrr": 1}}, "values.optim.lrr: not searched"),
        ({"values": {**content["values"], "optim.lr": "fast"}}, "optim.lr: 'fast' is not a number"),
        ({"number": 99}, "is the file of trial 99"),
        ({"what": 1}, "what: Unexpected keyword argument"),
        ({"ended": None}, "finished without an end"),
    ]
    for number, (change, _) in enumerate(changes, start=1):
        changed = {**content, "number": number, **change} if isinstance(change, dict) else change
        files.write(f"{number:04d}.json", changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    files.write("notes.json", b"")
    warnings: list[str] = []
    assert folder.trials(search, warnings.append) == [good]
    for number, ((_, message), line) in enumerate(zip(changes, warnings, strict=True), start=1):
        assert line.startswith(f"{folder.folder.uri}/trials/{number:04d}.json: {message}"), line
        assert line.endswith(f"Trial {number} is left out; its file stays as it is")
    with pytest.raises(JobError, match=r"trials/0001\.json: "):
        folder.trials(search)
    assert folder.numbers() == list(range(15)), "a resumed search goes on with number 15"
    assert propose(search, [good], number=15) != propose(search, [good])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "Invalid JSON: EOF while parsing"),
        (b"[]", "Input should be an object"),
        ({"job": []}, "job: Input should be an object"),
        ({"job": {"run": 1}}, "not a search of this version: job.run: 1 is not a section"),
        ({"spec": {}}, "not a search of this version: spec.run: missing"),
        (
            {"spec": {"run": {"name": "s"}, "job": "j", "space": {"optim.lr": {}}}},
            "not a search of this version: spec.space.",
        ),
    ],
)
def test_a_damaged_search_file_is_one_error_that_names_it(tmp_path: Path, change: Any, message: str) -> None:
    folder = SearchFolder.open(str(tmp_path / "s"))
    folder.start(make_search())
    content = json.loads(folder.folder.read("search.json"))
    changed = change if isinstance(change, bytes) else json.dumps({**content, **change}).encode()
    folder.folder.write("search.json", changed)
    with pytest.raises(JobError) as caught:
        folder.search()
    assert caught.value.problems[0].startswith(f"{folder.folder.uri}/search.json: {message}"), caught.value


def test_a_search_s_file_keeps_no_secret_and_resumes_nevertheless(tmp_path: Path) -> None:
    signed = Search(make_search().spec, with_values(JOB, {"data.val": "https://h/val?token=hunter2"}))
    folder = SearchFolder.open(str(tmp_path / "s"))
    folder.start(signed)
    assert b"hunter2" not in folder.folder.read("search.json")
    folder.check_same(signed)


def test_values_next_to_a_number_are_found_without_listing_them() -> None:
    wide = ParameterSpec(randint=(0, 10**15))
    assert (count(wide), nearest(wide, 5.4), nearest(wide, -3)) == (10**15 + 1, 5, 0)
    steps = ParameterSpec(uniform=(0.1, 1.0), step=0.25)
    assert [nearest(steps, value) for value in (0.0, 0.2, 0.225, 0.3, 9.0)] == [0.1, 0.1, 0.1, 0.35, 0.85]


def test_a_search_resumes_with_more_trials_but_not_with_another_space(tmp_path: Path) -> None:
    folder = SearchFolder.open(str(tmp_path / "s"))
    folder.start(make_search())
    folder.check_same(make_search(budget={"trials": 99}, searcher={"kind": "random"}))
    with pytest.raises(JobError) as caught:
        folder.check_same(make_search({"optim.lr": SPACE["optim.lr"]}, objective={"metric": "AP50"}))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["space", "objective"]


def test_a_folder_without_a_search_says_so(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no search here \(no search\.json\)"):
        SearchFolder.open(str(tmp_path)).search()
