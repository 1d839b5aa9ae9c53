"""A JSON that is read piece by piece has the values, and the mistakes, that ``json.loads`` finds in the whole."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headkd_ray.data import checked_split, json_stream
from headkd_ray.data.coco import read_coco
from headkd_ray.data.json_stream import BadJsonError, KeyTwiceError, NotObjectError, top_level
from tests.data.coco_files import make_coco

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@pytest.fixture
def piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few bytes at a time, so that every value is cut somewhere."""
    monkeypatch.setattr(json_stream, "PIECE", 8)


def read(content: bytes) -> dict[str, Any]:
    return {key: None if items is None else list(items) for key, items in top_level(io.BytesIO(content), dict)}


@pytest.mark.usefixtures("piece")
@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text(max_size=4), VALUES, max_size=4),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from(["utf-8-sig", "utf-8", "utf-16"]),
)
def test_values_are_those_of_json_loads(data: dict[str, Any], indent: int | None, escaped: bool, encoding: str) -> None:
    text = json.dumps(data, indent=indent, ensure_ascii=escaped)
    assert read(text.encode(encoding)) == {key: value if isinstance(value, list) else None for key, value in data.items()}


@pytest.mark.usefixtures("piece")
@settings(max_examples=80, deadline=None)
@given(st.integers(1, 120), st.sampled_from('{}[],:"\\x0- \n\t'))
def test_mistakes_are_those_of_json_loads(at: int, character: str) -> None:
    sound = json.dumps({"images": [{"id": 1.5e-3, "n": None}, "a\nb", [True]], "x": {"y": [-1, 1e5]}, "z": [[], {}]}, indent=1)
    text = sound[:at] + character + sound[at + 1 :]
    mistake, expected = "", {}
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        mistake = str(error)
    if mistake:
        with pytest.raises(BadJsonError) as caught:
            read(text.encode())
        assert str(caught.value) == mistake
    else:
        assert {key: value for key, value in read(text.encode()).items() if value is not None}.items() <= expected.items()


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("[1]", NotObjectError),
        ("3", NotObjectError),
        ('{"a": [1], "a": 2}', KeyTwiceError),
        ("", BadJsonError),
        ("{", BadJsonError),
    ],
)
def test_what_is_no_object(content: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        read(content.encode())


def test_lists_that_are_not_asked_for_are_checked_too() -> None:
    stream = top_level(io.BytesIO(b'{"a": [1, 2, 3], "b": [4, 5], "c": [6,}'), dict)
    assert next(stream)[0] == "a"
    key, items = next(stream)
    assert key == "b" and items is not None and next(items) == 4
    assert next(stream)[0] == "c"
    with pytest.raises(BadJsonError, match="Expecting value"):
        next(stream)


def test_a_large_json_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its boxes are, in columns: a fraction of the kilobyte that each needs as Python objects."""
    monkeypatch.setattr(json_stream, "PIECE", 2**14)
    monkeypatch.setattr(checked_split, "PIECE", 100)
    files = make_coco(tmp_path, images=3)
    some = files.data["annotations"][0]
    files.data["annotations"] = [{**some, "id": k, "iscrowd": 0, "bbox": [1.5 + k / 10**4, 2, 3, 4]} for k in range(4_000)]
    files.save()
    read_coco(files.json)  # what is loaded once does not count
    tracemalloc.start()
    split = read_coco(files.json)
    size = sum(len(piece) for piece in split.coco_json())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 300_000 and peak < 300 * len(split.label)
    assert [a["bbox"] for a in split.ground_truth()["annotations"]] == [a["bbox"] for a in files.data["annotations"]]
