"""Read and write folders on any filesystem: a local path, or a URI that pyarrow (file, s3, gs, hdfs) or fsspec understands.

An S3-compatible store other than AWS is named in the URI's query, which the URIs of all folders below it keep:
``s3://bucket/runs?endpoint_override=minio.example:9000&scheme=http``.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import functools
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.fs as pafs

from headkd_ray.errors import StorageError, UserError
from headkd_ray.text import without_password

Method = TypeVar("Method", bound=Callable[..., Any])

LOCK_FILE = ".lock"
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Filesystems (``type_name``) without folders, in which a file appears only once all of it has been uploaded."""

CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN for temporary ones), or AWS_PROFILE, where the "
    "command runs and on the cluster's nodes"
)
REASONS = {
    r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|INVALID_CLIENT_TOKEN_ID|InvalidToken": f"unknown access key; {CREDENTIALS}",
    r"SIGNATURE_DOES_NOT_MATCH": f"the secret key does not belong to this access key; {CREDENTIALS}",
    # The response to a HEAD request has no body to name the error; expired credentials get status 400 there.
    r"EXPIRED_TOKEN|ExpiredToken|TokenRefreshRequired|status 400\) No response body": "the credentials have expired; sign in "
    f"again, or {CREDENTIALS}",
    r"ACCESS_DENIED": "access denied: the credentials are missing, wrong or lack a permission (reading needs "
    "s3:GetBucketLocation, s3:ListBucket and s3:GetObject, writing also s3:PutObject, s3:DeleteObject and "
    f"s3:AbortMultipartUpload); {CREDENTIALS}",
    r"NO_SUCH_BUCKET": "there is no such bucket; create it, or correct the URI",
    r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|status 5\d\d": "the storage service has a problem; try again later",
    r"NETWORK_CONNECTION": "cannot be reached; check the network and, if it is not AWS, the URI's endpoint_override and scheme",
}
"""Explanation and remedy of a store's error, keyed by a pattern of the error's code as the AWS SDK or the store spells it."""


def _plainly(method: Method) -> Method:
    """Make a Folder's method raise StorageError when the storage refuses a request or cannot be reached."""

    @functools.wraps(method)
    def wrapped(self: Folder, *args: Any) -> Any:
        try:
            return method(self, *args)
        except (StorageError, FileNotFoundError):
            raise
        except OSError as error:
            reason = _reason(error)
            if reason is None and not self.remote:
                raise
            raise StorageError(f"{self.uri}: {reason or _in_words(error)}") from error
        except Exception as error:
            if not self.remote:
                raise
            # fsspec's filesystems raise errors of their own kinds (aiohttp's, botocore's, ...).
            raise StorageError(f"{self.uri}: {_in_words(error)}") from error

    return cast(Method, wrapped)


def _in_words(error: Exception) -> str:
    """Describe an error of a filesystem other than S3 on one line."""
    said = " ".join(str(error).split()) or "no reason given"
    return f"cannot be used ({type(error).__name__}: {said}); check the address, the network and the credentials"


def _reason(error: OSError) -> str | None:
    """Explain an S3 store's error and its remedy, without the SDK's prose; return None for any other error."""
    found = re.search(r"AWS Error (.*?) during \w+ operation: (.*)", str(error), re.DOTALL)
    if found is None:
        return None
    code, detail = found.group(1), re.sub(r"\s*\(Request ID.*", "", found.group(2), flags=re.DOTALL).strip()
    known = next((reason for names, reason in REASONS.items() if re.search(names, f"{code} {detail}")), None)
    if known is None:
        return f"the storage says {code}: {detail}"
    return f"{known} ({detail.rpartition('Details: ')[2]})" if code == "NETWORK_CONNECTION" else known


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. It is picklable, so it can be sent to any machine that can reach the filesystem.

    ``folder / "name"`` is a subfolder; methods that take a name refer to the file of that name in the folder. Every method that
    accesses the storage may raise StorageError, when an S3 store refuses a request or cannot be reached.
    """

    fs: pafs.FileSystem
    path: str
    """Path within ``fs``, without a trailing slash; absolute if ``fs`` is this machine's."""
    uri: str
    """The URI or path as the user wrote it, for error messages."""

    @classmethod
    def open(cls, uri: str | os.PathLike[str], error: type[UserError] = StorageError) -> Folder:
        """Return the folder that ``uri`` names; it need not exist. Raises ``error`` if no filesystem serves the URI."""
        uri = os.fspath(uri)
        fs, path = _resolve(uri, error)
        head, query = _split(uri)
        return cls(fs, path.rstrip("/") or "/", (head.rstrip("/") or "/") + query)

    @classmethod
    def of_file(cls, uri: str | os.PathLike[str], error: type[UserError] = StorageError) -> tuple[Folder, str]:
        """Return the folder that holds the file ``uri``, and the file's name in it. Raises ``error`` as ``open`` does."""
        uri = os.fspath(uri)
        fs, path = _resolve(uri, error)
        parent, name = posixpath.split(path.rstrip("/"))
        head, query = _split(uri)
        return cls(fs, parent or "/", (posixpath.dirname(head.rstrip("/")) or ".") + query), name

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.fs, self.at(name), self.named(name))

    @property
    def remote(self) -> bool:
        """Whether the folder is not on this machine: requests are then slow, so few large ones are better."""
        return not isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def address(self) -> str:
        """The folder's URI, or its absolute path, which does not depend on the current folder."""
        return self.uri if self.remote else self.path

    def at(self, name: str) -> str:
        """Return the path of ``name`` within the filesystem."""
        return posixpath.join(self.path, name)

    def named(self, name: str) -> str:
        """Return the path or URI of ``name`` for a message to the user."""
        head, query = _split(self.uri)
        return f"{head.rstrip('/')}/{name}{query}"

    def has(self, name: str) -> bool:
        """Return whether there is a file ``name``."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Return the size of the file ``name`` in bytes, or None if there is no such file."""
        return self.sizes([name])[0]

    @_plainly
    def sizes(self, names: list[str]) -> list[int | None]:
        """Return the size of each file in bytes, or None where there is no such file."""
        infos = self.fs.get_file_info([self.at(name) for name in names]) if names else []
        return [info.size if info.type == pafs.FileType.File else None for info in infos]

    def room(self) -> int | None:
        """Return the free bytes of the local disk that holds the folder, which must exist; None for a remote folder."""
        return None if self.remote else shutil.disk_usage(self.path).free

    @_plainly
    def names(self) -> list[str]:
        """Return the sorted names of the files directly in the folder; empty if there is no folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File)

    @property
    @_plainly
    def exists(self) -> bool:
        """Whether the folder exists."""
        if not self.remote:  # Python, unlike pyarrow, accepts names that are not UTF-8
            return os.path.isdir(self.path)
        return bool(self.fs.get_file_info(self.path).type == pafs.FileType.Directory)

    @_plainly
    def entries(self) -> list[tuple[str, bool]]:
        """Return the name of each file and folder directly in the folder, sorted, and whether it is a folder.

        Raises OSError (FileNotFoundError if there is no folder).
        """
        if not self.remote:  # Python, as in ``exists``
            with os.scandir(self.path) as found:
                return sorted((entry.name, entry.is_dir()) for entry in found)
        infos = self.fs.get_file_info(pafs.FileSelector(self.path))
        return sorted((info.base_name, info.type == pafs.FileType.Directory) for info in infos)

    @_plainly
    def files(self) -> list[str]:
        """Return the sorted paths, relative to the folder, of the files in it and in all folders below it.

        Hidden files and folders (whose names start with a dot) are left out; links to folders are followed, but each folder is
        visited once. Raises OSError (FileNotFoundError if there is no folder).
        """
        if self.remote:
            selector = pafs.FileSelector(self.path, recursive=True)
            found = [info.path for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File]
        else:
            found = list(_local_files(self.path))
        names = [posixpath.relpath(path, self.path).split("/") for path in found]
        return ["/".join(parts) for parts in sorted(names) if not any(part.startswith(".") for part in parts)]

    @_plainly
    def tree(self) -> list[str]:
        """Return the sorted paths, relative to the folder, of all files below it; empty if there is no folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        files = [info.path for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File]
        return sorted(posixpath.relpath(path, self.path) for path in files)

    @_plainly
    def versions(self, names: list[str]) -> list[tuple[int, int | None] | None]:
        """Return the size in bytes and the modification time of each file, which change if the file is replaced.

        The entry is None where there is no such file. The time is in nanoseconds; None where the storage does not report it.
        """
        if not self.remote:
            return [_version(self.at(name)) for name in names]
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)  # one listing, not a request per file
        files = [info for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.File]
        there = {info.path.lstrip("/"): (info.size, info.mtime_ns) for info in files}
        return [there.get(self.at(name).lstrip("/")) for name in names]

    @_plainly
    def read(self, name: str) -> bytes:
        """Return the file's bytes. Raises OSError (FileNotFoundError if it is missing)."""
        if not self.remote:  # Python, as in ``exists``; its errors are also clearer
            return Path(self.at(name)).read_bytes()
        # Not open_input_stream, which would request 256 KiB at a time.
        with self.fs.open_input_file(self.at(name)) as file:
            return file.read()

    @_plainly
    def open_file(self, name: str) -> Any:
        """Open a file for reading: a seekable binary file and context manager. Raises OSError as ``read`` does."""
        return self.fs.open_input_file(self.at(name)) if self.remote else open(self.at(name), "rb")

    @_plainly
    def create(self) -> None:
        """Create the folder and its parents."""
        self.fs.create_dir(self.path, recursive=True)

    @_plainly
    def write(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write a whole file, given at once or in pieces, atomically; the folder must exist."""
        draft = name if self.fs.type_name in OBJECT_STORES else name + ".tmp"
        try:
            with self.fs.open_output_stream(self.at(draft)) as stream:
                for piece in [content] if isinstance(content, bytes) else content:
                    stream.write(piece)
            if draft != name:
                self.publish(name)
        except OSError:
            if draft != name:  # on a full disk, a partial file would take up space
                self.delete(draft)
            raise

    @_plainly
    def publish(self, name: str) -> None:
        """Rename ``name``.tmp to ``name``, so that a reader sees either the whole file or none."""
        self.fs.move(self.at(name + ".tmp"), self.at(name))

    @_plainly
    def delete(self, name: str) -> None:
        """Delete the file ``name`` if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.at(name))

    @_plainly
    def copy_from(self, source: Folder) -> None:
        """Copy another folder's content here, overwriting what is there; the folder is created if needed."""
        self.create()
        pafs.copy_files(source.path, self.path, source_filesystem=source.fs, destination_filesystem=self.fs)

    @_plainly
    def remove(self) -> None:
        """Delete the folder and everything in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(self.path)

    def check_writable(self) -> None:
        """Write and delete a probe file, and any folders created for it. (An S3 store keeps an empty marker of the folder.)

        Raises:
            StorageError: the folder cannot be created or written.
        """
        probe = f".headkd-probe-{uuid.uuid4().hex[:8]}"
        missing: list[Path] = []
        try:
            if not self.remote:
                missing = [folder for folder in (Path(self.path), *Path(self.path).parents) if not folder.exists()]
            if self.fs.type_name not in OBJECT_STORES:
                self.create()
            self.write(probe, b"")
            self.delete(probe)
        except StorageError:
            raise
        except Exception as error:  # fsspec's filesystems raise errors of their own kinds
            raise StorageError(f"{self.uri}: not writable ({error}); choose another folder") from error
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # another process uses it by now, or it could not be created
                    folder.rmdir()


def folder_at(start: Folder, path: str) -> Folder:
    """Return the folder at a normalised ``path`` in the filesystem of ``start``, named like ``start`` if it is inside it.

    Raises:
        StorageError: the path is not in what ``start`` can be reached from.
    """
    while start.path != path and not path.startswith(start.path.rstrip("/") + "/"):
        parent = Folder.of_file(start.address)[0]
        if len(parent.path) >= len(start.path):
            raise StorageError(f"{path}: is not on the same filesystem as {start.uri}")
        start = parent
    return start if start.path == path else start / posixpath.relpath(path, start.path)


@contextlib.contextmanager
def locked(folder: Folder, busy: UserError) -> Iterator[None]:
    """Lock the folder, which must exist, against other processes; the lock ends with this process, however it ends.

    Object stores and some network file systems have no locks; nothing is locked there.

    Raises:
        UserError: ``busy``, if another process has locked it.
    """
    if folder.remote:
        yield
        return
    with open(folder.at(LOCK_FILE), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a network file system without locks
                raise
        yield


def _version(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that the filesystem does not allow
        return None
    return found.st_size, found.st_mtime_ns


def _local_files(path: str) -> Iterator[str]:
    """Yield the paths of the files below a folder, except in hidden folders; each folder is visited once, despite links."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for folder, inside, names in os.walk(path, onerror=refuse, followlinks=True):
        place = os.path.realpath(folder)
        inside[:] = [] if place in seen else sorted(name for name in inside if not name.startswith("."))
        if place not in seen:
            yield from (os.path.join(folder, name) for name in names)
        seen.add(place)


def _split(uri: str) -> tuple[str, str]:
    """Split a URI into the part before its query and the query with its question mark; a path has no query."""
    head, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return head, mark + query


def _resolve(uri: str, error: type[UserError]) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    scheme = uri.partition("://")[0]
    if (shown := without_password(uri)) is not None:
        raise error(
            f"{shown}: has a password in it, which would be written into job.json and logs; remove it, and {CREDENTIALS}"
        )
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
        # A copy, like those that other processes get, retries a silent server three times (seconds); the original, for minutes.
        return copy.copy(fs), path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as unknown_to_arrow:
        if scheme == "s3":
            raise error(f"{uri}: {unknown_to_arrow}; correct the URI") from unknown_to_arrow
        try:
            import fsspec  # A dependency of torch and of Ray; imported only for the schemes pyarrow does not know.

            fs, path = fsspec.core.url_to_fs(uri)
        except OSError as unreachable:  # some filesystems log in when they are created
            raise error(f"{uri}: {_in_words(unreachable)}") from unreachable
        except (ImportError, ValueError) as unknown_to_fsspec:
            raise error(
                f"{uri}: no filesystem for this URI (pyarrow: {unknown_to_arrow}; fsspec: {unknown_to_fsspec}); "
                "check the scheme, or install the fsspec package that serves it (for example adlfs, s3fs)"
            ) from unknown_to_fsspec
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path
    except OSError as unreachable:  # pyarrow asks AWS for the bucket's region
        raise error(f"{uri}: {_reason(unreachable) or unreachable}") from unreachable
