"""Names from files cannot control a terminal, and addresses keep their secrets."""

from __future__ import annotations

import io
import pickle

import pytest
from rich.table import Table

from headkd_ray.errors import DataError, StorageError
from headkd_ray.report.terminal import Terminal
from headkd_ray.storage import Folder
from headkd_ray.text import masked, printable, rounded


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://KEY:hunter2@bucket/runs", "s3://KEY:***@bucket/runs"),
        ("s3://KEY%3Ahunter2@bucket/runs", "s3://KEY:***@bucket/runs"),
        ("s3://KEY:hun%2Fter2%40bucket/runs", "s3://KEY:***%40bucket/runs"),
        ("s3://KEY:hun/ter2@bucket/runs", "s3://KEY:***@bucket/runs"),
        ("https://hunter2@host/x", "https://***@host/x"),
        (
            "https://h/x?X-Amz-Date=1&X-Amz-Signature=hunter2&b=1: gone",
            "https://h/x?X-Amz-Date=1&X-Amz-Signature=***&b=1: gone",
        ),
        ("az://c/x?sv=2020&sig=hunter2%3D.", "az://c/x?sv=2020&sig=***."),
        ("https://h/x?to%6ben=hunter2#access_token=hunter2", "https://h/x?to%6ben=***#access_token=***"),
        ('{"a": "s3://u:hunter2@h/x?token=hunter2", "b": "c@d"}', '{"a": "s3://u:***@h/x?token=***", "b": "c@d"}'),
    ],
)
def test_secrets_are_masked(address: str, shown: str) -> None:
    assert masked(f"run.storage: {address}") == f"run.storage: {shown}"
    assert masked(masked(address)) == shown


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/runs?endpoint_override=minio:9000&scheme=http",
        "s3://bucket/photos@2x/a:b",
        "hdfs://user@node:8020/runs",
        "hdfs://node:8020/user@x/runs",
        "abfs://container@account.dfs.core.windows.net/x",
        "mail a:b@c, see https://h/x?monkey=1",
    ],
)
def test_addresses_without_secrets_stay_as_they_are(address: str) -> None:
    assert masked(address) == address


@pytest.mark.parametrize("password", ["%3Ahunter2", ":hun/te?r2", ":hunter 2"])
def test_an_address_with_a_password_is_refused_and_not_echoed(password: str) -> None:
    with pytest.raises(StorageError, match=r"s3://KEY:\*\*\*@bucket/x: has a password in it") as caught:
        Folder.open(f"s3://KEY{password}@bucket/x")
    assert "hun" not in str(caught.value)


def test_another_store_s_errors_are_sentences_without_secrets() -> None:
    with pytest.raises(StorageError) as caught:
        Folder.open("http://127.0.0.1:9/val?token=hunter2").names()
    message = str(caught.value)
    assert message.startswith("http://127.0.0.1:9/val?token=***: cannot be used (") and "check the address" in message
    assert "hunter2" not in message


def test_an_error_s_lines_are_printable_wherever_they_go() -> None:
    error = DataError(["a\x1b[2J\r\x07.jpg\u202e: bad\ud800", "two\nlines"], headline="x\x9b: 2 problems:")
    expected = "x\\x9b: 2 problems:\n  - a\\x1b[2J\\x0d\\x07.jpg\\u202e: bad\\ud800\n  - two\nlines"
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == expected
    assert printable(printable("a\x1b\\x1b é 中 \u200d")) == "a\\x1b\\x1b é 中 \u200d"


def test_the_terminal_shows_what_it_must_not_obey() -> None:
    table = Table(title="[red]t[/]")
    table.add_column("a[b]")
    table.add_row("[bold]cat :smile: \x1b[2J")
    out = io.StringIO()
    terminal = Terminal(file=out, width=60, force_terminal=True)
    terminal.print(table)
    terminal.print("[red]photo.jpg \x1b]0;title\x1b\\", style="bold")
    shown = out.getvalue()
    for text in ("[red]t[/]", "a[b]", "[bold]cat :smile: \\x1", "[red]photo.jpg \\x1b]0;title\\x1b"):
        assert text in shown
    assert "\x1b[2J" not in shown and "\x1b]0" not in shown and "\x1b[1m" in shown, "its own colours stay"


def test_numbers_for_people_have_no_exponent() -> None:
    """100 % of the boxes, 150 hours."""
    shown = {100.0: "100", 150.2: "150", 9.96: "10", 37.5: "38", 1.54: "1.5", 0.00213: "0.0021", 0.0: "0", -120.0: "-120"}
    assert {value: rounded(value) for value in shown} == shown
