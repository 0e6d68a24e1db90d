"""The metrics that nightly runs leave for Prometheus."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.nightly.driver import regroup
from pipelines.nightly.metrics import kept_in_a_row
from pipelines.nightly.publish import owed, publish
from pipelines.registry.aliases import promote
from pipelines.registry.tracking import connect
from pipelines.storage import locate
from tests.pipelines.monitoring.endpoints import parsed
from tests.pipelines.registry.versions import THREE, add_version

KEPT, PROMOTED = "kept", "promoted"
VERDICTS = {
    "2026-03-01": PROMOTED, "2026-03-02": KEPT, "2026-03-03": PROMOTED, "2026-03-04": KEPT, "2026-03-06": KEPT,
    "2026-03-07": KEPT,
}  # fmt: skip


def write_verdicts(root: Path) -> None:
    """The verdicts of nightly runs that are done in every other respect."""
    for date, verdict in VERDICTS.items():
        (root / date).mkdir(parents=True)
        (root / date / "verdict.json").write_text(json.dumps({"verdict": verdict, "night": date}))
        (root / date / "published.json").write_text('{"report": true, "mlflow": true}')
    (root / "2026-03-05" / "challenger").mkdir(parents=True)  # without a verdict
    (root / "lease").mkdir()


@pytest.mark.parametrize(
    ("date", "count"),
    [("2026-03-01", 0), ("2026-03-02", 1), ("2026-03-03", 0), ("2026-03-04", 1), ("2026-03-07", 3)],
)
def test_nightly_runs_that_kept_the_champion_are_counted_from_the_last_that_replaced_it(
    date: str, count: int, tmp_path: Path
) -> None:
    write_verdicts(tmp_path)
    assert kept_in_a_row(locate(str(tmp_path / date))) == count


def test_a_nightly_run_leaves_its_metrics_and_owes_them_until_they_are_accepted(tmp_path: Path) -> None:
    values = {
        "name": "wide", "data": {"shards": "shards"}, "track": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
        "regroup": {"metrics": str(tmp_path / "textfiles" / "dmtg.prom")},
    }  # fmt: skip
    config = checked(Config, values)
    for _ in range(2):
        add_version(config.track, "wide", THREE)
    promote(config.track, "wide", 1)
    write_verdicts(tmp_path / "nightly")
    folder, logged = locate(str(tmp_path / "nightly" / "2026-03-06")), []
    publish(config, folder, logged.append)
    assert owed(config, folder) == ["metrics"]
    assert "note: metrics did not accept the verdict: [Errno 2] No such file or directory" in logged[0]
    (tmp_path / "textfiles").mkdir()
    before = time.time()
    publish(config, folder, logged.append)
    assert owed(config, folder) == []
    found = parsed((tmp_path / "textfiles" / "dmtg.prom").read_text())
    labels = (("model", "wide"),)
    assert before <= found["dmtg_nightly_finished_timestamp_seconds"].pop(labels) <= time.time()
    champion = connect(config.track).get_model_version("wide", "1").creation_timestamp
    assert found == {
        "dmtg_nightly_finished_timestamp_seconds": {},
        "dmtg_nightly_kept_runs": {labels: 2.0},
        "dmtg_champion_timestamp_seconds": {labels: pytest.approx(champion / 1000)},
    }


def test_a_wrong_address_of_a_pushgateway_is_refused_before_the_nightly_run(tmp_path: Path) -> None:
    values = {
        "name": "wide", "data": {"shards": "shards"}, "run": {"root": str(tmp_path)},
        "regroup": {"metrics": "http://push gateway:9091"},
    }  # fmt: skip
    with pytest.raises(UserError, match="address, got one with spaces") as caught:
        regroup(checked(Config, values), "2026-03-01")
    assert caught.value.where == "regroup.metrics"
    assert list(tmp_path.iterdir()) == []
