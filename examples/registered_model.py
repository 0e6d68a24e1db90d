"""Load a registered model and predict from raw rows.

    python examples/registered_model.py models:/machines@champion rows.csv

The script needs MLflow and the base install. It needs neither Ray nor shards. It ignores columns of the file that
the model does not read. `MLFLOW_TRACKING_URI` sets the registry. The default is `mlflow.db` in the current folder,
which `dmtg train` creates.
"""

import os
import sys

import mlflow
import pandas as pd


def main(model: str, file: str) -> None:
    """Print the predictions, one line for each row."""
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
