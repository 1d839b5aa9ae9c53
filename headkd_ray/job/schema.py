"""Write the job file's JSON Schema, with which editors complete and check the YAML: ``python -m headkd_ray.job.schema``.

It is written to ``jobs/job.schema.json`` (or the given path); a test checks that the committed file is up to date.
``python -m headkd_ray.tuning.search_schema`` does the same for search files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headkd_ray.job.job import Job
from headkd_ray.job.module_specs import Spec


def schema_text(top: type[Spec] = Job) -> str:
    """Return the JSON Schema (2020-12) of a job file, or of another file of ``Spec`` sections."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **top.model_json_schema()}
    return json.dumps(_one_line_descriptions(schema), indent=2) + "\n"


def _one_line_descriptions(node: object) -> object:
    if isinstance(node, dict):
        return {
            key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _one_line_descriptions(value)
            for key, value in node.items()
        }
    return [_one_line_descriptions(item) for item in node] if isinstance(node, list) else node


def write_schema(top: type[Spec], default: str) -> None:
    """Write the schema to the path given on the command line, or to ``default``."""
    parser = argparse.ArgumentParser(description=f"Write the JSON Schema to {default} or the given path.")
    parser.add_argument("path", nargs="?", type=Path, default=Path(default))
    path: Path = parser.parse_args().path
    if not path.parent.is_dir():
        parser.error(f"{path.parent}: no such folder")
    path.write_text(schema_text(top), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    write_schema(Job, "jobs/job.schema.json")
