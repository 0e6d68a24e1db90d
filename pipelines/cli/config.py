"""`dmtg config …`: a configuration made, shown, and described to an editor."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipelines.cli.console import Next, log, print_table, run
from pipelines.cli.options import ConfigFile, Debug, Json, RayFile, Words, load, same

config_app = typer.Typer(
    name="config", no_args_is_help=True, help="Make a configuration for your data, show one, describe all."
)


@config_app.command("show")
def config_show(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """The configuration as commands see it, on stdout: file, bases, words and defaults. Secrets are left out."""

    def body() -> dict[str, Any]:
        import yaml

        from pipelines.config.validation import checked
        from pipelines.data.sources import options_model
        from pipelines.registry.tracking import shown

        loaded = load(config, words, ray_config)
        if loaded.source is not None:
            checked(options_model(loaded.source.kind), loaded.source.options, "source.options")
        values = shown(loaded)
        if not as_json:
            print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110), end="")
        able = loaded.source is not None and loaded.source.given
        step = (
            Next("raw data to shards", same(["shard"], config, words, ray_config))
            if able
            else Next("statistics of the shards", same(["inspect"], config, words, ray_config))
        )
        return {"config": values, "next": step}

    run("config show", body, as_json=as_json, debug=debug)


@config_app.command("schema")
def config_schema(
    ray: Annotated[bool, typer.Option("--ray", help="That of ray_config.yaml instead.")] = False,
    debug: Debug = False,
) -> None:
    """The JSON schema of a configuration file, on stdout, for completion and checks in an editor."""

    def body() -> dict[str, Any]:
        from pipelines.scaffold.json_schema import config_schema as of_config
        from pipelines.scaffold.json_schema import ray_schema

        print(json.dumps(ray_schema() if ray else of_config(), indent=2, ensure_ascii=False))
        return {"next": Next("a file to start from", ("dmtg", "config", "new", "--help"))}

    run("config schema", body, as_json=False, debug=debug)


@config_app.command("new")
def config_new(
    data: Annotated[str, typer.Argument(help="Table (CSV, TSV, Parquet) or folder, local or s3://.")] = "",
    source: Annotated[
        str, typer.Option(help="Reader of the raw format; by default what the data look like.")
    ] = "",
    targets: Annotated[
        list[str] | None, typer.Option(help="Columns to predict, with commas between them.")
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="The file; <name>.yaml by default.")] = "",
    name: Annotated[str, typer.Option(help="Of runs and models; that of the data by default.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A commented file to start from: looks at the first rows, guesses what each column is, asks nothing."""

    def body() -> dict[str, Any]:
        from pipelines.errors import UserError
        from pipelines.scaffold.template import new_config
        from pipelines.storage import locate

        made = new_config(source, data, targets or [], name)
        file = out or f"{made.name}.yaml"
        place = locate(file)
        if place.exists() and not force:
            raise UserError(
                "the file is there already", where=str(place),
                remedy="give another one with -o, or --force to write over it", wrong_use=True,
            )  # fmt: skip
        place.write_text(made.text)
        source_of = load(file, []).source
        kinds = {use.column: use.options.get("kind", use.use) for use in made.uses}
        if made.uses:
            rows = [{"column": use.column, "is": kinds[use.column], "": use.why} for use in made.uses]
            print_table(f"What the columns of {data} seem to be", rows)
        log(f"configuration: {file}")
        able = source_of is not None and source_of.given
        why = "raw data to shards" if able else "when source.root in it names the raw data"
        return {"config": file, "columns": kinds, "next": Next(why, same(["shard"], file, []))}

    run("config new", body, as_json=as_json, debug=debug)
