"""Real searches on Ray Tune: failed, stopped and killed trials are told from finished ones, and nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import processes
from ray.tune.experiment import Trial as TuneTrial

from headkd_ray.errors import ClusterError
from headkd_ray.train import train
from headkd_ray.tuning.on_ray.tuner import SearchState, _scheduler, search_on_ray
from headkd_ray.tuning.search_file import load_search
from headkd_ray.tuning.space import Search
from headkd_ray.tuning.trial_records import SearchFolder, Trial
from tests.support import HANGS, MICRO_STUDENT, micro_job

STUDENT = {**MICRO_STUDENT, "head": {**MICRO_STUDENT["head"], "postprocess": {"score": 0.0}}}
"""A student that detects something, so that there is an AP to compare."""

Ask = Callable[..., Search]


@pytest.fixture
def ask(tmp_path: Path, drawn_splits: dict[str, str]) -> Ask:
    """Return a function that makes a search over a job that trains in a second; keywords are sections of its file."""

    def ask(space: dict[str, Any], job: dict[str, Any] | None = None, **sections: Any) -> Search:
        sections = {"run": {"name": "search", "storage": str(tmp_path)}, "job": str(tmp_path / "job.yaml"), **sections}
        every = {"eval": {"every_epochs": 1, "batch_size": 8}, **(job or {})}
        base = micro_job(tmp_path, drawn_splits, student=STUDENT, **every)
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(base.model_dump(mode="json")))
        (tmp_path / "search.yaml").write_text(yaml.safe_dump({"space": space, **sections}))
        return load_search(tmp_path / "search.yaml")

    return ask


def run(search: Search, folder: SearchFolder) -> tuple[list[Trial], list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    folder.start(search)
    return search_on_ray(search, folder, train, events.append), events


def test_a_search_on_ray(tmp_path: Path, ask: Ask, ray_cluster: None) -> None:
    """Trial 0 is the base job, an exploding one is recorded, halving stops a worse one; a resumed search repeats none."""
    grid: dict[str, Any] = {
        "space": {"optim.lr": {"choice": [0.01, 1000.0, 1e-6]}},
        "job": {"optim": {"epochs": 2, "milestones": [1], "clip_norm": None, "warmup_steps": 0, "lr_batch": None}},
        "searcher": {"kind": "grid"},
        "scheduler": {"kind": "asha", "reduction": 2},
    }
    folder = SearchFolder.open(str(tmp_path / "search"))
    trials, events = run(ask(**grid, budget={"trials": 2, "max_concurrent": 1}), folder)
    assert [(trial.number, trial.values, trial.state) for trial in trials] == [
        (0, {"optim.lr": 0.01}, "finished"),
        (1, {"optim.lr": 1000.0}, "failed"),
    ]
    assert trials[1].cause is not None and "not finite" in trials[1].cause and "lower optim.lr" in trials[1].cause
    assert [event["epoch"] for event in events if "epoch" in event] == [1, 2]
    result = json.loads((tmp_path / "search/runs/0000-s0/result.json").read_text())
    assert trials[0].mean("AP") == result["best"]["AP"] > 0
    assert Path(trials[0].results["0"]["student"]).is_dir()
    assert [epoch for epoch, _ in trials[0].curve] == [1, 2]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("search/*/0000*/**/*")}
    trials, events = run(ask(**grid, budget={"trials": 3}), folder)
    first, _, third = trials
    assert [(trial.number, trial.state) for trial in (first, trials[1])] == [(0, "finished"), (1, "failed")]
    worse = (third.curve[0][1] or 0) < (first.curve[0][1] or 0)  # by a little, after an epoch
    assert (third.state, len(third.curve)) == (("stopped", 1) if worse else ("finished", 2))
    assert {event["trial"].number for event in events} == {2}, "an ended trial ran again"
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not (tmp_path / "search/tune").exists(), "Tune's scratch files are gone"
    assert run(ask(**grid, budget={"trials": 3}), folder) == (trials, []), "nothing was left to do"


def test_halving_remembers_what_ended_before_a_resume_and_spares_the_base_job(tmp_path: Path, ask: Ask) -> None:
    search = ask(
        {"optim.lr": {"uniform": [0.01, 0.02]}},
        {"optim": {"epochs": 9, "milestones": []}},
        scheduler={"kind": "asha", "grace_epochs": 1, "reduction": 3},
        budget={"trials": 9},
    )
    folder = SearchFolder.open(str(tmp_path / "search"))
    folder.start(search)
    for number in range(4):
        values, ended = {"optim.lr": 0.01}, "finished" if number else "stopped"
        folder.write(Trial(number, values).with_end(ended, curve=[(1, 10.0 + number), (2, 9.0)]))
    scheduler = _scheduler(search, SearchState(search, folder, lambda event: None))

    def judged(number: int, value: float) -> str:
        trial = TuneTrial("run_trial", stub=True, config={"number": number})
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"epoch": 1, "AP": value})

    assert judged(4, 12.5) == "CONTINUE"  # among the best third of 10, 11, 12, 13
    assert judged(5, 11.5) == "STOP"
    assert judged(0, 1.0) == "CONTINUE"


@pytest.mark.slow
def test_seeds_are_trained_in_turn_and_their_mean_counts(tmp_path: Path, ask: Ask, ray_cluster: None) -> None:
    search = ask({"optim.lr": {"choice": [0.01, 0.02]}}, searcher={"kind": "grid"}, seeds=[3, 4], objective={"cost": "flops"})
    trials, _ = run(search, SearchFolder.open(str(tmp_path / "search")))
    for trial in trials:
        scores = [json.loads((tmp_path / f"search/runs/{trial.number:04d}-s{seed}/result.json").read_text()) for seed in (3, 4)]
        assert trial.mean("AP") == pytest.approx(sum(score["best"]["AP"] for score in scores) / 2)
        assert trial.cost["flops"] > 0 and trial.cost["params"] > 0
    assert trials[0].cost["flops"] == trials[1].cost["flops"], "the students are of one size"


@pytest.mark.slow
def test_a_trial_that_no_job_can_be_made_of_fails_alone(tmp_path: Path, ask: Ask, ray_cluster: None) -> None:
    """Each value is sound by itself; some combinations are not."""
    space = {
        "distill.ckd_epochs": {"choice": [None, 1]},
        "optim.epochs": {"choice": [2, 1]},
        "optim.milestones": {"choice": [[]]},
    }
    head = {"fcos": {"head": {"convs": 1, "channels": 16, "norm_groups": 4}}}
    job = {"method": "tf_head", "distill": {"assistants": head}, "optim": {"epochs": 2, "milestones": []}}
    trials, _ = run(
        ask(space, job, searcher={"kind": "grid"}, budget={"trials": None}), SearchFolder.open(str(tmp_path / "search"))
    )
    failed = [trial for trial in trials if trial.state == "failed"]
    assert [trial.values for trial in failed] == [{"distill.ckd_epochs": 1, "optim.epochs": 1, "optim.milestones": []}]
    assert failed[0].cause == "distill.ckd_epochs: 1 is not before the end of training (optim.epochs is 1); null = never stop"


@pytest.mark.slow
def test_trials_with_train_workers(tmp_path: Path, ask: Ask, ray_cluster: None) -> None:
    cluster = {"workers": 1, "threads_per_worker": 1, "cpus_per_worker": 1, "data_cpus": 1}
    space = {"optim.lr": {"choice": [0.01, 0.02]}}
    search = ask(space, {"cluster": cluster}, searcher={"kind": "grid"}, budget={"max_concurrent": 1})
    trials, events = run(search, SearchFolder.open(str(tmp_path / "search")))
    assert [trial.state for trial in trials] == ["finished", "finished"]
    assert {(event["trial"].number, event["epoch"]) for event in events if "epoch" in event} == {(0, 1), (0, 2), (1, 1), (1, 2)}


def test_a_trial_too_big_for_the_cluster_is_an_error_not_a_hang(tmp_path: Path, ask: Ask, ray_cluster: None) -> None:
    big = {"cluster": {"workers": 0, "cpus_per_worker": 64}}
    search = ask({"optim.lr": {"choice": [0.01, 0.02]}}, big, searcher={"kind": "grid"})
    with pytest.raises(ClusterError, match=r"no node has room for a trial.*64"):
        run(search, SearchFolder.open(str(tmp_path / "search")))


@pytest.mark.slow
def test_a_population_copies_its_best(tmp_path: Path, ask: Ask, ray_cluster: None) -> None:
    """The worse trial gets the other's state and continues from there with a learning rate of its own."""
    epochs = {"epochs": 6, "milestones": [], "lr": 0.02, "warmup_steps": 0, "lr_batch": None}
    search = ask(
        {"optim.lr": {"loguniform": [1e-7, 0.05]}},
        {"optim": epochs, "cluster": {"workers": 0, "threads_per_worker": 1}},
        scheduler={"kind": "pbt", "perturb_epochs": 1, "quantile": 0.5, "resample": 0.0},
        searcher={"kind": "random"},
        budget={"trials": 2, "max_concurrent": 2},
    )
    trials, events = run(search, SearchFolder.open(str(tmp_path / "search")))
    assert [trial.state for trial in trials] == ["finished", "finished"]
    copiers = [trial for trial in trials if trial.copies]
    assert copiers, "nobody copied"
    for trial in copiers:
        run_folder = tmp_path / f"search/runs/{trial.number:04d}-s0-c{len(trial.copies)}"
        job = json.loads((run_folder / "job.json").read_text())
        assert job["optim"]["lr"] == trial.values["optim.lr"] != trial.copies[-1]["values"]["optim.lr"]
        log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in log if "losses" in record]
        assert steps == list(range(1, steps[-1] + 1)), "the log is that of the copied state, then its own"
        assert log[-2]["lr"] == pytest.approx(trial.values["optim.lr"])
        assert [epoch for epoch, _ in trial.curve] == [1, 2, 3, 4, 5, 6]
    assert events


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(tmp_path: Path, ask: Ask, ray_cluster: None) -> None:
    search = ask(
        {"optim.lr": {"choice": [0.01]}},
        {"optim": {"epochs": 8, "milestones": [6]}},
        searcher={"kind": "grid"},
    )
    folder = SearchFolder.open(str(tmp_path / "search"))
    folder.start(search)
    killed: list[int] = []

    def kill(event: dict[str, Any]) -> None:
        if event.get("epoch", 0) >= 3 and not killed:
            killed.extend(processes("ray::ImplicitFunc") or processes("ray::run_trial"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    (trial,) = search_on_ray(search, folder, train, kill)
    assert killed and (trial.state, trial.cause) == ("finished", None)
    steps = [record["step"] for record in folder.log(trial, 0) if "losses" in record]
    assert steps == list(range(1, steps[-1] + 1))
    assert [epoch for epoch, _ in trial.curve] == list(range(1, 9))


@pytest.mark.slow
def test_a_killed_search_goes_on_and_repeats_nothing(tmp_path: Path, ask: Ask) -> None:
    """The driver is killed with SIGKILL while one trial has ended and another trains."""
    ask(
        {"optim.lr": {"loguniform": [0.001, 0.1]}},
        {"optim": {"epochs": 12, "milestones": [8]}, "cluster": {"workers": 0, "threads_per_worker": 1, "address": "local"}},
        budget={"trials": 4, "max_concurrent": 1},
        searcher={"kind": "random"},
    )
    command = [sys.executable, "-m", "headkd_ray.tune", str(tmp_path / "search.yaml")]
    folder = SearchFolder.open(str(tmp_path / "search"))
    with (tmp_path / "out.txt").open("w") as out:
        driver = subprocess.Popen(command, stdout=out, stderr=out)
        deadline = time.monotonic() + HANGS
        while not (
            folder.exists and any(_epochs(tmp_path, trial) in range(2, 11) for trial in folder.trials() if trial.number)
        ):
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.02)
        workers = processes("ray::", driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    killed = {trial.number: trial for trial in folder.trials()}
    (running,) = [number for number, trial in killed.items() if trial.state == "running"]
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("search/runs/0000*/**/*")}
    assert killed[0].state == "finished" and running >= 1 and workers

    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "is already a search: continue it (--resume)" in refused.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = folder.trials()
    assert [trial.state for trial in trials] == ["finished"] * 4
    assert finished == {path: path.stat().st_mtime_ns for path in finished}, "a finished trial ran again"
    assert {number: trials[number].values for number in killed} == {number: trial.values for number, trial in killed.items()}
    assert "trial 0 " not in done.stdout.split("search: 4 trials")[0]
    steps = [record["step"] for record in folder.log(trials[running], 0) if "losses" in record]
    assert steps == sorted(set(steps)), "the killed trial went on from its checkpoint"


def _epochs(tmp_path: Path, trial: Trial) -> int:
    """Return the epochs that the trial's log contains."""
    log = tmp_path / f"search/runs/{trial.number:04d}-s0/log.jsonl"
    return log.read_text().count('"val"') if log.exists() else 0
