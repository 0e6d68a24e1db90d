"""The frozen weights of registered models, which their versions share.

A version has the file `base.json` and not the weights:

| key | content |
|---|---|
| digest | SHA-256 of the weights, `dmtg_core.network.frozen.digest` |
| name, version | the registered model that has a copy of them |
| source | without a copy: the file or folder that the encoder was read from |

The environment variable DMTG_BASE replaces either: a folder of `dmtg_core.training.checkpoint.save_base`, or the
file or folder of the encoder. Other weights than those of the digest are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.scratch import temporary_folder

ENVIRONMENT = "DMTG_BASE"
COPY, REFERENCE = "copy", "reference"
REMEDY = f"set {ENVIRONMENT} to a copy of them: the encoder's file or folder, or a folder models/base of a run"


@contextmanager
def open_base(described: Mapping[str, Any] | None) -> Iterator[Path | None]:
    """The place of frozen weights, for `dmtg_core.training.checkpoint.load_model`.

    Args:
        described: Contents of `base.json`; None for a model that has all of its weights.

    Raises:
        UserError: If they are not there; it names them.
    """
    given = os.environ.get(ENVIRONMENT, "")
    if described is None:
        yield None
    elif given:
        if not Path(given).exists():
            raise UserError(f"no such file or folder: {given}", where=ENVIRONMENT, remedy="correct it or unset it")
        yield Path(given)
    elif described.get("name"):
        with temporary_folder() as folder:
            yield _fetched(described, folder)
    else:
        yield _referenced(described)


def _fetched(described: Mapping[str, Any], folder: Path) -> Path:
    """The copy of the registry in a local folder."""
    import mlflow

    address = f"models:/{described['name']}/{described['version']}"
    try:
        return Path(mlflow.artifacts.download_artifacts(address, dst_path=str(folder)))
    except Exception as error:
        raise UserError(
            f"cannot load the frozen weights {address} (SHA-256 {described['digest'][:12]}): "
            f"{str(error).splitlines()[0][:200]}",
            where="MLflow registry",
            remedy=f"name the registry with MLFLOW_TRACKING_URI, or {REMEDY}",
        ) from error


def _referenced(described: Mapping[str, Any]) -> Path | None:
    """The source of the weights; None for the name of weights that the encoder's library has."""
    source = described["source"]
    if not described["is_path"]:
        return None
    if not Path(source).exists():
        raise UserError(
            f"the frozen weights are missing: there is no {source} (SHA-256 {described['digest'][:12]})",
            where="base.json of the model",
            remedy=f"put them back, or {REMEDY}",
        )
    return Path(source)
