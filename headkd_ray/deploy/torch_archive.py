"""Read a ``.pt2`` file of ``torch.export`` without running code that it may hold.

``torch.export.load`` unpickles what a file declares a pickle, calls whatever function of torch or of Python's operators a node
of the graph names, and evaluates the file's expressions of sizes and its guards as Python. So a file is read only if it has
nothing but what ``headkd export`` writes: tensors as bare bytes, operators that compute, and sizes as arithmetic.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headkd_ray.deploy.description import Description, read_metadata
from headkd_ray.errors import CheckpointError

if TYPE_CHECKING:
    from torch.export.pt2_archive import PT2ArchiveReader

RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(?:weight_\d+|model_weights_config\.json)|data/constants/(?:tensor_\d+|model_constants_config\.json)"
    r"|extra/\w+"
)
"""Names of the parts of a file. Others hold pickles, or compiled code."""
OPERATORS = re.compile(
    r"torch\.ops\.(?:aten(?!\.from_file)|torchvision)\.\w+\.\w+|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
"""What a node may call: it computes, and reads no file."""
EXPRESSION = re.compile(r"(?:[A-Z]\w*(?=[(,)]|$)|'\w+'(?=[,)])|[a-z]+=(?=[TF])|[su]?\d+(?!\w)|[(), +*/-])*")
"""A size as SymPy prints it: numbers, symbols, and the names of SymPy's classes. No text matches in two ways: it is quick."""
RULES = {
    "target": OPERATORS,
    "expr_str": EXPRESSION,
    "torch_version": re.compile(r"[\w.+-]*"),
    "as_string": re.compile(r".*", re.DOTALL),  # an argument of an operator, such as einsum's equation
}
"""What a text may be, by its key."""
NAME = re.compile(r"[\w.]*")
"""What every other text is."""
KEY = re.compile(r"[\w.*+ -]*")
TREES = ("in_spec", "out_spec")
"""Keys of texts that are JSON: how the inputs and outputs are nested."""
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")


def read_program(content: bytes, path: str) -> tuple[nn.Module, Description]:
    """Return the graph in the ``content`` of the file at ``path``, ready to be called, and its description.

    Raises:
        CheckpointError: it is not such a file, is damaged, or headkd export did not write it.
    """
    from torch.export.pt2_archive import PT2ArchiveReader  # imported late, with parts of torch's compiler
    from torch.export.pt2_archive._package import load_pt2

    try:
        archive = PT2ArchiveReader(io.BytesIO(content))
        strange = next(_strange(archive), None)
        entries = {name.removeprefix("extra/"): archive.read_string(name) for name in _extra(archive)} if not strange else {}
    except Exception as error:  # the readers' errors have no common base
        raise CheckpointError(f"{path}: is not a file of torch.export, or is damaged; export it again") from error
    if strange is not None:
        raise CheckpointError(
            f"{path}: headkd export did not write this file: it has {strange}. Files of others are not read, because "
            "torch.export.load can run code that is in them"
        )
    description = read_metadata(entries, path)
    log, level = logging.getLogger("torch.export"), logging.getLogger("torch.export").level
    log.setLevel(logging.CRITICAL)  # what goes wrong is raised
    try:
        return load_pt2(io.BytesIO(content)).exported_programs["model"].module(), description
    except Exception as error:
        raise CheckpointError(
            f"{path}: torch {torch.__version__} cannot read this file ({type(error).__name__}); export it again with this torch"
        ) from error
    finally:
        log.setLevel(level)


def _extra(archive: PT2ArchiveReader) -> list[str]:
    return [name for name in archive.get_file_names() if name.startswith("extra/")]


def _strange(archive: PT2ArchiveReader) -> Iterator[str]:
    """Yield a phrase for everything in a file that :data:`RECORDS` and the rules below it do not know."""
    for name in archive.get_file_names():
        if not RECORDS.fullmatch(name):
            yield f"a part {name[:80]!r}"
    if archive.read_bytes("data/sample_inputs/model.pt"):
        yield "pickled example inputs"
    for kind, prefix in (("weights", "weight_"), ("constants", "tensor_")):
        for name, entry in json.loads(archive.read_string(f"data/{kind}/model_{kind}_config.json"))["config"].items():
            if entry["use_pickle"] is not False or not entry["path_name"].startswith(prefix):
                yield f"a pickle, {name[:80]!r}"
    yield from _strange_json(json.loads(archive.read_string("models/model.json")), "")


def _strange_json(value: Any, key: str) -> Iterator[str]:
    """Yield a phrase for everything in the JSON of a graph that could be code."""
    if key in ("metadata", "guards_code") and value:
        yield f"{key} with code"
    elif key in TREES:
        yield from (f"a container {kind!r}" for kind in _containers(json.loads(value)[1]) if kind not in CONTAINERS)
    elif isinstance(value, dict):
        for name, each in value.items():
            if not KEY.fullmatch(name):
                yield f"a key {name[:80]!r}"
            yield from _strange_json(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _strange_json(each, key)
    elif isinstance(value, str) and not RULES.get(key, NAME).fullmatch(value):
        yield f"{key} {value[:80]!r}"


def _containers(tree: dict[str, Any]) -> Iterator[str | None]:
    yield tree["type"]
    for child in tree["children_spec"]:
        yield from _containers(child)
