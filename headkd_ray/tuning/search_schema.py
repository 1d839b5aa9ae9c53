"""Write the search file's JSON Schema for editors.

``python -m headkd_ray.tuning.search_schema`` writes ``jobs/search.schema.json``.
"""

from __future__ import annotations

from headkd_ray.job.schema import write_schema
from headkd_ray.tuning.search_spec import SearchSpec

if __name__ == "__main__":
    write_schema(SearchSpec, "jobs/search.schema.json")
