"""The files of a registered model are compared with what registration recorded.

Registration writes the checksums of all files of a model to `files.json` in the model, and the checksum of this
file to a tag of the version. The files are in the artifact store, the tag is in the registry.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from dmtg_core.names import listed
from pipelines.errors import UserError

TAG, FILE = "dmtg.files", "files.json"
ADDED = "registered_model_meta"  # MLflow adds it to what it has downloaded
logger = logging.getLogger(__name__)


def record(model: Path) -> str:
    """Write the checksums of the files of a model, and return the checksum of the written file."""
    (model / FILE).write_text(json.dumps(_checksums(model), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _checksum(model / FILE)


def check(model: Path, recorded: str, uri: str, *, trust: bool = False) -> None:
    """Check that the files of a model are those that were registered.

    Args:
        model: Folder of the downloaded model.
        recorded: The checksum that `record` returned; empty for models of versions that recorded none.
        uri: Address of the model.
        trust: Log a difference and do not refuse it.

    Raises:
        UserError: When files are missing, added or changed; it names them.
    """
    if not recorded:
        logger.warning("%s has no record of its files, so they are not checked", uri)
        return
    differing = _differing(model, recorded)
    if not differing:
        return
    what = f"files of {uri} are not those that were registered: {listed(differing, 5)}"
    if not trust:
        raise UserError(
            what,
            where="MLflow artifact store",
            remedy="put them back, or delete the version and register the run again with dmtg models register; "
            "--trust-code loads them if you have changed them yourself",
        )
    logger.warning("%s; they are loaded because of --trust-code", what)


def _differing(model: Path, recorded: str) -> list[str]:
    if not (model / FILE).is_file() or _checksum(model / FILE) != recorded:
        return [FILE]
    expected = json.loads((model / FILE).read_text(encoding="utf-8"))
    found = _checksums(model)
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def _checksums(model: Path) -> dict[str, str]:
    files = sorted(file for file in model.rglob("*") if file.is_file() or file.is_symlink())
    names = {file.relative_to(model).as_posix(): file for file in files}
    return {name: _checksum(file) for name, file in names.items() if name not in (FILE, ADDED)}


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
