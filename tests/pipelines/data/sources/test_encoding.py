"""New data that is encoded as earlier shards are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, Source
from pipelines.data.sources.encoding import encode_like
from pipelines.errors import UserError

TASKS = [
    {"column": "sick", "kind": "binary"},
    {"column": "cost", "kind": "regression"},
    {"column": "ward", "kind": "multiclass"},
]


def table(root: Path, ages: list[float], works: list[str], costs: list[float], wards: list[str]) -> Source:
    root.mkdir()
    rows = len(ages)
    split = ["train"] * (rows - 1) + ["val"]
    frame = {"id": range(rows), "age": ages, "work": works, "sick": [0, 1] * (rows // 2), "cost": costs}
    pd.DataFrame(frame | {"ward": wards, "split": split}).to_csv(root / "t.csv", index=False)
    options = {"file": "t.csv", "id_column": "id", "features": ["age", "work"], "tasks": TASKS}
    return build_source("table", str(root), options)


@pytest.fixture
def first(tmp_path: Path) -> Source:
    return table(tmp_path / "1", [20, 40, 30, 50], ["sea", "land", "sea", "land"], [1, 2, 3, 4], list("nsns"))


def stored(source: Source) -> np.ndarray:
    return np.stack([source.read(entry)[INPUT] for entry in source.entries()])


def test_next_data_set_has_the_same_input_and_units(first: Source, tmp_path: Path) -> None:
    earlier = first.describe()
    again = table(tmp_path / "2", [60, 70, 80, 90], ["sea", "air", "land", "sea"], [50, 60, 70, 80], list("snsn"))
    own = again.describe()
    assert own.preparation != earlier.preparation
    other = table(tmp_path / "3", [60, 70, 80, 90], ["sea", "air", "land", "sea"], [50, 60, 70, 80], list("snsn"))
    found = encode_like(other, earlier, "x")
    assert (found.input, found.preparation, found.tasks) == (earlier.input, earlier.preparation, earlier.tasks)
    assert stored(other).shape[1:] == earlier.input.shape
    same = table(tmp_path / "4", [20, 40, 30, 50], ["sea", "land", "sea", "land"], [9, 8, 7, 6], list("nsns"))
    encode_like(same, earlier, "x")
    assert np.array_equal(stored(same), stored(first))


def test_texts_use_the_earlier_tokenizer(tmp_path: Path) -> None:
    sources = []
    for name, texts in (("a", ["one two", "two three", "three"]), ("b", ["nine ten", "ten one", "two"])):
        (tmp_path / name).mkdir()
        frame = {"id": [1, 2, 3], "text": texts, "sick": [0, 1, 0], "split": ["train", "train", "val"]}
        pd.DataFrame(frame).to_csv(tmp_path / name / "t.csv", index=False)
        options = {"file": "t.csv", "id_column": "id", "text_column": "text", "tasks": TASKS[:1], "length": 8}
        sources.append(build_source("text", str(tmp_path / name), options))
    earlier = sources[0].describe()
    assert encode_like(sources[1], earlier, "x").preparation == earlier.preparation
    assert len(stored(sources[1])) == 3


def test_data_that_cannot_be_encoded_like_the_earlier_is_refused(first: Source, tmp_path: Path) -> None:
    earlier = first.describe()
    other = table(tmp_path / "2", [60, 70, 80, 90], ["sea", "land"] * 2, [5, 6, 7, 8], list("nsxn"))
    with pytest.raises(UserError, match=r"task ward: .*'x'") as found:
        encode_like(other, earlier, "shards/1")
    assert found.value.where == "data.like=shards/1"
    assert "classes" in found.value.remedy
    lacking = replace(
        earlier,
        preparation=earlier.preparation
        | {"features": [{"column": "height", "type": "number", "mean": 0.0, "gaps": False}]},
    )
    fresh = table(tmp_path / "3", [60, 70, 80, 90], ["sea", "land"] * 2, [5, 6, 7, 8], list("nsns"))
    with pytest.raises(UserError, match="no column height"):
        encode_like(fresh, lacking, "x")
