"""Temporary folders: other users of the machine can neither read, block nor replace them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.scratch import STACKS, abandoned, new_scratch, remove_abandoned, temporary_folder
from pipelines.storage import locate
from pipelines.training.watchdog import worker_scratch
from tests.paths import ROOT
from tests.pipelines.other_user import run_as_other, running_as_other, shared_folder


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, which all users share."""
    folder = shared_folder(tmp_path / "tmp")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_folder_is_private_and_is_removed(shared: Path) -> None:
    with temporary_folder() as folder:
        assert folder.parent == shared
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "a").mkdir()
    assert list(shared.iterdir()) == []


def test_what_a_killed_process_left_beside_a_file_is_removed_by_the_next(tmp_path: Path) -> None:
    os.close(new_scratch(inside=tmp_path).descriptor)
    with temporary_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_kept_and_one_of_a_killed_process_is_removed(shared: Path) -> None:
    code = (
        "import os, signal; from pipelines.scratch import new_scratch; held = new_scratch();"
        "(held.path / 'weights').write_text('large'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TMPDIR": str(shared)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    own = new_scratch()
    (left,) = set(shared.iterdir()) - {own.path}
    remove_abandoned()
    assert not left.exists()
    assert own.path.exists()
    own.close()


def test_stacks_are_kept_for_the_next_process_of_their_run(shared: Path) -> None:
    events: list[tuple[str, str]] = []
    left = worker_scratch(locate(str(shared / "run")), lambda *one: events.append(one))
    (left.path / STACKS).write_text("main: stuck")
    os.close(left.descriptor)
    remove_abandoned()
    assert left.path.exists()
    worker_scratch(locate(str(shared / "run")), lambda *one: events.append(one)).close()
    assert not left.path.exists()
    assert [kind for kind, _ in events] == ["hung"]


@pytest.mark.parametrize("kind", ["link", "file", "open"])
def test_links_files_and_folders_that_others_can_read_are_left_alone(shared: Path, kind: str) -> None:
    target = shared / "target"
    target.mkdir()
    (target / "kept").touch()
    planted = shared / "dmtg-scratch--planted"
    if kind == "link":
        planted.symlink_to(target)
    elif kind == "file":
        planted.touch()
    else:
        planted.mkdir(mode=0o755)
    assert list(abandoned()) == []
    remove_abandoned()
    assert planted.exists()
    assert (target / "kept").exists()


PLANT = """
temporary, name, secret = sys.argv[1:]
folder = os.path.join(temporary, name)
os.mkdir(folder, 0o700)
os.symlink(secret, os.path.join(folder, "stacks.txt"))
"""


def test_another_user_cannot_make_a_worker_copy_a_private_file(shared: Path, tmp_path: Path) -> None:
    secret = tmp_path / "private_key"
    secret.write_text("of the victim")
    run = locate(str(tmp_path / "run"))
    used = worker_scratch(run, lambda *_: None)
    name = used.path.name
    used.close()
    planted = run_as_other(PLANT, str(shared), name, str(secret))
    assert planted.returncode == 0, planted.stderr
    worker_scratch(run, lambda *event: pytest.fail(str(event))).close()
    assert not list((tmp_path / "run").glob("*"))


LOCK = """
held = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(held, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_lock_of_another_user_on_the_temporary_folder_blocks_nothing(shared: Path, tmp_path: Path) -> None:
    with running_as_other(LOCK, str(shared)):
        worker_scratch(locate(str(tmp_path / "run")), lambda *_: None).close()  # it would wait for ever
        remove_abandoned()


READ = """
for action in (os.listdir, lambda path: os.open(path, os.O_RDONLY), lambda path: os.rename(path, path + "x")):
    try:
        action(sys.argv[1])
    except PermissionError:
        continue
    sys.exit("allowed")
"""


def test_another_user_cannot_read_lock_or_move_a_folder(shared: Path) -> None:
    with temporary_folder() as folder:
        (folder / "weights").touch()
        tried = run_as_other(READ, str(folder))
        assert tried.returncode == 0, tried.stderr
        assert (folder / "weights").exists()


def test_a_temporary_folder_that_cannot_be_created_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="folder for temporary files") as found:
        new_scratch()
    assert "TMPDIR" in found.value.remedy
