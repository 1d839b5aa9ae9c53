"""No file runs code: which readers the package may use, and what each does with a file that would run code."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file

import headkd_ray
from headkd_ray.data.packing import prepare_split
from headkd_ray.data.shards import ShardSet
from headkd_ray.detectors import build_detector
from headkd_ray.detectors.safe_load import read_file
from headkd_ray.detectors.weights import load_checkpoint, save_detector
from headkd_ray.detectors.weights.fetch import fetch_detector
from headkd_ray.engine.checkpoint import STATE_FILE, load_state
from headkd_ray.errors import DataError, JobError, UserError
from headkd_ray.golden.file import Golden
from headkd_ray.job import load_job
from headkd_ray.job.backbone_kwargs import KWARGS
from headkd_ray.storage import Folder
from tests.support import micro_job

PACKAGE = Path(headkd_ray.__file__).parent
ROOT = PACKAGE.parent
RUNS_CODE = {
    *("eval", "exec", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.serialization.add_safe_globals"),
    *("torch.serialization.safe_globals", "np.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("yaml.compose", "pd.read_pickle", "torch.export.load", "load_pt2", "torch.jit.load"),
}
"""Calls that run code from what they are given, or do so unless an argument forbids it."""
READERS = {
    # Ray's blocks, which the same run wrote.
    ("pickle.loads", "cluster/ray_stream.py"): "",
    ("pickle.loads", "cluster/decoding.py"): "",
    ("pickle.loads", "cluster/part_actors.py"): "",
    # Other people's files.
    ("torch.load", "detectors/safe_load.py"): "weights_only=True",
    ("torch.serialization.safe_globals", "detectors/safe_load.py"): "_allowed()",
    ("load_pt2", "deploy/torch_archive.py"): "",  # only what tests/deploy/test_torch_file.py shows to be ours
    ("np.load", "golden/file.py"): "allow_pickle=False",
    ("yaml.compose", "job/yaml_tree.py"): "Loader=_Loader",
    ("yaml.compose", "data/yolo_yaml.py"): "Loader=yaml.BaseLoader",
}
"""Where each of these calls may occur, and with what argument."""
MODULES = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for file in [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "bench").glob("*.py"))]:
        name = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.relative_to(ROOT)
        yield name.as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def test_no_call_that_runs_what_it_reads() -> None:
    found = set()
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
                assert not {name.split(".")[0] for name in (*names, source)} & MODULES, f"{file}:{node.lineno}"
                assert source not in ("pickle", "os", "subprocess"), f"{file}:{node.lineno}: call it by its module's name"
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert not any(word.arg == "shell" for word in node.keywords), f"{file}:{node.lineno}: a shell"
            if name in RUNS_CODE:
                argument = READERS.get((name, file))
                assert argument is not None, f"{file}:{node.lineno}: {name}"
                given = [ast.unparse(argument) for argument in (*node.args, *node.keywords)]
                assert not argument or argument in given, f"{file}:{node.lineno}: {name} without {argument}"
                found.add((name, file))
    assert found == set(READERS), "a reader is gone: take it out of the list"


class Bomb:
    """An object that makes a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Bomb]:
    bomb = Bomb(tmp_path / "it ran")
    yield bomb
    assert not bomb.mark.exists(), "code of the file was run"


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def backbone(file: Path) -> None:
    job = micro_job(file.parent, {"train": "t", "val": "v"})
    build_detector(job.student.replace({"backbone.weights": str(file)}), 2)


LOADERS: dict[str, Callable[[Path], object]] = {
    "teacher.pth": load_checkpoint,
    "student.pt": lambda file: fetch_detector(str(file)),
    "remote.pth": lambda file: fetch_detector(file.as_uri()),
    "backbone.pth": backbone,
    STATE_FILE: lambda file: load_state(file.parent),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.save", "pickle"])
def test_pickles_in_weight_files(name: str, wrapped: bool, bomb: Bomb, tmp_path: Path) -> None:
    file = tmp_path / name
    if wrapped:
        torch.save({"state_dict": {"weight": torch.zeros(2)}, "meta": bomb}, file)
    else:
        file.write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(UserError) as caught:
        LOADERS[name](file)
    message = str(caught.value)
    assert name in message and "that are not loaded, because that could run code" in message and "mkdir" in message
    assert "weights_only" not in message, "no advice to load it all the same"


def test_a_pickle_that_is_called_safetensors(bomb: Bomb, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match="not a readable weight file"):
        load_checkpoint(tmp_path / "model.safetensors")


class Reach:
    """An object pickled as mmdet's logs pickle their own methods: by a call of getattr."""

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, ("text", "upper")


def test_getattr_in_a_weight_file_reaches_nothing(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "log": Reach()}, tmp_path / "a.pth")
    assert read_file(tmp_path / "a.pth")["log"] is None


def test_arrays_of_objects(bomb: Bomb, tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", images=np.array([bomb], dtype=object))
    with pytest.raises(DataError, match=r"not an \.npz of plain arrays"):
        Golden.open(tmp_path / "golden.npz")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/module:os"])
def test_yaml_tags(tag: str, bomb: Bomb, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f'run: {{name: {tag} ["{bomb.mark}"]}}\nmethod: supervised\n')
    with pytest.raises(JobError, match=r"job\.yaml:1: .*python"):
        load_job(str(tmp_path / "job.yaml"), [])
    with pytest.raises(JobError, match="python"):
        load_job(str(ROOT / "jobs/head.yaml"), [f'run.name={tag} ["{bomb.mark}"]'])
    (tmp_path / "data.yaml").write_text(f'train: images\nnames: [{tag} ["{bomb.mark}"]]\n')
    with pytest.raises(DataError, match=r"data\.yaml: names: must list the names"):
        prepare_split(str(tmp_path / "data.yaml"), None, str(tmp_path / "out"))


@pytest.mark.parametrize("file", ["index.parquet", "shard-00000.parquet"])
def test_ray_s_python_objects_in_shards(file: str, bomb: Bomb, drawn_splits: dict[str, str], tmp_path: Path) -> None:
    """Ray Data's column type for Python objects unpickles what it reads, in every process that imports it."""
    objects = pytest.importorskip("ray.data._internal.object_extensions.arrow")
    split = Folder.open(tmp_path / "split")
    split.copy_from(Folder.open(drawn_splits["train"]))
    table = pq.read_table(io.BytesIO(split.read(file)))
    name = "boxes"
    column = objects.ArrowPythonObjectArray.from_objects([bomb] * len(table))
    table = table.set_column(table.column_names.index(name), name, column)
    with io.BytesIO() as buffer:
        pq.write_table(table, buffer)
        content = buffer.getvalue()
    assert isinstance(pq.read_schema(io.BytesIO(content)).field(name).type, pa.ExtensionType)
    meta = split.read("meta.json").decode()
    if file != "index.parquet":  # whoever makes the file also writes its size
        split.write("meta.json", meta.replace(str(split.size(file)), str(len(content)), 1).encode())
    split.write(file, content)
    with pytest.raises(DataError, match=f"{'split' if file == 'index.parquet' else file}.*other columns"):
        ShardSet.open(split.uri).read_group(0, 0, [0])


class Watch:
    """Detect readers of any kind by Python's audit hook and by a file's access time."""

    TOLD = ("socket.", "urllib.", "http.", "ftplib.", "subprocess.", "os.system", "os.exec", "pickle.find_class")

    def __init__(self, bait: Path) -> None:
        self.bait = bait
        self.events: list[str] = []
        self.on = False
        sys.addaudithook(self.hear)  # permanent, because an audit hook cannot be removed

    def hear(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            self.events.append(f"open {os.fsdecode(args[0])}")
        elif event.startswith(self.TOLD):
            self.events.append(event)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect events in ``events``; a reader in another language than Python is detected by the bait's access time."""
        self.events.clear()
        os.utime(self.bait, (0, self.bait.stat().st_mtime))
        self.on = True
        try:
            yield
        finally:
            self.on = False
        if self.bait.stat().st_atime > 0:
            self.events.append("bait was read")

    def strange(self, *allowed: Path) -> list[str]:
        """Return the events except for reads of ``allowed`` files, installed packages and the system."""
        installed = (sys.prefix, sys.base_prefix, str(ROOT), "/proc", "/sys", "/dev", "/usr/lib", *map(str, allowed))
        return [event for event in self.events if not event.startswith(tuple(f"open {place}" for place in installed))]


@pytest.fixture
def watch(bomb: Bomb, tmp_path: Path) -> Watch:
    torch.save(bomb, tmp_path / "bait.pth")
    return Watch(tmp_path / "bait.pth")


def test_the_watch_sees_readers(watch: Watch) -> None:
    readers: dict[str, Callable[[], object]] = {
        "timm's own": lambda: timm.create_model("resnet10t", checkpoint_path=str(watch.bait)),
        "safetensors, in Rust": lambda: load_file(watch.bait),
        "Arrow, in C++": lambda: pa.OSFile(str(watch.bait)).read(),
        "an address": lambda: timm.create_model(
            "resnet10t", pretrained=True, pretrained_cfg={"url": "http://127.0.0.1:9/a.pth"}
        ),
    }
    for name, reader in readers.items():
        with watch.watching(), suppress(Exception):
            reader()
        assert watch.strange(), name


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Return the paths of the plain values in ``value``, and of its empty parts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    yield from inside or [path]


def replaced(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """Return a copy of ``value`` with ``new`` at ``path``."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]] if not isinstance(value, dict) else value.get(path[0]), path[1:], new)
    return copy


def timm_arguments() -> set[str]:
    """Return all arguments of timm's builders, all keys of its pretrained configs, and all arguments that we let pass."""
    builders = (timm.create_model, timm.models.build_model_with_cfg, timm.models.load_pretrained)
    return {name for builder in builders for name in inspect.signature(builder).parameters} | set(KWARGS)


def test_no_value_of_a_model_json_or_job_makes_anything_read_or_fetch(watch: Watch, tmp_path: Path) -> None:
    """Whatever is at whichever key, only the files of the folder are read: there is no second reader."""
    folder = tmp_path / "student"
    job = micro_job(tmp_path, {"train": "t", "val": "v"})
    save_detector(folder, build_detector(job.student, 2), ("ant", "bee"))
    files = (folder / "model.json", folder / "model.safetensors")
    card = json.loads(files[0].read_text())
    file, address = str(watch.bait), "http://127.0.0.1:9/a.pth"
    names = [f"local-dir:{tmp_path}", f"hf-hub:{file}", f"resnet10t.{file}", f"resnet10t.{address}"]
    tries: list[tuple[tuple[str | int, ...], Any]] = [(path, file) for path in leaves(card)]
    tries += [(("spec", "backbone", "name"), name) for name in names]
    arguments = [("spec", "backbone", "kwargs", name) for name in sorted(timm_arguments())]
    tries += [(path, value) for path in arguments for value in (file, {"url": address, "file": file})]
    for path, value in tries:
        files[0].write_text(json.dumps(replaced(card, path, value)))
        with watch.watching(), suppress(UserError):
            load_checkpoint(folder)
        assert not watch.strange(*files), f"model.json with {value} at {path}"

    for path in [*leaves(card["spec"]), *(argument[1:] for argument in arguments)]:
        if path == ("backbone", "weights"):
            continue  # the one reader, which is watched above
        override = f"student.{'.'.join(map(str, path))}={json.dumps(file)}"
        with watch.watching(), suppress(UserError):
            build_detector(load_job(ROOT / "jobs/small/baseline.yaml", [override]).student, 2)
        assert not watch.strange(), override
