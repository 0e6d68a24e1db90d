"""Registered models take what a user has, texts or rows of a table, and answer as on stored input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from dmtg_core.checkpoint import save_model
from dmtg_core.encoders import EncoderSpec
from dmtg_core.network import GroupingNetwork, NetworkSpec
from pipelines.config import Config
from pipelines.manifest import Manifest
from pipelines.registry import load_groups, register
from pipelines.sections import checked
from pipelines.sources import INPUT, Source, build_source
from pipelines.storage import locate
from pipelines.tracking import connect

TABLE = {
    "file": "t.csv",
    "id_column": "id",
    "features": ["age", "work"],
    "tasks": [{"column": "sick", "kind": "binary"}, {"column": "cost", "kind": "regression"}],
}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rows": ("table", TABLE, "mlp"),
    "texts": (
        "text",
        {"file": "t.csv", "id_column": "id", "tasks": TABLE["tasks"], "text_column": "note", "length": 8},
        "embedding_bag",
    ),
}
FRAME = pd.DataFrame(
    {
        "id": list("abcd"),
        "age": [20.5, 40, None, 30],
        "work": ["sea", "land", None, "air"],
        "note": ["a day at sea", "[PAD] or not", "“no”, she said", "zzz"],
        "sick": [1, 0, 1, 0],
        "cost": [3.0, 5.5, 4.0, 1.0],
        "split": ["train", "train", "train", "val"],
    }
)


def save_and_register(kind: str, root: Path) -> tuple[Source, str, str]:
    """A network that has learnt nothing, registered as training would do it."""
    source_kind, options, encoder = KINDS[kind]
    source = build_source(source_kind, str(root), options)
    description = source.describe()
    network = GroupingNetwork(NetworkSpec(description.input, description.tasks, EncoderSpec(encoder), groups=1))
    run = root / kind
    ((name, model),) = network.specialise().items()
    save_model(run / "models" / name, model)
    tracking = {"uri": f"sqlite:///{root / 'mlflow.db'}", "experiment": "served"}
    config = checked(Config, {"name": kind, "data": {"shards": str(run)}, "track": tracking})
    client = connect(config.track)
    experiment = client.get_experiment_by_name("served")
    number = (
        experiment.experiment_id if experiment else client.create_experiment("served", str(root / "artifacts"))
    )
    tasks = [task.name for task in description.tasks]
    result = {"grouping": {name: tasks}, "grouping_name": "all", "metrics": {task: {} for task in tasks}}
    example = np.stack([source.read(entry)[INPUT] for entry in source.entries()])
    run_id = client.create_run(number).info.run_id
    composite, single = register(config, locate(str(run)), run_id, Manifest(description, {}, {}), example, result)
    (again,) = load_groups(composite.uri, config.track).values()
    assert again.tasks == model.tasks
    return source, composite.uri, single.uri


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Source, Any, Any, str]]:
    """Kind → source, the loaded composite, the loaded model of its one group, the address of the composite."""
    root = tmp_path_factory.mktemp("served")
    FRAME.to_csv(root / "t.csv", index=False)
    found = {}
    for kind in KINDS:
        source, *uris = save_and_register(kind, root)
        composite, single = (mlflow.pyfunc.load_model(uri) for uri in uris)
        found[kind] = (source, composite, single, uris[0])
    return found


def answers(source: Source, model: Any) -> dict[str, np.ndarray]:
    """What the network says to the stored input."""
    stored = torch.from_numpy(np.stack([source.read(entry)[INPUT] for entry in source.entries()]))
    (network,) = model.unwrap_python_model().models
    return {task: value.numpy() for task, value in network.predict(stored).items()}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return set(found) == set(expected) and all(np.array_equal(found[task], expected[task]) for task in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_gives_what_the_stored_input_gives(served, kind) -> None:
    source, composite, single, _ = served[kind]
    column = {"rows": ["age", "work"], "texts": ["note"]}[kind]
    expected = answers(source, composite)
    assert len({value.tobytes() for value in expected["cost"]}) == 4
    for model in (composite, single):
        assert same(model.predict(FRAME[column]), expected)
        assert same(model.predict(FRAME[column].to_dict("records")), expected)


def test_plain_strings_do_where_there_is_one_column(served) -> None:
    source, composite, *_ = served["texts"]
    expected = answers(source, composite)
    texts = list(FRAME["note"])
    for raw in (texts, np.array(texts), np.array(texts, object)):
        assert same(composite.predict(raw), expected)
    assert composite.predict(texts[0])["sick"].shape == (1,)


def test_rows_may_have_other_columns_and_whole_numbers(served) -> None:
    source, composite, *_ = served["rows"]
    whole = FRAME.assign(age=[20, 40, 30, 30])[["split", "work", "age"]]
    found = composite.predict(whole)
    expected = answers(source, composite)
    assert found["cost"][3] == expected["cost"][3]
    assert found["cost"][0] != expected["cost"][0]


def test_errors_name_column_and_row(served) -> None:
    rows, texts = (served[kind][1] for kind in KINDS)
    with pytest.raises(MlflowException, match=r"missing inputs \['work'\]"):
        rows.predict(FRAME[["age"]])
    with pytest.raises(ValueError, match="row 1: 'old' in column age is not a finite number"):
        rows.predict(FRAME[:2].assign(age=["20", "old"]))
    with pytest.raises(ValueError, match="row 0: no column note; there are comment"):
        texts.predict(pd.DataFrame({"comment": ["a"]}))
    with pytest.raises(ValueError, match="row 1: expected a text in column note, got ''"):
        texts.predict(["a", ""])
    with pytest.raises(ValueError, match="row 0: expected a text in column note, got None"):
        texts.predict(pd.DataFrame({"note": [None]}))


def test_signature_requirements_and_preparation_travel_with_the_model(served) -> None:
    for kind, columns in (("rows", ["age", "work"]), ("texts", [0])):
        source, composite, _, uri = served[kind]
        signature = composite.metadata.signature
        assert signature.inputs.input_names() == columns
        assert signature.outputs.input_names() == ["sick", "cost"]
        folder = Path(mlflow.artifacts.download_artifacts(uri))
        held = json.loads((folder / "artifacts" / "preparation.json").read_text())
        assert held == json.loads(json.dumps(source.describe().preparation))
        assert ("tokenizers==" in (folder / "requirements.txt").read_text()) == (kind == "texts")
