import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, BadSampleError
from pipelines.data.sources.table import TableSource
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.pipelines.data.memory_plans import plans

SICK = {"column": "sick", "kind": "binary"}
COST = {"column": "cost", "kind": "regression"}
WARD = {"column": "ward", "kind": "multiclass"}
ROWS = [
    "id,age,work,sick,cost,ward,split",
    "a,20,office,1,5.0,north,train",
    "b,40,field,0,,south,train",
    "c,,office,,9.0,north,train",
    "d,30,sea,1,7.0,,val",
    "e,nan,,0,NaN,north,test",
]


def write(root, *lines, name="t.csv"):
    (root / name).write_text("\n".join(lines or ROWS) + "\n")
    return root


def source(root, *tasks, **options):
    given = {"file": "t.csv", "id_column": "id", "tasks": list(tasks) or [SICK, COST, WARD]}
    return TableSource(locate(str(root)), {**given, **options})


def rows(reader):
    return {entry.id: reader.read(entry) for entry in reader.entries()}


@pytest.fixture
def root(tmp_path):
    return write(tmp_path)


def test_rows_match_the_description(root):
    reader = source(root)
    description = reader.describe()
    assert [t.name for t in description.tasks] == ["sick", "cost", "ward"]
    assert [(e.id, e.split) for e in reader.entries()] == [
        ("a", "train"), ("b", "train"), ("c", "train"), ("d", "val"), ("e", "test")
    ]  # fmt: skip
    for row in rows(reader).values():
        assert set(row) == set(description.columns)
        for name, value in row.items():
            column = description.columns[name]
            assert value is None or (value.dtype == column.dtype and value.shape == column.shape)


def test_numbers_gaps_and_categories(root):
    found = rows(source(root))
    # age, age is missing, work: field, office, other
    assert found["a"][INPUT].tolist() == [20, 0, 0, 1, 0]
    assert found["b"][INPUT].tolist() == [40, 0, 1, 0, 0]
    assert found["c"][INPUT].tolist() == [30, 1, 0, 1, 0]
    assert found["d"][INPUT].tolist() == [30, 0, 0, 0, 1]
    assert found["e"][INPUT].tolist() == [30, 1, 0, 0, 1]


def test_constants_of_the_device_are_from_training_rows_only(root):
    spec = source(root).describe().input
    assert (spec.kind, spec.shape, spec.dtype) == ("features", (5,), "float32")
    assert spec.mean == (30, 0, 0, 0, 0)
    assert spec.std == (10, 1, 1, 1, 1)
    (cost,) = source(root, COST).describe().tasks
    assert (cost.offset, cost.scale) == ((7.0,), (2.0,))


def test_labels_that_are_empty_or_nan_are_missing(root):
    found = rows(source(root))
    assert [found[i]["task.sick"] is None for i in "abcde"] == [False, False, True, False, False]
    assert [found[i]["task.cost"] is None for i in "abcde"] == [False, True, False, False, True]
    assert [found[i]["task.ward"] is None for i in "abcde"] == [False, False, False, True, False]


def test_other_markers_of_missing_cells(tmp_path):
    write(tmp_path, "id,age,sick,split", "a,1,?,train", "b,3,0,train", "c,?,1,train")
    found = rows(source(tmp_path, SICK, missing=["?"]))
    assert found["a"]["task.sick"] is None
    assert found["c"][INPUT].tolist() == [2, 1]


def test_missing_number_without_example_in_training_is_the_mean(tmp_path):
    write(tmp_path, "id,age,sick,split", "a,1,1,train", "b,3,0,train", "c,,1,val")
    assert rows(source(tmp_path, SICK))["c"][INPUT].tolist() == [2]


def test_empty_category_is_a_value_if_training_has_it(tmp_path):
    write(tmp_path, "id,work,sick,split", "a,sea,1,train", "b,,0,train", "c,land,1,val", "d,,1,val")
    found = rows(source(tmp_path, SICK))
    assert [found[i][INPUT].tolist() for i in "abcd"] == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]


def test_features_can_be_listed_and_numbers_be_categories(root):
    reader = source(root, features=["age"], categorical=["age"])
    (feature,) = reader.describe().preparation["features"]
    assert feature == {"column": "age", "type": "category", "values": ["", "20", "40"], "form": "value"}
    assert rows(reader)["d"][INPUT].tolist() == [0, 0, 0, 1]


def test_text_in_a_column_of_numbers_is_a_bad_sample(tmp_path):
    write(tmp_path, "id,age,sick,split", "a,1,1,train", "b,2,0,train", "c,old,1,train", "d,1e99,1,val")
    reader = source(tmp_path, SICK)
    a, _, c, d = list(reader.entries())
    assert reader.read(a)[INPUT].tolist() == [1]
    assert reader.describe().input.mean == (1.5,)
    with pytest.raises(BadSampleError, match="'old' in column age is not a finite number, line 4"):
        reader.read(c)
    with pytest.raises(BadSampleError, match="'1e99' in column age is not a finite number, line 5"):
        reader.read(d)


def test_a_bad_label_names_line_and_column(tmp_path):
    write(tmp_path, "id,age,sick,split", "a,1,1,train", "b,2,maybe,train")
    reader = source(tmp_path, SICK)
    with pytest.raises(BadSampleError, match="'maybe' is neither yes .* in column sick, line 3"):
        reader.read(list(reader.entries())[1])


def test_constant_features_are_left_out_and_named(tmp_path, caplog):
    write(tmp_path, "id,age,unit,none,sick,split", "a,1,kg,,1,train", "b,2,kg,,0,train", "c,2,lb,5,0,val")
    reader = source(tmp_path, SICK)
    assert reader.describe().input.shape == (1,)
    assert "constant in training: unit, none" in caplog.text
    assert rows(reader)["c"][INPUT].tolist() == [2]
    with pytest.raises(UserError, match="no feature is left"):
        source(tmp_path, SICK, features=["unit"]).describe()


def test_drop_removes_rows_and_logs_it(root, caplog):
    reader = source(root, {**WARD, "drop": ["south"]}, SICK, features=["age"])
    with caplog.at_level(logging.INFO):
        assert [entry.id for entry in reader.entries()] == ["a", "c", "d", "e"]
    assert "1 of 5 rows left out" in caplog.text


def test_a_value_to_drop_that_no_row_has_is_named(root, caplog):
    list(source(root, {**WARD, "drop": ["south", "soth"]}, SICK, features=["age"]).entries())
    assert caplog.text.count("`drop` names 'soth', which is no value of column") == 1
    assert "'south'" not in caplog.text


def test_row_number_as_id_counts_dropped_rows(root):
    task = {**WARD, "drop": ["south"]}
    reader = source(root, task, id_column=None, features=["age"])
    assert [entry.id for entry in reader.entries()] == ["1", "3", "4", "5"]


def test_split_without_a_column_follows_from_the_hash_of_the_id(tmp_path):
    write(tmp_path, "id,age,sick", *(f"id{i},{i},1" for i in range(400)))
    splits = [entry.split for entry in source(tmp_path, SICK).entries()]
    assert splits[:4] == ["train", "test", "val", "train"]
    assert 0.6 < splits.count("train") / 400 < 0.8


TYPED = pa.table(
    {
        "id": ["a", "b", "c", "d"],
        "age": pa.array([20, 40, None, 30], pa.int64()),
        "dose": pa.array([0.5, float("nan"), 1.5, 2.5]),
        "smoker": pa.array([True, False, True, None]),
        "sick": pa.array([1, 0, None, 1], pa.int8()),
        "cost": pa.array([5.25, 1.0, float("nan"), None]),
        "ward": pa.array([1.0, 2.0, None, 2.0]),
        "split": ["train", "train", "train", "val"],
    }
)


def test_parquet_file_and_folder_hold_the_same(tmp_path):
    pq.write_table(TYPED, tmp_path / "all.parquet")
    (tmp_path / "parts").mkdir()
    pq.write_table(TYPED.slice(0, 2), tmp_path / "parts" / "p0.parquet")
    pq.write_table(TYPED.slice(2), tmp_path / "parts" / "p1.parquet")
    one = source(tmp_path, file="all.parquet")
    many = source(tmp_path / "parts", file="")
    assert one.describe() == many.describe()
    assert one.describe().tasks[2].labels == ("1", "2")
    left, right = rows(one), rows(many)
    assert list(left) == list(right) == list("abcd")
    for name in "abcd":
        for column, value in left[name].items():
            assert np.array_equal(value, right[name][column]), (name, column)
    # age, gap, dose, gap, smoker: False, True, other
    assert left["b"][INPUT].tolist() == [40, 0, 1, 1, 1, 0, 0]
    assert left["c"][INPUT].tolist() == [30, 1, 1.5, 0, 0, 1, 0]
    assert left["d"][INPUT].tolist() == [30, 0, 2.5, 0, 0, 0, 1]
    assert [left[i]["task.sick"] for i in "abcd"] == [1, 0, None, 1]
    assert [left[i]["task.cost"] for i in "abcd"] == [5.25, 1.0, None, None]


def test_a_bad_sample_of_a_parquet_folder_names_file_and_row(tmp_path):
    pq.write_table(TYPED, tmp_path / "p0.parquet")
    other = TYPED.slice(0, 1).set_column(0, "id", pa.array(["z"])).set_column(4, "sick", pa.array([7], pa.int8()))
    pq.write_table(other, tmp_path / "p1.parquet")
    reader = source(tmp_path, file="")
    with pytest.raises(BadSampleError, match=r"'7' is neither .* column sick, p1\.parquet, row 1"):
        reader.read(list(reader.entries())[-1])
    pq.write_table(TYPED.drop_columns(["dose"]), tmp_path / "p2.parquet")
    with pytest.raises(UserError, match="no column dose") as caught:
        list(source(tmp_path, file="").entries())
    assert "p2.parquet" in caught.value.where


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ["height"]}, "no column height"),
        ({"id_column": "name"}, "no column name"),
        ({"split_column": "fold"}, "no column fold"),
        ({"features": ["age", "sick"]}, "sick cannot be a feature"),
        ({"features": ["id"]}, "id cannot be a feature"),
        ({"features": ["age", "age"]}, "age more than once"),
        ({"features": ["age"], "categorical": ["work"]}, "categorical names work"),
        ({"max_values": 2, "categorical": ["age"]}, "column age has 3 different values, more than max_values=2"),
        ({"categorical": ["age"]}, "no number in the train rows of column work"),
        ({"bits": 64}, "bits has no meaning"),
        ({"smiles": "work", "features": ["age"]}, "features has no meaning"),
        ({"smiles": "work", "radius": 3}, "radius has no meaning"),
        ({"feature": ["age"]}, "unknown key source.options.feature"),
    ],
)
def test_options_that_cannot_be_used(root, options, message):
    with pytest.raises(UserError, match=message):
        source(root, **options).describe()


def test_ids_that_cannot_be_used(tmp_path):
    write(tmp_path, "id,age,sick", *(f"{name},{i},{i % 2}" for i, name in enumerate("aabcdefgh")))
    with pytest.raises(UserError, match="1 ids occur more than once: a"):
        plans(source(tmp_path, SICK))
    write(tmp_path, "id,age,sick", "a,1,1", ",2,0")
    with pytest.raises(UserError, match="no id id in line 3"):
        list(source(tmp_path, SICK).entries())


def test_numbers_that_are_equal_in_float32_are_refused(tmp_path):
    write(tmp_path, "id,time,sick,split", "a,1700000000,1,train", "b,1700000060,0,train")
    with pytest.raises(UserError, match="column time differs by 30 around 1.7e"):
        source(tmp_path, SICK).describe()


def test_missing_table(tmp_path):
    with pytest.raises(UserError, match="the table does not exist"):
        build_source("table", str(tmp_path), {"file": "none.csv", "tasks": [SICK]})
    with pytest.raises(UserError, match="no Parquet file in the folder"):
        list(build_source("table", str(tmp_path), {"tasks": [SICK]}).entries())
    (tmp_path / "t.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="not a Parquet file"):
        list(source(tmp_path, SICK, file="t.parquet").entries())


def test_reader_is_sent_to_a_worker_without_the_rows(root):
    reader = source(root)
    reader.describe()
    entries = list(reader.entries())
    reader.read(entries[0])
    packed = pickle.dumps(reader)
    assert b"Entry" in pickle.dumps(entries)
    assert b"Entry" not in packed
    (root / "t.csv").unlink()
    assert pickle.loads(packed).read(entries[1])[INPUT].tolist() == [40, 0, 1, 0, 0]  # noqa: S301
