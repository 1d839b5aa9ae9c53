"""Problems with the output do not end the work."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from typing import TextIO

import pytest
from rich.console import Console

from headkd_ray.cli import user_errors
from headkd_ray.report.console import RunConsole
from headkd_ray.report.output import Forgiving, forgive_output


def terminal(encoding: str) -> tuple[TextIO, io.BytesIO]:
    written = io.BytesIO()
    return io.TextIOWrapper(written, encoding=encoding, write_through=True), written


def test_what_the_encoding_lacks_is_replaced() -> None:
    stream, written = terminal("ascii")
    print("AP 10.5 ± 0.2 … cafe\u0301 \u2014 \udc80", file=Forgiving(stream))
    assert written.getvalue() == b"AP 10.5 +/- 0.2 ... cafe\\u0301 - \\udc80\n"
    stream, written = terminal("utf-8")
    print("± \udc80", file=Forgiving(stream))
    assert written.getvalue() == "± \\udc80\n".encode()


def test_a_run_goes_on_when_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    forgive_output()
    with RunConsole("run") as console:
        for step in range(3):
            console({"step": step, "steps": 3, "note": "–" * 10_000})
    sys.stdout.close()  # would raise if anything were left to write


def test_rich_draws_what_the_terminal_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, written = terminal("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    forgive_output()
    Console().rule("stage")
    assert b"--- stage ---" in written.getvalue()


def test_output_that_is_lost_is_told_after_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    done: list[str] = []

    def work() -> None:
        with user_errors():
            print("a job, written into a file")
            done.append("the rest")

    with pytest.raises(SystemExit) as exit_:
        work()
    assert done and exit_.value.code == 2
    assert "error: standard output: cannot be written (No space left on device)" in capsys.readouterr().err


def test_ctrl_c_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, user_errors():
        raise KeyboardInterrupt
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C before the end\n"


@pytest.mark.parametrize(("argument", "stream", "code"), [("--help", "stdout", 0), ("--no-such-option", "stderr", 2)])
def test_help_and_wrong_options_may_meet_a_closed_pipe(argument: str, stream: str, code: int) -> None:
    """This happens in ``python -m headkd_ray.train --help | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([sys.executable, "-m", "headkd_ray.train", argument], **streams)
    os.close(writer)
    assert done.returncode == code and not done.stdout and not done.stderr
