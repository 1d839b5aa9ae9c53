"""Folders on any filesystem: a local path, or a URI that pyarrow (file, s3, gs, hdfs) or else fsspec understands."""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from headkd_ray.errors import StorageError, UserError


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. Picklable, so it may travel to another machine if the filesystem is reachable there.

    ``folder / "name"`` is a folder in it; the methods that take a name are about the file of that name in it.
    """

    fs: pafs.FileSystem
    path: str
    """Path within ``fs``, without a trailing slash; absolute if ``fs`` is this machine's."""
    uri: str
    """What the user wrote: error messages name this."""

    @classmethod
    def open(cls, uri: str | os.PathLike[str], error: type[UserError] = StorageError) -> Folder:
        """The folder that ``uri`` names; it need not exist. Raises ``error`` if no filesystem serves the URI."""
        uri = os.fspath(uri)
        fs, path = _resolve(uri, error)
        return cls(fs, path.rstrip("/") or "/", uri.rstrip("/") or "/")

    @classmethod
    def of_file(cls, uri: str | os.PathLike[str], error: type[UserError] = StorageError) -> tuple[Folder, str]:
        """The folder that holds the file ``uri``, and the file's name in it. Raises ``error`` as ``open`` does."""
        uri = os.fspath(uri)
        fs, path = _resolve(uri, error)
        head, name = posixpath.split(path)
        return cls(fs, head or "/", posixpath.dirname(uri) or "."), name

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.fs, self.at(name), self.named(name))

    @property
    def remote(self) -> bool:
        """Not this machine's file system: requests are slow, so few and large ones are better."""
        return not isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def address(self) -> str:
        """Where to find the folder from anywhere: its URI, or its absolute path."""
        return self.uri if self.remote else self.path

    def at(self, name: str) -> str:
        """Path of ``name`` within the filesystem."""
        return posixpath.join(self.path, name)

    def named(self, name: str) -> str:
        """How to call ``name`` in a message to the user."""
        return f"{self.uri.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Is there a file ``name``?"""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of the file ``name``; None if there is no such file."""
        return self.sizes([name])[0]

    def sizes(self, names: list[str]) -> list[int | None]:
        """Bytes of each file; None where there is no such file."""
        infos = self.fs.get_file_info([self.at(name) for name in names]) if names else []
        return [info.size if info.type == pafs.FileType.File else None for info in infos]

    def room(self) -> int | None:
        """Bytes left on this machine's disk that holds the folder, which must exist; None for a remote one."""
        return None if self.remote else shutil.disk_usage(self.path).free

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted; empty if there is no folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File)

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises OSError (FileNotFoundError if missing)."""
        with self.fs.open_input_stream(self.at(name)) as stream:
            return stream.read()

    def create(self) -> None:
        """Make the folder and its parents."""
        self.fs.create_dir(self.path, recursive=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file, atomically; the folder must exist."""
        with self.fs.open_output_stream(self.at(name + ".tmp")) as stream:
            stream.write(content)
        self.publish(name)

    def publish(self, name: str) -> None:
        """Rename ``name``.tmp to ``name``: a reader sees the whole file or none."""
        self.fs.move(self.at(name + ".tmp"), self.at(name))

    def delete(self, name: str) -> None:
        """Delete the file ``name`` if there is one."""
        if self.has(name):
            self.fs.delete_file(self.at(name))

    def copy_from(self, source: Folder) -> None:
        """Copy another folder's content here, over what is there; makes the folder."""
        self.create()
        pafs.copy_files(source.path, self.path, source_filesystem=source.fs, destination_filesystem=self.fs)

    def remove(self) -> None:
        """Delete the folder and everything in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(self.path)

    def check_writable(self) -> None:
        """Write and delete a probe file; on a local filesystem, also the folders that this made.

        Raises:
            StorageError: the folder cannot be created or written.
        """
        probe = f".headkd-probe-{uuid.uuid4().hex[:8]}"
        missing: list[Path] = []
        try:
            if not self.remote:
                missing = [folder for folder in (Path(self.path), *Path(self.path).parents) if not folder.exists()]
            self.create()
            self.write(probe, b"")
            self.delete(probe)
        except Exception as error:  # fsspec's filesystems raise errors of their own kinds
            raise StorageError(f"{self.uri}: not writable ({error})") from error
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # somebody else uses it by now, or it could not be made
                    folder.rmdir()


def _resolve(uri: str, error: type[UserError]) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as unknown_to_arrow:
        try:
            import fsspec  # A dependency of torch and of Ray; imported only for the schemes pyarrow does not know.

            fs, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError, OSError) as unknown_to_fsspec:
            raise error(
                f"{uri}: no filesystem for this URI (pyarrow: {unknown_to_arrow}; fsspec: {unknown_to_fsspec}); "
                "check the scheme, or install the fsspec package that serves it (for example adlfs, s3fs)"
            ) from unknown_to_fsspec
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path
