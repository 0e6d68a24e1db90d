"""The files for single machines and for Ray's launcher: systemd, cron, ray up."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dmtg_core import GroupingNetwork, InputSpec
from pipelines.config.loading import load_config
from pipelines.data.sources.taskonomy.tasks import TASKS
from tests.paths import ROOT

CLUSTER = ROOT / "cluster"


def launcher() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text(encoding="utf-8"))
    return found


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """A launcher configuration as `ray up` completes and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def test_ray_up_takes_the_launcher_file() -> None:
    whole = prepared(launcher())
    assert whole["available_node_types"]["gpu"]["max_workers"] <= whole["max_workers"]
    assert whole["available_node_types"]["gpu"]["min_workers"] == 0
    assert whole["available_node_types"]["head"]["resources"]["CPU"] == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(idle_timeout=5),
        lambda c: c["auth"].update(user="ubuntu"),
        lambda c: c["available_node_types"]["gpu"].pop("node_config"),
        lambda c: c["available_node_types"]["gpu"]["resources"].update(GPU="4"),
    ],
)
def test_a_wrong_launcher_file_is_refused(spoil: Any) -> None:
    config = launcher()
    spoil(config)
    with pytest.raises(jsonschema.ValidationError):
        prepared(config)


def test_the_launcher_copies_what_the_install_needs_and_starts_ray_with_the_token() -> None:
    config = launcher()
    mounts = config["file_mounts"]
    for place, source in mounts.items():
        assert source.startswith("~") or (ROOT / source).exists(), source
        assert place.startswith("~/")
    installs = " ".join(config["setup_commands"])
    assert "--require-hashes" in installs
    assert {word for word in shlex.split(installs) if word.endswith(".lock")} == {"~/dmtg/requirements.lock"}
    assert mounts["~/dmtg/requirements.lock"] == "cluster/requirements.lock"
    assert "~/.ray/auth_token" in mounts
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for file in (CLUSTER / "systemd").glob("dmtg-regroup.*"):
        # the command has to be there for systemd to be content
        text = file.read_text(encoding="utf-8").replace("/opt/dmtg/.venv/bin/dmtg", sys.executable)
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    assert verified(tmp_path) == ""
    service = tmp_path / "dmtg-regroup.service"
    service.write_text(service.read_text(encoding="utf-8").replace("SuccessExitStatus", "SuccessExitCode"))
    assert "SuccessExitCode" in verified(tmp_path), "a wrong key would be seen"


def verified(folder: Path) -> str:
    """What systemd has against the units in a folder."""
    line = ["systemd-analyze", "verify", "--man=no", *(str(file) for file in sorted(folder.iterdir()))]
    return subprocess.run(line, capture_output=True, text=True, check=False).stderr


def test_cron_reads_one_line_a_night_that_two_jobs_cannot_run_at_once() -> None:
    lines = (CLUSTER / "systemd" / "crontab").read_text(encoding="utf-8").splitlines()
    jobs = [line for line in lines if re.match(r"[\d*]", line)]
    assert len(jobs) == 1
    assert re.match(r"\d+ \d+ \* \* \* cd ", jobs[0])
    assert "%" not in jobs[0], "cron would end the command there"
    words = shlex.split(jobs[0])
    assert words[words.index("flock") : words.index("flock") + 2] == ["flock", "--nonblock"]


def figures() -> dict[str, float]:
    """What the formulas of the README give, each held against the figure beside it."""
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, float] = {}
    for line in "".join(blocks).splitlines():
        found = re.fullmatch(r"(\w+) = (.+?) +# (?:([\d,.]+)(?: (.*))?|given.*)", line)
        assert found, f"a figure without its value: {line}"
        name, formula, shown = found[1], found[2], found[3]
        names[name] = eval(formula, {"__builtins__": {}}, names)  # noqa: S307 - our own page
        if shown:
            digits = len(shown.replace(",", "").partition(".")[2])
            assert round(names[name], digits) == float(shown.replace(",", "")), line
    return names


def test_figures_of_the_readme_follow_from_their_formulas() -> None:
    found = figures()
    assert len(found) >= 25
    assert found["sample"] == 851_968


def test_the_network_of_the_readme_is_as_large_as_it_says() -> None:
    config = load_config("paper/taskonomy5_k3")
    assert config.source is not None
    tasks = [TASKS[name] for name in config.source.options["tasks"]]
    size = config.source.options["size"]
    network = GroupingNetwork(config.network_spec(InputSpec("image", (size, size, 3), "uint8"), tasks))
    found = figures()
    assert found["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.forward_pairs(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    assert counter.get_total_flops() / 1e9 == pytest.approx(found["gflop"] / 3, abs=0.1)
