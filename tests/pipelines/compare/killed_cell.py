"""A comparison that trains its cells in its own process, with a checkpoint after each step, and is killed.

    python -m tests.pipelines.compare.killed_cell CONFIG NUMBER

The process is killed (SIGKILL) after it has written the checkpoint with this number.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from pipelines.compare import preparation, training
from pipelines.compare.driver import compare
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.runs.checkpoints import Checkpoints
from pipelines.training import context


def checkpoints_at_each_step(patch: pytest.MonkeyPatch) -> None:
    """Let cells be trained in this process, with checkpoints as often as possible."""
    patch.setattr(preparation, "processes", lambda _section: 0)
    patch.setattr(training, "CHECKPOINT_S", 1e-9)
    patch.setattr(context, "SPACING", 0)


def main(config: str, number: int) -> None:
    """Run the comparison of a configuration until its checkpoint with a number."""
    add, written = Checkpoints.add, []

    def counted(self: Checkpoints, local: Path) -> None:
        add(self, local)
        written.append(local)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        checkpoints_at_each_step(patch)
        patch.setattr(Checkpoints, "add", counted)
        compare(checked(Config, json.loads(Path(config).read_text())))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
