"""Load a registered model and predict from raw rows: MLflow and the base install, no Ray and no shards.

    python examples/registered_model.py models:/machines@champion rows.csv

Columns of the file that the model does not read are left alone. `MLFLOW_TRACKING_URI` says where the registry is;
by default it is `mlflow.db` in the current folder, where `dmtg train` made it.
"""

import os
import sys

import mlflow
import pandas as pd


def main(model: str, file: str) -> None:
    """Print each prediction beside the row it is of."""
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
    groups = mlflow.models.get_model_info(model).metadata["groups_served"]
    print(f"{model}: {' | '.join(', '.join(tasks) for tasks in groups.values())}")
    loaded = mlflow.pyfunc.load_model(model)
    rows = pd.read_csv(file)
    needed = [column.name for column in loaded.metadata.get_input_schema().inputs]
    predicted = loaded.predict(rows[needed])
    print(pd.DataFrame({name: list(values) for name, values in predicted.items()}).to_string(max_rows=10))


if __name__ == "__main__":
    main(*sys.argv[1:])
