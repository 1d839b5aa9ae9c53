"""Files on any filesystem: a local path, or a URI that pyarrow (file, s3, gs, hdfs) or else fsspec understands."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from headkd_ray.errors import DataError


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. Picklable, so it may travel to another machine if the filesystem is reachable there."""

    fs: pafs.FileSystem
    path: str
    """Path within ``fs``, without a trailing slash."""
    uri: str
    """What the user wrote: error messages name this."""

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> Folder:
        """The folder that ``uri`` names; it need not exist. Raises DataError if no filesystem serves the URI."""
        uri = os.fspath(uri)
        fs, path = _resolve(uri)
        return cls(fs, path.rstrip("/") or "/", uri.rstrip("/") or "/")

    @classmethod
    def of_file(cls, uri: str | os.PathLike[str]) -> tuple[Folder, str]:
        """The folder that holds the file ``uri``, and the file's name in it."""
        uri = os.fspath(uri)
        fs, path = _resolve(uri)
        head, name = posixpath.split(path)
        return cls(fs, head or "/", posixpath.dirname(uri) or "."), name

    @property
    def remote(self) -> bool:
        """Not this machine's file system: requests are slow, so few and large ones are better."""
        return not isinstance(self.fs, pafs.LocalFileSystem)

    def at(self, name: str) -> str:
        """Path of ``name`` within the filesystem."""
        return posixpath.join(self.path, name)

    def named(self, name: str) -> str:
        """How to call ``name`` in a message to the user."""
        return f"{self.uri.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of the file ``name``; None if there is no such file."""
        return self.sizes([name])[0]

    def sizes(self, names: list[str]) -> list[int | None]:
        """Bytes of each file; None where there is no such file."""
        infos = self.fs.get_file_info([self.at(name) for name in names]) if names else []
        return [info.size if info.type == pafs.FileType.File else None for info in infos]

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises OSError (FileNotFoundError if missing)."""
        with self.fs.open_input_stream(self.at(name)) as stream:
            return stream.read()

    def create(self) -> None:
        """Make the folder and its parents."""
        self.fs.create_dir(self.path, recursive=True)

    def publish(self, name: str) -> None:
        """Rename ``name``.tmp to ``name``: a reader sees the whole file or none."""
        self.fs.move(self.at(name + ".tmp"), self.at(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file, atomically."""
        with self.fs.open_output_stream(self.at(name + ".tmp")) as stream:
            stream.write(content)
        self.publish(name)

    def delete(self, name: str) -> None:
        """Delete the file ``name`` if there is one."""
        if self.size(name) is not None:
            self.fs.delete_file(self.at(name))

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted; empty if there is no folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File)


def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as unknown_to_arrow:
        try:
            import fsspec  # A dependency of torch and of Ray; imported only for the schemes pyarrow does not know.

            fs, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError, OSError) as error:
            raise DataError(
                f"{uri}: no filesystem for this URI (pyarrow: {unknown_to_arrow}; fsspec: {error}); "
                "check the scheme, or install the fsspec package that serves it (for example adlfs, s3fs)"
            ) from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path
