"""Arguments and options that several commands share, and the command lines of next commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.completion import complete_config, complete_model, complete_override
from pipelines.cli.console import Next
from pipelines.compare.verdicts import Verdict
from pipelines.errors import without_credentials

if TYPE_CHECKING:
    from pipelines.config.loading import Config
    from pipelines.config.sections import TrackSection

ConfigFile = Annotated[
    str,
    typer.Option(
        "--config", "-c", help="YAML file, or the name of a packaged recipe.", autocompletion=complete_config
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="section.key=value arguments that override values of the file.", autocompletion=complete_override
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
RayFile = Annotated[
    str, typer.Option("--ray-config", help="File that configures Ray; ./ray_config.yaml by default.")
]
LocalOk = Annotated[
    bool, typer.Option("--local-ok", help="Accept places on a cluster that only this job can see.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
TrackUri = Annotated[
    str, typer.Option("--uri", help="Tracking server; an SQLite file in the current folder by default.")
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Import the code of other packages that models and shards name, also if it has changed, and load a "
        "registered model whose files differ from those registered.",
    ),
]
RunDir = Annotated[str, typer.Argument(help="Folder of a finished run.")]
Model = Annotated[
    str,
    typer.Argument(
        help="models:/<name>/<version> or models:/<name>@<alias>, or a run folder.", autocompletion=complete_model
    ),
]
PredictModel = Annotated[
    str,
    typer.Argument(
        help="models:/<name>/<version> or models:/<name>@<alias>, a run folder, or the folder of a saved model.",
        autocompletion=complete_model,
    ),
]


def load(
    config: str, overrides: Sequence[str] | None, ray_config: str = "", *, trust_code: bool = False
) -> Config:
    """Read the configuration of a command; `trust_code` sets `run.trust_code`."""
    from pipelines.config.loading import load_config

    trusting = ["run.trust_code=true"] if trust_code else []
    return load_config(config, [*(overrides or []), *trusting], ray_config)


def load_for_work(
    config: str,
    overrides: Sequence[str] | None,
    ray_config: str,
    *,
    local_ok: bool,
    out: str = "",
    trust_code: bool = False,
) -> Config:
    """Read the configuration of a command that writes results, and check that its places are not lost.

    Args:
        config, overrides, ray_config, trust_code: As for `load`.
        local_ok: Accept places that only this job can see.
        out: A further folder that is written.
    """
    from pipelines.execution.choice import on_ray
    from pipelines.execution.places import check_places
    from pipelines.registry.tracking import tracking_uri

    loaded = load(config, overrides, ray_config, trust_code=trust_code)
    places = {"run.root": loaded.run.root, "data.shards": loaded.data.shards, "--out": out}
    places |= {"regroup.shards": loaded.regroup.shards}
    places |= {"track.uri": tracking_uri(loaded.track), "track.registry_uri": loaded.track.registry_uri}
    if not local_ok and on_ray(loaded.ray):
        check_places(loaded.ray, places)
    return loaded


def command_line(
    command: Sequence[str], config: str, overrides: Sequence[str] | None, ray_config: str = "", *more: str
) -> tuple[str, ...]:
    """Another command with the same configuration and overrides.

    Args:
        command: Name of the command and its positional arguments.
        config: The configuration file or recipe.
        overrides: `section.key=value` arguments.
        ray_config: The file that configures Ray; empty for the default.
        more: Further options.
    """
    ray = ["--ray-config", ray_config] if ray_config else []
    return "dmtg", *command, "-c", config, *map(_without_secrets, overrides or ()), *ray, *more


def predict_command(
    model: str, loaded: Config, config: str, overrides: Sequence[str] | None, ray_config: str
) -> tuple[str, ...]:
    """The command for a model's predictions, in a folder beside the runs of its configuration."""
    out = f"{loaded.run.root.rstrip('/')}/predictions"
    return command_line(["predict", model], config, overrides, ray_config, "--out", out)


def _without_secrets(override: str) -> str:
    """An override for a log. A value that holds a secret becomes a dot dot dot, and has to be typed again."""
    key, _, value = override.partition("=")
    return f"{key}=…" if key == "regroup.webhook" or without_credentials(value) != value else override


def models_command(command: str, track: TrackSection, *more: str) -> tuple[str, ...]:
    """A `dmtg models` command for the registry of a configuration."""
    from pipelines.config.loading import load_track

    elsewhere = track.uri and track.uri != load_track().uri and without_credentials(track.uri) == track.uri
    return "dmtg", "models", command, *more, *(["--uri", track.uri] if elsewhere else [])


ONE_ENCODER = "network.groups=1"  # naive MTL: nothing is searched
# verdict → purpose, command and further overrides; None for the command that uses the model
STEPS: Mapping[Verdict, tuple[str, str, Sequence[str]] | None] = {
    Verdict.HELPS: ("train a grouping and its models", "train", ()),
    Verdict.UNMEASURED: ("measure in short runs whether the grouping can matter", "signal", ()),
    Verdict.UNCLEAR: ("compare the search with the baselines", "compare", ()),
    Verdict.NOT: ("train one encoder for all tasks, without a search", "train", (ONE_ENCODER,)),
    Verdict.SETTLED: None,
}


def next_step(
    verdict: Verdict, config: str, overrides: Sequence[str] | None, ray_config: str, use: Next | None = None
) -> Next:
    """The next command after a verdict.

    Args:
        verdict: Whether grouping helps.
        config: The configuration file or recipe.
        overrides: `section.key=value` arguments of the command that ended.
        ray_config: The file that configures Ray; empty for the default.
        use: The command that uses the model that is there, if there is one; it needs no other training.
    """
    step = STEPS[verdict]
    if use is not None and (step is None or verdict is Verdict.HELPS):
        return use
    assert step is not None, "a verdict that is settled has a model"
    purpose, command, more = step
    return Next(purpose, command_line([command], config, [*(overrides or []), *more], ray_config))
