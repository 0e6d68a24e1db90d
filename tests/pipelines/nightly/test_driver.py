"""Nights on drifting data: a first champion, a night that keeps it, one that replaces it, and back again."""

from __future__ import annotations

import http.server
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from pipelines.config.loading import Config
from pipelines.config.sections import RegroupSection
from pipelines.config.validation import checked
from pipelines.data.shards import shard
from pipelines.errors import UserError
from pipelines.nightly.datasets import checked_night, newest
from pipelines.nightly.driver import LEASE, regroup
from pipelines.nightly.evaluation import verdict_of
from pipelines.nightly.lease import Lease
from pipelines.registry import aliases
from pipelines.registry.models import load_groups
from pipelines.registry.versions import list_models
from pipelines.storage import locate
from tests.pipelines.driver import Driver, kill

pytestmark = pytest.mark.ray
TASKS = [f"task_{n}" for n in range(4)]
FEATURES, ROWS = 6, 2000
NIGHTS = ("2026-03-01", "2026-03-02", "2026-03-03")


def relation(x: np.ndarray, pair: int, turn: float) -> np.ndarray:
    """What a task asks of two of the features; not linear, so that an encoder has something to learn."""
    a, b = x[:, 2 * pair], x[:, 2 * pair + 1]
    u, v = a * np.cos(turn) + b * np.sin(turn), b * np.cos(turn) - a * np.sin(turn)
    return u * v + 0.3 * u


def write_night(root: Path, seed: int, pairs: tuple[int, ...], level: float = 0.0) -> None:
    """A table of one night: task n asks of the pair of features `pairs[n]`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, FEATURES))
    table = pd.DataFrame(x, columns=[f"x{i}" for i in range(FEATURES)]).round(4)
    for n, name in enumerate(TASKS):
        table[name] = (relation(x, pairs[n], 0.6 * n) + 0.2 * rng.normal(size=ROWS) > level).astype(int)
    table["amount"] = (10 + 3 * x[:, 0] * x[:, 1] + rng.normal(size=ROWS)).round(3)
    table["id"] = [f"{seed}-{i}" for i in range(ROWS)]
    root.mkdir(parents=True)
    table.to_csv(root / "table.csv", index=False)


def config_of(root: Path, **sections: Any) -> dict[str, Any]:
    tasks = [{"column": name, "kind": "binary"} for name in TASKS] + [{"column": "amount", "kind": "regression"}]
    values: dict[str, Any] = {
        "name": "nightly",
        "source": {
            "kind": "table",
            "root": str(root / "raw"),
            "options": {"file": "table.csv", "id_column": "id", "tasks": tasks},
        },
        "data": {"shards": str(root / "shards"), "min_support": 1},
        "network": {"encoder": "mlp", "groups": 2, "options": {"widths": [32, 16]}},
        "gate": {"learning_rate": 0.05},
        "train": {"epochs": 12, "batch_size": 64, "learning_rate": 0.01},
        "search": {"baseline": False, "share": 0.3, "starts": 0, "wide": False},  # one candidate will do
        "track": {"uri": f"sqlite:///{root / 'mlflow.db'}"},
        "run": {"root": str(root / "runs")},
        "ray": {"workers": 1, "object_store_mib": 128},
        "regroup": {"shards": str(root / "nights"), "margin": 15.0, "limit": 25.0, "resamples": 300},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values[name] | section
    return values


def make_nights(root: Path) -> None:
    """Shards of three nights: of the third on, the first two tasks ask of other features."""
    old, new = (0, 0, 1, 1), (2, 1, 1, 1)
    for n, (night, pairs) in enumerate(zip(NIGHTS, (old, old, new), strict=True)):
        raw = root / f"raw-{night}"
        write_night(raw, n, pairs, level=0.5 if pairs == new else 0.0)
        like = str(root / "nights" / f"date={NIGHTS[0]}") if n else ""
        values = config_of(root, data={"shards": str(root / "nights" / f"date={night}"), "like": like})
        values["source"]["root"] = str(raw)
        shard(checked(Config, values))


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    root = tmp_path_factory.mktemp("nights")
    make_nights(root)
    return root


@pytest.fixture(scope="module")
def config(nights: Path) -> Config:
    return checked(Config, config_of(nights))


@pytest.fixture(scope="module")
def received() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A receiver of webhooks: its address, and what it was sent. It answers the first one as if it were down."""
    bodies: list[dict[str, Any]] = []
    first = [True]

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(503 if first.pop() else 200) if first else self.send_response(200)
            self.end_headers()
            bodies.append(json.loads(body))

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook", bodies
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def done(
    config: Config, nights: Path, received: tuple[str, list[dict[str, Any]]]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """The verdict of every night, and what was said."""
    hooked = config.model_copy(update={"regroup": config.regroup.model_copy(update={"webhook": received[0]})})
    verdicts, logged = {}, {}
    for night in NIGHTS:
        logged[night] = []
        verdicts[night] = regroup(hooked, night, log=logged[night].append)
    return verdicts, logged


def versions(config: Config) -> dict[str, list[str]]:
    """Version → aliases of the composite."""
    return {str(m["version"]): m["aliases"] for m in list_models(config.track) if m["name"] == "nightly"}


def test_the_first_night_has_a_champion(done, config: Config) -> None:
    first = done[0][NIGHTS[0]]
    assert (first["verdict"], first["reason"], first["champion"]) == ("promoted", "there was no champion", None)
    assert first["challenger"] == "models:/nightly/1"
    assert not first["repeated"]


def test_a_night_without_a_better_model_keeps_it(done) -> None:
    second = done[0][NIGHTS[1]]
    assert second["verdict"] == "kept"
    assert "it had to fall by 15 %" in second["reason"] or "chance" in second["reason"]
    assert second["comparison"]["samples"] > 50
    assert second["data_drift"] == []
    assert second["champion"] == "models:/nightly/1"


def test_a_night_on_which_the_labels_ask_for_something_else_replaces_it(done, config: Config) -> None:
    third = done[0][NIGHTS[2]]
    assert third["verdict"] == "promoted", third["reason"]
    compared = third["comparison"]
    assert compared["gain"]["low"] > 15
    assert compared["by_task"]["task_0"]["low"] > 0
    assert any(line.startswith("task_0: ") and "for the champion" in line for line in third["data_drift"])
    drift = third["grouping_drift"]
    assert drift["moved"]
    assert drift["adjusted_rand_index"] < 1
    assert drift["before"] == done[0][NIGHTS[0]]["grouping"]
    assert aliases.champion(config.track, "nightly")["version"] == 3


def test_the_same_night_again_is_read_and_not_repeated(done, config: Config) -> None:
    logged: list[str] = []
    again = regroup(config, NIGHTS[1], log=logged.append)
    assert again["repeated"]
    assert {k: v for k, v in again.items() if k != "repeated"} == {
        k: v for k, v in done[0][NIGHTS[1]].items() if k != "repeated"
    }
    assert any("this night is done" in line for line in logged)
    assert len(mlflow.MlflowClient(config.track.uri).search_model_versions("name='nightly'")) == 3


def test_the_registry_shows_all_nights_and_rolls_back(done, config: Config) -> None:
    assert "champion" in versions(config)["3"]
    assert aliases.rollback(config.track, "nightly")["version"] == 1
    assert "champion" in versions(config)["1"]
    assert load_groups("models:/nightly@champion", config.track)
    with pytest.raises(UserError):
        aliases.rollback(config.track, "nightly")
    aliases.promote(config.track, "nightly", 3)


def test_the_webhook_had_every_verdict(done, received: tuple[str, list[dict[str, Any]]]) -> None:
    told = [(body["night"], body["verdict"]) for body in received[1]]
    assert told == [(NIGHTS[0], "promoted"), *((night, done[0][night]["verdict"]) for night in NIGHTS)]


def test_the_page_says_what_happened_and_is_in_mlflow(done, config: Config) -> None:
    third = done[0][NIGHTS[2]]
    page = locate(third["report"]).read_text()
    assert "replaced models:/nightly/1" in page
    assert page.count("<svg") == 3
    assert 'src="' not in page
    client = mlflow.MlflowClient(config.track.uri)
    files = {file.path for file in client.list_artifacts(third["run_id"])}
    assert {"verdict.json", "regroup.html"} <= files
    assert client.get_run(third["run_id"]).data.tags["dmtg.verdict"] == "promoted"


def test_another_configuration_of_a_night_is_refused(done, config: Config, nights: Path) -> None:
    (locate(config.run.root) / "regroup" / "nightly" / "2026-03-04" / "night.json").write_json(
        {**json.loads(next(nights.glob("runs/regroup/nightly/*/night.json")).read_text()), "config": "another"}
    )
    with pytest.raises(UserError, match="begun with another configuration"):
        regroup(config, "2026-03-04")


def test_two_at_once_the_second_leaves(done, config: Config) -> None:
    held = Lease(locate(config.run.root) / "regroup" / "nightly" / LEASE, 60, "regroup of nightly")
    with held.held(), pytest.raises(UserError, match="another regroup of nightly is running"):
        regroup(config, "2026-03-05")


def test_a_dry_run_leaves_no_trace_in_the_registry_and_its_work_is_used(
    done, config: Config, tmp_path: Path
) -> None:
    values = config.model_dump(mode="json")
    values["run"]["root"] = str(tmp_path / "runs")
    fresh = checked(Config, values)
    before = [(m["name"], m["version"], m["aliases"]) for m in list_models(fresh.track)]
    found = regroup(fresh, "2026-03-06", dry_run=True)
    assert found["dry_run"]
    assert found["verdict"] == "kept"  # the data is that of the champion
    assert any("newest data is of 2026-03-03" in note for note in found["notes"])
    assert [(m["name"], m["version"], m["aliases"]) for m in list_models(fresh.track)] == before
    folder = tmp_path / "runs" / "regroup" / "nightly" / "2026-03-06"
    assert not (folder / "verdict.json").exists()
    trained = (folder / "challenger" / "result.json").stat().st_mtime_ns
    assert regroup(fresh, "2026-03-06")["verdict"] == "kept"
    assert (folder / "challenger" / "result.json").stat().st_mtime_ns == trained
    assert "champion" in versions(fresh)["3"]
    assert "challenger" in versions(fresh)["4"]


def test_data_that_is_encoded_otherwise_is_refused(done, config: Config, nights: Path, tmp_path: Path) -> None:
    values = config_of(nights, data={"shards": str(tmp_path / "shards"), "like": ""}, regroup={"shards": ""})
    values["source"]["root"] = str(nights / f"raw-{NIGHTS[1]}")
    values["run"]["root"] = str(tmp_path / "runs")
    with pytest.raises(UserError, match="encoded otherwise than that of the champion") as found:
        regroup(checked(Config, values), "2026-03-07")
    assert "data.like" in found.value.remedy


def test_evaluation_data_that_is_trained_on_is_refused(done, config: Config, nights: Path, tmp_path: Path) -> None:
    section = config.regroup.model_copy(
        update={"evaluation": str(nights / "nights" / f"date={NIGHTS[2]}"), "split": "val"}
    )
    values = config.model_dump(mode="json")
    values["run"]["root"] = str(tmp_path / "runs")
    values["regroup"] = section.model_dump(mode="json") | {"shards": str(tmp_path / "copy")}
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / NIGHTS[2]).symlink_to(nights / "nights" / f"date={NIGHTS[2]}")
    with pytest.raises(UserError, match="samples of the evaluation are in the data to train on"):
        regroup(checked(Config, values), NIGHTS[2])


def test_what_a_night_needs_is_checked_first(config: Config, tmp_path: Path) -> None:
    untracked = config.model_copy(update={"track": config.track.model_copy(update={"uri": "none"})})
    with pytest.raises(UserError, match="needs a model registry"):
        regroup(untracked)
    for wrong in ("yesterday", "2026-3-1", "2026-13-01"):
        with pytest.raises(UserError, match="expected a date") as found:
            checked_night(wrong)
        assert found.value.wrong_use
    with pytest.raises(UserError, match="expected an http"):
        regroup(
            config.model_copy(update={"regroup": config.regroup.model_copy(update={"webhook": "file:///etc/x"})})
        )


def listed(root: Path, place: str) -> Config:
    return checked(Config, config_of(root, regroup={"shards": place}))


def test_the_newest_finished_data_set_up_to_the_night_is_taken(tmp_path: Path) -> None:
    for name in ("2026-01-01", "date=2026-01-03", "2026-01-05", "other", "2026-01-04x"):
        (tmp_path / "sets" / name).mkdir(parents=True)
    for name in ("2026-01-01", "date=2026-01-03"):
        (tmp_path / "sets" / name / "_manifest.json").touch()
    logged: list[str] = []
    sets = listed(tmp_path, str(tmp_path / "sets"))
    assert newest(sets, "2026-01-03", logged.append).shards.endswith("date=2026-01-03")
    assert logged == []
    assert newest(sets, "2026-01-05", logged.append).date == "2026-01-03"
    assert "2026-01-05 is not finished" in logged[0]
    assert newest(sets, "2026-01-02", logged.append).date == "2026-01-01"
    with pytest.raises(UserError, match="no finished data set up to 2025-12-31"):
        newest(sets, "2025-12-31", logged.append)


def test_a_listing_says_where_the_data_sets_are(tmp_path: Path) -> None:
    entries = [{"date": d, "shards": str(tmp_path / d)} for d in ("2026-01-01", "2026-01-02")]
    (tmp_path / "2026-01-01").mkdir()
    (tmp_path / "2026-01-01" / "_manifest.json").touch()
    (tmp_path / "sets.json").write_text(json.dumps(entries))
    found = newest(listed(tmp_path, str(tmp_path / "sets.json")), "2026-02-01", lambda _: None)
    assert (found.date, found.shards) == ("2026-01-01", str(tmp_path / "2026-01-01"))
    for wrong in ('{"date": 1}', '[{"date": "x", "shards": "y"}]', '[{"shards": "y"}]', "[1]"):
        (tmp_path / "sets.json").write_text(wrong)
        with pytest.raises(UserError, match="expected a list"):
            newest(listed(tmp_path, str(tmp_path / "sets.json")), "2026-02-01", lambda _: None)


def compared(value: float | None, low: float | None, **tasks: float | None) -> dict[str, Any]:
    by_task = {name: {"value": one, "low": one, "high": one} for name, one in tasks.items()}
    gain = {"value": value, "low": low, "high": value}
    return {"gain": gain, "by_task": by_task, "champion": {}, "challenger": {}, "likely": 0.5, "samples": 9}


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (compared(2.0, 0.5, a=3.0, b=1.0), "promoted", "-2.00 %"),
        (compared(0.4, 0.2, a=0.4), "kept", "had to fall by 0.5 %"),
        (compared(2.0, -0.1, a=2.0), "kept", "may be chance"),
        (compared(9.0, 5.0, a=30.0, b=-6.0), "kept", "b +6.00 %, allowed +5 %"),
        (compared(9.0, 5.0, a=30.0, c=-6.0), "promoted", "-9.00"),
        (compared(9.0, 5.0, a=30.0, d=-1.5), "kept", "d +1.50 %, allowed +1 %"),
        (compared(None, None, a=None), "kept", "had to fall"),
        (compared(9.0, 5.0, a=30.0, b=None), "kept", "rose too far"),
    ],
)
def test_the_rule_of_promotion(found: dict[str, Any], verdict: str, words: str) -> None:
    rules = RegroupSection(margin=0.5, limit=5.0, limits={"c": 10.0, "d": 1.0})
    logged = verdict_of(found, rules)
    assert logged[0] == verdict
    assert words in logged[1]


def outcome_of(driver: Driver, words: list[str]) -> Callable[[], Any]:
    """The command of a night as a process of its own."""
    command = driver.command()
    at = command.index("train")
    return lambda: driver.start_command([*command[:at], "regroup", *command[at + 1 :], *words])


@pytest.mark.soak
def test_killed_at_ten_points_a_champion_serves_and_the_next_run_ends_the_night(
    nights: Path, tmp_path: Path
) -> None:
    values = config_of(nights, track={"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"})
    values["run"] = {"root": str(tmp_path / "runs")}
    values["regroup"] |= {"lease_s": 5}
    config = checked(Config, values)
    driver = Driver(tmp_path, yaml.safe_load(yaml.safe_dump(values)))
    regroup(config, NIGHTS[0])
    points, moments = random.Random(4), []  # noqa: S311 - moments, not secrets
    started = time.monotonic()
    begin = outcome_of(driver, ["--night", NIGHTS[2], "--kept-ok"])
    for _ in range(10):
        process = begin()
        until = time.monotonic() + points.uniform(1, 40)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        moments.append(round(time.monotonic() - started, 1))
        kill(driver.family())
        process.wait()
        champion = aliases.champion(config.track, "nightly")
        assert champion is not None
        assert load_groups("models:/nightly@champion", config.track), moments
    assert begin().wait() == 0, driver.log
    found = driver.outcome()
    assert found["verdict"] == "promoted"
    assert aliases.champion(config.track, "nightly")["version"] == int(found["challenger"].rsplit("/", 1)[1])
    assert len(mlflow.MlflowClient(config.track.uri).search_model_versions("name='nightly'")) == 2
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
