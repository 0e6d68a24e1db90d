"""Entry point of `dmtg` and of `python -m pipelines.cli`. It needs no other package until it runs a command."""

import os
import sys
from collections.abc import MutableMapping

from pipelines.cli import versions

SPIN, WAITING = "10000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let threads of an operator that wait for each other keep their cores briefly, unless the user has chosen.

    By default they keep them so long that a step on a machine with other work takes five to forty times as long:
    the thread that they wait for has no core. The variable is read when PyTorch is imported.
    """
    if not any(name in environment for name in WAITING):
        environment[WAITING[0]] = SPIN


def main() -> None:
    """Run the command of the command line.

    Raises:
        SystemExit: With the exit code; without the packages of the extra `pipelines`, with what to install.
    """
    wait_briefly(os.environ)
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
