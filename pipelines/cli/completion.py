"""Shell completion of configurations and models. It must be fast and must not fail if a server is unreachable."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from pipelines.recipes import recipes

if TYPE_CHECKING:
    from pydantic import BaseModel

SERVER_S = "3"  # timeout of requests to the tracking server, in seconds


def complete_config(incomplete: str) -> list[str]:
    """Recipes, YAML files and folders whose names begin with `incomplete`."""
    return [*(name for name in recipes() if name.startswith(incomplete)), *_files(incomplete, (".yaml", ".yml"))]


def _files(incomplete: str, ends: Collection[str]) -> list[str]:
    """Files with one of some endings, or with any if there is none, and folders."""
    folder, _, begun = incomplete.rpartition("/")
    place = Path(f"{folder}/") if folder or incomplete.startswith("/") else Path()
    prefix = f"{folder}/" if "/" in incomplete else ""
    found = [path for path in place.glob(f"{begun}*") if not path.name.startswith(".") or begun.startswith(".")]
    files = [f"{prefix}{path.name}" for path in found if path.is_file() and (not ends or path.suffix in ends)]
    folders = [f"{prefix}{path.name}/" for path in found if path.is_dir()]
    return [*sorted(files), *sorted(folders)]


def complete_input(incomplete: str) -> list[str]:
    """Files and folders whose names begin with `incomplete`, and overrides."""
    return [*_files(incomplete, ()), *(complete_override(incomplete) if "." in incomplete else [])]


def complete_override(incomplete: str) -> list[str]:
    """`section.key=` for each key whose name begins with `incomplete`, with its values if they are listed.

    Bash makes three words of key=value. The values alone are completed there.
    """
    words = os.environ.get("COMP_WORDS", "").split()[1:]
    before = words[-3:-1] if incomplete not in ("", "=") else words[-2:]
    keys = _keys()
    if "=" in before and before[0] in keys:
        return [value for value in keys[before[0]] if value.startswith(incomplete.removeprefix("="))]
    found = [f"{key}={value}" for key, values in keys.items() for value in (values or ("",))]
    matching = [one for one in found if one.startswith(incomplete)]
    several = len({one.partition("=")[0] for one in matching}) > 1
    return list(dict.fromkeys(f"{one.partition('=')[0]}=" for one in matching)) if several else matching


def _keys() -> dict[str, tuple[str, ...]]:
    """`section.key` of a configuration → its values, if they are listed."""
    from pipelines.config.loading import Config

    return dict(_keys_of(Config, ""))


def _keys_of(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is not None:
            yield from _keys_of(inner, f"{prefix}{name}.")
            continue
        listed = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        yield f"{prefix}{name}", tuple(map(str, listed)) or (("true", "false") if bool in kinds else ())


def complete_model(incomplete: str) -> list[str]:
    """Addresses of registered models: the newest version of each model, and every alias."""
    return [address for address in _addresses() if address.startswith(incomplete)]


def complete_name(incomplete: str) -> list[str]:
    """Names of registered composites."""
    names = {address.removeprefix("models:/").partition("/")[0].partition("@")[0] for address in _addresses()}
    return sorted(name for name in names if name.startswith(incomplete) and "." not in name)


def complete_address(incomplete: str) -> list[str]:
    """Addresses as of `complete_model`, without `models:/`, which is optional for the commands of the registry."""
    return [
        short for address in _addresses() if (short := address.removeprefix("models:/")).startswith(incomplete)
    ]


def _addresses() -> list[str]:
    try:
        with _silent_and_quick():
            from pipelines.config.loading import load_track
            from pipelines.registry.versions import list_models

            found = list_models(load_track())
    except Exception:  # noqa: BLE001 - a completion that fails offers nothing
        return []
    aliases = [f"models:/{model['name']}@{alias}" for model in found for alias in model["aliases"]]
    return [*(model["uri"] for model in found), *aliases]


@contextmanager
def _silent_and_quick() -> Iterator[None]:
    """Log nothing, and do not wait for a server that is away. Both end with the block."""
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": SERVER_S, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before, disabled = {name: os.environ.get(name) for name in limits}, logging.root.manager.disable
    os.environ |= limits
    logging.disable()
    try:
        yield
    finally:
        logging.disable(disabled)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
