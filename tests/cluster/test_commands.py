"""Every command line in cluster/ is read by the real CLI, and its configuration is loaded."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from subprocess import list2cmdline

import pytest

from pipelines.config.loading import Config, load_config
from pipelines.errors import UserError
from tests.cluster.commands import CLUSTER, Command, commands, in_line, mapped, parsed
from tests.cluster.manifests import KUBERAY, config_files

COMMANDS = commands()


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that pods find in /etc/dmtg; the current folder holds no ray_config.yaml, as theirs does not."""
    (tmp_path / "etc").mkdir()
    for name, text in config_files().items():
        (tmp_path / "etc" / name).write_text(text, encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "etc"


def configured(command: Command, mounted: Path) -> Config | None:
    """The configuration of a command; None for one that takes none."""
    _, given = parsed(command.words)
    if "config" not in given:
        return None
    ray_config = mapped(given.get("ray_config") or "", mounted)
    # those of predict can also be files
    overrides = [word for word in given.get("overrides") or given.get("given") or [] if "=" in word]
    config = load_config(mapped(given["config"], mounted), overrides, ray_config)
    config.settings()
    return config


def test_commands_are_found_in_every_file_that_holds_one() -> None:
    holding = set()
    for file in CLUSTER.rglob("*"):
        if file.suffix in (".yaml", ".md", ".service", ".timer", "") and file.is_file():
            lines = [one for one in file.read_text(encoding="utf-8").splitlines() if not one.startswith("#")]
            if re.search(r"dmtg,? (shard|sweep|train|predict|regroup|models) -", "\n".join(lines)):
                # a manifest is read as its overlay renders it
                place = file.parent if KUBERAY in file.parents else file
                holding.add(str(place.relative_to(CLUSTER)))
    assert len(holding) >= 6
    assert holding <= {command.file for command in COMMANDS}
    used = {command.words[0] for command in COMMANDS}
    assert {"shard", "train", "sweep", "regroup", "predict", "models"} <= used


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_real_command_line_and_configuration_take_it(command: Command, mounted: Path) -> None:
    config = configured(command, mounted)
    if config is not None and "--ray-config" in command.words:
        assert config.track.uri.startswith("http://mlflow."), "MLflow is that of ray_config.yaml"
        assert config.run.root.startswith("s3://dmtg/"), "and so is storage"


@pytest.mark.parametrize(
    "line",
    [
        "dmtg trian -c rooms",
        "dmtg train",
        "dmtg train -c rooms --ray_config x.yaml",
        "dmtg train -c rooms train.epoch=3",
        "dmtg train -c rooms ray.workers=0",
        "dmtg train -c no_such_recipe",
    ],
)
def test_a_wrong_word_is_caught(line: str, mounted: Path) -> None:
    (words,) = in_line(line)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - typer has its own errors, the configuration has another
        configured(Command("", words), mounted)
    assert isinstance(caught.value, UserError) or "UsageError" in {t.__name__ for t in type(caught.value).__mro__}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ray job submit --working-dir . -- dmtg train -c rooms 'sweep.groups=[2, 3]'",
         [("train", "-c", "rooms", "sweep.groups=[2, 3]")]),
        ('ray exec c.yaml "dmtg train -c rooms" && dmtg models list',
         [("train", "-c", "rooms"), ("models", "list")]),
        ("ExecStart=/opt/dmtg/bin/dmtg report x >> log 2>&1", [("report", "x")]),
        ("crontab -u dmtg file", []),
        ("cd /opt/dmtg && kubectl -n dmtg get pods", []),
        ("# dmtg train", []),
    ],
)  # fmt: skip
def test_commands_are_found_in_a_line(line: str, found: list[tuple[str, ...]]) -> None:
    assert list(in_line(line)) == found


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_words_survive_the_second_shell_of_ray_job_submit(command: Command) -> None:
    assert tuple(shlex.split(list2cmdline(command.words))) == command.words


def test_regroup_never_ends_a_scheduled_job_as_failed_because_the_champion_was_kept() -> None:
    nightly = [one for one in COMMANDS if one.words[0] == "regroup"]
    assert len(nightly) >= 4
    service = (CLUSTER / "systemd" / "dmtg-regroup.service").read_text(encoding="utf-8")
    assert "SuccessExitStatus=3" in service
    for night in nightly:
        assert "--kept-ok" in night.words or night.file.endswith(".service"), night
