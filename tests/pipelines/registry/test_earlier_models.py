"""Models that versions before 0.2 registered: their copy of the code of a model is loaded and predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.training.checkpoint import save_model
from pipelines.data.preprocessing import load_preparation, prepare
from pipelines.data.sources.base import INPUT
from tests.paths import ROOT
from tests.pipelines.untrained import small_table

CODE = Path(__file__).parent / "pyfunc_model_v1.py.txt"
AGES = [{"age": 20.0}, {"age": 40.0}, {"age": 30.0}]

LIGHT = """
import sys
sys.modules |= dict.fromkeys(("ray", "typer", "boto3", "pydantic"))  # None: cannot be imported
import pipelines.preparation
print(sorted(name for name in sys.modules if name.startswith("pipelines")))
"""


@pytest.mark.parametrize("raw", [True, False])
def test_a_model_with_the_earlier_code_is_loaded_and_predicts(tmp_path: Path, raw: bool) -> None:
    source = small_table(tmp_path)
    description = source.describe()
    spec = NetworkSpec(description.input, description.tasks, EncoderSpec("mlp"), groups=2, initial="diagonal",
                       initial_scale=1.0)  # fmt: skip
    network = GroupingNetwork(spec)
    groups = network.specialise()
    for name, model in groups.items():
        save_model(tmp_path / "groups" / name, model)
    (tmp_path / "grouping.json").write_text(network.grouping().to_json())
    (tmp_path / "preparation.json").write_text(json.dumps(description.preparation))
    (tmp_path / "code.py").write_text(CODE.read_text())
    names = ("grouping", "preparation") if raw else ("grouping",)
    artifacts = {name: str(tmp_path / f"{name}.json") for name in names}
    mlflow.pyfunc.save_model(
        tmp_path / "model", python_model=str(tmp_path / "code.py"), pip_requirements=[],
        artifacts=artifacts | {"groups": str(tmp_path / "groups")},
    )  # fmt: skip

    stored = np.stack([source.read(entry)[INPUT] for entry in source.entries()])
    assert np.array_equal(prepare(load_preparation(description.preparation), AGES), stored)
    found = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(AGES if raw else stored)
    assert set(found) == {"sick", "cost", "days"}
    for model in groups.values():
        for task, value in model.eval().predict(torch.from_numpy(stored)).items():
            assert np.array_equal(found[task], value.numpy())


def test_the_earlier_name_of_the_preparation_imports_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    modules = ["pipelines", "pipelines.data", "pipelines.data.preprocessing", "pipelines.preparation"]
    assert done.stdout.strip() == str(modules)
