"""A run that is killed and started again ends like an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headkd_ray.data.shards import ShardSet
from headkd_ray.engine.checkpoint import METRICS_FILE, STUDENT_FOLDER, UNSCORED, first_intact, load_state, seal
from headkd_ray.engine.local import train_here
from headkd_ray.engine.run import only_one, open_run, run_folder
from headkd_ray.engine.scratch import Scratch
from headkd_ray.engine.stop import stop_signals
from headkd_ray.errors import CheckpointError, JobError, StoppedError, UserError
from headkd_ray.storage import Folder
from headkd_ray.train import main, train
from tests.support import (
    HANGS,
    MICRO_STUDENT,
    assert_same_weights,
    micro_job,
    micro_teacher,
    start_training,
    student_weights,
    wait_for_lines,
)


def start_unseen(job_file: Path) -> subprocess.Popen[Any]:
    """Start it where nothing can be printed: nobody reads the pipe, and the encoding lacks most characters."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "headkd_ray.train", str(job_file)]
    process = subprocess.Popen(command, env=environment, stdout=writer)
    os.close(writer)
    return process


def test_kill_9_and_resume_is_bit_exact(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    whole = micro_job(tmp_path, drawn_splits, "whole", checkpoint={"every_steps": 3}, optim={"ema": 0.9, "accumulate": 2})
    killed = whole.replace({"run.name": "killed"})
    expected = train(whole, lambda record: None)

    job_file = tmp_path / "killed.yaml"
    job_file.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    log = tmp_path / "killed" / "log.jsonl"
    process = start_training(job_file)
    wait_for_lines(log, 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists(), "killed too late: the run had ended"
    assert start_unseen(job_file).wait() == 0

    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert_same_weights(student_weights(expected), student_weights(result))
    assert result["last"] == expected["last"] and result["best"] == expected["best"]
    steps = [record["step"] for record in map(json.loads, log.read_text().splitlines()) if "losses" in record]
    assert steps == list(range(1, steps[-1] + 1)), "a step is missing from the log, or there twice"


def test_sigterm_keeps_the_step_and_the_same_command_goes_on(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """It is stopped in the middle of an epoch, with checkpoints due only at the ends of epochs."""
    optim = {"epochs": 4, "milestones": [2]}
    expected = train(micro_job(tmp_path, drawn_splits, "whole", optim=optim), lambda record: None)
    stopped = micro_job(tmp_path, drawn_splits, "stopped", optim=optim)
    job_file = tmp_path / "stopped.yaml"
    job_file.write_text(yaml.safe_dump(stopped.model_dump(mode="json")))
    process = start_training(job_file, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "stopped" / "log.jsonl", 3, process)
    process.terminate()
    _, told = process.communicate(timeout=HANGS)
    assert process.returncode == 143, told
    (last,) = re.findall(r"stopped as requested at step (\d+) of 44, with a checkpoint; .* resumes", told.splitlines()[-1])
    assert "Traceback" not in told and int(last) % 11, "stopped at the end of an epoch: nothing was tested"

    records: list[dict[str, Any]] = []
    result = train(stopped, records.append)
    assert records[0]["step"] == int(last) + 1
    assert_same_weights(student_weights(expected), student_weights(result))


def test_a_finished_run_is_not_trained_again_and_says_so(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    splits = {name: str(shutil.copytree(split, tmp_path / name)) for name, split in drawn_splits.items()}
    job = micro_job(tmp_path, splits, optim={"epochs": 1, "milestones": []})
    first = train(job, lambda record: None)
    records: list[dict] = []
    notes: list[str] = []
    assert train(job, records.append, notes.append) == first and not records
    assert len(notes) == 1 and f"{tmp_path}/run has already ended, at step 11: this is its result" in notes[0]

    meta = tmp_path / "val" / "meta.json"
    fields = json.loads(meta.read_text())
    meta.write_text(json.dumps({**fields, "fingerprint": "0" * 64}))
    with pytest.raises(UserError, match=r"data\.val: the run .*/run has ended, and was trained on different data .*run\.name"):
        train(job, lambda record: None)


def test_a_resumed_run_does_not_read_again_what_it_started_from(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """The checkpoint may be gone by then; the result says which weights they were, so that others are noticed."""
    once = {"epochs": 1, "milestones": []}
    source = Path(train(micro_job(tmp_path, drawn_splits, "source", optim=once), lambda record: None)["student"])
    student = {**MICRO_STUDENT, "checkpoint": str(source)}
    job = micro_job(tmp_path, drawn_splits, student=student, optim={**once, "ema": 0.9}, run={"seed": 1})
    result = train(job, lambda record: None)
    card = json.loads((Path(result["student"]) / "model.json").read_text())
    assert card["meta"]["start"] == {"checkpoint": str(source), "fingerprint": result["data"]["student.checkpoint"]}
    assert card["spec"].keys().isdisjoint({"checkpoint", "classes"}), "older versions would not read it"

    weights = student_weights(result)
    away = source.rename(tmp_path / "away")
    assert train(job, lambda record: None) == result
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "student")
    records: list[dict] = []
    assert train(job, records.append) == result and not records
    assert_same_weights(student_weights(result), weights)

    shutil.copytree(away, source)
    train(job, lambda record: None)
    shutil.rmtree(source)
    shutil.copytree(result["student"], source)
    with pytest.raises(
        UserError, match=r"student\.checkpoint: the run .*/run has ended, and started from different weights .*run\.name"
    ):
        train(job, lambda record: None)
    with pytest.raises(UserError, match=f"student.checkpoint: {tmp_path}/gone: no such folder"):
        train(
            micro_job(tmp_path, drawn_splits, "new", student={**student, "checkpoint": f"{tmp_path}/gone"}), lambda record: None
        )


def test_a_teacher_of_other_weights_is_noticed_before_and_after_the_end(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    teacher = micro_teacher(tmp_path / "teacher", classes)
    sections: dict[str, Any] = {"teacher": {"checkpoint": teacher}, "checkpoint": {"every_steps": 2}}
    job = micro_job(tmp_path, drawn_splits, method="copy_only", optim={"epochs": 1, "milestones": []}, **sections)

    def cut(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise RuntimeError("the machine is taken away")

    with pytest.raises(RuntimeError, match="taken away"):
        train(job, cut)
    micro_teacher(tmp_path / "teacher", classes, seed=4)
    with pytest.raises(UserError, match=r"^teacher\.checkpoint: the checkpoint at step 2 was written with '\w{64}', this run"):
        train(job, lambda record: None)
    micro_teacher(tmp_path / "teacher", classes)
    result = train(job, lambda record: None)
    card = json.loads((Path(result["student"]) / "model.json").read_text())
    assert card["meta"]["teacher"] == {"checkpoint": teacher, "fingerprint": result["data"]["teacher.checkpoint"]}
    assert train(job, lambda record: None) == result
    micro_teacher(tmp_path / "teacher", classes, seed=4)
    with pytest.raises(UserError, match=r"^teacher\.checkpoint: the run .*/run has ended, and had a different teacher "):
        train(job, lambda record: None)


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


def test_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    """The log says so; a reader of tensors would not notice this damage. If none is intact, the run does not start over."""

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    sections: dict[str, Any] = {"optim": {"epochs": 1, "milestones": []}, "checkpoint": {"every_steps": 2}}
    job = micro_job(tmp_path, drawn_splits, **sections)
    with pytest.raises(StoppedError, match="at step 6 of 11"):
        train_here(job, stop)
    folder = tmp_path / "run" / "checkpoints"
    assert [entry["name"] for entry in json.loads((folder / "checkpoints.json").read_text())] == [
        "step_00000004",
        "step_00000006",
    ]
    shutil.copytree(tmp_path / "run", tmp_path / "both")
    damage(folder / "step_00000006" / "training_state.pt")

    records: list[dict[str, Any]] = []
    result = train_here(job, records.append)
    notes = [record["note"] for record in records if "note" in record]
    assert notes == [
        f"{folder}/step_00000006/training_state.pt: is damaged: its content differs from what was written",
        "resuming from the previous checkpoint, step_00000004",
    ]
    assert [record["step"] for record in records if "losses" in record] == list(range(5, 12))
    whole = train_here(micro_job(tmp_path, drawn_splits, "whole", **sections), lambda record: None)
    assert_same_weights(student_weights(whole), student_weights(result))

    shutil.rmtree(tmp_path / "both" / "checkpoints" / "step_00000004")
    damage(tmp_path / "both" / "checkpoints" / "step_00000006" / "student" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        train_here(micro_job(tmp_path, drawn_splits, "both", **sections), lambda record: None)
    text = str(caught.value)
    assert "step_00000006/student/model.safetensors: is damaged" in text and "step_00000004: is missing" in text
    assert f"delete {tmp_path}/both/checkpoints to train the run from the start" in text


def test_a_stop_within_an_evaluation_is_met_at_once_and_the_evaluation_made_up(
    tmp_path: Path, drawn_splits: dict[str, str]
) -> None:
    """Also within that of the last epoch. The run ends as one that was never stopped, and its log has each record once."""
    sections: dict[str, Any] = {"eval": {"every_epochs": 1, "batch_size": 2, "patience": 5}}
    job = micro_job(tmp_path, drawn_splits, **sections)
    log: list[dict[str, Any]] = []
    for end in (11, 22):

        def stop(record: dict[str, Any], end: int = end) -> None:
            log.append(record)
            if record["step"] == end and "losses" in record:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(StoppedError, match=f"at step {end} of 22, with a checkpoint"):
            train_here(job, stop)
        assert log[-1]["step"] == end and "val" not in log[-1]
        listed = json.loads((tmp_path / "run" / "checkpoints" / "checkpoints.json").read_text())
        assert listed[-1]["name"] == f"step_{end:08d}" and listed[-1]["score"] == UNSCORED
    result = train_here(job, log.append)
    whole: list[dict[str, Any]] = []
    undisturbed = train_here(micro_job(tmp_path, drawn_splits, "whole", **sections), whole.append)
    assert [(record["step"], record.get("val")) for record in log] == [(record["step"], record.get("val")) for record in whole]
    assert {key: result[key] for key in ("best", "last", "data")} == {key: undisturbed[key] for key in ("best", "last", "data")}
    assert_same_weights(student_weights(result), student_weights(undisturbed))
    states = [load_state(tmp_path / name / "checkpoints" / listed_last(tmp_path / name)) for name in ("run", "whole")]
    assert states[0]["patience"] == states[1]["patience"]


def listed_last(run: Path) -> str:
    """Return the name of a run's latest checkpoint."""
    name: str = json.loads((run / "checkpoints" / "checkpoints.json").read_text())[-1]["name"]
    return name


def damage(file: Path) -> None:
    """Change 200 bytes in the middle of a file."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(byte ^ 1 for byte in content[middle : middle + 200])
    file.write_bytes(content)


def test_a_disk_that_is_full_is_told_with_the_file(
    tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(micro_job(tmp_path, drawn_splits).model_dump(mode="json")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # log lines fit, a checkpoint does not
    try:
        with pytest.raises(SystemExit) as exit_:
            main([str(job_file)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: /") and "/training_state.pt: cannot be written (File too large); make room there" in last


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", "[]"),
        ("result.json", '{"best": 3, "last": {}, "student": "x"}'),
        ("job.json", "{"),
        ("job.json", "[" * 100_000),
        ("checkpoints/checkpoints.json", '{"a": 1}'),
        ("checkpoints/checkpoints.json", '[{"name": 1}]'),
    ],
)
def test_a_damaged_file_of_the_run_is_named(name: str, content: str, tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits)
    open_run(job)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(UserError) as caught:
        train(job, lambda record: None)
    assert f"{tmp_path}/run/{name}: " in str(caught.value) and "; " in str(caught.value)


def test_a_damaged_student_is_not_promoted(tmp_path: Path) -> None:
    good, bad = (tmp_path / name for name in ("good", "bad"))
    for folder in (good, bad):
        (folder / STUDENT_FOLDER).mkdir(parents=True)
        (folder / STUDENT_FOLDER / "model.safetensors").write_bytes(bytes(1000))
        (folder / METRICS_FILE).write_text("{}")
        seal(folder)
    damage(bad / STUDENT_FOLDER / "model.safetensors")
    folder, problems = first_intact([Folder.open(bad), Folder.open(good)])
    assert folder.path == str(good) and len(problems) == 1 and f"{bad}/student/model.safetensors: is damaged" in problems[0]


def test_what_a_killed_process_leaves_behind_is_deleted_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is deleted."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}; from headkd_ray.engine.scratch import Scratch; "
    program += "s = Scratch(); (s.folder() / 'training_state.pt').write_text('big'); print('there', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    (left,) = tmp_path.iterdir()
    mine = Scratch()
    assert left.exists(), "swept a living process's"
    process.kill()
    process.communicate()
    other = tmp_path / "headkd-other"
    other.mkdir()
    again = Scratch()
    assert not left.exists() and other.exists() and mine.folder().is_dir() and again.folder().is_dir()
    again.close()
    mine.close()
    assert list(tmp_path.iterdir()) == [other]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, also where the shell that started the tests ignores it, as for background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_as_sigterm_does_and_a_second_one_at_once(interruptible: None) -> None:
    def twice() -> None:
        with stop_signals() as requested:
            assert not requested()
            os.kill(os.getpid(), signal.SIGINT)
            assert requested()
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                raise StoppedError("with a checkpoint") from None

    with pytest.raises(StoppedError) as stopped:
        twice()
    assert stopped.value.signal == signal.SIGINT


def test_two_processes_do_not_train_one_run(tmp_path: Path, drawn_splits: dict[str, str]) -> None:
    job = micro_job(tmp_path, drawn_splits, optim={"epochs": 1, "milestones": []})
    with only_one(run_folder(job)), pytest.raises(JobError, match=r"run\.name: another process is training .*/run;"):
        train(job, lambda record: None)
    assert train(job, lambda record: None)["last"]["step"] > 0
