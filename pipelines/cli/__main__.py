"""Entry point of `dmtg` and of `python -m pipelines.cli`. It needs no other package until it runs a command."""

import os
import sys

from pipelines.cli import versions

# Threads of an operator that wait for each other keep their cores for some microseconds only. By default it is a
# millisecond, and on a machine with other work a step is then five to forty times slower: the thread that they
# wait for has no core. The variable is read when PyTorch is imported.
SPIN, WAITING = "10000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def main() -> None:
    """Run the command of the command line.

    Raises:
        SystemExit: With the exit code; without the packages of the extra `pipelines`, with what to install.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ[WAITING[0]] = SPIN
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
