"""Parts of a worker that keep a run alive when storage fails, memory runs out or the worker hangs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmtg_core.training.checkpoint import seal
from dmtg_core.training.loop import NonFiniteLossError
from pipelines import storage, stores
from pipelines.config.ray_section import RaySection
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.runs.checkpoints import Checkpoints
from pipelines.runs.events import DAMAGED, UNWRITTEN
from pipelines.runs.writer import BackgroundWriter, PendingWrite
from pipelines.scratch import STACKS
from pipelines.storage import is_transient, locate
from pipelines.training.failures import PermanentError, permanent_error
from pipelines.training.watchdog import worker_scratch
from tests.paths import ROOT
from tests.pipelines.conftest import make_config
from tests.pipelines.driver import in_own_mounts


class Recorded(list[tuple[str, str]]):
    """The emitted events, as kind and message."""

    def __call__(self, kind: str, message: str) -> None:
        self.append((kind, message))


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize(
    ("call", "transient"),
    [
        (lambda: Path("/dev/full").write_text("x"), True),
        (lambda: Path("/no/such/file").read_text(), False),
        (lambda: Path("/").read_text(), False),
        (lambda: Path("/proc/self/stat").chmod(0), False),  # refused to root as well
    ],
)
def test_a_full_disk_is_transient_and_a_refusal_is_not(call: Callable[[], object], transient: bool) -> None:
    with pytest.raises(OSError) as found:  # noqa: PT011 - which one is what is tested
        call()
    assert is_transient(found.value) is transient


def test_an_unreachable_server_is_transient_and_only_a_retrying_location_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(stores, "S3_ATTEMPTS", 1)
    stores.filesystem.cache_clear()
    place = locate("s3://bucket/x")
    delays: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", delays.append)
    with pytest.raises(UserError, match="connect") as found:
        place.write_bytes(b"")
    assert is_transient(found.value)
    assert delays == []
    with pytest.raises(UserError, match="connect"):
        place.retrying(3).read_bytes()
    stores.filesystem.cache_clear()
    assert delays[:3] == [0.5, 1.0, 2.0]


FULL = """
import shutil, subprocess, threading
from pathlib import Path
from pipelines.runs.checkpoints import Checkpoints
from pipelines.runs.writer import BackgroundWriter, PendingWrite
from pipelines.errors import UserError
from pipelines.storage import locate

disk = Path({disk!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=True)
filler, events = disk / "filler", []
filler.write_bytes(bytes(900_000))
local = Path({disk!r} + "-local")

def staged(name):
    (local / name).mkdir(parents=True)
    (local / name / "weights").write_bytes(bytes(300_000))
    return local / name

held = Checkpoints(locate(str(disk / "checkpoints")), local, lambda *event: events.append(event))
first = staged(held.next_name())
try:
    held.add(first)
except UserError as error:
    print("refused:", error.what)
print("left:", sorted(path.name for path in (disk / "checkpoints").rglob("*")))
try:
    (locate(str(disk)) / "small").write_bytes(bytes(300_000))
except UserError as error:
    print("small:", error.what)

writer = BackgroundWriter(lambda *event: (events.append(event), filler.unlink(missing_ok=True)))  # frees space
writer.put("the checkpoint", PendingWrite(lambda: held.add(first), lambda: shutil.rmtree(first)))
(locate(str(disk)) / "small").retrying(60).write_bytes(bytes(100_000))
assert writer.flush(60)
print("events:", [kind for kind, _ in events], events[0][1])
print("whole:", held.whole == [first.name], (disk / "checkpoints" / first.name / "sha256.json").exists())
print("staged:", list(local.iterdir()))
"""


def test_on_a_full_disk_nothing_half_written_stays_and_it_is_tried_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    found = subprocess.run(
        [*in_own_mounts(), sys.executable, "-c", FULL.format(disk=str(disk))],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    printed = dict(line.split(": ", 1) for line in found.stdout.splitlines())
    assert "No space left on device" in printed["refused"]
    assert printed["left"] == "[]"
    assert "No space left on device" in printed["small"]
    assert printed["events"].startswith("['unwritten', 'unwritten'] the checkpoint cannot be written")
    assert "No space left on device" in printed["events"]
    assert printed["whole"] == "True True"
    assert printed["staged"] == "[]"


# ---------------------------------------------------------------- checkpoints


def folder_of(root: Path, name: str, content: str = "weights") -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "network.safetensors").write_text(content)
    return root / name


def held(root: Path, events: Recorded) -> Checkpoints:
    return Checkpoints(locate(str(root / "run")), root / "scratch", events)


def test_only_the_newest_whole_checkpoints_stay(tmp_path: Path) -> None:
    left = folder_of(tmp_path / "run", "checkpoint_00000007_killed")  # by a writer that was killed
    store = held(tmp_path, Recorded())
    assert store.newest() is None
    names = [store.next_name() for _ in range(3)]
    for name in names:
        store.add(folder_of(tmp_path / "scratch", name, name))
    assert [int(name.split("_")[1]) for name in names] == [8, 9, 10]
    assert not left.exists()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names[1:]
    newest = held(tmp_path, Recorded()).newest()
    assert newest is not None
    assert (newest / "network.safetensors").read_text() == names[2]


def test_the_newest_is_that_of_the_highest_number_whatever_its_digits(tmp_path: Path) -> None:
    for number, mark in ((99_999_998, "abc123"), (99_999_999, "9e9999"), (100_000_000, "1e5000")):
        seal(folder_of(tmp_path / "run", f"checkpoint_{number:08d}_{mark}"))
    store = held(tmp_path, Recorded())
    newest = store.newest()
    assert newest is not None
    assert newest.name == "checkpoint_100000000_1e5000"
    name = store.next_name()
    assert name.startswith("checkpoint_100000001_")
    store.add(folder_of(tmp_path / "scratch", name))
    assert {f.name for f in (tmp_path / "run").iterdir()} == {newest.name, name}


def test_a_damaged_checkpoint_is_skipped_reported_and_not_counted(tmp_path: Path) -> None:
    store = held(tmp_path, Recorded())
    names = [store.next_name() for _ in range(2)]
    for name in names:
        store.add(folder_of(tmp_path / "scratch", name))
    (tmp_path / "run" / names[1] / "network.safetensors").write_text("Weights")
    events = Recorded()
    again = held(tmp_path, events)
    found = again.newest()
    assert found is not None
    assert found.name == names[0]
    assert events == [(DAMAGED, f"{names[1]} is skipped: missing or damaged: network.safetensors")]
    new = again.next_name()
    again.add(folder_of(tmp_path / "scratch", new))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [names[0], new]
    for name in (names[0], new):
        (tmp_path / "run" / name / "network.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        held(tmp_path, Recorded()).newest()


def test_a_newer_write_replaces_one_that_waits_or_fails() -> None:
    events, written, gone = Recorded(), [], []
    begun, resume = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        resume.wait()
        written.append("slow")

    writer = BackgroundWriter(events)
    writer.put("a", PendingWrite(slow, lambda: gone.append("slow")))
    begun.wait()
    writer.put("a", PendingWrite(lambda: written.append("old"), lambda: gone.append("old")))
    writer.put("b", PendingWrite(lambda: written.append("b")))
    writer.put("a", PendingWrite(lambda: written.append("new"), lambda: gone.append("new")))
    assert not writer.flush(0)
    resume.set()
    assert writer.flush(60)
    assert written == ["slow", "b", "new"]
    assert gone == ["old", "slow", "new"]

    failed = threading.Event()

    def full() -> None:
        failed.set()
        Path("/dev/full").write_text("x")

    writer.put("a", PendingWrite(full, lambda: gone.append("full")))
    failed.wait()
    writer.put("a", PendingWrite(lambda: written.append("newest")))
    assert writer.flush(60)
    assert gone[-1] == "full"
    assert written[-1] == "newest"
    assert [kind for kind, _ in events] == [UNWRITTEN, UNWRITTEN]
    assert "No space left on device" in events[0][1]
    assert "again" in events[1][1]


def test_a_refused_write_is_not_retried() -> None:
    events, tries = Recorded(), []

    def refused() -> None:
        tries.append(1)
        Path("/proc/self/stat").chmod(0)

    writer = BackgroundWriter(events)
    writer.put("a", PendingWrite(refused))
    assert writer.flush(60)
    assert len(tries) == len(events) == 1
    writer.close()


# ---------------------------------------------------------------- a worker that hangs

HANGS = """
import ctypes, sys, time
import numpy as np, torch
from dmtg_core.training.data import ArrayData, Arrays
from dmtg_core.tasks import Task
from pipelines.scratch import STACKS
from pipelines.storage import locate
from pipelines.training.watchdog import MonitoredData, Watchdog, worker_scratch

scratch = worker_scratch(locate({run!r}), print)
watchdog = Watchdog({seconds}, scratch.path / STACKS)
rows = Arrays(np.zeros((80, 4), "float32"), {{"a": np.zeros(80, "uint8")}}, {{}})
data = MonitoredData(ArrayData({{"train": rows, "val": rows}}, [Task("a", "binary")]), watchdog)
started = time.monotonic()
for batch in data.train(0, 1):
    if time.monotonic() - started > 1.5 * {seconds}:
        break
    time.sleep({seconds} / 20)
for batch in data.evaluate("val", 1):
    pass
print("trained", scratch.path, flush=True)
def stuck_in_a_driver():
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock, as a driver's call can
stuck_in_a_driver()
"""


def test_a_worker_that_hangs_is_ended_and_its_stacks_are_kept(tmp_path: Path) -> None:
    script = HANGS.format(run=str(tmp_path / "run"), seconds=4)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert found.returncode == 1, found.stderr  # from the watchdog, neither a signal nor Python
    assert found.stdout.startswith("trained"), found.stderr
    left = Path(found.stdout.split()[-1])
    assert "stuck_in_a_driver" in (left / STACKS).read_text()

    events = Recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        own = worker_scratch(locate(str(tmp_path / "run")), events)
        other = worker_scratch(locate(str(tmp_path / "run")), events)  # a folder in use is left alone
    assert not left.exists()
    kept = next((tmp_path / "run").glob("hung_*.txt"))
    assert "stuck_in_a_driver" in kept.read_text()
    assert [(kind, str(kept) in message) for kind, message in events] == [("hung", True)]
    assert own.path.is_dir()
    own.close()
    other.close()
    assert not list(tmp_path.glob("dmtg-*"))


# ---------------------------------------------------------------- errors for the user


def test_errors_of_the_configuration_are_permanent_and_name_what_to_change(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, ray={"workers": [1, 2]})
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    permanent = permanent_error(found.value, config, "run", 2)
    assert permanent is not None
    arrived = pickle.loads(pickle.dumps(permanent))  # noqa: S301 - as Ray sends it
    assert isinstance(arrived, PermanentError)
    assert "16 samples on 2 workers" in arrived.what
    for word in ("train.batch_size", "train.accumulate", "train.recompute", "bf16", "ray.workers"):
        assert word in arrived.remedy
    refused = permanent_error(NonFiniteLossError("it became NaN: lower it"), config, "run", 1)
    assert refused is not None
    assert (refused.what, refused.remedy) == ("it became NaN", "lower it")
    assert permanent_error(RuntimeError("connection reset"), config, "run", 1) is None


def test_workers_are_one_number_or_two(tmp_path: Path) -> None:
    section = checked(RaySection, {"workers": [1, 3]})
    assert (section.workers, section.fewest, section.most) == ((1, 3), 1, 3)
    assert checked(RaySection, section.model_dump(mode="json")) == section
    assert checked(RaySection, {"workers": 4}).fewest == 4
    for wrong in (0, [3, 1], [1, 2, 3], "2", [0, 1], True, []):
        with pytest.raises(UserError, match="two such numbers"):
            checked(RaySection, {"workers": wrong})
