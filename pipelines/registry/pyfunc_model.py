"""The code of a registered model, which MLflow runs when the model is loaded. Needs the base install, not Ray.

MLflow copies this file into every registered model, and later versions of DMTG run the copy with its imports.
Therefore it imports only these names of DMTG, which are stable: a version that moves one of them keeps the old
name importable.

- `dmtg_core.names.by_number`
- `dmtg_core.network.composite.Composite`
- `dmtg_core.training.checkpoint.load_model` and `code_of`, and `named_shares` of the tasks of a model
- `dmtg_core.addresses.allow_code`
- `pipelines.registry.bases.open_base`
- `pipelines.data.preprocessing.load_preparation` and `prepare`
"""

from __future__ import annotations

import csv
import functools
import json
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.types.schema import AnyType

from dmtg_core.addresses import allow_code
from dmtg_core.names import by_number
from dmtg_core.network.composite import Composite
from dmtg_core.training.checkpoint import code_of, load_model
from pipelines.data.preprocessing import load_preparation, prepare
from pipelines.registry.bases import open_base


class GroupPredictor(mlflow.pyfunc.PythonModel):
    """Decoded predictions for the user's input: a dictionary with an array for each task.

    The artifact "groups" is a folder with a sub-folder for each group: one for a group's own model, all of them
    for the composite. The artifact "base", if there is one, says where the frozen weights of all groups are (see
    `pipelines.registry.bases`). The artifact "preparation" describes the conversion of raw to stored input;
    without it, the input is stored input. The result has the names of the signature and nothing else. The group of
    each task is in the metadata of the model, `mlflow.models.get_model_info(uri).metadata["groups_served"]`.
    """

    def load_context(self, context: Any) -> None:
        """Load the weights and the preparation.

        MLflow runs this file because its user trusts the registry. Code of other packages that the model names is
        therefore imported, but only if it is the code of its training.
        """
        folders = sorted(Path(context.artifacts["groups"]).iterdir(), key=lambda place: by_number(place.name))
        allow_code(*(one["address"] for folder in folders for one in code_of(folder)))
        described = json.loads(Path(context.artifacts["grouping"]).read_text(encoding="utf-8"))
        place = context.artifacts.get("base")
        with open_base(json.loads(Path(place).read_text(encoding="utf-8")) if place else None) as base:
            self.models = [load_model(folder, branches=len(described["groups"]), base=base) for folder in folders]
        self.composite = Composite(self.models)
        file = context.artifacts.get("preparation")
        self.preparation = load_preparation(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None
        accept_csv(sys.modules.get("mlflow.pyfunc.scoring_server"))

    # MLflow would read annotations as a schema; the schema is the signature in the registry
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Predict.

        Args:
            context: Not read.
            model_input: Input of `pipelines.data.preprocessing.prepare` (a DataFrame, a list of strings);
                without a preparation `(B, H, W, C)` as stored in the shards.
            params: Not read.

        Returns:
            Task name → result of `Task.decode`; and for tasks whose classes have names `<task>.<class>` →
            probability of the class, of a binary task only of the positive one.

        Raises:
            ValueError: For a missing column, or an invalid sample, with its number.
        """
        stored = np.array(model_input) if self.preparation is None else prepare(self.preparation, model_input)
        predicted = self.composite.predict(torch.from_numpy(stored))
        found: dict[str, np.ndarray] = {name: value.numpy() for name, value in predicted.items()}
        shares: dict[str, np.ndarray] = {}
        for task in self.composite.tasks:
            shares |= task.named_shares(found[task.name])
        # a task whose name is that of a share keeps it
        return found | {name: share for name, share in shares.items() if name not in found}


def rows_of(text: Iterable[str], columns: Collection[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV table as dictionaries, with every cell as it is written.

    Args:
        text: The lines. Cells are separated by commas, or by semicolons, tabs or bars if only then the table has
            the columns.
        columns: Names of columns that the table has to have.

    Raises:
        ValueError: For a row with more or fewer cells than there are names.
        csv.Error: When a quote is not closed.
    """
    lines = list(text)
    mark = next((mark for mark in ",;\t|" if set(columns) <= set(_names(lines, mark))), ",")
    names, *rows = [cells for cells in csv.reader(lines, delimiter=mark, strict=True) if cells] or [[]]
    wrong = [number for number, cells in enumerate(rows, start=1) if len(cells) != len(names)]
    if wrong:
        raise ValueError(f"row {wrong[0]} has {len(rows[wrong[0] - 1])} cells, expected {len(names)}")
    names = _names(lines, mark)
    return [dict(zip(names, cells, strict=True)) for cells in rows]


def _names(lines: Iterable[str], mark: str) -> list[str]:
    """The names of the columns if cells are separated by a mark; none if the first row cannot be read so."""
    try:
        first = next((cells for cells in csv.reader(lines, delimiter=mark, strict=True) if cells), [])
    except csv.Error:
        return []
    return [name.removeprefix("\ufeff").strip() for name in first]


def accept_csv(server: Any) -> None:
    """Let a scoring server of MLflow read the cells of `text/csv` as text, as they were read for training.

    MLflow reads CSV with the types of the signature. The columns of a table have none, because MLflow would refuse
    whole numbers in a column of doubles, and numbers and booleans in a column of strings, in JSON and DataFrames.
    Without types it refuses CSV, and inferred types turn 001 into 1. A table with semicolons and decimal commas is
    read as well: decimal commas are known from training.

    Args:
        server: The module `mlflow.pyfunc.scoring_server`; None in a process that serves nothing.
    """
    parse = getattr(server, "parse_csv_input", None)
    if parse is None or hasattr(parse, "__wrapped__"):
        return

    @functools.wraps(parse)
    def parse_as_text(csv_input: Any, schema: Any = None) -> Any:
        if schema is None or not any(isinstance(kind, AnyType) for kind in schema.input_types()):
            return parse(csv_input, schema)
        try:
            return rows_of(csv_input, schema.input_names())
        except (csv.Error, ValueError) as error:
            raise MlflowException.invalid_parameter_value(f"not a CSV table: {error}") from error

    server.parse_csv_input = parse_as_text


set_model(GroupPredictor())
