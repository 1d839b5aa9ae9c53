"""A detector of transformers trains, resumes and is used like every other kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headkd_ray import export
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.weights import save_detector
from headkd_ray.evaluate import evaluate_checkpoint
from headkd_ray.train import train
from tests.detectors.micro import transformers_spec
from tests.support import assert_same_weights, micro_job, student_weights


@pytest.mark.slow
def test_a_killed_and_resumed_training_from_a_folder_of_transformers_is_bit_exact(
    tmp_path: Path, drawn_splits: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The architecture is the folder's, and a resumed run needs it no more. RT-DETR draws noise in every step."""
    classes = ShardSet.open(drawn_splits["train"]).meta.classes
    folder = tmp_path / "theirs"
    save_detector(folder, build_detector(transformers_spec(), len(classes)), ("a", *classes[1:]))
    (folder / "model.json").unlink()  # what is left is what transformers itself would write
    student = {"kind": "transformers", "checkpoint": str(folder), "config": {"num_denoising": 4}}
    optim = {"optimizer": "adamw", "lr": 0.001, "backbone_lr_factor": 0.1, "ema": 0.9, "epochs": 1, "milestones": []}
    sections = {"optim": optim, "checkpoint": {"every_steps": 2}, "eval": {"every_epochs": 1}, "data": {"batch_size": 8}}
    whole = micro_job(tmp_path, drawn_splits, "whole", student=student, **sections)
    killed = whole.replace({"run.name": "killed"})
    expected = train(whole)
    (note,) = [record["note"] for record in records(tmp_path / "whole") if "note" in record]
    assert f"its outputs for {len(classes) - 1} of {len(classes)} classes are taken" in note and "(transformers)" in note

    with pytest.raises(KilledError):
        train(killed, killed_at(3))
    assert not (tmp_path / "killed" / "result.json").exists()
    shutil.rmtree(folder)
    result = train(killed)
    assert_same_weights(student_weights(expected), student_weights(result))
    assert result["last"] == expected["last"]

    metrics = evaluate_checkpoint(expected["student"], drawn_splits["val"]).as_dict()
    assert json.dumps(metrics) == json.dumps({name: expected["best"][name] for name in metrics})  # as text: NaN equals NaN
    with pytest.raises(SystemExit):
        export.main([expected["student"], "--to", "onnx", "--val", drawn_splits["val"], "--out", str(tmp_path / "out")])
    assert "a detector of transformers cannot be exported here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class KilledError(Exception):
    """Ends a run without a chance to save anything."""


def killed_at(step: int) -> Callable[[dict[str, Any]], None]:
    """Return a sink that ends the run when it learns of ``step``."""

    def tell(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise KilledError

    return tell


def records(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
