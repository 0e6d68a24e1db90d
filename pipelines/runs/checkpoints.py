"""Checkpoints in the run folder: finds the newest whole one, and writes new ones.

Ray Train's own checkpoint storage is not used: it restarts all workers after a copy that fails, ends the run if it
cannot write its list of checkpoints, and cannot read a checkpoint without that list.
"""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path

from dmtg_core.training.checkpoint import SEAL, check_seal, seal
from dmtg_core.training.context import newest_whole
from pipelines.errors import UserError
from pipelines.runs.events import DAMAGED, Emit
from pipelines.storage import Location

PREFIX = "checkpoint_"
NAME = re.compile(rf"{PREFIX}\d{{8,}}_\w+")  # of another folder nothing is read, and it is not removed
KEEP = 2  # so that one can be damaged


class Checkpoints:
    """The checkpoints of a run. Only one process adds checkpoints, and no name is used twice.

    The seal of a checkpoint is written last. A checkpoint without it comes from a writer that was interrupted: it
    is ignored, and removed after the next one has been written.

    Args:
        folder: Their folder, local or in an object store.
        scratch: Local folder for copies of those that are not local.
        emit: Called for a damaged checkpoint.
    """

    def __init__(self, folder: Location, scratch: Path, emit: Emit) -> None:
        self.folder, self.scratch, self.emit = folder, scratch, emit
        self.fetched: Path | None = None
        names = [name for name in folder.folders() if NAME.fullmatch(name)]
        self.number = int(names[-1].split("_")[1]) if names else 0
        self.whole = [name for name in names if (folder / name / SEAL).exists()]

    def newest(self) -> Path | None:
        """The newest whole checkpoint as a local folder, None without one.

        Raises:
            ValueError: When there are checkpoints and all of them are damaged.
        """
        return newest_whole((self.fetch(name) for name in reversed(list(self.whole))), self._skip_damaged)

    def _skip_damaged(self, problem: str) -> None:
        damaged = self.whole.pop()  # it is not one of the KEEP checkpoints
        self.emit(DAMAGED, f"{damaged} is skipped: {problem.partition(': ')[2]}")

    def fetch(self, name: str) -> Path:
        """A checkpoint as a local folder; `forget` removes the copy."""
        self.forget()
        place = self.folder / name
        if place.local is not None:
            return place.local
        self.fetched = self.scratch / f"fetched_{name}"
        for file in place.files():
            (self.fetched / file).parent.mkdir(parents=True, exist_ok=True)
            (self.fetched / file).write_bytes((place / file).read_bytes())
        return self.fetched

    def fetch_whole(self, name: str) -> Path:
        """Fetch the checkpoint that another worker has chosen.

        Raises:
            ValueError: When it is damaged.
        """
        folder = self.fetch(name)
        check_seal(folder)
        return folder

    def forget(self) -> None:
        """Remove the local copy that `fetch` has made."""
        if self.fetched is not None:
            shutil.rmtree(self.fetched, ignore_errors=True)
            self.fetched = None

    def next_name(self) -> str:
        """A name that follows those of all checkpoints."""
        self.number += 1
        return f"{PREFIX}{self.number:08d}_{uuid.uuid4().hex[:6]}"

    def add(self, local: Path) -> None:
        """Write a local folder under its name, its seal last; then remove all but the newest whole checkpoints.

        Raises:
            OSError, UserError: When it could not be written. Its files are removed if that is possible.
        """
        if not (local / SEAL).exists():
            seal(local)
        folder = self.folder.retrying(0)  # the caller retries
        place = folder / local.name
        files = sorted(file for file in local.rglob("*") if file.is_file() and file.name != SEAL)
        try:
            for file in (*files, local / SEAL):
                (place / file.relative_to(local).as_posix()).write_file(file)
        except BaseException:
            _delete(place)
            raise
        self.whole = [*self.whole, local.name][-KEEP:]
        for name in folder.folders():
            if NAME.fullmatch(name) and name not in self.whole:
                _delete(folder / name)


def _delete(place: Location) -> None:
    """Remove a folder; if that fails, it is removed after the next checkpoint."""
    try:
        place.delete()
    except (OSError, UserError):
        return
