"""The split of rows by the hash of a column: all rows of a person are in one split, for every reader of rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.data.sources import build_source
from pipelines.data.sources.row_splits import SplitOptions, hash_split
from pipelines.data.sources.tables.row import Row
from pipelines.errors import UserError
from pipelines.scaffold.template import new_config
from tests.pipelines.data.sources.image_files import png

PERSONS, VISITS = 300, 4
TASKS = [{"column": "a", "kind": "binary"}, {"column": "b", "kind": "binary"}]
KINDS: dict[str, dict[str, Any]] = {
    "table": {"file": "t.csv", "id_column": "visit"},
    "text": {"file": "t.csv", "text_column": "note", "id_column": "visit"},
    "folder": {"labels": "t.csv", "image_column": "visit"},
    "image_table": {"file": "t.parquet", "id_column": "visit"},
}


def visits(**more: Any) -> pd.DataFrame:
    """A table of persons with several visits each; the numbers of persons have leading zeros."""
    count = PERSONS * VISITS
    columns = {
        "visit": [f"v{i}" for i in range(count)],
        "person": [f"{i % PERSONS:05d}" for i in range(count)],
        "note": [f"visit number {i} of this person" for i in range(count)],
        "x": [i / count for i in range(count)],
        "a": [i % 2 for i in range(count)],
        "b": [i // 2 % 2 for i in range(count)],
    }
    return pd.DataFrame(columns | more)


def write(root: Path, frame: pd.DataFrame) -> Path:
    """The table as CSV, and as Parquet with images."""
    (root / "images").mkdir(parents=True)
    frame.to_csv(root / "t.csv", index=False)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    image = pa.array([{"bytes": png(0), "path": ""}] * len(frame))
    pq.write_table(table.append_column("image", image), root / "t.parquet")
    return root


def splits(root: Path, kind: str, **options: Any) -> dict[str, str]:
    """Visit → split."""
    source = build_source(kind, str(root), {**KINDS[kind], "tasks": TASKS, **options})
    return {entry.id: entry.split for entry in source.entries()}


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_of_a_person_are_in_one_split(tmp_path: Path, kind: str) -> None:
    frame = visits()
    write(tmp_path / "data", frame)
    found = splits(tmp_path / "data", kind, split_by="person")
    person = dict(zip(frame["visit"], frame["person"], strict=True))
    assert found == {visit: hash_split(person[visit]) for visit in person}
    assert splits(tmp_path / "data", kind) == {visit: hash_split(visit) for visit in person}
    shares = Counter(found.values())
    expected = {"train": 0.70, "val": 0.15, "test": 0.15}
    assert {name: shares[name] / len(frame) for name in expected} == pytest.approx(expected, abs=0.06)


def test_rows_for_validation_are_taken_by_person(tmp_path: Path) -> None:
    frame = visits()
    write(tmp_path / "data", frame)
    found = splits(tmp_path / "data", "image_table", split_by="person", val_share=0.3)
    of_person: dict[str, set[str]] = {}
    for visit, person in zip(frame["visit"], frame["person"], strict=True):
        of_person.setdefault(person, set()).add(found[visit])
    assert max(map(len, of_person.values())) == 1
    assert Counter(found.values())["val"] > 0.25 * len(frame)


def test_the_column_is_a_feature_only_if_it_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "data", visits())
    for features, names in (("all", {"note", "x"}), (["x", "person"], {"x", "person"})):
        options = {**KINDS["table"], "split_by": "person", "features": features, "tasks": TASKS}
        entry = next(iter(build_source("table", str(root), options).entries()))
        assert set(entry.fields["row"].cells) == {"a", "b"} | names


@pytest.mark.parametrize("kind", KINDS)
def test_two_rules_and_empty_cells_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="either split_column or split_by"):
        splits(write(tmp_path / "both", visits()), kind, split_by="person", split_column="x")
    with pytest.raises(UserError, match="no column persons"):
        splits(tmp_path / "both", kind, split_by="persons")
    write(tmp_path / "split", visits(split="train"))
    with pytest.raises(UserError, match="split_by: person is set") as caught:
        splits(tmp_path / "split", kind, split_by="person")
    assert "split_column=null" in caught.value.remedy
    assert set(splits(tmp_path / "split", kind, split_by="person", split_column=None).values()) > {"train"}
    empty = visits()
    empty.loc[2, "person"] = ""
    with pytest.raises(UserError, match="no person, which decides on the split") as caught:
        splits(write(tmp_path / "empty", empty), kind, split_by="person")
    assert "fill the column person" in caught.value.remedy


def test_splits_of_files_leave_nothing_to_decide(tmp_path: Path) -> None:
    root = write(tmp_path / "data", visits())
    options = {"files": {"train": "t.csv", "val": "t.csv"}, "text_column": "note", "tasks": TASKS}
    with pytest.raises(UserError, match="split_by has no meaning"):
        build_source("text", str(root), options | {"split_by": "person"})


def test_a_row_without_a_column_of_splits_follows_its_id() -> None:
    row = Row(1, {"person": "7"})
    assert SplitOptions().split_of(row, "v1", "t.csv") == hash_split("v1")
    assert SplitOptions(split_by="person").split_of(row, "v1", "t.csv") == hash_split("7")


@pytest.mark.parametrize(
    ("name", "values", "proposed"),
    [
        ("patient_id", [f"P{i % 60:03d}" for i in range(600)], True),
        ("Kundennummer", [str(10_000 + i % 60) for i in range(600)], True),
        ("subject", [i % 60 for i in range(600)], True),
        ("userId", [f"u{i % 60}" for i in range(600)], True),
        ("store", [f"s{i % 60}" for i in range(600)], False),  # a category
        ("user", ["new", "old"] * 300, False),  # two values
        ("person_weight", [50 + i / 10 for i in range(600)], False),  # an amount
        ("patient", [f"P{i}" for i in range(600)], False),  # one row each: an id
        ("superuser_id", [i % 60 for i in range(600)], False),
        ("users", [i % 60 for i in range(600)], False),  # a count
        ("number_of_patients", [i % 60 for i in range(600)], False),
        ("user_agent", [f"agent {i % 60}" for i in range(600)], False),
        ("customer_city", [f"city {i % 60}" for i in range(600)], False),
        ("ward_patient_no.", [f"{i % 60:03d}" for i in range(600)], True),
    ],
)
def test_new_configurations_keep_the_rows_of_a_person_together(
    tmp_path: Path, name: str, values: list[Any], proposed: bool
) -> None:
    frame = pd.DataFrame(
        {name: values, "x": [i * 0.1 for i in range(600)], "a": [0, 1, 1] * 200, "b": [0, 1] * 300}
    )
    file = tmp_path / "t.csv"
    frame.to_csv(file, index=False)
    made = new_config("", str(file), ["a,b"], "x")
    options = yaml.safe_load(made.text)["source"]["options"]
    assert options.get("split_by") == (name if proposed else None)
    if not proposed:
        return
    assert "all rows of a value are in one split" in made.text
    assert name not in [use.column for use in made.uses if use.use in ("category", "number")]
    found = [entry.split for entry in build_source("table", str(file), options).entries()]
    assert Counter(found).keys() == {"train", "val", "test"}
    assert len({*zip(values, found, strict=True)}) == len(set(values))  # one split each
    frame["split"] = ["train", "val"] * 300
    frame.to_csv(file, index=False)
    options = yaml.safe_load(new_config("", str(file), ["a,b"], "x").text)["source"]["options"]
    assert (options["split_column"], options.get("split_by")) == ("split", None)
