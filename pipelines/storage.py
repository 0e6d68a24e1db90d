"""Storage: files and folders at a local path, or at an address of `pipelines.stores`, such as `s3://bucket/path`."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow.fs as pafs

from pipelines import stores
from pipelines.errors import UserError

PATIENCE_S = 120.0  # how long a run retries when its folder, which it has reached before, is unreachable
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
TRANSIENT = frozenset({
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT,
    errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH,
})  # fmt: skip
TRANSIENT_TEXT = re.compile(  # of errors of stores, which have no number
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|THROTTLING)"
    r"|HTTP status (429|5\d\d)"
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL)"
    r"|Azure Error: \[(ServerBusy|InternalError|OperationTimedOut)"
)
PIECE = 8 * 2**20  # bytes that are copied at a time
T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """A file or folder on some filesystem: cheap to create, and safe to send to a worker without credentials.

    Args:
        path: Absolute local path, or that in the store, such as bucket and key.
        scheme: Empty for a local path, else a key of `stores.STORES`.
        endpoint: The server of the store; empty for the usual one.
        patience_s: How long to retry after a transient error, such as a server that is unreachable or a full disk.
            A request that is refused, or a file that is missing, is not retried.
    """

    path: str
    scheme: str = ""
    endpoint: str = ""
    patience_s: float = 0.0

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The filesystem that opens it."""
        return stores.filesystem(self.scheme, self.endpoint) if self.scheme else pafs.LocalFileSystem()

    def __truediv__(self, name: str) -> Location:
        return replace(self, path=f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return stores.written(self.scheme, self.path, self.endpoint) if self.scheme else self.path

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """The local path; None if the filesystem is remote."""
        return None if self.scheme else Path(self.path)

    @property
    def parent(self) -> Location:
        """The folder that holds this file or folder."""
        return replace(self, path=self.path.rstrip("/").rsplit("/", 1)[0])

    def exists(self) -> bool:
        """Whether the file or the folder exists."""
        return bool(self._info().type != pafs.FileType.NotFound)

    def is_dir(self) -> bool:
        """Whether it exists and is a folder."""
        return bool(self._info().type == pafs.FileType.Directory)

    def size(self) -> int | None:
        """Bytes of the file; None if there is no such file."""
        info = self._info()
        return int(info.size) if info.type == pafs.FileType.File else None

    def retrying(self, seconds: float = PATIENCE_S) -> Location:
        """The same location, whose operations, and those of all paths below it, are retried for `seconds`."""
        return replace(self, patience_s=seconds)

    def _retry(self, call: Callable[[], T]) -> T:
        """The result of `call`, which is retried after transient errors for `patience_s`."""
        until = time.monotonic() + self.patience_s
        for pause in retry_delays():
            try:
                return call()
            except OSError as error:
                if not is_transient(error) or time.monotonic() + pause > until:
                    raise
                time.sleep(pause)
        raise AssertionError

    def check_bucket(self) -> None:
        """Check that the bucket of an address exists, so that its absence is not reported as a missing file.

        Raises:
            UserError: When the bucket does not exist.
        """
        store = stores.STORES.get(self.scheme)
        if store is None or not store.unit:
            return
        bucket = replace(self, path=self.path.split("/", 1)[0])
        if not bucket.exists():
            raise UserError(
                f"there is no {store.unit} {bucket.path} at {self.endpoint or store.name}",
                where=str(self),
                remedy=f"correct its name{' or AWS_ENDPOINT_URL' * (self.scheme == 's3')}, or create the "
                f"{store.unit}: dmtg does not",
            )

    def _info(self, of: str | pafs.FileSelector = "") -> Any:
        """The `FileInfo` of this path, or those that a selector finds."""
        try:
            return self._retry(lambda: self.filesystem.get_file_info(of or self.path))
        except OSError as error:
            raise self.unreachable(error) from error

    def unreachable(self, error: OSError) -> UserError:
        """The `UserError` of a read that failed."""
        return UserError(
            f"cannot read from the storage: {_first_line(error)}", where=str(self), remedy=_remedy(self)
        )

    def files(self, *, recursive: bool = True) -> list[str]:
        """Paths of the files below this folder, relative to it, `by_number`; empty if there is no folder."""
        found = self._info(pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive))
        files = [info.path[len(self.path.rstrip("/")) + 1 :] for info in found if info.type == pafs.FileType.File]
        return _by_number(files)

    def folders(self) -> list[str]:
        """Names of the folders directly below this one, `by_number`: group_10 comes after group_9."""
        found = self._info(pafs.FileSelector(self.path, allow_not_found=True))
        folders = [info.base_name for info in found if info.type == pafs.FileType.Directory]
        return _by_number(folders)

    def read_bytes(self, start: int = 0, size: int | None = None) -> bytes:
        """The whole file, or `size` bytes of it from `start`.

        Raises:
            FileNotFoundError: When there is no such file.
            PermissionError: When this user may not read it.
            UserError: When the storage does not answer or refuses the request.
        """
        try:
            return self._retry(lambda: self._read(start, size))
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            raise self.unreachable(error) from error

    def _read(self, start: int, size: int | None) -> bytes:
        with self.filesystem.open_input_file(self.path) as file:
            return bytes(file.readall() if size is None else file.read_at(size, start))

    def read_text(self) -> str:
        """The whole file as UTF-8."""
        return self.read_bytes().decode("utf-8")

    def read_json(self) -> Any:
        """The whole file as JSON.

        Raises:
            UserError: When it is not JSON.
        """
        try:
            return json.loads(self.read_text())
        except json.JSONDecodeError as error:
            raise UserError(
                f"not a JSON file: {error}", where=str(self), remedy="restore the file, or create it again"
            ) from error

    def write_bytes(self, data: bytes, *, sync: bool = True) -> None:
        """Write the file atomically: a reader never sees a part of it.

        Args:
            data: Content of the file.
            sync: Wait until the content is on the disk, so that it survives a power failure.

        Raises:
            UserError: When the location cannot be written to.
        """
        self._written(lambda: self._write(BytesIO(data), sync))

    def create(self, text: str) -> bool:
        """Create the file; return False if it already exists.

        Of two concurrent calls exactly one succeeds, locally and on S3. pyarrow has no conditional request, so on
        other stores both can succeed: the later file stays, and the caller has to read it again.

        Raises:
            UserError: When the location cannot be written to.
        """
        done = [False]

        def write() -> None:
            if self.local is not None:
                done[0] = self._create_local(text)
            elif self.scheme == "s3":
                done[0] = self._create_object(text)
            elif not self.exists():
                self._write(BytesIO(text.encode()), sync=False)
                done[0] = True

        self._written(write)
        return done[0]

    def _create_local(self, text: str) -> bool:
        assert self.local is not None
        try:
            with _part_of(self.local) as part:
                part.write_text(text, encoding="utf-8")
                os.link(part, self.local)  # atomic: the file appears with its whole content
        except FileExistsError:
            return False
        return True

    def _create_object(self, text: str) -> bool:
        import boto3  # Arrow has no conditional request
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self.path.partition("/")
        try:
            client = boto3.client("s3", endpoint_url=self.endpoint or None)
            client.put_object(Bucket=bucket, Key=key, Body=text.encode(), IfNoneMatch="*")
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in (409, 412):
                return False
            raise OSError(f"HTTP status {status}: {error}") from error
        except BotoCoreError as error:
            raise OSError(f"AWS Error NETWORK_CONNECTION: {error}") from error
        return True

    def write_file(self, source: Path) -> None:
        """`write_bytes` of a local file, in pieces: the file can be larger than the memory."""

        def copy() -> None:
            with source.open("rb") as file:
                self._write(file, sync=True)

        self._written(copy)

    def _written(self, write: Callable[[], None]) -> None:
        try:
            self._retry(write)
        except OSError as error:
            raise UserError(
                f"cannot write: {_first_line(error)}", where=str(self), remedy=_remedy(self)
            ) from error

    def _write(self, source: BinaryIO, sync: bool) -> None:
        if self.local is None:
            if stores.STORES[self.scheme].whole:
                self._copy(source, self.path)
            else:
                self._copy_and_rename(source)
            return
        with _part_of(self.local) as part:
            with part.open("wb") as target:
                shutil.copyfileobj(source, target, PIECE)
                if sync:
                    target.flush()
                    os.fsync(target.fileno())
            part.replace(self.local)

    def _copy(self, source: BinaryIO, path: str) -> None:
        with self.filesystem.open_output_stream(path) as file:
            shutil.copyfileobj(source, file, PIECE)

    def _copy_and_rename(self, source: BinaryIO) -> None:
        """Write to another name first, for a store whose readers see a file while it is written."""
        part = (self.parent / f".{self.name}.{uuid.uuid4().hex[:8]}.part").path
        try:
            self._copy(source, part)
            self.filesystem.move(part, self.path)
        except BaseException:
            with suppress(OSError):
                self.filesystem.delete_file(part)
            raise

    def write_text(self, text: str) -> None:
        """`write_bytes` of UTF-8."""
        self.write_bytes(text.encode("utf-8"))

    def write_json(self, value: Any) -> None:
        """Write indented JSON that ends with a newline; letters are not escaped, NaN and infinity become null."""
        text = json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        self.write_bytes(text.encode("utf-8", "backslashreplace"))  # half of a pair becomes an escape of JSON

    def delete(self) -> None:
        """Remove the file, or the folder with its content; do nothing if neither exists."""
        kind = self._info().type
        if kind == pafs.FileType.Directory:
            self._retry(lambda: self.filesystem.delete_dir(self.path))
        elif kind == pafs.FileType.File:
            self._retry(lambda: self.filesystem.delete_file(self.path))

    def check_writable(self) -> None:
        """Write and remove a small file, so that a job fails before its work and not after it.

        Raises:
            UserError: When the location cannot be written to.
        """
        self.check_bucket()
        probe = self / f".probe-{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"")
        probe.delete()


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def locate(uri: str) -> Location:
    """The location of a local path, or of an address of a store.

    Raises:
        UserError: For another scheme, or an address that carries credentials.
    """
    scheme, separator, _ = uri.partition("://")
    if uri.startswith("file:"):
        return Location(str(Path(uri[5:].removeprefix("//").removeprefix("localhost")).absolute()))
    if not separator or "/" in scheme:  # "?" and "#" are characters of a path here and of a key there
        return Location(str(Path(uri).expanduser().absolute()))
    found = stores.parse(uri)
    return Location(found.path, found.scheme, found.endpoint)


def is_transient(error: BaseException) -> bool:
    """Whether a retry can succeed: the storage is unreachable or full, and does not refuse the request."""
    if isinstance(error, UserError):
        return error.__cause__ is not None and is_transient(error.__cause__)
    if not isinstance(error, OSError):
        return False
    return error.errno in TRANSIENT or bool(TRANSIENT_TEXT.search(str(error)))


def retry_delays() -> Iterator[float]:
    """Seconds to wait between retries: an endless series that doubles up to a limit."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


@contextmanager
def _part_of(file: Path) -> Iterator[Path]:
    """The path of a temporary file in the folder of `file`, which is created; the file is removed at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _by_number(names: list[str]) -> list[str]:
    from dmtg_core.names import by_number  # imports torch, which `dmtg --help` does not need

    return sorted(names, key=by_number)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _remedy(location: Location) -> str:
    if location.local is None:
        store = stores.STORES[location.scheme]
        return store.check + ("" if store.seen else f"; {location.scheme}:// {stores.UNSEEN}")
    return "choose a folder that this user may write to, on a disk with free space"
