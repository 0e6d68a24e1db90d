"""Temporary folders that only their user can read, and that the next command removes if their process was killed.

A folder is created by `mkdtemp` (mode 0700) in the folder of `tempfile.gettempdir()`, which all users of a machine
share, or beside a file that is renamed to its place. Its process holds a lock on the folder itself and on nothing
that others can open. A folder is abandoned if it belongs to this user, is no link, has mode 0700 and can be
locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError

PREFIX = "dmtg-scratch-"  # folders of earlier versions, which were not all locked, have other names
PRIVATE = 0o700
STACKS = "stacks.txt"  # in the folder of a worker: the stacks of its threads, if it hung


@dataclass(frozen=True)
class Scratch:
    """A temporary folder of this process.

    Args:
        path: The folder.
        descriptor: Its open file, which holds the lock.
    """

    path: Path
    descriptor: int

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.descriptor)


def new_scratch(purpose: str = "", inside: Path | None = None) -> Scratch:
    """Create a temporary folder.

    Args:
        purpose: A part of its name, by which `abandoned` finds it.
        inside: The folder that gets it; that of `tempfile.gettempdir()` by default.

    Raises:
        UserError: If no folder can be created.
    """
    try:
        while True:
            path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-", dir=inside))
            descriptor = _locked(path)
            if descriptor is not None:
                return Scratch(path, descriptor)
    except OSError as error:
        raise UserError(
            f"cannot create a folder for temporary files: {error}",
            where=str(inside or tempfile.gettempdir()),
            remedy="free disk space there" + ("" if inside else ", or set TMPDIR to another folder"),
        ) from error


@contextmanager
def temporary_folder(inside: Path | None = None) -> Iterator[Path]:
    """A temporary folder for the time of the block.

    Args:
        inside: The folder that gets it, if a file in it is renamed to its place; abandoned ones are removed there.

    Raises:
        UserError: If no folder can be created.
    """
    if inside is not None:
        remove_abandoned(inside)
    scratch = new_scratch(inside=inside)
    try:
        yield scratch.path
    finally:
        scratch.close()


def abandoned(purpose: str = "", inside: Path | None = None) -> Iterator[Path]:
    """The folders of processes of this user that have ended. Each is locked while it is yielded."""
    place = inside or Path(tempfile.gettempdir())
    for path in sorted(place.glob(f"{PREFIX}{purpose}-*" if purpose else f"{PREFIX}*")):
        try:
            descriptor = _locked(path)
        except OSError:
            continue  # a link, a file, a folder of another user, or one that was removed meanwhile
        if descriptor is not None:
            try:
                yield path
            finally:
                os.close(descriptor)


def remove_abandoned(inside: Path | None = None) -> None:
    """Remove the abandoned folders. The stacks of a worker that hung are kept for the run that it belongs to."""
    for path in abandoned(inside=inside):
        stacks = path / STACKS
        if not (stacks.exists() and stacks.stat().st_size):
            shutil.rmtree(path, ignore_errors=True)


def _locked(path: Path) -> int | None:
    """The open file of a private folder with a lock on it; None if another process holds the lock or removed it.

    Raises:
        OSError: If it is a link or cannot be opened, or another user owns it or can read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    kept = False
    try:
        _check_private(path, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept = os.path.samestat(os.fstat(descriptor), path.lstat())  # or it was removed before it was locked
    except (BlockingIOError, FileNotFoundError):
        return None
    finally:
        if not kept:
            os.close(descriptor)
    return descriptor if kept else None


def _check_private(path: Path, descriptor: int) -> None:
    held = os.fstat(descriptor)
    if held.st_uid != os.geteuid() or stat.S_IMODE(held.st_mode) != PRIVATE:
        raise PermissionError(f"{path} is not private to this user")
