"""Folders of a configuration: for a run, a comparison and a grouping signal."""

from __future__ import annotations

import yaml

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.config.yaml_text import load_yaml
from pipelines.errors import UserError
from pipelines.runs.files import CONFIG
from pipelines.storage import Location, locate

SIGNAL = "signal.json"


def folder_name(config: Config, what: str) -> str:
    """The folder of a comparison or a grouping signal; its name follows from the digest of the configuration."""
    return f"{config.name}-{what}-{config.digest()}"


def earlier_verdict(config: Config) -> str:
    """The verdict of `dmtg signal` with the same configuration; empty if it has not been run."""
    file = locate(config.run.root) / folder_name(config, "signal") / SIGNAL
    return str(file.read_json()["verdict"]) if file.exists() else ""


def open_run(config: Config) -> Location:
    """The run folder of a configuration.

    Raises:
        UserError: When it cannot be written to, or belongs to another configuration.
    """
    run = locate(config.run.root) / config.run_name()
    run.check_writable()
    run = run.retrying()
    if (run / CONFIG).exists() and _stored_digest(run / CONFIG) != config.digest():
        raise UserError(
            "this run folder belongs to another configuration",
            where=str(run / CONFIG),
            remedy="give another run.name, or leave it out: the name then follows from the configuration",
            wrong_use=True,
        )
    return run


def _stored_digest(file: Location) -> str:
    """Digest of a stored configuration.

    The compare section is no part of the digest. It is not read, because its methods had other names in earlier
    versions.
    """
    try:
        stored = load_yaml(file.read_text())
        return checked(Config, {name: section for name, section in stored.items() if name != "compare"}).digest()
    except (UserError, AttributeError, yaml.YAMLError) as error:
        problem = error.what if isinstance(error, UserError) else "it is damaged"
        raise UserError(
            f"the configuration in this run folder cannot be read: {problem}",
            where=str(file),
            remedy="another version of dmtg wrote it: use that version, or give another run.name",
        ) from error
