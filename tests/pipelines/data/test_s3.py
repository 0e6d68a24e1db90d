"""Shards and runs in object storage, against a real server: the same results, clear errors, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines import stores
from pipelines.config.loading import Config
from pipelines.config.sections import DataSection
from pipelines.data.manifest import Manifest, check_shards, read_manifest
from pipelines.data.reader import Reader
from pipelines.data.shards import QUARANTINE, shard
from pipelines.data.sources import build_source
from pipelines.data.stream import StreamData
from pipelines.errors import UserError
from pipelines.report.inspect import inspect
from pipelines.storage import Location, locate
from pipelines.training.driver import Trained, train
from tests.pipelines.conftest import TASKS, make_config, write_images
from tests.pipelines.data.test_shard_folder import killed_at, old_names
from tests.pipelines.s3_server import BUCKET, CHECKS_CREDENTIALS, SECRET, faulty, settings
from tests.soak import others_in_soak

WRONG = "wrong-secret-77"
pytestmark = pytest.mark.usefixtures("s3")


def upload(folder: Path, place: Location) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (place / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


def on_s3(config: Config, name: str, raw: str = "raw", **data: object) -> Config:
    """The configuration with raw data, shards and run folder in the bucket."""
    source = config.source.model_copy(update={"root": f"s3://{BUCKET}/{raw}"})
    shards = config.data.model_copy(update={"shards": f"s3://{BUCKET}/{name}/shards"} | data)
    run = config.run.model_copy(update={"root": f"s3://{BUCKET}/{name}/runs"})
    return config.model_copy(update={"source": source, "data": shards, "run": run})


@pytest.fixture(scope="module")
def raw(images: Path, s3: int) -> Location:
    place = locate(f"s3://{BUCKET}/raw")
    upload(images, place)
    return place


@pytest.fixture(scope="module")
def few(s3: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the images, in the bucket as `few`, for tests that do not train."""
    folder = write_images(tmp_path_factory.mktemp("few"), rows=24)
    upload(folder, locate(f"s3://{BUCKET}/few"))
    return folder


@pytest.fixture
def of_few(few: Path, tmp_path: Path) -> Config:
    """A configuration of the few images on files."""
    return make_config(few, tmp_path, data={"rows_per_shard": 3})


@pytest.fixture(scope="module")
def sharded(images: Path, raw: Location, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Manifest]:
    """Shards in the bucket, made from raw files in the bucket."""
    config = on_s3(make_config(images, tmp_path_factory.mktemp("local")), "sharded")
    return config, shard(config).manifest


def test_shards_from_a_bucket_equal_those_from_files(
    sharded: tuple[Config, Manifest], images: Path, tmp_path: Path
) -> None:
    local = shard(make_config(images, tmp_path)).manifest
    assert sharded[1].digest() == local.digest()
    assert sharded[1].sums == local.sums
    assert inspect(sharded[0])["problems"] == []
    assert shard(sharded[0]).made == 0


def test_run_in_a_bucket_has_the_metrics_of_a_run_on_files(
    sharded: tuple[Config, Manifest], run: tuple[Config, Trained, list[str]], tmp_path: Path
) -> None:
    config, done, _ = run
    remote = on_s3(config, "sharded", cache="stream" if config.data.cache == "stream" else "auto")
    remote = remote.model_copy(update={"track": config.track.model_copy(update={"uri": "none"})})
    found = train(remote)
    assert found.result["grouping"] == done.result["grouping"]
    for task, metrics in done.result["metrics"].items():
        assert found.result["metrics"][task] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    assert {"config.yaml", "metrics.jsonl", "gate.jsonl", "grouping.json", "report.html"} <= set(found.run.files())
    written = [(found.run / name).read_bytes() for name in found.run.files()]
    assert not any(SECRET.encode() in data for data in written)


def test_streaming_from_a_bucket_returns_every_sample_once(sharded: tuple[Config, Manifest]) -> None:
    config, manifest = sharded
    reader = Reader(locate(config.data.shards), manifest, manifest.description.tasks[:1])
    data = StreamData(
        reader, DataSection(shards="x", shuffle_mib=0.01), seed=0, rank=0, world_size=1, device=torch.device("cpu")
    )
    for epoch in range(2):
        assert sum(len(batch.inputs) for batch in data.train(epoch, 16)) == manifest.rows("train")


@pytest.fixture
def elsewhere(s3: int, monkeypatch: pytest.MonkeyPatch):
    """Sets the AWS environment of this process to another one, for the time of a test."""

    def change(**values: str) -> None:
        for key, value in values.items():
            monkeypatch.setenv(key, value)
        stores.filesystem.cache_clear()

    yield change
    monkeypatch.undo()
    stores.filesystem.cache_clear()


def test_missing_bucket_is_named(images: Path, tmp_path: Path) -> None:
    place = "s3://no-such-bucket/x"
    for call in (
        lambda: read_manifest(locate(place)),
        lambda: locate(place).check_writable(),
        lambda: build_source("folder", place, {"tasks": TASKS}),
        lambda: shard(make_config(images, tmp_path, data={"shards": place})),
    ):
        with pytest.raises(UserError, match="no bucket no-such-bucket"):
            call()


@pytest.mark.skipif(not CHECKS_CREDENTIALS, reason="moto's S3 server accepts all credentials")
def test_error_of_wrong_credentials_does_not_show_them(
    sharded: tuple[Config, Manifest], elsewhere, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere(AWS_SECRET_ACCESS_KEY=WRONG)
    folder = locate(sharded[0].data.shards)
    for call in (lambda: read_manifest(folder), folder.check_writable, folder.files, (folder / "x").read_bytes):
        with pytest.raises(UserError, match="DENIED|SIGNATURE") as found:
            call()
        assert "credentials" in found.value.remedy
        assert WRONG not in str(found.value) + caplog.text


def test_dropped_requests_are_sent_again(of_few: Config, s3: int, elsewhere) -> None:
    with faulty(s3, drop=8) as (road, port):
        elsewhere(**settings(port))
        config = on_s3(of_few, "flaky", "few")
        manifest = shard(config).manifest
        reader = Reader(locate(config.data.shards), manifest, manifest.description.tasks)
        data = StreamData(
            reader, DataSection(shards="x"), seed=0, rank=0, world_size=1, device=torch.device("cpu")
        )
        read = sum(len(batch.inputs) for split in ("train", "val", "test") for batch in data.evaluate(split, 16))
    assert road.dropped >= 5
    assert manifest.quarantined == 0
    assert read == sum(manifest.rows(split) for split in manifest.shards) == 24


def test_unreachable_server_is_an_error_and_not_a_bad_sample(
    sharded: tuple[Config, Manifest], elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "S3_ATTEMPTS", 2)  # how long to hope is not what is tested
    elsewhere(AWS_ENDPOINT_URL="http://127.0.0.1:1")
    config, manifest = sharded
    place = locate(config.data.shards)
    for call in (lambda: read_manifest(place), place.check_writable, place.files, (place / "x").read_bytes):
        with pytest.raises(UserError, match="connect") as found:
            call()
        assert "AWS_ENDPOINT_URL" in found.value.remedy
    reader = Reader(place, manifest, manifest.description.tasks)
    data = StreamData(reader, DataSection(shards="x"), seed=0, rank=0, world_size=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match="connect"):
        list(data.train(0, 16))


def test_sample_without_its_file_is_quarantined_and_in_no_shard(few: Path, of_few: Config) -> None:
    config = on_s3(of_few, "gone", "gone-raw", max_bad_fraction=0.1)
    upload(few, locate(f"s3://{BUCKET}/gone-raw"))
    locate(f"s3://{BUCKET}/gone-raw/images/img005.png").delete()
    manifest = shard(config).manifest
    bad = (locate(config.data.shards) / QUARANTINE).read_text()
    assert "img005" in bad
    assert "no such file" in bad
    assert sum(manifest.rows(split) for split in manifest.shards) + manifest.quarantined == 24


def contents(folder: Location) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in folder.files()}


def test_bucket_or_folder_with_other_files_is_refused(images: Path, raw: Location, tmp_path: Path) -> None:
    place = locate(f"s3://{BUCKET}/taken")
    (place / "below" / "mine.parquet").write_bytes(b"mine")
    for shards, message in (
        (f"s3://{BUCKET}/raw", "data.shards and source.root are the same folder"),
        (f"s3://{BUCKET}//raw/", "data.shards and source.root are the same folder"),
        (f"s3://{BUCKET}/taken", "1 files or folders and no record of shards: below"),
        (f"s3://{BUCKET}", "files or folders and no record of shards"),
        (f"s3://{BUCKET}/taken/below/mine.parquet", "names a file"),
    ):
        config = on_s3(make_config(images, tmp_path), "unused", shards=shards)
        with pytest.raises(UserError, match=message) as found:
            shard(config)
        assert found.value.wrong_use
        assert contents(place) == {"below/mine.parquet": b"mine"}


@pytest.mark.parametrize("step", others_in_soak([9, 27], 27))
def test_data_set_in_a_bucket_stays_until_the_next_is_complete(
    few: Path, of_few: Config, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = on_s3(of_few, f"again{step}", "few")
    first, folder = shard(config).manifest, locate(config.data.shards)
    names = old_names(folder, first.files(), published=True)
    kept = shard(config)
    assert (kept.made, kept.manifest.files()) == (0, names)
    (folder / "notes.parquet").write_bytes(b"mine")
    before = contents(folder)
    upload(few, locate(f"s3://{BUCKET}/bad-raw"))
    locate(f"s3://{BUCKET}/bad-raw/images/img005.png").delete()
    with pytest.raises(UserError, match="cannot be used") as found:
        shard(on_s3(config, f"again{step}", "bad-raw", rows_per_shard=6))
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert b"img005" in after[found.value.where.removeprefix(f"{folder}/")]
    other, ends, moment = on_s3(config, f"again{step}", "few", rows_per_shard=8), False, 0
    while not ends:  # ended before every change of the storage that is left
        with monkeypatch.context() as patch:
            ends = not killed_at(patch, moment, False, lambda: shard(other))
        check_shards(folder, read_manifest(folder), checksums=True)
        moment += step  # every one in tests/pipelines/data/test_shard_folder.py, with files
    manifest = read_manifest(folder)
    assert manifest.rows("train") == first.rows("train")
    assert not set(manifest.files()) & set(names)
    left = {name for name in folder.files() if not name.startswith(".probe-")}  # of the jobs that ended
    assert left == {
        "_manifest.json", "_quarantine.jsonl", "notes.parquet", *manifest.files(),
        *(f"_parts/{name}.json" for name in manifest.files()),
    }  # fmt: skip


def test_deleted_truncated_or_swapped_shard_in_a_bucket_is_found(of_few: Config) -> None:
    config = on_s3(of_few, "damaged", "few")
    held = shard(config).manifest.shards
    folder = locate(config.data.shards)
    first, second, third = (folder / one.file for one in held["train"][:3])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    third.write_bytes(third.read_bytes()[:100])
    (folder / held["val"][0].file).delete()
    problems = "\n".join(inspect(config)["problems"])
    for place in (first, second):
        assert place.name in problems
    assert f"{third.name} has 100 bytes" in problems
    assert f"{held['val'][0].file} is missing" in problems
    again = shard(config)
    assert inspect(config)["problems"] == []
    assert again.made >= 2
