"""The `dmtg` command: its subcommands in help panels, in the order of use, each with examples.

A command parses its arguments, calls one function of another package, prints the result and prints the next
command. Ray, MLflow and torch are imported inside the commands that use them, so that `--help` is instant.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import getdoc
from os import _exit as end_process
from typing import Annotated, Any

import typer

from pipelines.cli import versions
from pipelines.cli.config import config_app
from pipelines.cli.data import inspect, shard
from pipelines.cli.doctor import doctor
from pipelines.cli.experiments import compare, signal, sweep
from pipelines.cli.models import models_app
from pipelines.cli.serve import evaluate, predict, regroup, serve
from pipelines.cli.train import demo, report, train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Learn which prediction tasks should share an encoder, and train one model for each group of tasks.\n\n"
    "For your own table, start with: dmtg config new mydata.csv --targets first,second,third\n\n"
    "Every command prints the next command.",
    epilog="-c takes a YAML file or the name of a packaged recipe. Arguments section.key=value override its "
    "values. dmtg COMMAND --help shows examples.",
)


def _print_versions(asked: bool) -> None:
    if asked:
        print("\n".join(versions()))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print versions of dmtg and its packages.",
        ),
    ] = False,
) -> None:
    pass


# title of a help panel → commands of the panel, each with examples
PANELS: Mapping[str, Mapping[Callable[..., Any] | typer.Typer, tuple[str, ...]]] = {
    "Getting started": {
        demo: ("dmtg demo", "dmtg demo train.seed=1"),
        doctor: ("dmtg doctor", "dmtg doctor -c mydata.yaml --write"),
        config_app: (
            "dmtg config new mydata.csv --targets churn,spend,segment",
            "dmtg config show -c clothing",
            "dmtg config schema > dmtg.schema.json",
        ),
    },
    "Prepare data": {
        shard: ("dmtg shard -c mydata.yaml", "dmtg shard -c clothing source.root=/data/clothing-dataset"),
        inspect: ("dmtg inspect -c mydata.yaml", "dmtg inspect -c mydata.yaml --out page.html"),
    },
    "Find a grouping": {
        signal: ("dmtg signal -c mydata.yaml",),
        train: (
            "dmtg train -c mydata.yaml",
            "dmtg train -c mydata.yaml train.epochs=40 network.groups=4",
            "dmtg train -c mydata.yaml --profile",
        ),
        compare: ("dmtg compare -c mydata.yaml", "dmtg compare -c mydata.yaml 'compare.seeds=[1, 2, 3, 4, 5]'"),
        sweep: ("dmtg sweep -c mydata.yaml 'sweep.groups=[2, 3, 4]' 'sweep.seeds=[1, 2]'",),
    },
    "Serve models": {
        models_app: (
            "dmtg models list",
            "dmtg models diff mydata",
            "dmtg models promote mydata",
            "dmtg models rollback mydata",
        ),
        evaluate: ("dmtg evaluate models:/mydata/1 -c mydata.yaml",),
        predict: (
            "dmtg predict models:/mydata@champion new.csv -o predictions.csv",
            "dmtg predict models:/mydata@champion photos -o predictions.parquet --bad-rows skip",
            "dmtg predict models:/mydata@champion -c mydata.yaml --out predictions --split all",
        ),
        serve: (
            "dmtg serve models:/mydata@champion",
            "dmtg serve models:/mydata@champion --host 0.0.0.0 --port 8080 --replicas 4",
        ),
    },
    "Nightly runs": {
        regroup: (
            "dmtg regroup -c mydata.yaml regroup.shards=s3://bucket/daily/mydata",
            "dmtg regroup -c mydata.yaml --night 2026-11-25 --dry-run",
        ),
    },
    "Reports": {report: ("dmtg report work/mydata/runs/mydata-0a1b2c3d",)},
}


def _examples(lines: tuple[str, ...]) -> str:
    return "\n\n".join(("Examples:", *lines))


for panel, commands in PANELS.items():
    for command, lines in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, rich_help_panel=panel, epilog=_examples(lines))
        else:
            app.command(rich_help_panel=panel, epilog=_examples(lines))(command)

# typer keeps the line breaks of all paragraphs but the first
for group in (app, config_app, models_app):
    for one in group.registered_commands:
        text = getdoc(one.callback) or ""
        one.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def main() -> None:
    """Entry point of the console script.

    The process ends without the clean-up of the interpreter, which frees the modules of torch and MLflow for
    seconds. Threads have ended and functions that were registered with `atexit` have run by then.
    """
    code = [1]
    atexit.register(_end_process, code)  # the first one that is registered runs last
    try:
        app()
    except SystemExit as end:
        code[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def _end_process(code: list[int]) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a reader that has gone, or a closed stream
            stream.flush()
    end_process(code[0])


if __name__ == "__main__":
    main()
