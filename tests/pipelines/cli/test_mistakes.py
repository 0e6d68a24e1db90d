"""Mistakes of users: each ends with what, where and remedy, without a traceback and without a start of Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.errors import UserError
from pipelines.execution.session import _start_errors

NEW = ("config", "new")
SHOW = ("config", "show", "-c")
# files of the mistakes
FILES: dict[str, bytes] = {
    "good.csv": b"x,a,b\n" + b"".join(b"%d,%d,%d\n" % (i * 7 % 5, i % 2, i % 3 % 2) for i in range(60)),
    "empty.csv": b"",
    "head.csv": b"x,a,b\n",
    "one.csv": b"x,a,b\n1,0,1\n",
    "targets.csv": b"a,b\n1,0\n0,1\n",
    "latin.csv": "nö,a,b\n1,0,1\n2,0,0\n".encode("latin-1"),
    "ragged.csv": b"x,a,b\n1,0,1\n2,1\n",
    "twice.csv": b"x,a,a\n1,0,1\n2,1,0\n",
    "other.csv": b"nichts".join([b"x,a,b\n", b"\x81\x90,0,1\n"]),
    "packed.csv": b"PK\x03\x04 and more",
    "open.csv": b'x,a,b\n1,0,1\n"2,1,0\n3,0,1\n',
    "inner.csv": b'x,a,b\n1,0,1\n2,"a "b" c",0\n3,0,1\n',
    "no.parquet": b"this is none" * 20,
    "broken.yaml": b"name: x\ndata: [1\n",
    "list.yaml": b"- name\n",
    "latin.yaml": "name: ö\n".encode("latin-1"),
    "nmae.yaml": b"nmae: x\ndata: {shards: s}\n",
    "nothing.yaml": b"name: x\ndata: {shards: s}\nsearch:\n",
    "itself.yaml": b"base: itself.yaml\nname: x\n",
}


@pytest.mark.parametrize(
    ("arguments", "what", "remedy"),
    [
        ((*SHOW, "clohting"), "no configuration file 'clohting'", "did you mean clothing?"),
        ((*SHOW, "paper/celeba9_k5"), "no configuration file", "did you mean paper/celeba9_k"),
        ((*SHOW, "rooms", "trian.epochs=3"), "unknown key trian", "train"),
        ((*SHOW, "rooms", "train.epochs=three"), "train.epochs: Input should be a valid integer", "correct"),
        ((*SHOW, "rooms", "train.epochs=[1"), "the value is not YAML: [1", "close every bracket"),
        ((*SHOW, "rooms", "train.epochs"), "expected section.key=value", "train.epochs=10"),
        ((*SHOW, "rooms", "ray.workers=0"), "ray.workers", "correct"),
        ((*SHOW, "rooms", "source.kind=tabel"), "unknown source kind 'tabel'", "did you mean table?"),
        ((*SHOW, "broken.yaml"), "not valid YAML in line 3, column 1", "correct the file"),
        ((*SHOW, "latin.yaml"), "cannot read the configuration", "correct the file"),
        ((*SHOW, "list.yaml"), "expected sections with keys", "start from a recipe"),
        ((*SHOW, "nmae.yaml"), "name is missing", "did you mean name?"),
        ((*SHOW, "nothing.yaml"), "search is empty", "remove its line"),
        ((*SHOW, "itself.yaml"), "bases form a cycle", "remove the base"),
        ((*SHOW, "rooms", "--ray-config", "none.yaml"), "No such file", "correct the file"),
        ((*NEW,), "no data and no source are named", "name a table"),
        ((*NEW, "none.csv", "--targets", "a,b"), "no such file or folder", "correct the path"),
        ((*NEW, "ftp://x/y.csv", "--targets", "a,b"), "cannot open an address of the kind ftp", "s3://"),
        ((*NEW, "s3://me:hush@bucket/y.csv", "--targets", "a,b"), "must not carry credentials", "AWS_ACCESS"),
        ((*NEW, "good.csv"), "no target columns are named", "the columns are x, a, b"),
        ((*NEW, "good.csv", "--targets", "a,c"), "no column c", "the columns are x, a, b"),
        ((*NEW, "empty.csv", "--targets", "a,b"), "the table has no rows", "column names"),
        ((*NEW, "head.csv", "--targets", "a,b"), "the table has no rows", "column names"),
        ((*NEW, "one.csv", "--targets", "a,b"), "target a is '0' in all rows", "remove it"),
        ((*NEW, "targets.csv", "--targets", "a,b"), "no column is left to predict from", "fewer targets"),
        ((*NEW, "other.csv", "--targets", "a,b"), "line 2, byte 7 of it: 0x81 is not UTF-8", "gb18030"),
        ((*NEW, "packed.csv", "--targets", "a,b"), "a ZIP archive or an Excel workbook", "as CSV"),
        ((*NEW, "open.csv", "--targets", "a,b"), "line 3, column 1 (x): a quote opens and is", "close it"),
        ((*NEW, "inner.csv", "--targets", "a,b"), "line 3, column 2 (a): a quote opens, and", "are doubled"),
        ((*NEW, "latin.csv", "--targets", "a,b"), "target a is '0'", "remove it"),
        ((*NEW, "ragged.csv", "--targets", "a,b"), "line 3 has 2 cells, expected 3", "needs quotes"),
        ((*NEW, "twice.csv", "--targets", "a,x"), "column a occurs more than once", "rename one"),
        ((*NEW, "no.parquet", "--targets", "a,b"), "not a Parquet file", "create the file again"),
        ((*NEW, ".", "--targets", "a,b", "--source", "folder"), "none is named labels.csv", "add labels"),
        (("inspect", "-c", "rooms", "data.shards=none"), "no data set here", "dmtg shard"),
        (("train", "-c", "rooms", "train.cuda_graphs=true", "train.accumulate=2"), "cuda_graphs needs", "correct"),
        (("train", "-c", "rooms", "train.aggregator=upgrad", "train.accumulate=2"), "whole batch", "correct"),
        (
            ("shard", "-c", "clothing", "source.root=none", "data.shards=shards"),
            "the folder of the data set does not exist",
            "correct source.root",
        ),
        (("report", "none"), "no finished run here", "dmtg train"),
        (("doctor", "train.epochs=3"), "overrides a configuration", "-c"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained(
    arguments: tuple[str, ...], what: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    found = CliRunner().invoke(app, [*arguments])
    logged = dict(line.split(": ", 1) for line in found.stderr.splitlines() if ": " in line)
    assert found.exit_code in (1, 2)
    assert what in logged["what"]
    assert logged.get("where")
    assert remedy in logged["remedy"]
    assert len(logged["what"]) < 400
    assert "Traceback" not in found.stderr
    assert "hush" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["trian"], "Did you mean 'train'?"), (["train"], "--config"), (["train", "-c"], "argument")],
)
def test_unknown_and_missing_arguments_are_wrong_use(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert message in found.stderr


@pytest.mark.parametrize(("address", "what"), [("10.0.0.1:6379", "does not answer"), (None, "does not start")])
def test_ray_that_does_not_start_or_answer_names_the_next_thing_to_do(address: str | None, what: str) -> None:
    with pytest.raises(UserError, match=what) as found, _start_errors(address):
        raise RuntimeError("timed out\nand more")
    assert "dmtg doctor" in found.value.remedy
    assert "and more" not in found.value.what
