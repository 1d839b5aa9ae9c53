"""Runs that end early, and runs that are trained longer than they were started for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from headkd_ray.engine.local import train_here
from headkd_ray.engine.patience import Patience
from headkd_ray.errors import UserError
from headkd_ray.job import Job
from headkd_ray.train import main, train
from tests.support import assert_same_weights, micro_job, student_weights

ONCE = {"epochs": 1, "milestones": []}
TWICE = {"epochs": 2, "milestones": [1]}


def written(job: Job, folder: Path) -> str:
    file = folder / f"{job.run.name}.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return str(file)


def test_patience_counts_evaluations_since_the_best() -> None:
    patience = Patience(2)
    for epoch, (ap, exhausted) in enumerate(
        [(10.0, False), (10.0, False), (20.0, False), (math.nan, False), (19.0, True)], start=1
    ):
        patience.see(ap, epoch)
        assert patience.exhausted is exhausted
    assert str(patience) == "AP has not risen in 2 evaluations since epoch 3 (20.0)"


def test_a_run_ends_early_and_stays_ended(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """Its learning rate is 0 after the first epoch, so AP cannot rise after the first evaluation."""
    optim = {"epochs": 6, "milestones": [1], "gamma": 1e-30, "weight_decay": 0.0}
    job = micro_job(tmp_path, drawn_splits, optim=optim, eval={"every_epochs": 1, "patience": 2})
    records: list[dict] = []
    result = train(job, records.append)
    assert result["last"]["step"] == 33 and result["best"]["AP"] == result["last"]["AP"]
    assert records[-1]["note"].startswith("ended early, at step 33 of 66 (eval.patience): AP has not risen in 2 evaluations")
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed then
    again: list[dict] = []
    assert train(job, again.append) == result and ["note" in record for record in again] == [True]


def test_a_run_that_is_extended_is_one_that_was_started_longer(
    tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job = micro_job(tmp_path, drawn_splits, "short", optim=ONCE, eval={"every_epochs": 1})
    expected = train(job.replace({"run.name": "long", "optim.epochs": 2, "optim.milestones": (1,)}), lambda record: None)
    command = [written(job, tmp_path), "--extend", "epochs=2", "milestones=[1]"]
    train(job, lambda record: None)
    assert main(command) == 0
    result = json.loads((tmp_path / "short" / "result.json").read_text())
    assert_same_weights(student_weights(expected), student_weights(result))
    assert {**result, "student": None} == {**expected, "student": None}
    log = (tmp_path / "short" / "log.jsonl").read_bytes()
    steps = [json.loads(line)["step"] for line in log.splitlines()]
    assert steps == sorted(steps) and steps[-1] == 22

    capsys.readouterr()
    assert main(command) == 0  # the same again changes nothing
    told = "".join(capsys.readouterr())
    assert "has already ended, at step 22" in told and "--extend epochs=N" in told
    assert (tmp_path / "short" / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    ("optim", "extension", "problem"),
    [
        ({"schedule": "cosine", "milestones": []}, {"optim.epochs": 3}, "follows the schedule cosine to the end of 2 epochs"),
        ({}, {"optim.epochs": 1, "optim.milestones": ()}, "optim.epochs: 1 is less than the 2 that the run"),
        (
            {},
            {"optim.epochs": 4, "optim.milestones": (3,)},
            r"optim.milestones: \[3\] changes .*; keep \[1\], and add only epochs from 2",
        ),
        ({}, {"optim.epochs": 4, "optim.lr": 0.5}, "optim.lr: the run .* was started with 0.01, now 0.5"),
    ],
)
def test_what_would_not_be_the_same_run_is_refused(
    optim: dict[str, Any], extension: dict[str, Any], problem: str, tmp_path: Path, drawn_splits: dict[str, str]
) -> None:
    job = micro_job(tmp_path, drawn_splits, optim={**TWICE, **optim})
    train_here(job.replace({"optim.epochs": 2}), lambda record: None)
    result = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(UserError, match=problem):
        train(job.replace(extension), extend=True)
    assert (tmp_path / "run" / "result.json").read_bytes() == result


def test_only_a_run_that_exists_and_only_its_length_can_be_extended(
    tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(micro_job(tmp_path, drawn_splits), tmp_path)
    for extension, problem in {
        "epochs=3": "run/run to extend; leave out --extend to start it",
        "lr=3": "--extend lr=3: give KEY=VALUE, where KEY is one of epochs, milestones and patience",
        "epochs": "--extend epochs: give KEY=VALUE",
        "epochs=x": "optim.epochs: 'x' is not a whole number",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main([file, "--extend", extension])
        assert stop.value.code == 2 and problem.replace("run/run", f"{tmp_path}/run") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
