"""Nightly runs on drifting data: a first champion, a run that keeps it, a run that replaces it, and a rollback."""

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
from pipelines.config.regroup_section import RegroupSection
from pipelines.config.validation import checked
from pipelines.data.shards import shard
from pipelines.errors import UserError
from pipelines.nightly import webhook
from pipelines.nightly.datasets import checked_date, newest, of_date
from pipelines.nightly.driver import LEASE, _Job, regroup
from pipelines.nightly.evaluation import verdict_of
from pipelines.registry import aliases
from pipelines.registry.models import load_groups
from pipelines.registry.versions import list_models
from pipelines.runs.lease import Lease
from pipelines.storage import locate
from tests.pipelines.driver import Driver, kill

pytestmark = pytest.mark.usefixtures("plain_reports")
TASKS = [f"task_{n}" for n in range(4)]
FEATURES, ROWS = 6, 1500
DATES = ("2026-03-01", "2026-03-02", "2026-03-03")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """No pauses between requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhook, "PAUSE_S", 0.01)
        yield


def relation(x: np.ndarray, pair: int, turn: float) -> np.ndarray:
    """The relation of a task to two features. It is not linear, so that an encoder has to learn it."""
    a, b = x[:, 2 * pair], x[:, 2 * pair + 1]
    u, v = a * np.cos(turn) + b * np.sin(turn), b * np.cos(turn) - a * np.sin(turn)
    return u * v + 0.3 * u


def write_table(root: Path, seed: int, pairs: tuple[int, ...], level: float = 0.0) -> None:
    """Write the table of a date: task n depends on the pair of features `pairs[n]`."""
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
        "train": {"epochs": 8, "batch_size": 64, "learning_rate": 0.02, "trees": False},
        "search": {"baseline": False, "share": 0.3, "starts": 0, "wide": False},  # one candidate is enough
        "track": {"uri": f"sqlite:///{root / 'mlflow.db'}"},
        "run": {"root": str(root / "runs")},
        "ray": {"executor": "embedded"},
        "regroup": {"shards": str(root / "datasets"), "margin": 15.0, "limit": 25.0, "resamples": 300},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values[name] | section
    return values


def write_datasets(root: Path) -> None:
    """Write tables of three dates, and shards of the first two. On the third, two tasks need other features."""
    old, new = (0, 0, 1, 1), (2, 1, 1, 1)
    for n, (date, pairs) in enumerate(zip(DATES, (old, old, new), strict=True)):
        raw = root / f"raw-{date}"
        write_table(raw, n, pairs, level=0.5 if pairs == new else 0.0)
        if pairs == new:
            return  # its nightly run writes the shards
        like = str(root / "datasets" / f"date={DATES[0]}") if n else ""
        values = config_of(root, data={"shards": str(root / "datasets" / f"date={date}"), "like": like})
        values["source"]["root"] = str(raw)
        shard(checked(Config, values))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    write_datasets(root)
    return root


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return checked(Config, config_of(root))


@pytest.fixture(scope="module")
def received() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A receiver of webhooks: its address and the bodies it got. It answers the first request with an error."""
    bodies: list[dict[str, Any]] = []
    first = [True]

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(503 if first.pop() else 200) if first else self.send_response(200)
            self.end_headers()
            bodies.append(json.loads(body))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook", bodies
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def done(
    config: Config, root: Path, received: tuple[str, list[dict[str, Any]]], plain_reports: None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Verdict and log of every nightly run."""
    hooked = config.model_copy(update={"regroup": config.regroup.model_copy(update={"webhook": received[0]})})
    verdicts, logged = {}, {}
    for date in DATES:
        logged[date] = []
        own = hooked if date != DATES[2] else with_table(hooked, root, date)
        verdicts[date] = regroup(own, date, shard=date == DATES[2], log=logged[date].append)
    return verdicts, logged


def with_table(config: Config, root: Path, date: str) -> Config:
    """The configuration with the table of a date as its source."""
    assert config.source is not None
    source = config.source.model_copy(update={"root": str(root / f"raw-{date}")})
    return config.model_copy(update={"source": source})


def versions(config: Config) -> dict[str, list[str]]:
    """Version → aliases of the composite model."""
    return {str(m["version"]): m["aliases"] for m in list_models(config.track) if m["name"] == "nightly"}


def test_the_first_nightly_run_promotes_its_challenger(done, config: Config) -> None:
    first = done[0][DATES[0]]
    assert (first["verdict"], first["reason"], first["champion"]) == ("promoted", "there was no champion", None)
    assert first["challenger"] == "models:/nightly/1"
    assert not first["repeated"]


def test_a_nightly_run_without_a_better_model_keeps_the_champion(done) -> None:
    second = done[0][DATES[1]]
    assert second["verdict"] == "kept"
    assert "less than the margin of 15 %" in second["reason"] or "not significant" in second["reason"]
    assert second["comparison"]["samples"] > 50
    assert second["data_drift"] == []
    assert second["champion"] == "models:/nightly/1"


def test_a_nightly_run_with_other_relations_of_the_labels_replaces_the_champion(done, config: Config) -> None:
    third = done[0][DATES[2]]
    assert third["verdict"] == "promoted", third["reason"]
    compared = third["comparison"]
    assert compared["gain"]["low"] > 15
    assert compared["by_task"]["task_0"]["low"] > 0
    assert any(line.startswith("task_0: ") and "for the champion" in line for line in third["data_drift"])
    drift = third["grouping_drift"]
    assert drift["moved"]
    assert drift["adjusted_rand_index"] < 1
    assert drift["before"] == done[0][DATES[0]]["grouping"]
    assert aliases.champion(config.track, "nightly")["version"] == 3


def test_a_finished_nightly_run_is_read_and_not_repeated(done, config: Config) -> None:
    logged: list[str] = []
    again = regroup(config, DATES[1], log=logged.append)
    assert again["repeated"]
    assert {k: v for k, v in again.items() if k != "repeated"} == {
        k: v for k, v in done[0][DATES[1]].items() if k != "repeated"
    }
    assert any("the nightly run of 2026-03-02 is finished" in line for line in logged)
    assert len(mlflow.MlflowClient(config.track.uri).search_model_versions("name='nightly'")) == 3


def test_the_registry_has_all_nightly_runs_and_rolls_back(done, config: Config) -> None:
    assert "champion" in versions(config)["3"]
    assert aliases.rollback(config.track, "nightly")["version"] == 1
    assert "champion" in versions(config)["1"]
    assert load_groups("models:/nightly@champion", config.track)
    with pytest.raises(UserError):
        aliases.rollback(config.track, "nightly")
    aliases.promote(config.track, "nightly", 3)


def test_the_webhook_gets_every_verdict(done, received: tuple[str, list[dict[str, Any]]]) -> None:
    sent = [(body["night"], body["verdict"]) for body in received[1]]
    assert sent == [(DATES[0], "promoted"), *((date, done[0][date]["verdict"]) for date in DATES)]


def test_the_report_has_the_verdict_and_is_in_mlflow(done, config: Config) -> None:
    third = done[0][DATES[2]]
    page = locate(third["report"]).read_text()
    assert "replaced models:/nightly/1" in page
    assert page.count("<svg") == 3
    assert 'src="' not in page
    client = mlflow.MlflowClient(config.track.uri)
    files = {file.path for file in client.list_artifacts(third["run_id"])}
    assert {"verdict.json", "regroup.html"} <= files
    assert client.get_run(third["run_id"]).data.tags["dmtg.verdict"] == "promoted"


def test_another_configuration_of_a_nightly_run_is_refused(done, config: Config, root: Path) -> None:
    (locate(config.run.root) / "regroup" / "nightly" / "2026-03-04" / "plan.json").write_json(
        {**json.loads(next(root.glob("runs/regroup/nightly/*/plan.json")).read_text()), "config": "another"}
    )
    with pytest.raises(UserError, match="started with another configuration"):
        regroup(config, "2026-03-04")


def test_a_nightly_run_is_not_continued_on_other_data(done, config: Config, root: Path) -> None:
    held = json.loads(next(root.glob("runs/regroup/nightly/*/plan.json")).read_text())
    job = _Job(config, locate(str(root / "runs" / "changed")), None, None, print, trust_code=False)
    (job.folder / "plan.json").write_json({**held, "config": job.digest()})
    assert job.plan("2026-03-04").digest == held["digest"]
    (job.folder / "plan.json").write_json({**held, "config": job.digest(), "digest": "another"})
    with pytest.raises(UserError, match="the training data has changed since the nightly run"):
        job.plan("2026-03-04")


def test_a_second_job_at_the_same_time_is_refused(done, config: Config) -> None:
    held = Lease(locate(config.run.root) / "regroup" / "nightly" / LEASE, 60, "regroup of nightly")
    with held.held(), pytest.raises(UserError, match="another regroup of nightly is running"):
        regroup(config, "2026-03-05")


def test_a_dry_run_does_not_change_the_registry_and_its_training_is_reused(
    done, config: Config, tmp_path: Path
) -> None:
    values = config.model_dump(mode="json")
    values["run"]["root"] = str(tmp_path / "runs")
    values["train"]["epochs"] = 2  # no better than the champion
    fresh = checked(Config, values)
    before = [(m["name"], m["version"], m["aliases"]) for m in list_models(fresh.track)]
    found = regroup(fresh, "2026-03-06", dry_run=True)
    assert found["dry_run"]
    assert found["verdict"] == "kept"  # the data is that of the champion
    assert any("no finished data set of 2026-03-06" in note for note in found["notes"])
    assert [(m["name"], m["version"], m["aliases"]) for m in list_models(fresh.track)] == before
    folder = tmp_path / "runs" / "regroup" / "nightly" / "2026-03-06"
    assert not (folder / "verdict.json").exists()
    trained = (folder / "challenger" / "result.json").stat().st_mtime_ns
    assert regroup(fresh, "2026-03-06")["verdict"] == "kept"
    assert (folder / "challenger" / "result.json").stat().st_mtime_ns == trained
    assert "champion" in versions(fresh)["3"]
    assert "challenger" in versions(fresh)["4"]


def test_data_with_another_encoding_is_refused(done, config: Config, root: Path, tmp_path: Path) -> None:
    values = config_of(root, data={"shards": str(tmp_path / "shards"), "like": ""}, regroup={"shards": ""})
    values["source"]["root"] = str(root / f"raw-{DATES[1]}")
    values["run"]["root"] = str(tmp_path / "runs")
    with pytest.raises(UserError, match="another encoding than the data of the champion") as found:
        regroup(checked(Config, values), "2026-03-07")
    assert "data.like" in found.value.remedy


def test_evaluation_data_that_is_trained_on_is_refused(done, config: Config, root: Path, tmp_path: Path) -> None:
    section = config.regroup.model_copy(
        update={"evaluation": str(root / "datasets" / f"date={DATES[2]}"), "split": "val"}
    )
    values = config.model_dump(mode="json")
    values["run"]["root"] = str(tmp_path / "runs")
    values["regroup"] = section.model_dump(mode="json") | {"shards": str(tmp_path / "copy")}
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / DATES[2]).symlink_to(root / "datasets" / f"date={DATES[2]}")
    with pytest.raises(UserError, match="samples of the evaluation are in the training data"):
        regroup(checked(Config, values), DATES[2])


def test_the_options_of_a_nightly_run_are_checked_first(config: Config, tmp_path: Path) -> None:
    untracked = config.model_copy(update={"track": config.track.model_copy(update={"uri": "none"})})
    with pytest.raises(UserError, match="needs a model registry"):
        regroup(untracked)
    for wrong in ("yesterday", "2026-3-1", "2026-13-01"):
        with pytest.raises(UserError, match="expected a date") as found:
            checked_date(wrong)
        assert found.value.wrong_use
    with pytest.raises(UserError, match="expected an http"):
        regroup(
            config.model_copy(update={"regroup": config.regroup.model_copy(update={"webhook": "file:///etc/x"})})
        )


def test_the_data_set_of_a_date_is_beside_the_others_and_prepared_like_the_newest(tmp_path: Path) -> None:
    config = listed(tmp_path, str(tmp_path / "sets"))
    assert of_date(config, "2026-02-01").data.shards == f"{tmp_path}/sets/2026-02-01"
    assert of_date(config, "2026-02-01").data.like == ""
    for name in ("date=2026-01-01", "date=2026-01-03", "date=2026-01-05", "date=2026-03-01"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        if name != "date=2026-01-05":
            (tmp_path / "sets" / name / "_manifest.json").touch()
    found = of_date(config, "2026-02-01").data
    assert (found.shards, found.like) == (f"{tmp_path}/sets/date=2026-02-01", f"{tmp_path}/sets/date=2026-01-03")
    own = config.model_copy(update={"data": config.data.model_copy(update={"like": "mine"})})
    assert of_date(own, "2026-02-01").data.like == "mine"


def test_a_data_set_of_a_date_needs_a_source_and_a_folder(tmp_path: Path) -> None:
    for wrong, named in (
        (listed(tmp_path, ""), "needs a folder in regroup.shards"),
        (listed(tmp_path, "sets.json"), "needs a folder in regroup.shards"),
        (listed(tmp_path, "sets").model_copy(update={"source": None}), "needs a source"),
    ):
        with pytest.raises(UserError, match=named) as found:
            regroup(wrong, "2026-02-01", shard=True)
        assert found.value.wrong_use


def listed(root: Path, place: str) -> Config:
    return checked(Config, config_of(root, regroup={"shards": place}))


def test_the_newest_finished_data_set_up_to_the_date_is_used(tmp_path: Path) -> None:
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


def test_a_listing_has_the_addresses_of_the_data_sets(tmp_path: Path) -> None:
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
    ("found", "verdict", "reason"),
    [
        (compared(2.0, 0.5, a=3.0, b=1.0), "promoted", "gain +2.00 % (95% interval +0.50 to +2.00 %)"),
        (compared(0.4, 0.2, a=0.4), "kept", "less than the margin of 0.5 %"),
        (compared(2.0, -0.1, a=2.0), "kept", "not significant"),
        (compared(9.0, 5.0, a=30.0, b=-6.0), "kept", "b -6.00 %, the limit is -5 %"),
        (compared(9.0, 5.0, a=30.0, c=-6.0), "promoted", "+9.00"),
        (compared(9.0, 5.0, a=30.0, d=-1.5), "kept", "d -1.50 %, the limit is -1 %"),
        (compared(None, None, a=None), "kept", "less than the margin"),
        (compared(9.0, 5.0, a=30.0, b=None), "kept", "lose too much"),
    ],
)
def test_the_rule_of_promotion(found: dict[str, Any], verdict: str, reason: str) -> None:
    rules = RegroupSection(margin=0.5, limit=5.0, limits={"c": 10.0, "d": 1.0})
    outcome = verdict_of(found, rules)
    assert outcome[0] == verdict
    assert reason in outcome[1]


def nightly_command(driver: Driver, options: list[str]) -> Callable[[], Any]:
    """The command of a nightly run, which starts it as a process."""
    command = driver.command()
    at = command.index("train")
    return lambda: driver.start_command([*command[:at], "regroup", *command[at + 1 :], *options])


@pytest.mark.soak
def test_after_ten_kills_a_champion_serves_and_the_next_job_finishes_the_nightly_run(
    root: Path, tmp_path: Path
) -> None:
    values = config_of(root, track={"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"})
    values["run"] = {"root": str(tmp_path / "runs")}
    values["regroup"] |= {"lease_s": 5}
    config = checked(Config, values)
    regroup(config, DATES[0])
    values["source"]["root"] = str(root / f"raw-{DATES[2]}")
    driver = Driver(tmp_path, yaml.safe_load(yaml.safe_dump(values)))
    points, moments = random.Random(4), []  # noqa: S311 - moments, not secrets
    started = time.monotonic()
    begin = nightly_command(driver, ["--night", DATES[2], "--shard", "--kept-ok"])
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
