"""Folders that may be local or remote: the one place that turns a path or URI into a pyarrow filesystem."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from headkd_ray.errors import StorageError


@dataclass(frozen=True)
class Folder:
    """A folder on a filesystem; ``root / "name"`` goes down, like pathlib."""

    filesystem: fs.FileSystem
    path: str
    """Path as the filesystem understands it, without the URI's scheme."""

    @classmethod
    def at(cls, uri: str | Path) -> Folder:
        """Local path (``~`` and relative paths are made absolute), a pyarrow URI (file, s3, gs, hdfs) or any fsspec protocol.

        Raises:
            StorageError: no filesystem serves the URI's scheme.
        """
        text = str(uri)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), str(Path(text).expanduser().absolute()))
        try:
            return cls(*fs.FileSystem.from_uri(text))
        except (ValueError, OSError) as pyarrow_error:
            try:
                import fsspec

                handler, path = fsspec.core.url_to_fs(text)
            except (ImportError, ValueError) as fsspec_error:
                raise StorageError([f"{text}: no filesystem serves it (pyarrow: {pyarrow_error}; fsspec: {fsspec_error})"]) from None
            return cls(fs.PyFileSystem(fs.FSSpecHandler(handler)), path)

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}:{self.path}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound

    def create(self) -> Folder:
        self.filesystem.create_dir(self.path, recursive=True)
        return self

    def read(self) -> bytes:
        """The bytes of the file at this path."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def write(self, content: bytes) -> None:
        """Write the file at this path; on a local filesystem readers see the old or the new content, never a part."""
        if not self.is_local:  # object stores publish an object when its upload is complete
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)
            return
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        draft.write_bytes(content)
        draft.replace(target)

    def copy_from(self, source: Folder) -> None:
        """Copy a folder's content here, over what is there."""
        self.create()
        fs.copy_files(
            source.path,
            self.path,
            source_filesystem=source.filesystem,
            destination_filesystem=self.filesystem,
        )

    def delete(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path)

    def check_writable(self) -> None:
        """Write and delete a probe file.

        Raises:
            StorageError: the folder cannot be created or written.
        """
        probe = self / f".headkd-probe-{uuid.uuid4().hex[:8]}"
        try:
            self.create()
            probe.write(b"")
            self.filesystem.delete_file(probe.path)
        except OSError as error:
            raise StorageError([f"{self}: not writable ({error}); choose another run.storage"]) from None
