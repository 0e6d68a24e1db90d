"""Entry point of `dmtg` and of `python -m pipelines.cli`. It needs no other package until it runs a command."""

import ctypes
import os
import sys
from collections.abc import MutableMapping
from contextlib import suppress

from pipelines.cli import versions

SPIN, WAITING = "10000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# variable of the C library → its parameter of mallopt (malloc.h), and the value in bytes
MEMORY = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**25), "MALLOC_TRIM_THRESHOLD_": (-1, 2**28)}


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let threads of an operator that wait for each other keep their cores briefly, unless the user has chosen.

    By default they keep them so long that a step on a machine with other work takes five to forty times as long:
    the thread that they wait for has no core. The variable is read when PyTorch is imported.
    """
    if not any(name in environment for name in WAITING):
        environment[WAITING[0]] = SPIN


def keep_memory(environment: MutableMapping[str, str]) -> None:
    """Let processes keep the memory that a step frees for the next step, unless the user has chosen.

    By default the GNU C library gives it back, and the next step pays for each page again: 3 to 15 % of a step on
    a CPU. The variables are read when a process starts.
    """
    if not any(name in environment for name in MEMORY):
        environment.update({name: str(value) for name, (_, value) in MEMORY.items()})


def set_defaults() -> None:
    """Apply `wait_briefly` and `keep_memory` to this process and to those that it starts."""
    wait_briefly(os.environ)
    keep_memory(os.environ)
    with suppress(AttributeError, ValueError):  # another C library, or a value that it ignores
        mallopt = ctypes.CDLL(None).mallopt
        for name, (parameter, _) in MEMORY.items():
            if name in os.environ:
                mallopt(parameter, int(os.environ[name]))


def main() -> None:
    """Run the command of the command line.

    Raises:
        SystemExit: With the exit code; without the packages of the extra `pipelines`, with what to install.
    """
    set_defaults()
    if sys.argv[1:] == ["--version"]:
        print("\n".join(versions()))
        return
    try:
        from pipelines.cli.app import main as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "pipelines", "dmtg_core"):
            raise
        sys.exit(f"dmtg needs the package {missing}: pip install 'dmtg[pipelines]'")
    run()


if __name__ == "__main__":
    main()
