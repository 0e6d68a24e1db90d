"""`dmtg config …`: create a configuration, show it, and print its JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.console import Next, print_table, run, show
from pipelines.cli.options import ConfigFile, Debug, Json, Overrides, RayFile, command_line, load

TARGETS = (
    "Columns to predict. Repeat the option for each column, or separate them by commas. Quote a name with a comma "
    """as in CSV: '"height, in cm",weight'."""
)
config_app = typer.Typer(
    name="config", no_args_is_help=True, help="Create a configuration for your data, show one, print the schema."
)


@config_app.command("show", epilog="Example: dmtg config show -c mydata.yaml train.epochs=40")
def config_show(
    config: ConfigFile,
    overrides: Overrides = None,
    ray_config: RayFile = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the configuration with all bases, overrides and defaults on stdout.

    Secrets are left out.
    """

    def body() -> dict[str, Any]:
        import yaml

        from pipelines.config.validation import checked
        from pipelines.data.sources import options_model
        from pipelines.registry.tracking import shown

        loaded = load(config, overrides, ray_config)
        if loaded.source is not None:
            checked(options_model(loaded.source.kind), loaded.source.options, "source.options")
        values = shown(loaded)
        if not as_json:
            print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110), end="")
        has_source = loaded.source is not None and loaded.source.given
        purpose, command = ("write the shards", "shard") if has_source else ("inspect the shards", "inspect")
        step = Next(purpose, command_line([command], config, overrides, ray_config))
        return {"config": values, "next": step}

    run("config show", body, reads=config, as_json=as_json, debug=debug)


@config_app.command("schema", epilog="Example: dmtg config schema > dmtg.schema.json")
def config_schema(
    ray: Annotated[bool, typer.Option("--ray", help="Print the schema of ray_config.yaml instead.")] = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of configuration files on stdout, for completion and validation in an editor."""

    def body() -> dict[str, Any]:
        from pipelines.scaffold.json_schema import config_schema as schema_of_config
        from pipelines.scaffold.json_schema import ray_schema

        print(json.dumps(ray_schema() if ray else schema_of_config(), indent=2, ensure_ascii=False))
        return {"next": Next("create a configuration", ("dmtg", "config", "new", "--help"))}

    run("config schema", body, as_json=False, debug=debug)


@config_app.command("new", epilog="Example: dmtg config new mydata.csv --targets churn,spend")
def config_new(
    data: Annotated[str, typer.Argument(help="Table or folder, local or in object storage.")] = "",
    source: Annotated[str, typer.Option(help="Reader of the raw format; inferred from the data by default.")] = "",
    targets: Annotated[list[str] | None, typer.Option(help=TARGETS)] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="File to write; <name>.yaml by default.")] = "",
    name: Annotated[str, typer.Option(help="Name of runs and models; the name of the data by default.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a commented configuration. The type of each column is inferred from the first rows."""

    def body() -> dict[str, Any]:
        from pipelines.errors import UserError
        from pipelines.runs.folders import check_file
        from pipelines.scaffold.template import new_config
        from pipelines.storage import locate

        beside = "" if "://" in out else str(Path(out).parent)
        made = new_config(source, data, targets or [], name, beside)
        file = out or f"{made.name}.yaml"
        place = locate(file)
        check_file(place, "-o", "a configuration", _is_config if force else lambda _: True)
        if place.exists() and not force:
            raise UserError(
                "the file exists already", where=str(place),
                remedy="name another file with -o, or overwrite it with --force", wrong_use=True,
            )  # fmt: skip
        place.write_text(made.text)
        loaded = load(file, [])
        kinds = {use.column: use.options.get("kind", use.use) for use in made.uses}
        if made.uses:
            rows = [{"column": use.column, "type": kinds[use.column], "reason": use.why} for use in made.uses]
            print_table(f"Inferred types of the columns of {data}", rows)
        show(f"configuration: {file}")
        has_source = loaded.source is not None and loaded.source.given
        purpose = "write the shards" if has_source else "set source.root in the file, then write the shards"
        return {"config": file, "columns": kinds, "next": Next(purpose, command_line(["shard"], file, []))}

    run("config new", body, reads=data, as_json=as_json, debug=debug)


def _is_config(text: str) -> bool:
    """Whether a text is a configuration: a mapping with sections of one, and nothing else."""
    import yaml

    from pipelines.config.loading import Config
    from pipelines.config.yaml_text import load_yaml

    try:
        values = load_yaml(text)
    except yaml.YAMLError:
        return False
    return isinstance(values, dict) and set(values) <= {"base", *Config.model_fields}
