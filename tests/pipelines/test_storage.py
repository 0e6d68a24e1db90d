from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.storage import finite, locate


def test_file_is_written_whole_and_leaves_no_part(tmp_path: Path) -> None:
    place = locate(str(tmp_path)) / "a" / "b.txt"
    place.write_text("one")
    place.write_text("two")
    assert place.read_text() == "two"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_lists_sizes_and_deletes(tmp_path: Path) -> None:
    root = locate(str(tmp_path / "r"))
    assert root.files() == []
    assert not root.exists()
    (root / "x" / "y.bin").write_bytes(b"123")
    assert root.files() == ["x/y.bin"]
    assert root.folders() == ["x"]
    assert (root / "x" / "y.bin").size() == 3
    assert (root / "x").size() is None
    assert (root / "x" / "y.bin").parent.path == (root / "x").path
    root.delete()
    assert not root.exists()


def test_listings_are_in_the_order_of_the_numbers_in_names(tmp_path: Path) -> None:
    root = locate(str(tmp_path))
    for n in (0, 1, 2, 9, 10, 11, 100):
        (root / f"group_{n}" / f"part-{n}.parquet").write_bytes(b"")
    assert root.folders() == [f"group_{n}" for n in (0, 1, 2, 9, 10, 11, 100)]
    assert root.files() == [f"group_{n}/part-{n}.parquet" for n in (0, 1, 2, 9, 10, 11, 100)]


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = locate(str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="cannot write") as found:
        place.check_writable()
    assert "below" in found.value.where


def test_unknown_scheme_and_credentials_in_an_address_are_refused() -> None:
    with pytest.raises(UserError, match="gs://"):
        locate("gs://bucket/x")
    with pytest.raises(UserError) as found:
        locate("s3://key:secret@bucket/x")
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("name", ["data#1", "data?x=1", "a b", "a%20b", "#", "x\ty"])
def test_an_address_is_read_as_it_is_written(tmp_path: Path, name: str) -> None:
    assert locate(f"s3://b/{name}").path == f"b/{name}"
    assert str(locate(f"s3://b/{name}/c")) == f"s3://b/{name}/c"
    for address in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
        assert locate(address).path == f"{tmp_path}/{name}"
    with pytest.raises(UserError, match="names no bucket"):
        locate("s3:///x")


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file") as found:
        (locate(str(tmp_path)) / "x.json").read_json()
    assert found.value.where.endswith("x.json")


def test_figures_that_json_does_not_have_become_null() -> None:
    assert finite({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {"a": [None, 1.0], "b": [None]}
