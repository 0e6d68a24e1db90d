"""When `dmtg serve` uses HAProxy, and what it sets for it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.config.ray_section import RaySection
from pipelines.serving.proxy import SWITCH, fast_proxy

LOCAL = RaySection()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray Serve on Linux alone")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(Path("/", "tmp")))  # that of tests is longer


def test_a_local_ray_has_it_with_its_sockets_in_a_private_folder() -> None:
    before = dict(os.environ)
    with fast_proxy(LOCAL):
        added = {name: value for name, value in os.environ.items() if before.get(name) != value}
        assert added[SWITCH] == "1"
        folders = {
            Path(value).parent for name, value in added.items() if name.endswith(("SOCKET_PATH", "FILE_LOC"))
        }
        (folder,) = folders
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "its control socket lets everyone change it"
        longest = folder / ("0" * 56) / "metrics.sock"  # the id of a node
        assert len(str(longest)) < 108, "the path of a socket on Linux"
        ports = [value for name, value in added.items() if name.endswith("_PORT")]
        assert len(set(ports)) == 3, "two servers on one machine do not meet"
    assert dict(os.environ) == before
    assert not folder.exists()


@pytest.mark.parametrize("how", ["user", "section", "environment", "session", "long path", "not installed"])
def test_other_clusters_and_the_choice_of_the_user_are_kept(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section = RaySection(address="ray.test:6379") if how == "section" else LOCAL
    if how == "user":
        monkeypatch.setenv(SWITCH, "0")
    elif how == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "ray.test:6379")
    elif how == "session":
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    elif how == "long path":
        (tmp_path / ("x" * 40)).mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 40)))
    elif how == "not installed":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = dict(os.environ)
    with fast_proxy(section):
        assert dict(os.environ) == before
