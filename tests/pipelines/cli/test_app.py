"""The contract of every command: exit codes, one JSON line, one error message, no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.errors import UserError
from tests.pipelines.conftest import config_values, write_images

RUNNER = CliRunner()


def write_config(path: Path, images: Path, work: Path, **sections: object) -> str:
    path.write_text(yaml.safe_dump(config_values(images, work, **sections)))
    return str(path)


def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON object and stderr of a command."""
    result = RUNNER.invoke(app, [*arguments, "--json"])
    lines = result.stdout.strip().splitlines()
    return result.exit_code, json.loads(lines[-1]) if lines else {}, result.stderr


@pytest.fixture
def config(images: Path, tmp_path: Path) -> str:
    return write_config(tmp_path / "c.yaml", images, tmp_path)


def test_paragraphs_of_help_have_no_line_breaks_of_the_code() -> None:
    """A terminal of 80 columns would show these in the middle of a sentence."""
    every: Any = get_command(app)
    assert "required; others are not read. The predictions have" in every.commands["predict"].help
    groups = [every.commands[name].commands.values() for name in ("config", "models")]
    for command in (*every.commands.values(), *groups[0], *groups[1]):
        assert all("\n" not in paragraph for paragraph in (command.help or "").split("\n\n"))


def test_help_lists_the_commands_in_the_order_of_use_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from pipelines.cli.app import app;"
        "print(CliRunner().invoke(app, ['--help']).stdout);"
        "print({'ray', 'torch', 'mlflow', 'pydantic_core'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    commands = (
        "demo", "doctor", "config", "shard", "inspect", "signal", "train", "compare", "sweep", "evaluate",
        "predict", "models", "regroup", "report",
    )  # fmt: skip
    places = [out.index(f"│ {name} ") for name in commands]
    assert places == sorted(places)
    assert out.strip().endswith("set()")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.epoch=2", "train.epoch"),
        ("gate.sampling=gumble", "gate.sampling"),
        ("train.epochs", "train.epochs"),
        ("data.shards=", "data.shards"),
        ("data.shards=''", "data.shards"),
        ("data.shards='  '", "data.shards"),
    ],
)
def test_wrong_configuration_is_wrong_use(config: str, override: str, named: str) -> None:
    code, found, shown = call("train", "-c", config, override)
    assert code == 2
    assert found["status"] == "failed"
    assert named in found["error"]["what"]
    assert found["error"]["remedy"]
    assert "Traceback" not in shown
    assert found["error"]["what"] in shown


def test_missing_shards_are_reported_with_the_command_that_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "data": {"shards": str(tmp_path / "none")}}))
    code, found, _ = call("inspect", "-c", str(path))
    assert code == 1
    assert "no manifest" in found["error"]["what"]
    assert "dmtg shard" in found["error"]["remedy"]


def test_unknown_source_kind_option_and_missing_root_are_named(config: str, tmp_path: Path, images: Path) -> None:
    pytest.importorskip("ray")
    from pipelines.data.sources import build_source

    with pytest.raises(UserError, match="unknown source kind 'foldr'"):
        build_source("foldr", str(images), {})
    with pytest.raises(UserError, match="unknown key source.options.sise"):
        build_source("folder", str(images), {"sise": 3})
    with pytest.raises(UserError) as found:
        list(
            build_source(
                "folder", str(tmp_path / "nowhere"), {"tasks": [{"column": "x", "kind": "binary"}]}
            ).entries()
        )
    assert "nowhere" in str(found.value)


def test_debug_shows_the_traceback(config: str) -> None:
    result = RUNNER.invoke(app, ["train", "-c", config, "train.epoch=1", "--debug"])
    assert isinstance(result.exception, UserError)


class TestWithShards:
    """Commands that end before a worker starts."""

    def test_shard_and_inspect_report_rows_and_statistics(self, config: str) -> None:
        code, made, _ = call("shard", "-c", config)
        assert (code, made["status"], made["rows"], made["quarantined"]) == (0, "done", 96, 0)
        code, seen, shown = call("inspect", "-c", config)
        assert code == 0
        assert seen["statistics"]["train"]["bright"]["missing_rate"] == 0
        assert "colour" in shown

    def test_task_that_the_shards_do_not_have(self, config: str) -> None:
        code, found, _ = call("train", "-c", config, "data.tasks=[colour, hue]")
        assert code == 1
        assert found["error"]["what"] == "the shards have no task hue"
        assert "colour, bright, level" in found["error"]["remedy"]

    def test_constant_target_stops_train_and_inspect(self, tmp_path: Path) -> None:
        raw = write_images(tmp_path / "raw")
        text = (raw / "labels.csv").read_text().replace(",True,", ",False,")
        (raw / "labels.csv").write_text(text)
        path = write_config(tmp_path / "c.yaml", raw, tmp_path)
        code, found, _ = call("train", "-c", path)
        assert code == 1
        assert "task bright is constant" in found["error"]["what"]
        code, found, _ = call("inspect", "-c", path)
        assert (code, found["status"]) == (1, "failed")
        assert any("task bright is constant" in problem for problem in found["problems"])
        # the remedy of the message: leave the task out
        code, found, _ = call("inspect", "-c", path, "data.tasks=[colour, level]")
        assert code == 0

    def test_label_outside_its_classes_and_unreadable_image(self, tmp_path: Path) -> None:
        raw = write_images(tmp_path / "raw")
        (raw / "images" / "img001.png").write_bytes((raw / "images" / "img001.png").read_bytes()[:60])
        values = config_values(raw, tmp_path)
        values["source"]["options"]["tasks"][0] = {  # type: ignore[index]
            "column": "colour", "kind": "multiclass", "classes": ["red", "green"],
        }  # fmt: skip
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(values))
        # with one bad sample less it would pass
        code, found, _ = call("shard", "-c", str(path), "data.max_bad_fraction=0.34")
        assert code == 1
        assert "33 of 96 samples cannot be used so far" in found["error"]["what"]
        reasons = Path(found["error"]["where"]).read_text()
        assert "blue" in reasons
        assert "img001" in reasons

    def test_shard_whose_checksum_differs(self, config: str, tmp_path: Path) -> None:
        assert call("shard", "-c", config)[0] == 0
        (victim,) = (tmp_path / "shards").glob("val-00000-*.parquet")
        data = bytearray(victim.read_bytes())
        data[100] ^= 255
        victim.write_bytes(bytes(data))
        code, found, _ = call("train", "-c", config)
        assert code == 1
        assert found["error"]["what"] == f"{victim.name} has another checksum than the manifest says"

    def test_tracking_server_that_does_not_answer(self, config: str) -> None:
        with (
            socket.socket() as held
        ):  # bound but not listening: no server answers, and no other process can bind it
            held.bind(("127.0.0.1", 0))
            code, found, _ = call("train", "-c", config, f"track.uri=http://127.0.0.1:{held.getsockname()[1]}")
        assert code == 1
        assert "tracking server does not answer" in found["error"]["what"]
        assert "track.uri=none" in found["error"]["remedy"]

    def test_a_file_in_place_of_a_folder(self, config: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for key, exit_code, what in (
            ("run.root", 1, "cannot write"),
            ("data.shards", 2, "data.shards names a file"),
        ):
            code, found, _ = call("train", "-c", config, f"{key}={tmp_path / 'file'}")
            assert code == exit_code
            assert what in found["error"]["what"]
            assert str(tmp_path / "file") in found["error"]["where"]

    def test_encoder_that_does_not_fit_the_input(self, config: str) -> None:
        code, found, _ = call("train", "-c", config, "network.encoder=mlp", "network.options={}")
        assert code == 2
        assert "mlp reads features input, got image" in found["error"]["what"]

    def test_more_workers_than_the_embedded_executor_has(self, config: str) -> None:
        code, found, _ = call("train", "-c", config, "ray.workers=64")
        assert code == 2
        assert "64 workers needs Ray" in found["error"]["what"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without the permission to write")
def test_folder_of_another_user_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    code = (
        "import os; from pipelines.storage import locate; from pipelines.errors import UserError\n"
        "os.setuid(65534)\n"
        f"try: locate({str(tmp_path / 'runs')!r}).check_writable()\n"
        "except UserError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Permission denied" in found.stdout
    assert str(tmp_path / "runs") in found.stdout
