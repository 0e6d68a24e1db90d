"""The same behaviour of files and folders at every kind of address, and the reading of addresses."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipelines import stores
from pipelines.config.loading import Config
from pipelines.data.manifest import check_shards, read_manifest
from pipelines.data.shards import shard
from pipelines.errors import UserError, without_credentials
from pipelines.storage import Location, finite, is_transient, locate
from pipelines.training.driver import train
from tests.pipelines.conftest import make_config, write_images
from tests.pipelines.fake_stores import UNSEEN, use_memory
from tests.pipelines.s3_server import BUCKET


@pytest.fixture(params=["local", "s3", *UNSEEN])
def root(request: pytest.FixtureRequest, tmp_path: Path, s3: int, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A folder that does not exist yet."""
    if request.param in UNSEEN:
        use_memory(monkeypatch)
    places = {"local": str(tmp_path), "s3": f"s3://{BUCKET}/{tmp_path.name}", **UNSEEN}
    return locate(places[request.param]) / "r"


def test_file_is_written_whole_and_leaves_no_part(root: Location) -> None:
    place = root / "a" / "b.txt"
    place.write_text("one")
    place.write_text("two")
    assert place.read_text() == "two"
    assert (root / "a").files() == ["b.txt"]


@pytest.mark.parametrize("root", ["local", "s3", "abfs", "hdfs"], indirect=True)  # memory has no objects as gs has
def test_a_reader_sees_the_former_file_until_the_next_is_written(root: Location) -> None:
    place, seen = root / "b.txt", []
    place.write_text("one")

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            seen.append(place.read_text())
            return super().read(size)

    place._write(Slow(b"two"), sync=True)
    assert set(seen) == {"one"}
    assert place.read_text() == "two"
    assert root.files() == ["b.txt"]


def test_lists_sizes_and_deletes(root: Location) -> None:
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


def test_listings_are_in_the_order_of_the_numbers_in_names(root: Location) -> None:
    for n in (0, 1, 2, 9, 10, 11, 100):
        (root / f"group_{n}" / f"part-{n}.parquet").write_bytes(b"")
    assert root.folders() == [f"group_{n}" for n in (0, 1, 2, 9, 10, 11, 100)]
    assert root.files() == [f"group_{n}/part-{n}.parquet" for n in (0, 1, 2, 9, 10, 11, 100)]


def test_a_file_is_created_once(root: Location) -> None:
    assert (root / "lease").create("first")
    assert not (root / "lease").create("second")
    assert (root / "lease").read_text() == "first"


def test_a_range_and_a_missing_file(root: Location, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(bytes(range(100)))
    (root / "x").write_file(tmp_path / "local")
    assert (root / "x").read_bytes(10, 3) == bytes((10, 11, 12))
    assert (root / "x").read_bytes() == bytes(range(100))
    with pytest.raises(FileNotFoundError):
        (root / "absent").read_bytes()


def test_the_address_of_a_file_locates_it(root: Location) -> None:
    (root / "x").write_text("here")
    assert locate(str(root / "x")) == root / "x"
    assert locate(str(root / "x")).read_text() == "here"
    root.check_writable()
    assert root.files() == ["x"]


@pytest.mark.parametrize("scheme", ["s3", "gs", "abfs"])
def test_a_missing_bucket_is_named(scheme: str, s3: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_memory(monkeypatch)
    place = {**UNSEEN, "s3": "s3://bucket"}[scheme].replace("bucket", "no-such-bucket")
    with pytest.raises(UserError, match=f"there is no {stores.STORES[scheme].unit} no-such-bucket"):
        locate(f"{place}/x").check_writable()


@pytest.mark.usefixtures("plain_reports")
@pytest.mark.parametrize("scheme", UNSEEN)
def test_shards_and_a_run_there_equal_local_ones(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_memory(monkeypatch)
    images = write_images(tmp_path / "raw", rows=48)
    local = shard(make_config(images, tmp_path)).manifest
    for file in images.rglob("*"):
        if file.is_file():
            place = locate(f"{UNSEEN[scheme]}/raw/{file.relative_to(images).as_posix()}")
            place.write_bytes(file.read_bytes())
    values = {
        "data": {"shards": f"{UNSEEN[scheme]}/shards"}, "run": {"root": f"{UNSEEN[scheme]}/runs"},
        "track": {"uri": "none"}, "train": {"epochs": 1}, "search": {"baseline": False},
    }  # fmt: skip
    config: Config = make_config(Path("unused"), tmp_path, **values)
    assert config.source is not None
    source = config.source.model_copy(update={"root": f"{UNSEEN[scheme]}/raw"})
    config = config.model_copy(update={"source": source})
    made = shard(config)
    assert made.manifest.digest() == local.digest()
    assert shard(config).made == 0
    folder = locate(config.data.shards)
    check_shards(folder, read_manifest(folder), checksums=True)
    if scheme == "abfs":  # the slowest of these steps, and the same code for all
        done = train(config)
        assert {"config.yaml", "metrics.jsonl", "grouping.json", "report.html"} <= set(done.run.files())
        assert str(done.run).startswith(UNSEEN[scheme])
        assert f"root: {UNSEEN[scheme]}/runs" in (done.run / "config.yaml").read_text()


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = locate(str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="cannot write") as found:
        place.check_writable()
    assert "below" in found.value.where


def test_errors_of_stores_that_are_not_seen_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(scheme: str, endpoint: str) -> pafs.FileSystem:
        raise OSError("google::cloud::Status(UNAVAILABLE: no route)")

    monkeypatch.setattr(stores, "filesystem", refused)
    for address in UNSEEN.values():
        with pytest.raises(UserError, match="UNAVAILABLE") as found:
            locate(address).exists()
        assert "not with the real service" in found.value.remedy
        assert is_transient(found.value)
    with pytest.raises(UserError) as found:
        locate("s3://bucket/x").exists()
    assert "real service" not in found.value.remedy


@pytest.mark.parametrize(
    ("address", "what", "remedy"),
    [
        ("ftp://bucket/x", "ftp://", "gs://bucket/path"),
        ("s3://key:secret@bucket/x", "credentials", "AWS_ACCESS_KEY_ID"),
        ("gs://token-secret@bucket/x", "credentials", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("abfs://bucket:secret@account.dfs.core.windows.net/x", "credentials", "AZURE_STORAGE"),
        ("hdfs://me:secret@name:8020/x", "credentials", "HADOOP_USER_NAME"),
        ("abfs://bucket/x", "names no storage account", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("abfss://", "names no container", "abfs://container@account"),
        ("gs:///x", "names no bucket", "gs://bucket/path"),
    ],
)
def test_wrong_addresses_are_refused(
    address: str, what: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UserError, match=what) as found:
        locate(address)
    assert "secret" not in str(found.value)
    assert remedy in found.value.remedy
    assert found.value.wrong_use


def test_addresses_of_every_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    azure = "mine.dfs.core.windows.net"
    for address, expected, shown in (
        ("gs://b/x/y", Location("b/x/y", "gs", ""), "gs://b/x/y"),
        ("abfs://c/x", Location("c/x", "abfs", azure), f"abfs://c@{azure}/x"),
        ("abfss://c@other.dfs.x.cn/x/", Location("c/x", "abfs", "other.dfs.x.cn"), "abfs://c@other.dfs.x.cn/x"),
        ("hdfs://n:9000/a/b", Location("/a/b", "hdfs", "n:9000"), "hdfs://n:9000/a/b"),
        ("hdfs:///a/b", Location("/a/b", "hdfs", "default"), "hdfs:///a/b"),
    ):
        assert locate(address) == expected
        assert str(locate(address)) == shown
        assert locate(shown) == expected
        assert without_credentials(f"at {shown}, in a line") == f"at {shown}, in a line"
    assert without_credentials("abfs://c:secret@mine.x/y") == "abfs://mine.x/y"


def test_files_systems_are_those_of_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    stores.filesystem.cache_clear()
    opened = [locate(address).filesystem for address in (UNSEEN["gs"], UNSEEN["abfs"])]
    assert [type(one) for one in opened] == [pafs.GcsFileSystem, pafs.AzureFileSystem]
    made = dict[str, object]()
    monkeypatch.setattr(pafs, "HadoopFileSystem", lambda *place, **given: made.update(place=place, **given))
    monkeypatch.setenv("HADOOP_USER_NAME", "me")  # without a Hadoop client it cannot be opened
    assert locate(UNSEEN["hdfs"]).filesystem is None
    assert made == {"place": ("name", 8020), "user": "me"}
    stores.filesystem.cache_clear()


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
