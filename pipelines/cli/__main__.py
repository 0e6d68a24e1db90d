"""Entry point of `python -m pipelines.cli`."""

from pipelines.cli.app import main

main()
