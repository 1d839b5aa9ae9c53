import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from headkd_ray.data.batch import Batch
from headkd_ray.engine.distributed import Distributed
from headkd_ray.engine.log import JsonLines, StepWindow, TensorBoard


def test_json_lines_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path, resumed_step=0)
    for step in (10, 20, 30):
        log({"step": step})
    log.file.write('{"step": 40, "lo')  # cut off by a kill
    log.file.close()
    log = JsonLines(path, resumed_step=20)
    log({"step": 30, "AP": None})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 10}, {"step": 20}, {"step": 30, "AP": None}]


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": "x"}\n{"step": 2}\n')
    JsonLines(path, resumed_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_class_named_with_half_a_character_does_not_end_the_run(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, resumed_step=0)
    board({"step": 1, "steps": 2, "epoch": 1.0, "val": {"per_class": {"caf\udce9": 10.0}}})
    board.close()
    (file,) = tmp_path.iterdir()
    assert b"caf\\udce9" in file.read_bytes()


def test_window_averages_and_starts_anew(batch_of: Callable[[int], Batch]) -> None:
    window = StepWindow(Distributed(0, 1, torch.device("cpu")))
    window.add({"loss_cls": torch.tensor(1.0)}, batch_of(2))
    window.add({"loss_cls": torch.tensor(3.0)}, batch_of(2))
    record = window.record()
    assert record["losses"] == {"loss_cls": 2.0} and record["images_per_second"] > 0 and 0 <= record["data_wait"] < 1
    window.add({"loss_cls": torch.tensor(5.0)}, batch_of(2))
    assert window.record()["losses"] == {"loss_cls": 5.0}


def test_idle_batches_count_in_no_mean(batch_of: Callable[[int], Batch]) -> None:
    window = StepWindow(Distributed(0, 1, torch.device("cpu")))
    window.add({"loss_cls": torch.tensor(2.0)}, batch_of(2))
    window.add({"loss_cls": torch.tensor(float("nan"))}, replace(batch_of(1), idle=True))
    assert window.record()["losses"] == {"loss_cls": 2.0}
