"""The rule for what is written: a folder that is not empty holds a record of ours, a file is of the same kind.

Every command follows it before it writes anything. What a command removes is named by its own records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from pipelines.errors import UserError
from pipelines.runs.lease import FILE as LEASE
from pipelines.storage import Location

NAMED = 3
# a lease, or what a killed process left of a file that it wrote
PASSING = re.compile(rf"{re.escape(LEASE)}|\..*\.[0-9a-f]{{8}}\.part|\.probe-[0-9a-f]{{8}}")


def check_folder(
    folder: Location,
    key: str,
    holds: str,
    ours: Callable[[], bool],
    ignored: Collection[str] = (),
    below: str = "",
) -> None:
    """Check that a folder may be written.

    Args:
        folder: The folder.
        key: Setting or option that names it, for the message.
        holds: What it is for, such as "shards".
        ours: Whether it holds a record of ours; asked if the folder is not empty.
        ignored: Names in it that count as none.
        below: Name of a folder in it whose content counts instead of the folder.

    Raises:
        UserError: If it is a file, or a folder with other contents.
    """
    if folder.size() is not None:
        raise UserError(
            f"{key} names a file",
            where=str(folder),
            remedy=f"set {key} to a folder that is empty or does not exist yet",
            wrong_use=True,
        )
    folder.check_bucket()
    held = _names(folder)
    held = [name for name in held if name != below] + [
        f"{below}/{name}" for name in _names(folder / below) if below
    ]
    foreign = [one for one in held if not PASSING.fullmatch(one.rpartition("/")[2]) and one not in ignored]
    if foreign and not ours():
        more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
        raise UserError(
            f"the folder holds {len(foreign)} files or folders and no record of {holds}: "
            f"{', '.join(foreign[:NAMED])}{more}",
            where=str(folder),
            remedy=f"set {key} to a folder that is empty or does not exist yet",
            wrong_use=True,
        )


def _names(folder: Location) -> list[str]:
    return [*folder.files(recursive=False), *folder.folders()]


def check_file(file: Location, key: str, what: str, ours: Callable[[str], bool]) -> None:
    """Check that a file may be written: there is none yet, it is empty, or it is of the kind that is written.

    Args:
        file: The file.
        key: Option that names it, for the message.
        what: What it has to be, such as "a page".
        ours: Whether a text is one of this kind.

    Raises:
        UserError: If it is another file, or a folder.
    """
    problem = "it is a folder" if file.is_dir() else ""
    if file.size():
        problem = "" if ours(file.read_bytes().decode(errors="replace")) else f"the file exists and is not {what}"
    if problem:
        raise UserError(problem, where=str(file), remedy=f"name another file with {key}", wrong_use=True)


def check_page(page: Location, key: str) -> None:
    """Check that a page may be written: there is no file yet, or it is a page.

    Raises:
        UserError: If it is another file.
    """
    check_file(page, key, "a page", lambda text: text[:15].lower().startswith("<!doctype html"))
