"""Checkpoints in the run folder: the newest whole one is found, new ones are written while training goes on.

Ray Train could do the writing, and does not here: a copy that fails makes it start all workers anew, a list of the
checkpoints that it cannot write ends the run, and it reads that list before it reads a checkpoint.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from dmtg_core.training.checkpoint import SEAL, check_seal, seal
from dmtg_core.training.context import newest_whole
from pipelines.errors import UserError
from pipelines.runs.events import DAMAGED, Emit
from pipelines.storage import Location

PREFIX = "checkpoint_"
KEEP = 2  # so that one can be damaged


class Checkpoints:
    """The checkpoints of a run. Only one process adds some; each has a name of its own, whoever wrote it.

    A checkpoint without its seal, which is written last, was left by a writer that did not get to its end: it does
    not count, and goes when the next one is whole.

    Args:
        folder: Where they are, in a local folder or an object store.
        scratch: Local folder for copies of those that are not local.
        tell: Hears of damage.
    """

    def __init__(self, folder: Location, scratch: Path, emit: Emit) -> None:
        self.folder, self.scratch, self.emit = folder, scratch, emit
        self.fetched: Path | None = None
        names = [name for name in folder.folders() if name.startswith(PREFIX)]
        self.number = int(names[-1].removeprefix(PREFIX).split("_")[0]) if names else 0
        self.whole = [name for name in names if (folder / name / SEAL).exists()]

    def newest(self) -> Path | None:
        """The newest whole one as a local folder, None where there is none.

        Raises:
            ValueError: When there are checkpoints and all of them are damaged.
        """
        return newest_whole((self.fetch(name) for name in reversed(list(self.whole))), self._passed_over)

    def _passed_over(self, problem: str) -> None:
        damaged = self.whole.pop()  # it does not count among those that are kept
        self.emit(DAMAGED, f"{damaged} is passed over: {problem.partition(': ')[2]}")

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
        """`fetch` of the one that another worker has chosen.

        Raises:
            ValueError: When it is not what was written.
        """
        folder = self.fetch(name)
        check_seal(folder)
        return folder

    def forget(self) -> None:
        """Remove the local copy of what was fetched."""
        if self.fetched is not None:
            shutil.rmtree(self.fetched, ignore_errors=True)
            self.fetched = None

    def next_name(self) -> str:
        """A name after those of all that there are."""
        self.number += 1
        return f"{PREFIX}{self.number:08d}_{uuid.uuid4().hex[:6]}"

    def add(self, local: Path) -> None:
        """Write a local folder under its name, its seal last; then remove all but the newest whole ones.

        Raises:
            OSError, UserError: When it could not be written; nothing of it stays where that can be helped.
        """
        if not (local / SEAL).exists():
            seal(local)
        folder = self.folder.retrying(0)  # it is for the caller to try again, or not
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
            if name.startswith(PREFIX) and name not in self.whole:
                _delete(folder / name)


def _delete(place: Location) -> None:
    """Remove what is not needed; where that fails now, it goes after the next checkpoint."""
    try:
        place.delete()
    except (OSError, UserError):
        return
