"""What is in a folder of shards is safe: files of others, and the data set before until the next one is there."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from dmtg_core import InputSpec
from pipelines.cli.app import app
from pipelines.config.loading import Config, load_config
from pipelines.config.ray_section import RaySection
from pipelines.config.sections import DataSection, SourceSection
from pipelines.config.validation import checked
from pipelines.data import planning, shards
from pipelines.data.ingest import load_splits
from pipelines.data.manifest import FILE, Manifest, Shard, check_shards, read_manifest
from pipelines.data.planning import make_plans
from pipelines.data.shard_folder import SHARD, quarantined_in, read_records
from pipelines.data.shards import QUARANTINE, shard
from pipelines.data.sources.base import Column, Description, Entry
from pipelines.data.sources.table import TableSource
from pipelines.errors import UserError
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.storage import Location, locate
from tests.pipelines.conftest import config_values
from tests.pipelines.data.test_shards import manifest_of
from tests.pipelines.driver import kill
from tests.pipelines.shard_files import NUMBER, streamed, write_numbers
from tests.soak import others_in_soak

JOB = "_parts/_job.json"


def write_table(file: Path, rows: int = 60, bad: int = 0) -> Path:
    """Two targets and a feature; the label of the last `bad` rows fits no class."""
    file.parent.mkdir(parents=True, exist_ok=True)
    first = [str(i % 2) if i < rows - bad else "perhaps" for i in range(rows)]
    columns = {"x": [i * 7 % 5 for i in range(rows)], "a": first, "b": [i % 3 for i in range(rows)]}
    split = ["train" if i % 5 < 3 else "val" for i in range(rows)]
    pq.write_table(pa.table(columns | {"split": split}), file)
    return file


def values_of(root: Path | str, place: Path | str | Location, **data: object) -> dict[str, Any]:
    tasks = [
        {"column": "a", "kind": "multiclass", "classes": ["0", "1"]},
        {"column": "b", "kind": "multiclass", "classes": ["0", "1", "2"]},
    ]
    return {
        "name": "machines",
        "source": {"kind": "table", "root": str(root), "options": {"tasks": tasks}},
        "data": {"shards": str(place), "rows_per_shard": 8, **data},
        "ray": {"executor": "embedded"},
    }


def config_of(root: Path | str, place: Path | str | Location, **data: object) -> Config:
    return checked(Config, values_of(root, place, **data))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with what it holds; every folder with nothing."""
    return {
        path.relative_to(folder).as_posix(): b"" if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job must not come as far as to list its samples or to open an executor."""
    monkeypatch.setattr(TableSource, "entries", lambda _: pytest.fail("the source was listed"))
    monkeypatch.setattr(shards, "open_executor", lambda _: pytest.fail("an executor was opened"))


@pytest.mark.usefixtures("nothing_starts")
class TestRefused:
    def refuse(self, config: Config, folder: Path, message: str) -> UserError:
        """The error of a job that has changed nothing below `folder`."""
        before = tree(folder)
        with pytest.raises(UserError) as found:
            shard(config)
        assert tree(folder) == before
        assert re.search(message, found.value.what)
        assert found.value.wrong_use
        assert found.value.where
        assert "data.shards" in found.value.remedy
        return found.value

    @pytest.mark.parametrize("written", ["{}", "{}/", "{}/../raw", "{}/./.", "."])
    def test_shards_in_the_folder_of_the_raw_data(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
    ) -> None:
        raw = write_table(tmp_path / "raw" / "machines.parquet").parent
        monkeypatch.chdir(raw)
        self.refuse(config_of(raw, written.format(raw)), tmp_path, "are the same folder")
        (tmp_path / "link").symlink_to(raw)
        self.refuse(config_of(tmp_path / "link", written.format(raw)), tmp_path, "are the same folder")

    def test_shards_at_any_depth_below_raw_data(self, tmp_path: Path) -> None:
        raw = write_table(tmp_path / "raw" / "deep" / "machines.parquet").parents[1]
        for place in (raw / "shards", raw / "deep" / "shards", raw / "new" / "shards"):
            self.refuse(config_of(raw, place), tmp_path, f"is inside {raw}")
        values = values_of(raw, raw / "deep")
        values["source"]["options"]["file"] = "deep"
        self.refuse(checked(Config, values), tmp_path, f"is inside {raw / 'deep'}")

    @pytest.mark.parametrize(
        ("held", "named"),
        [
            (["train-00000.parquet"], "1 files or folders.*: train-00000.parquet$"),
            (
                ["c.csv", "b.txt", "a.parquet", "d/e.txt"],
                "4 files or folders.*: a.parquet, b.txt, c.csv and 1 more",
            ),
            (["d/e.txt"], "1 files or folders.*: d$"),
            ([".hidden"], "1 files or folders.*: .hidden"),
            (["_parts/train-00000.parquet.json"], "1 files or folders.*: _parts/train-00000.parquet.json"),
            (["_parts/_job.json"], "1 files or folders.*: _parts/_job.json"),
            (["_parts/deep/x"], "1 files or folders.*: _parts/deep"),
            ([FILE], "1 files or folders.*: _manifest.json"),
        ],
    )
    @pytest.mark.parametrize("text", ["", "[]", '{"plan": "x", "file": "y"}'])
    def test_folder_with_other_files(self, tmp_path: Path, held: list[str], named: str, text: str) -> None:
        raw = write_table(tmp_path / "raw.parquet")
        for name in held:
            (tmp_path / "taken" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "taken" / name).write_text(text)
        self.refuse(config_of(raw, tmp_path / "taken"), tmp_path, named)

    def test_the_current_folder_and_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = write_table(tmp_path / "raw.parquet")
        (tmp_path / "notes.txt").write_text("mine")
        monkeypatch.chdir(tmp_path)
        self.refuse(config_of(raw, "."), tmp_path, "2 files or folders")
        found = self.refuse(config_of(raw, tmp_path / "notes.txt"), tmp_path, "names a file")
        assert found.where == str(tmp_path / "notes.txt")


@pytest.mark.parametrize("value", ["", " ", "\t"])
def test_empty_address_is_a_wrong_configuration(tmp_path: Path, value: str) -> None:
    raw = write_table(tmp_path / "raw.parquet")
    with pytest.raises(
        UserError, match=r"data\.shards: .*expected a folder or an address in object storage"
    ) as found:
        config_of(raw, value)
    assert found.value.wrong_use
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values_of(raw, value)))
    (tmp_path / "ray.yaml").write_text(yaml.safe_dump({"storage": "s3://bucket"}))
    with pytest.raises(UserError, match=r"data\.shards"):
        load_config(str(tmp_path / "c.yaml"), (), str(tmp_path / "ray.yaml"))


def test_command_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_table(tmp_path / "raw" / "machines.parquet").parent
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values_of(raw, tmp_path / "shards")))
    before = tree(raw)
    words = ["shard", "-c", str(tmp_path / "c.yaml"), "data.shards=.", "--json"]
    monkeypatch.chdir(raw)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.stderr
    assert json.loads(done.stdout)["error"]["what"] == "data.shards and source.root are the same folder"
    assert "Traceback" not in done.stderr
    assert tree(raw) == before


class TestJob:
    def test_shards_beside_a_table_of_one_file_are_allowed(self, tmp_path: Path) -> None:
        raw = write_table(tmp_path / "machines.parquet")
        assert shard(config_of(raw, tmp_path / "shards")).kept == 0
        values = values_of(tmp_path, tmp_path / "shards")
        values["source"]["options"]["file"] = raw.name
        shard(checked(Config, values))

    def test_another_plan_replaces_only_the_earlier_shards(self, tmp_path: Path) -> None:
        raw, place = write_table(tmp_path / "raw.parquet"), tmp_path / "shards"
        first = shard(config_of(raw, place))
        assert not (place / JOB).exists()
        mine = {
            "notes.parquet": b"mine", "readme.txt": b"mine", "train-00000.parquet": b"mine",
            "train-00000-0123456789ab.parquet": b"mine", "deep/val-00000.parquet": b"mine",
            "_parts/train-00000.parquet.json": b"mine", f"{first.manifest.files()[0]}.part": b"mine",
        }  # fmt: skip
        for name, data in mine.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(data)
        old = {name: data for name, data in tree(place).items() if name not in mine}
        seen: list[bool] = []

        def logged(line: str) -> None:
            if line.startswith("shard "):
                now = tree(place)
                seen.append(all(now[name] == data for name, data in old.items()))

        again = shard(config_of(raw, place, rows_per_shard=11), logged)
        assert seen == [True] * again.made
        assert again.kept == 0
        files = again.manifest.files()
        assert not set(files) & set(first.manifest.files())
        expected = {FILE, QUARANTINE, "_parts", "deep", *mine, *files, *(f"_parts/{name}.json" for name in files)}
        left = tree(place)
        assert left.keys() == expected
        assert {name: left[name] for name in mine} == mine

    def test_refused_job_keeps_the_data_set_and_names_the_file_of_bad_samples(self, tmp_path: Path) -> None:
        place = tmp_path / "shards"
        good = config_of(write_table(tmp_path / "good.parquet", bad=1), place, max_bad_fraction=0.02)
        first = shard(good)
        before = tree(place)
        bad = config_of(write_table(tmp_path / "bad.parquet", bad=20), place)
        with pytest.raises(UserError, match="of 60 samples cannot be used so far") as found:
            shard(bad)
        after = tree(place)
        assert {name: after[name] for name in before} == before
        assert before[QUARANTINE].count(b"perhaps") == 1
        assert (place / "_parts") in Path(found.value.where).parents
        assert Path(found.value.where).read_text().count("perhaps") > 1
        check_shards(locate(str(place)), first.manifest, checksums=True)
        again = shard(good)
        assert (again.made, again.manifest.to_dict()) == (0, first.manifest.to_dict())
        assert tree(place) == before

    def test_a_note_in_memory_holds_three_of_its_bad_samples(self, tmp_path: Path) -> None:
        raw, place = write_table(tmp_path / "raw.parquet", bad=40), locate(str(tmp_path / "shards"))
        manifest = shard(config_of(raw, place, max_bad_fraction=0.9)).manifest
        notes = [note for held in read_records(place).notes.values() for note in held]
        assert {len(note["quarantined"]) for note in notes} <= {0, 1, 2, 3}
        assert max(note["bad"] for note in notes) > 3
        assert sum(note["bad"] for note in notes) == manifest.quarantined == 40
        written = [json.loads(line) for line in (place / QUARANTINE).read_text().splitlines()]
        expected = [bad for file in manifest.files() for bad in quarantined_in(place, file)]
        assert written == expected
        assert len({bad["id"] for bad in written}) == 40

    @pytest.mark.parametrize("published", [True, False])
    def test_shards_with_earlier_names_are_kept(self, tmp_path: Path, published: bool) -> None:
        config = config_of(write_table(tmp_path / "raw.parquet"), tmp_path / "shards")
        new = shard(config).manifest
        names = old_names(locate(config.data.shards), new.files(), published)
        again = shard(config)
        assert (again.made, again.manifest.files()) == (0, names)
        assert again.manifest.digest() == new.digest()
        (tmp_path / "shards" / names[1]).write_bytes(b"damaged")
        mended = shard(config)
        assert (mended.made, mended.kept) == (1, len(names) - 1)
        assert mended.manifest.files() == [names[0], new.files()[1], *names[2:]]
        assert mended.manifest.digest() == new.digest()
        held = {name for name in tree(tmp_path / "shards") if name.endswith((".parquet", ".parquet.json"))}
        files = mended.manifest.files()
        assert held == {*files, *(f"_parts/{name}.json" for name in files)}
        check_shards(locate(config.data.shards), read_manifest(locate(config.data.shards)), checksums=True)
        other = shard(config_of(config.source.root, tmp_path / "shards", rows_per_shard=11))
        held = {name for name in tree(tmp_path / "shards") if name.endswith(".parquet")}
        assert held == set(other.manifest.files())

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("torn", [False, True])
    @pytest.mark.parametrize("then", [11, 13])
    @pytest.mark.parametrize("every", others_in_soak([1, 7], 7))
    def test_job_killed_at_any_moment_is_completed_or_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, torn: bool, then: int, every: int
    ) -> None:
        def made(place: Path, rows: int) -> Manifest:
            return shard(config_of(raw, place, rows_per_shard=rows)).manifest

        raw = write_table(tmp_path / "raw.parquet", rows=40)
        first, begun, expected = (made(tmp_path / f"whole{rows}", rows) for rows in (8, 11, then))
        moment, killed = every // 2, True
        while killed:
            place = tmp_path / f"{moment}"
            if before:
                made(place, 8)
                (place / "_parts" / f"{first.files()[0]}.json").unlink()  # only the manifest names this shard
            with monkeypatch.context() as patch:
                killed = killed_at(patch, moment, torn, lambda p=place: made(p, 11))
            if before:  # one of the two is whole at every moment
                held = read_manifest(locate(str(place)))
                assert held.digest() in (first.digest(), begun.digest())
                check_shards(locate(str(place)), held, checksums=True)
            assert made(place, then).digest() == expected.digest()
            left = {name for name in tree(place) if not name.endswith(".part") and not name.startswith(".probe-")}
            assert left == tree(tmp_path / f"whole{then}").keys()
            moment += every
        assert moment > (20 if before else 10)

    def test_shard_lost_before_the_end_is_an_error_and_the_earlier_data_set_stays(self, tmp_path: Path) -> None:
        raw, place = write_table(tmp_path / "raw.parquet"), tmp_path / "shards"
        first = shard(config_of(raw, place)).manifest

        def logged(line: str) -> None:
            if line.startswith("shard 2/"):
                next(path for path in place.glob("train-*.parquet") if path.name not in first.files()).unlink()

        with pytest.raises(UserError, match="is missing"):
            shard(config_of(raw, place, rows_per_shard=11), logged)
        assert read_manifest(locate(str(place))).files() == first.files()
        check_shards(locate(str(place)), first, checksums=True)


def killed_at(patch: pytest.MonkeyPatch, moment: int, torn: bool, call: Callable[[], object]) -> bool:
    """Whether `call` came to its change number `moment` of the storage, where it is ended like a process.

    Args:
        torn: Leave a part of the file that was being written.
    """
    write, delete, changes = Location._write, Location.delete, [0]

    class Killed(BaseException):
        pass

    def passes(place: Location) -> None:
        changes[0] += 1
        if changes[0] > moment:
            if torn and place.local is not None:
                place.local.parent.mkdir(parents=True, exist_ok=True)
                place.local.with_name(f".{place.local.name}.0123abcd.part").write_bytes(b"to")
            raise Killed

    def written(place: Location, source: Any, sync: bool) -> None:
        passes(place)
        write(place, source, sync)

    def deleted(place: Location) -> None:
        passes(place)
        delete(place)

    patch.setattr(Location, "_write", written)
    patch.setattr(Location, "delete", deleted)
    try:
        call()
    except Killed:
        return True
    return False


def old_names(folder: Location, files: list[str], published: bool) -> list[str]:
    """Name the shards as earlier versions did; a folder without its manifest is one of a job that was killed."""
    manifest, names = (folder / FILE).read_text(), []
    for file in files:
        names.append(f"{file.rsplit('-', 1)[0]}.parquet")
        (folder / names[-1]).write_bytes((folder / file).read_bytes())
        note = (folder / "_parts" / f"{file}.json").read_text()
        (folder / "_parts" / f"{names[-1]}.json").write_text(note.replace(file, names[-1]))
        (folder / file).delete()
        (folder / "_parts" / f"{file}.json").delete()
        manifest = manifest.replace(file, names[-1])
    (folder / FILE).write_text(manifest)
    if not published:
        (folder / FILE).delete()
    return names


def test_command_resumes_after_a_kill(images: Path, tmp_path: Path) -> None:
    values = config_values(images, tmp_path, data={"compression": "lz4"})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    words = [sys.executable, "-m", "pipelines.cli", "shard", "-c", str(tmp_path / "c.yaml"), "--json"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    while not list((tmp_path / "shards").glob("*.parquet")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    kill([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "shards" / FILE).exists()
    manifest = shard(checked(Config, values)).manifest
    check_shards(locate(str(tmp_path / "shards")), manifest, checksums=True)
    assert manifest.digest() == manifest_of(tmp_path / "whole", images, compression="lz4")[2].digest()


def test_shard_number_one_hundred_thousand_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_SHARDS", 10**6)  # so that small shards suffice
    described = Description(InputSpec("features", (4,)), (), {"input": Column("float32", (4,))})
    entries = [Entry(f"{i}", "train" if i else "val") for i in range(100_003)]
    data = DataSection(shards="x", rows_per_shard=1)
    plans = make_plans(entries, described, SourceSection(kind="table"), data)
    numbers = [int(plan.file.split("-")[1]) for plan in plans if plan.split == "train"]
    assert numbers == list(range(100_002))
    assert all(SHARD.fullmatch(plan.file) for plan in plans[99_998:])


def test_shards_are_read_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    reader = write_numbers(tmp_path, [3, 3, 3, 3], group_rows=2)
    names = ["99999", "100000", "9", "100001"]
    held: dict[str, list[Shard]] = {}
    for split, parts in reader.manifest.shards.items():
        held[split] = []
        for part, name in zip(parts, names, strict=True):
            renamed = f"{split}-{name}-0123456789ab.parquet"
            (tmp_path / part.file).rename(tmp_path / renamed)
            held[split].append(replace(part, file=renamed))
    reader = replace(reader, manifest=replace(reader.manifest, shards=held))
    expected = list(range(12))
    with EmbeddedExecutor(RaySection()) as executor:
        tables = [held.get() for held in load_splits(reader, executor)["train"]]
    assert [int(v) for t in tables for v in reader.arrays(t).labels[NUMBER.name]] == expected
    batches = streamed(reader, 6).evaluate("train", 5)
    assert [int(v) for batch in batches for v in batch.targets[NUMBER.name]] == expected
