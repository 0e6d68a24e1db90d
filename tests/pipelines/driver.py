"""`dmtg train` in its own process: started, killed, waited for, and compared with an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.config.loading import Config
from pipelines.runs.events import Event
from pipelines.training.driver import Trained

CHECKPOINTS = 16  # of an undisturbed run: one in the middle of each of eight epochs, and one at its end
OFTEN = {"checkpoint_every": 2}
Undisturbed = tuple[Config, Trained, list[str]]


@dataclass
class Driver:
    """A run folder below `root`, and the commands that train in it.

    Args:
        root: Where configuration, log and run folder are.
        values: The configuration.
        before: Arguments before the command, such as those that start it in its own namespace.
        place: The folder of its runs as seen from this process, if it is not below `root`.
    """

    root: Path
    values: Mapping[str, object]
    before: tuple[str, ...] = ()
    place: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return (self.place or self.root) / "runs" / "disturbed"

    @property
    def log(self) -> str:
        """The output of all commands so far."""
        return (self.root / "log").read_text()

    def command(self) -> list[str]:
        """The arguments of the command."""
        config = self.root / "config.yaml"
        config.write_text(yaml.safe_dump(dict(self.values)))
        return [*self.before, sys.executable, "-m", "pipelines.cli", "train", "-c", str(config), "--json"]

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the command and do not wait for it."""
        return self.start_command(self.command(), **environment)

    def start_command(self, arguments: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        """Start another command and do not wait for it."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
        # in the background a suite ignores Ctrl-C, which a command would inherit
        kept = signal.signal(signal.SIGINT, signal.default_int_handler)
        with (self.root / "log").open("ab") as out:
            self.process = subprocess.Popen(
                arguments, stdout=out, stderr=subprocess.STDOUT, env=inherited | environment
            )
        signal.signal(signal.SIGINT, kept)
        return self.process

    def finish(self) -> dict:
        """Run the command to its end; its JSON object."""
        assert self.start().wait() == 0, self.log
        return self.outcome()

    def outcome(self) -> dict:
        """The JSON object of the last command."""
        found: dict = json.loads(self.log.strip().splitlines()[-1])
        return found

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until the condition is met; fail if the command ends before."""
        assert self.process is not None
        while not condition():
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        """The command and all processes below it."""
        assert self.process is not None
        try:
            command = psutil.Process(self.process.pid)
            return [command, *command.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def lose(self) -> None:
        """Send SIGKILL to the command and to every Ray process below it, like the loss of a machine."""
        kill(self.family())
        assert self.process is not None
        self.process.wait()

    def epochs(self) -> list[tuple[str, int]]:
        """The epochs whose metrics are in the run folder."""
        return [(record["stage"], record["epoch"]) for record in lines(self.folder / "metrics.jsonl")]

    def checkpoints(self) -> list[Path]:
        """The checkpoints with a seal, the newest one last."""
        found = (self.folder / "checkpoints").glob("checkpoint_*")
        return sorted(folder for folder in found if (folder / "sha256.json").exists())

    def newest(self) -> int:
        """The number of the newest checkpoint."""
        return max((int(folder.name.split("_")[1]) for folder in self.checkpoints()), default=0)

    def events(self, *kinds: str) -> list[Event]:
        """The events of the run of some kinds."""
        return [event for event in lines(self.folder / "events.jsonl") if event["kind"] in kinds]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kill(processes: list[psutil.Process]) -> None:
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def workers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The training workers among some processes."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def disturbed(undisturbed: Undisturbed, root: Path, **sections: Mapping[str, object]) -> Driver:
    """A run with the configuration of an undisturbed one, in its own folder; sections override it."""
    values = undisturbed[0].model_dump(mode="json")
    own = {"run": {"root": str(root / "runs"), "name": "disturbed"}, "track": {"uri": "none"}}
    for name, section in {**own, **sections}.items():
        values[name] = values[name] | dict(section)
    return Driver(root, values)


# a rounding error can move a pixel over a threshold, and r2 is a difference of two nearly equal sums
THRESHOLDS = ("within_11", "within_22", "within_30", "miou", "accuracy", "balanced_accuracy", "f1", "r2")


def same(found: Mapping, undisturbed: Mapping, *, shares: float = 1e-5) -> None:
    """Check that two results have the same grouping and metrics.

    Args:
        found, undisturbed: The results.
        shares: Largest difference of the metrics of `THRESHOLDS`, where the order of sums differs.
    """
    assert found["grouping"] == undisturbed["grouping"]
    for kind in ("metrics", "baseline"):
        for task, figures in undisturbed[kind].items():
            for name, value in figures.items():
                tolerance = shares if name in THRESHOLDS else 1e-5
                assert found[kind][task][name] == pytest.approx(value, rel=1e-4, abs=tolerance), (kind, task, name)


def in_own_mounts() -> list[str]:
    """Arguments that start a command in a namespace in which it can mount; skips without permission."""
    arguments = ["unshare", "--user", "--map-root-user", "--mount"]
    tried = subprocess.run([*arguments, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no own mounts here: {tried.stderr.decode().strip()}")
    return arguments
