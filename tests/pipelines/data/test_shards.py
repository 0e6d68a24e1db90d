import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dmtg_core import InputSpec, Task
from pipelines.config.sections import DataSection, SourceSection
from pipelines.data import shards
from pipelines.data.manifest import FILE, check_shards, check_targets, read_manifest
from pipelines.data.planning import make_plans
from pipelines.data.raw_data import identity
from pipelines.data.shards import QUARANTINE, finished_part, shard, table_of, write_shard
from pipelines.data.sources import build_source
from pipelines.data.sources.base import Column, Description, Entry
from pipelines.errors import UserError
from pipelines.storage import Location, locate
from tests.pipelines.conftest import make_config, write_images


class TestJob:
    def test_every_sample_is_in_one_shard_or_in_quarantine(self, tmp_path: Path) -> None:
        raw = write_images(tmp_path / "raw")
        (raw / "images" / "img003.png").write_bytes(b"not a picture")
        (raw / "images" / "img004.png").unlink()
        config = make_config(raw, tmp_path, data={"max_bad_fraction": 0.1})
        done = shard(config)
        folder = locate(config.data.shards)
        ids = [i for s in done.manifest.shards.values() for x in s
               for i in pq.read_table((folder / x.file).path)["id"].to_pylist()]  # fmt: skip
        bad = [json.loads(line) for line in (folder / QUARANTINE).read_text().splitlines()]
        assert sorted(ids + [b["id"] for b in bad]) == [f"img{i:03d}" for i in range(96)]
        assert done.manifest.quarantined == 2
        reasons = {b["id"]: b["reason"] for b in bad}
        assert "img003" in reasons["img003"]
        assert "img004" in reasons["img004"]

    def test_second_run_keeps_complete_shards_and_creates_missing_ones(self, images: Path, tmp_path: Path) -> None:
        config = make_config(images, tmp_path)
        first = shard(config)
        folder = locate(config.data.shards)
        before = {name: (folder / name).read_bytes() for name in folder.files() if name.endswith(".parquet")}
        (folder / first.manifest.shards["train"][1].file).delete()
        (folder / first.manifest.shards["val"][0].file).write_bytes(b"short")
        second = shard(config)
        assert (first.made, second.made, second.kept) == (len(before), 2, len(before) - 2)
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert second.manifest.digest() == first.manifest.digest()

    def test_storage_that_is_away_for_a_moment_is_waited_for(
        self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, calls = Location._write, []

        def away(place: Location, *arguments: Any, **options: Any) -> None:
            calls.append(place.patience_s)
            if place.name.endswith(".parquet") and len(calls) % 3:
                raise OSError(errno.EHOSTUNREACH, "No route to host")
            write(place, *arguments, **options)

        monkeypatch.setattr(Location, "_write", away)
        monkeypatch.setattr("pipelines.storage.FIRST_PAUSE_S", 0.0)
        config = make_config(images, tmp_path)
        assert shard(config).made == len(list((tmp_path / "shards").glob("*.parquet")))

    def test_other_options_replace_all_shards(self, images: Path, tmp_path: Path) -> None:
        shard(make_config(images, tmp_path))
        again = shard(make_config(images, tmp_path, data={"rows_per_shard": 40}))
        folder = locate(str(tmp_path / "shards"))
        assert again.kept == 0
        assert [f for f in folder.files(recursive=False) if f.endswith(".parquet")] == sorted(
            s.file for shards in again.manifest.shards.values() for s in shards
        )

    def test_write_error_of_a_task_keeps_its_message(self, images: Path, tmp_path: Path) -> None:
        config = make_config(images, tmp_path)
        in_the_way = tmp_path / "shards" / shard(config).manifest.shards["train"][1].file
        in_the_way.unlink()
        (in_the_way / "a folder").mkdir(parents=True)
        with pytest.raises(UserError, match="cannot write") as found:
            shard(config)
        assert found.value.where == str(in_the_way)
        assert "disk with free space" in found.value.remedy

    def test_too_many_bad_samples_stop_it_without_a_manifest(self, tmp_path: Path) -> None:
        raw = write_images(tmp_path / "raw")
        for i in range(10):
            (raw / "images" / f"img{i:03d}.png").unlink()
        config = make_config(raw, tmp_path)
        with pytest.raises(UserError, match=r"\d of 96 samples cannot be used so far") as found:
            shard(config)
        assert "max_bad_fraction" in found.value.remedy
        assert Path(found.value.where).read_text().count("no such file") > 1
        assert not (locate(config.data.shards) / FILE).exists()


def test_bytes_of_a_shard_are_the_same_every_time(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path)
    assert config.source is not None
    source = build_source("folder", str(images), config.source.options)
    plan = make_plans(source.entries(), source.describe(), config.source, config.data)[0]
    notes = [write_shard(source, source.describe(), plan, locate(str(tmp_path / name)), "lz4") for name in "ab"]
    assert notes[0] == notes[1]
    assert finished_part(locate(str(tmp_path / "a")), plan, {plan.digest: notes[:1]}, source) == notes[0]


def test_row_groups_are_of_the_size_in_the_manifest(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "GROUP_BYTES", 1)  # the smallest groups there are: 16 rows
    _, folder, manifest = manifest_of(tmp_path, images, rows_per_shard=40)
    first = pq.ParquetFile((folder / manifest.shards["train"][0].file).path).metadata
    assert manifest.group_rows == 16
    assert [first.row_group(i).num_rows for i in range(first.num_row_groups)] == [16, 16, 8]


def test_rows_of_a_shard_follow_from_their_size() -> None:
    def rows(values: int) -> int:
        described = Description(InputSpec("features", (values,)), (), {"input": Column("float32", (values,))})
        source = SourceSection(kind="folder")
        entries = [Entry(f"{i}", "val" if i % 2 else "train") for i in range(20_000)]
        return len(make_plans(entries, described, source, DataSection(shards="x"))[0].entries)

    assert rows(2**18) == 64  # 1 MiB each
    assert rows(2**14) == 1024
    assert rows(4) == 8192


def test_value_of_another_shape_than_described_is_an_internal_error(tmp_path: Path) -> None:
    description = Description(InputSpec("features", (2,)), (), {"input": Column("float32", (2,))})
    with pytest.raises(ValueError, match=r"column input: expected float32 \(2,\), got float32 \(3,\)"):
        table_of(description, [("a", {"input": np.zeros(3, np.float32)})])


def test_ids_that_occur_twice_and_empty_splits_are_refused(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path)
    assert config.source is not None
    described = Description(InputSpec("features", (2,)), (Task("t", "binary"),), {})
    twice = [Entry("a", "train"), Entry("a", "val"), Entry("b", "val")]
    with pytest.raises(UserError, match="1 ids occur more than once: a"):
        make_plans(twice, described, config.source, config.data)
    with pytest.raises(UserError, match="val: 0"):
        make_plans([Entry("a", "train")], described, config.source, config.data)


def manifest_of(tmp_path: Path, images: Path, **data: object):
    """A dataset made without Ray."""
    config = make_config(images, tmp_path, data=data)
    assert config.source is not None
    source = build_source("folder", str(images), config.source.options)
    plans = make_plans(source.entries(), source.describe(), config.source, config.data)
    folder, made = locate(config.data.shards), identity(source, config.source, config.data)
    parts = {plan.digest: write_shard(source, source.describe(), plan, folder, "lz4") for plan in plans}
    return config, folder, shards._publish(folder, source.describe(), plans, parts, config.source, made)


def test_manifest_survives_the_round_trip(images: Path, tmp_path: Path) -> None:
    _, folder, manifest = manifest_of(tmp_path, images)
    assert read_manifest(folder).to_dict() == manifest.to_dict()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p, _: p.unlink(), "is missing"),
        (lambda p, _: p.write_bytes(p.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda p, _: p.write_bytes(p.read_bytes()[:-1] + b"x"), "has another checksum"),
        (lambda p, other: p.write_bytes(other.read_bytes()), "train-00000-"),
    ],
)
def test_damaged_shard_is_named_before_training(images: Path, tmp_path: Path, damage, message: str) -> None:
    _, folder, manifest = manifest_of(tmp_path, images)
    check_shards(folder, manifest, checksums=True)
    names = [shard.file for shard in manifest.shards["train"]]
    damage(*(tmp_path / "shards" / name for name in names[:2]))
    with pytest.raises(UserError, match=message) as found:
        check_shards(folder, manifest, checksums=True)
    assert names[0] in found.value.what


def test_folder_without_manifest_or_with_another_schema_is_not_a_data_set(images: Path, tmp_path: Path) -> None:
    _, folder, _ = manifest_of(tmp_path, images)
    values = (folder / FILE).read_json()
    (folder / FILE).write_json(values | {"schema_version": 99})
    with pytest.raises(UserError, match="schema 99"):
        read_manifest(folder)
    (folder / FILE).delete()
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(folder)


def test_unknown_task_and_constant_target_are_named(images: Path, tmp_path: Path) -> None:
    _, folder, manifest = manifest_of(tmp_path, images)
    with pytest.raises(UserError, match="no task hue") as found:
        manifest.tasks(["colour", "hue"], str(folder))
    assert "colour, bright, level" in found.value.remedy
    manifest.sums["train"]["bright"]["classes"] = [58, 0]
    with pytest.raises(UserError, match="task bright is constant in the training split: every label is class 0"):
        check_targets(manifest, manifest.description.tasks, str(folder))
