"""Samples of val and test whose input is that of a training sample."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines.config.loading import Config
from pipelines.data.shards import shard
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.report.inspect import inspect
from pipelines.storage import locate
from pipelines.training.checks import prepare
from tests.pipelines.conftest import make_config

ROWS = 3_000


def config_of(folder: Path, frame: pd.DataFrame, split: dict[str, str]) -> Config:
    """The configuration of a table."""
    frame.to_csv(folder / "table.csv", index=False)
    options = {"tasks": [{"column": "y", "kind": "regression"}], "features": ["a", "b"], **split}
    source = {"kind": "table", "root": str(folder / "table.csv"), "options": options}
    return make_config(
        folder, folder, source=source, data={"rows_per_shard": 700}, network={"encoder": "mlp", "options": {}}
    )


def found_in(folder: Path, frame: pd.DataFrame, split: dict[str, str]) -> dict[str, Any]:
    """What `inspect` finds for a table."""
    config = config_of(folder, frame, split)
    shard(config)
    return inspect(config)


@pytest.fixture
def frame() -> pd.DataFrame:
    """Rows of 700 persons."""
    rng = np.random.default_rng(0)
    person = rng.integers(700, size=ROWS)
    values = rng.normal(size=(2, 700)).round(4)
    return pd.DataFrame(
        {"person": person, "a": values[0, person], "b": values[1, person], "y": rng.normal(size=ROWS)}
    ).assign(split=rng.choice(["train", "val", "test"], ROWS, p=[0.5, 0.2, 0.3]))


def test_rows_with_the_features_of_a_training_row_are_counted_as_by_pandas(tmp_path, frame) -> None:
    found = found_in(tmp_path, frame, {"split_column": "split"})
    known = frame[frame["split"] == "train"][["a", "b"]].drop_duplicates()
    counts = frame.merge(known, on=["a", "b"])["split"].value_counts()
    assert found["repeated"] == {"val": counts["val"], "test": counts["test"]}
    notes = [note for note in found["notes"] if "input of a training sample" in note]
    assert len(notes) == 2
    assert notes[1].startswith(f"{counts['test']} of {(frame['split'] == 'test').sum()} test samples")


def test_rows_that_are_split_by_person_have_none(tmp_path, frame) -> None:
    found = found_in(tmp_path, frame.drop(columns="split"), {"split_by": "person"})
    assert found["repeated"] == {"val": 0, "test": 0}
    assert not any("training sample" in note for note in found["notes"])


def test_a_few_equal_rows_are_counted_without_a_note(tmp_path, frame) -> None:
    frame["a"] = np.arange(ROWS)
    train, test = (np.flatnonzero(frame["split"] == split)[:5] for split in ("train", "test"))
    frame.loc[test, ["a", "b"]] = frame.loc[train, ["a", "b"]].to_numpy()
    found = found_in(tmp_path, frame, {"split_column": "split"})
    assert found["repeated"] == {"val": 0, "test": 5}
    assert not any("training sample" in note for note in found["notes"])


def test_a_training_notes_them_and_shards_that_are_kept_are_counted_too(tmp_path, frame) -> None:
    config = config_of(tmp_path, frame, {"split_column": "split"})
    first = shard(config)
    assert first.manifest.repeated["test"] > 100
    (locate(config.data.shards) / "_manifest.json").delete()
    again = shard(config)
    assert (again.made, again.kept) == (0, first.made)
    assert again.manifest.repeated == first.manifest.repeated
    with EmbeddedExecutor(config.ray) as executor:
        notes = prepare(config, executor, print).notes
    assert [note.partition(" of ")[0] for note in notes if "input of a training sample" in note] == [
        str(first.manifest.repeated[split]) for split in ("val", "test")
    ]


def test_shards_of_an_earlier_version_are_not_counted(tmp_path, frame) -> None:
    config = config_of(tmp_path, frame, {"split_column": "split"})
    manifest, folder = shard(config).manifest, locate(config.data.shards)
    note = folder / "_parts" / f"{manifest.files()[0]}.json"
    note.write_json({key: value for key, value in note.read_json().items() if key != "inputs"})
    (folder / "_manifest.json").delete()
    assert shard(config).manifest.repeated == {}
    assert not any("training sample" in line for line in inspect(config)["notes"])
