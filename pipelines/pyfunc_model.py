"""The code of a registered model, run by MLflow where the model is loaded. Needs `dmtg_core`, not Ray.

MLflow copies this file beside the weights, so it imports nothing else of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import set_model

from dmtg_core.checkpoint import load_model


class GroupPredictor(mlflow.pyfunc.PythonModel):
    """Stored input in, decoded predictions out: a dictionary of arrays, one a task.

    The artifact "groups" is a folder with a sub-folder for each group: one for a group's own model, all of them
    for the composite.
    """

    def load_context(self, context: Any) -> None:
        """Load the weights."""
        folders = sorted(Path(context.artifacts["groups"]).iterdir())
        self.models = [load_model(folder) for folder in folders]

    # MLflow reads annotations here as a schema of its own; the signature in the registry is the schema
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """Predict.

        Args:
            context: Not read.
            model_input: `(B, H, W, C)` or `(B, F)` as stored in the shards.
            params: Not read.

        Returns:
            Task name → what `Task.decode` gives.
        """
        raw = torch.from_numpy(np.array(model_input))
        found: dict[str, np.ndarray] = {}
        for model in self.models:
            found |= {name: value.numpy() for name, value in model.predict(raw).items()}
        return found


set_model(GroupPredictor())
