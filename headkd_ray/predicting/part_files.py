"""The files of a prediction in parts: their names, and how a part's rows are stored."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from headkd_ray.storage import Folder

Format = Literal["parquet", "jsonl"]

INPUTS = "inputs"
"""Folder with the images of each part."""
PROBLEMS = ".problems.jsonl"
"""End of the name of the file that lists a part's images that could not be read; there is none if all could."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("problem", pa.string()),
        (
            "detections",
            pa.list_(pa.struct([("category_id", pa.int64()), ("bbox", pa.list_(pa.float32())), ("score", pa.float32())])),
        ),
    ]
)
"""Columns of a part: a row for each image, in order. ``problem`` is null if the image could be read; else height and width are.
Boxes are x, y, width, height in pixels of the upright image."""


def part_name(number: int, end: str) -> str:
    """Return the name of part ``number``, from 0, with the given end (``.parquet``, ``.jsonl``, ``PROBLEMS``, ``.json``)."""
    return f"part-{number:06d}{end}"


def encoded(rows: Sequence[Mapping[str, Any]], output: Format) -> bytes:
    """Return the content of a part's file."""
    if output == "jsonl":
        return json_lines(rows)
    content = io.BytesIO()
    shown = [{**row, "file_name": row["file_name"].encode("utf-8", "backslashreplace").decode()} for row in rows]
    pq.write_table(pa.Table.from_pylist(shown, SCHEMA), content)
    return content.getvalue()


def json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON, one a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def unfinished(out: Folder, parts: int, output: Format, retry: bool = False) -> list[int]:
    """Return the numbers of the parts that are not there; with ``retry`` also of those that list problems."""
    there = set(out.names())
    missing = [number for number in range(parts) if part_name(number, f".{output}") not in there]
    again = [number for number in range(parts) if part_name(number, PROBLEMS) in there] if retry else []
    return sorted({*missing, *again})


def problems_in(out: Folder, parts: int) -> list[str]:
    """Return the name and the problem of each image that could not be read, in order."""
    there = set(out.names())
    names = [name for name in (part_name(number, PROBLEMS) for number in range(parts)) if name in there]
    rows = [json.loads(line) for name in names for line in out.read(name).splitlines()]
    return [f"{row['file_name']}: {row['problem']}" for row in rows]
