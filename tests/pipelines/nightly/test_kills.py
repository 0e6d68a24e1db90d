"""A nightly run that is killed at any of its writes is finished by the same command, with nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.shards import shard
from pipelines.errors import UserError
from pipelines.nightly import publish, webhook
from pipelines.nightly.driver import LEASE, regroup
from pipelines.registry import aliases, lost_runs
from pipelines.registry.changes import JOURNAL
from pipelines.registry.models import load_groups
from pipelines.registry.records import registered
from pipelines.registry.tracking import connect
from pipelines.storage import locate
from tests.paths import ROOT
from tests.pipelines.kill_points import kill_points
from tests.pipelines.nightly import test_driver as nightly
from tests.pipelines.nightly.test_driver import received
from tests.pipelines.registry import versions

pytestmark = pytest.mark.usefixtures("plain_reports")
FIRST, NIGHT = "2026-03-01", "2026-03-02"
__all__ = ["received"]  # a fixture


def config_of(root: Path, **sections: Any) -> Config:
    values = nightly.config_of(root, train={"epochs": 2, "learning_rate": 0.02}, **sections)
    values["regroup"] |= {"margin": 0.0, "limit": None, "lease_s": 5}
    return checked(Config, values)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A small table, and no pauses between requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nightly, "ROWS", 600)
        patch.setattr(webhook, "PAUSE_S", 0.01)
        yield


@pytest.fixture(scope="module")
def root(plain_reports: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two dates, and a champion that was hardly trained."""
    root = tmp_path_factory.mktemp("killed")
    for n, date in enumerate((FIRST, NIGHT)):
        nightly.write_table(root / f"raw-{date}", n, (0, 0, 1, 1), level=0.4 * n)
        like = str(root / "datasets" / f"date={FIRST}") if n else ""
        values = nightly.config_of(root, data={"shards": str(root / "datasets" / f"date={date}"), "like": like})
        values["source"]["root"] = str(root / f"raw-{date}")
        shard(checked(Config, values))
    values = config_of(root).model_dump(mode="json")
    values["train"] |= {"epochs": 1, "learning_rate": 1e-9}
    regroup(checked(Config, values), FIRST)
    return root


@pytest.fixture(scope="module")
def config(root: Path, received: tuple[str, list[dict[str, Any]]]) -> Config:
    return config_of(root, regroup={"shards": str(root / "datasets"), "webhook": received[0], "resamples": 300})


def check_finished(config: Config, found: dict[str, Any], bodies: list[dict[str, Any]]) -> None:
    """Check a verdict, and all that follows from it."""
    assert found["verdict"] == "promoted", found["reason"]
    assert any(line.startswith("task_0: ") for line in found["data_drift"])
    assert found["owed"] == []
    version = int(found["challenger"].rpartition("/")[2])
    members = {f".{group}": model for group, model in zip(found["grouping"], found["models"][1:], strict=True)}
    expected = {"": version} | {name: int(uri.rpartition("/")[2]) for name, uri in members.items()}
    assert versions.aliases(config.track, "nightly")["champion"] == expected
    client = connect(config.track)
    assert JOURNAL not in registered(client, "nightly").tags
    run = client.get_run(found["run_id"])
    assert (run.info.status, run.data.tags["dmtg.verdict"], run.data.tags["dmtg.night"]) == (
        "FINISHED", "promoted", found["night"],
    )  # fmt: skip
    assert {"verdict.json", "regroup.html"} <= {file.path for file in client.list_artifacts(found["run_id"])}
    assert locate(found["report"]).exists()
    sent = [{k: v for k, v in body.items() if k in found} for body in bodies if body["night"] == found["night"]]
    assert sent
    assert all(body["challenger"] == found["challenger"] for body in sent)


SOME = ("set_registered_model_tag", "set_registered_model_alias", "log_text", "send")


@pytest.mark.parametrize(
    ("date", "whole"),
    [pytest.param(NIGHT, False, id="some"), pytest.param("2026-03-05", True, id="all", marks=pytest.mark.soak)],
)
def test_a_night_that_is_killed_at_any_write_after_its_decision_is_finished(
    root, config, received, date, whole
) -> None:
    folder, held = root / "runs" / "regroup" / "nightly", root / f"held-{date}"
    aliases.promote(config.track, "nightly", 1)

    def night() -> dict[str, Any]:
        return regroup(config, date)

    with kill_points() as points:
        assert not points.ended(night, None)
        assert "write_bytes decision.json" in points.calls
        found = night()
        check_finished(config, found, received[1])
        aliases.promote(config.track, "nightly", 1)
        for name in ("verdict.json", "regroup.html", "published.json"):
            (folder / date / name).unlink()
        shutil.copytree(folder / date, held)
        points.ended(night, None)
        writes = points.calls
        assert {"write_bytes verdict.json", "set_registered_model_alias", "log_text", "send"} <= set(writes)
        assert [call for call in writes if "published" in call] == ["write_bytes published.json"] * 3
        first = writes.index("set_registered_model_tag")  # the lease has its own tests
        some = [*(writes.index(name, first) for name in SOME), len(writes) - 1]
        for at in range(first, len(writes)) if whole else some:
            aliases.promote(config.track, "nightly", 1)
            shutil.rmtree(folder / date)
            shutil.copytree(held, folder / date)
            received[1].clear()
            assert points.ended(night, at)
            (folder / LEASE).unlink(missing_ok=True)  # of this process, which has not ended
            champion = aliases.champion(config.track, "nightly")
            assert f"models:/nightly/{champion['version']}" in ("models:/nightly/1", found["challenger"])
            check_finished(config, night(), received[1])


def test_what_did_not_accept_the_verdict_is_owed_and_sent_again(root, config, received, monkeypatch) -> None:
    def tried() -> tuple[dict[str, Any], list[str]]:
        logged: list[str] = []
        return regroup(config, NIGHT, log=logged.append), logged

    regroup(config, NIGHT)
    (root / "runs" / "regroup" / "nightly" / NIGHT / "published.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(publish, "send", lambda *_: "it answered 500")
        patch.setattr(publish, "_track", lambda *_: "no answer")
        found, logged = tried()
    assert found["owed"] == ["mlflow", "webhook"]
    assert any(
        "mlflow did not accept the verdict: no answer; the same command sends it again" in x for x in logged
    )
    received[1].clear()
    assert tried()[0]["owed"] == []
    assert tried()[0]["owed"] == []
    assert len(received[1]) == 1


def test_a_damaged_evaluation_shard_is_found_before_it_is_used(root, config, tmp_path) -> None:
    copy = tmp_path / "evaluation"
    shutil.copytree(root / "datasets" / f"date={NIGHT}", copy)
    (file,) = copy.glob("test-*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = config.regroup.model_copy(update={"evaluation": str(copy)})
    with pytest.raises(UserError, match=f"{file.name} has another checksum than the manifest says"):
        regroup(config.model_copy(update={"regroup": damaged}), "2026-03-03", dry_run=True)


@pytest.mark.soak
def test_a_night_that_is_killed_at_any_of_its_writes_is_finished(root, config, received, tmp_path) -> None:
    """Each nightly run has its own date. All of them have the same data and start from the same champion."""
    file, listing = tmp_path / "config.yaml", tmp_path / "writes"
    file.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))

    def command(at: int, date: str) -> subprocess.CompletedProcess[str]:
        words = ["regroup", "-c", str(file), "--night", date, "--json"]
        return subprocess.run(
            [sys.executable, "-m", "tests.pipelines.kill_points", str(listing), str(at), "--", *words],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    at, writes = 0, 10**9
    while at < writes:
        aliases.promote(config.track, "nightly", 1)
        date = f"{2027 + at // 300}-{at // 25 % 12 + 1:02d}-{at % 25 + 1:02d}"
        killed = command(at, date)
        count = len(listing.read_text().splitlines())
        if killed.returncode == 0:
            writes = count
            break
        assert (killed.returncode, count) == (-9, at), killed.stderr
        assert load_groups("models:/nightly@champion", config.track)
        done = command(10**9, date)
        assert done.returncode == 0, (at, listing.read_text(), done.stderr)
        check_finished(config, json.loads(done.stdout.strip().splitlines()[-1]), received[1])
        at += 1
    assert at > 50
    lost_runs.searched.clear()
    connect(config.track)
    client = connect(config.track)
    found = client.search_runs([client.get_experiment_by_name(config.track.experiment).experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    assert len(found) == at + 2
