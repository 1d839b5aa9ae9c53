"""Exported files: their contents by name, and opening them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from headkd_ray.deploy.description import Description
from headkd_ray.deploy.networks import RT_INFO, FileNetwork, OnnxNetwork, OpenVinoNetwork, TorchFileNetwork, first_line
from headkd_ray.errors import CheckpointError, ExportError
from headkd_ray.storage import Folder

SUFFIXES = (".onnx", ".pt2", ".xml")
"""Names of files that can be opened end in one of these; beside a ``.xml`` lies its ``.bin``."""


@dataclass(frozen=True)
class Exported:
    """An exported detector."""

    path: str
    """Name or path of the file that is opened."""
    files: Mapping[str, bytes]
    """The contents of its files by name, first of the one that is opened."""

    @classmethod
    def read(cls, path: str) -> Exported:
        """Read the files at a path or URI. Raises CheckpointError if one is missing or cannot be read."""
        folder, name = Folder.of_file(path, CheckpointError)
        names = [name, str(PurePosixPath(name).with_suffix(".bin"))] if name.endswith(".xml") else [name]
        files = {}
        for each in names:
            try:
                files[each] = folder.read(each)
            except OSError as error:
                place = path if each == name else folder.named(each)
                raise CheckpointError(f"{place}: cannot be read ({error.strerror or error})") from error
        return cls(path, files)

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(len(content) for content in self.files.values())

    def open(self, threads: int = 0) -> FileNetwork:
        """Open it in its runtime; ``threads`` = 0 stands for one a core. Raises CheckpointError, ExportError.

        A ``.pt2`` file runs in this process's PyTorch, with its number of threads.
        """
        contents = list(self.files.values())
        if self.path.endswith(".pt2"):
            return TorchFileNetwork(contents[0], self.path)
        if self.path.endswith(".onnx"):
            return OnnxNetwork(contents[0], self.path, threads)
        return OpenVinoNetwork(contents[0], contents[1], self.path, threads)


def as_openvino(onnx_file: bytes, description: Description) -> Exported:
    """Convert an ONNX file that ``description`` describes to an OpenVINO model, with weights in float32.

    Raises:
        ExportError: OpenVINO cannot read it.
    """
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model.xml"
        try:
            model = openvino.Core().read_model(onnx_file)
            for name, value in description.as_metadata().items():
                model.set_rt_info(value, [RT_INFO, name])
            openvino.save_model(model, target, compress_to_fp16=False)
        except Exception as error:  # its errors have no common base but this
            raise ExportError(f"--to openvino: OpenVINO cannot read this detector's ONNX file ({first_line(error)})") from error
        return Exported(target.name, {file.name: file.read_bytes() for file in (target, target.with_suffix(".bin"))})
