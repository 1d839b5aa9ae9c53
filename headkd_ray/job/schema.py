"""The job file's JSON Schema, by which editors complete and check the YAML: ``python -m headkd_ray.job.schema``.

Writes ``jobs/job.schema.json`` (or the path given); a test keeps the committed file fresh.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headkd_ray.job.job import Job


def schema_text() -> str:
    """The JSON Schema (2020-12) of a job file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}
    return json.dumps(_one_line_descriptions(schema), indent=2) + "\n"


def _one_line_descriptions(node: object) -> object:
    if isinstance(node, dict):
        return {
            key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _one_line_descriptions(value)
            for key, value in node.items()
        }
    return [_one_line_descriptions(item) for item in node] if isinstance(node, list) else node


def main() -> None:
    """Write the schema."""
    parser = argparse.ArgumentParser(prog="python -m headkd_ray.job.schema", description="Write the job file's JSON Schema.")
    parser.add_argument("path", nargs="?", type=Path, default=Path("jobs/job.schema.json"))
    path: Path = parser.parse_args().path
    path.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
