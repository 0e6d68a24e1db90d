"""Split files of Taskonomy's authors and of the user, and splits by hash."""

import pytest

from pipelines.data.sources.taskonomy.splits import read_splits, split_buildings
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.pipelines.data.sources.taskonomy_files import arrays, save, source


@pytest.mark.parametrize("count", [3, 4, 12, 33])
def test_whole_buildings_are_split_in_any_order(count):
    names = [f"b{i}" for i in range(count)]
    splits = split_buildings(names)
    assert splits == split_buildings(names[::-1])
    found = [list(splits.values()).count(split) for split in ("train", "val", "test")]
    assert min(found) >= 1
    assert found[0] >= count / 3


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize(
    "lines",
    [("id,train,val,test", "alpha,1,0,0", "beta,0,1,0", "gamma,0,0,1"),
     ("building,split", "alpha,train", "beta,val", "gamma,test")],
)  # fmt: skip
def test_split_files_with_any_line_end(tmp_path, lines, end):
    table = tmp_path / "splits.csv"
    table.write_bytes((end.join(lines) + end).encode())
    assert read_splits(locate(str(table))) == {"alpha": "train", "beta": "val", "gamma": "test"}
    save(tmp_path, {"rgb": arrays()["rgb"]}, building="beta")
    (entry,) = list(source(tmp_path, splits=str(table)).entries())
    assert entry.split == "val"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,train,val,test\na,1,1,0\n", "'a' in line 2 has no one split"),
        ("id,train,val,test\na,yes,0,0\n", "'a' in line 2 has no one split"),
        ("building,split\na,train\na,val\n", "'a' in line 3 has no one split"),
        ("building,split\na,elsewhere\n", "'a' in line 2 has no one split"),
        ("name,part\na,train\n", "not a split file: its columns are name, part"),
    ],
)
def test_split_files_that_cannot_be_used(tmp_path, table, message):
    (tmp_path / "splits.csv").write_text(table)
    with pytest.raises(UserError, match=message) as caught:
        read_splits(locate(str(tmp_path / "splits.csv")))
    assert caught.value.where.endswith("splits.csv")
