"""A run that is killed and started again ends as the one that was not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from headkd_ray.engine.local import train_here
from headkd_ray.engine.run import only_one, run_folder
from headkd_ray.errors import CheckpointError, JobError, UserError
from headkd_ray.train import train
from tests.support import assert_same_weights, micro_job, start_training, student_weights, wait_for_lines


def test_kill_9_and_resume_is_bit_exact(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    whole = micro_job(tmp_path, drawn_splits, "whole", checkpoint={"every_steps": 3}, optim={"ema": 0.9, "accumulate": 2})
    killed = whole.model_copy(update={"run": whole.run.model_copy(update={"name": "killed"})})
    expected = train(whole, lambda record: None)

    job_file = tmp_path / "killed.yaml"
    job_file.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    log = tmp_path / "killed" / "log.jsonl"
    process = start_training(job_file)
    wait_for_lines(log, 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists(), "killed too late: the run had ended"
    assert start_training(job_file).wait() == 0

    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert_same_weights(student_weights(expected), student_weights(result))
    assert result["last"] == expected["last"] and result["best"] == expected["best"]
    steps = [record["step"] for record in map(json.loads, log.read_text().splitlines()) if "losses" in record]
    assert steps == list(range(1, steps[-1] + 1)), "a step is missing from the log, or there twice"


def test_sigterm_keeps_the_step_and_the_same_command_goes_on(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """In the middle of an epoch, with checkpoints only at the ends of epochs."""
    optim = {"epochs": 4, "milestones": [2]}
    expected = train(micro_job(tmp_path, drawn_splits, "whole", optim=optim), lambda record: None)
    stopped = micro_job(tmp_path, drawn_splits, "stopped", optim=optim)
    job_file = tmp_path / "stopped.yaml"
    job_file.write_text(yaml.safe_dump(stopped.model_dump(mode="json")))
    process = start_training(job_file, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "stopped" / "log.jsonl", 3, process)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    (last,) = re.findall(r"stopped as asked at step (\d+) of 44, with a checkpoint; .* goes on", told.splitlines()[-1])
    assert "Traceback" not in told and int(last) % 11, "stopped at the end of an epoch: nothing was tested"

    records: list[dict[str, Any]] = []
    result = train(stopped, records.append)
    assert records[0]["step"] == int(last) + 1
    assert_same_weights(student_weights(expected), student_weights(result))


def test_a_finished_run_is_not_trained_again(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, optim={"epochs": 1, "milestones": []})
    first = train(job, lambda record: None)
    records: list[dict] = []
    assert train(job, records.append) == first and not records


def test_other_keys_under_the_same_name_are_refused(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, optim={"epochs": 1, "milestones": []})
    train(job, lambda record: None)
    other = micro_job(tmp_path, drawn_splits, optim={"epochs": 1, "milestones": [], "lr": 0.5})
    with pytest.raises(UserError, match=r"optim\.lr.*0\.01.*0\.5"):
        train(other, lambda record: None)


def test_best_and_last_checkpoint_stay(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, optim={"epochs": 3, "milestones": []}, eval={"every_epochs": 1})
    result = train_here(job, lambda record: None)
    folder = tmp_path / "run" / "checkpoints"
    listed = json.loads((folder / "checkpoints.json").read_text())
    assert sorted(entry["name"] for entry in listed) == sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert 1 <= len(listed) <= 2 and listed[-1]["name"].endswith(str(result["last"]["step"]))
    assert result["best"]["AP"] == max(entry["score"] for entry in listed)


def test_a_damaged_training_state_is_named(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, optim={"epochs": 1, "milestones": []})
    train_here(job, lambda record: None)
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/training_state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="unreadable training state"):
        train_here(job, lambda record: None)


def test_two_processes_do_not_train_one_run(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, optim={"epochs": 1, "milestones": []})
    with only_one(run_folder(job)), pytest.raises(JobError, match=r"run\.name: another process is training .*/run;"):
        train(job, lambda record: None)
    assert train(job, lambda record: None)["last"]["step"] > 0
