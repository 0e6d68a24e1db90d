"""The code of a registered model, run by MLflow where the model is loaded. Needs the base install, not Ray.

MLflow copies this file beside the weights. Of this package it imports only what the base install can run.
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
    """What a user has in, decoded predictions out: a dictionary of arrays, one a task.

    The artifact "groups" is a folder with a sub-folder for each group: one for a group's own model, all of them
    for the composite. The artifact "preparation" says how raw input becomes stored input; without it the stored
    input is taken as it is. An answer has the tasks of the signature and nothing else: which group serves each
    task is in the metadata of the model, `mlflow.models.get_model_info(uri).metadata["groups_served"]`.
    """

    def load_context(self, context: Any) -> None:
        """Load the weights and the preparation."""
        folders = sorted(Path(context.artifacts["groups"]).iterdir(), key=lambda place: by_number(place.name))
        described = json.loads(Path(context.artifacts["grouping"]).read_text(encoding="utf-8"))
        self.models = [load_model(folder, branches=len(described["groups"])) for folder in folders]
        file = context.artifacts.get("preparation")
        self.preparation = load_preparation(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None

    # MLflow reads annotations here as a schema of its own; the signature in the registry is the schema
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Predict.

        Args:
            context: Not read.
            model_input: What `pipelines.data.preprocessing.prepare` takes (a DataFrame, a list of strings);
                without a preparation `(B, H, W, C)` as stored in the shards.
            params: Not read.

        Returns:
            Task name → what `Task.decode` gives.

        Raises:
            ValueError: For a column that is missing, or a sample that cannot be used, with its number.
        """
        stored = np.array(model_input) if self.preparation is None else prepare(self.preparation, model_input)
        found: dict[str, np.ndarray] = {}
        for model in self.models:
            found |= {name: value.numpy() for name, value in model.predict(torch.from_numpy(stored)).items()}
        return found


set_model(GroupPredictor())
