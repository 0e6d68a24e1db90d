"""The code of a registered model, which MLflow runs when the model is loaded. Needs the base install, not Ray.

MLflow copies this file into every registered model, and later versions of DMTG run the copy with its imports.
Therefore it imports only these names of DMTG, which are stable: a version that moves one of them keeps the old
name importable.

- `dmtg_core.names.by_number`
- `dmtg_core.training.checkpoint.load_model`
- `pipelines.data.preprocessing.load_preparation` and `prepare`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import set_model

from dmtg_core.names import by_number
from dmtg_core.training.checkpoint import load_model
from pipelines.data.preprocessing import load_preparation, prepare


class GroupPredictor(mlflow.pyfunc.PythonModel):
    """Decoded predictions for the user's input: a dictionary with an array for each task.

    The artifact "groups" is a folder with a sub-folder for each group: one for a group's own model, all of them
    for the composite. The artifact "preparation" describes the conversion of raw to stored input; without
    it, the input is stored input. The result has the tasks of the signature and nothing else. The group of each
    task is in the metadata of the model, `mlflow.models.get_model_info(uri).metadata["groups_served"]`.
    """

    def load_context(self, context: Any) -> None:
        """Load the weights and the preparation."""
        folders = sorted(Path(context.artifacts["groups"]).iterdir(), key=lambda place: by_number(place.name))
        described = json.loads(Path(context.artifacts["grouping"]).read_text(encoding="utf-8"))
        self.models = [load_model(folder, branches=len(described["groups"])) for folder in folders]
        file = context.artifacts.get("preparation")
        self.preparation = load_preparation(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None

    # MLflow would read annotations as a schema; the schema is the signature in the registry
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Predict.

        Args:
            context: Not read.
            model_input: Input of `pipelines.data.preprocessing.prepare` (a DataFrame, a list of strings);
                without a preparation `(B, H, W, C)` as stored in the shards.
            params: Not read.

        Returns:
            Task name → result of `Task.decode`.

        Raises:
            ValueError: For a missing column, or an invalid sample, with its number.
        """
        stored = np.array(model_input) if self.preparation is None else prepare(self.preparation, model_input)
        found: dict[str, np.ndarray] = {}
        for model in self.models:
            found |= {name: value.numpy() for name, value in model.predict(torch.from_numpy(stored)).items()}
        return found


set_model(GroupPredictor())
