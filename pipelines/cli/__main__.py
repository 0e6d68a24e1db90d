"""Entry point of `dmtg` and of `python -m pipelines.cli`. It needs no other package until it runs a command."""

import os
import sys

from pipelines.cli import versions

# Threads of an operator that wait for each other sleep. By default they spin, and on a machine with other work a
# thread that waits for a core then makes a step ten to forty times slower. It is read when PyTorch is imported.
WAITING = ("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command of the command line.

    Raises:
        SystemExit: With the exit code; without the packages of the extra `pipelines`, with what to install.
    """
    os.environ.setdefault(*WAITING)
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
