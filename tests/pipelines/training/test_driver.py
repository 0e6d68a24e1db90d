"""A run on a small data set from end to end: shards, Ray Train on two workers, registry and report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml

from dmtg_core import MetricSums
from dmtg_core.training.checkpoint import load_model
from pipelines.data.manifest import read_manifest
from pipelines.errors import UserError
from pipelines.registry.models import load_groups
from pipelines.registry.versions import list_models, show_model
from pipelines.report.run import page, task_rows, verdict
from pipelines.runs.files import GATE, METRICS, read_jsonl
from pipelines.serving.evaluate import evaluate
from pipelines.storage import locate
from pipelines.training.driver import train
from pipelines.training.publish import stored_example
from tests.pipelines.conftest import make_config


def test_result_is_better_than_chance_and_has_naive_mtl_beside_it(run) -> None:
    _, done, _ = run
    assert set(done.result["metrics"]) == set(done.result["baseline"]) == {"colour", "bright", "level"}
    assert done.result["split"] == "test"
    assert done.result["trees"] == {"skipped": "extra trees read tables, got image input"}
    assert done.result["metrics"]["colour"]["accuracy"] > 0.45  # a third by chance
    assert done.result["normalized_gain"] is not None
    assert {t for group in done.result["grouping"].values() for t in group} == {"colour", "bright", "level"}


def test_the_run_folder_has_all_files_and_records(run) -> None:
    config, done, _ = run
    files = set(done.run.files())
    assert {"config.yaml", "metrics.jsonl", "gate.jsonl", "grouping.json", "result.json", "report.html"} <= files
    assert yaml.safe_load((done.run / "config.yaml").read_text())["train"]["epochs"] == config.train.epochs
    records = read_jsonl(done.run / METRICS)
    assert [(r["stage"], r["epoch"]) for r in records] == [
        *(("naive_mtl", e) for e in (1, 2, 3, 4)), ("start_0", 1), ("start_0", 2), ("start_0", 3), ("start_0", 4)
    ]  # fmt: skip
    for record in read_jsonl(done.run / GATE):
        assert np.allclose(np.sum(record["probabilities"], axis=1), 1)
    assert not [f for f in files if f.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]
    kept = [f for f in files if f.endswith("search.json")]
    assert 1 <= len(kept) <= 2


def test_every_epoch_and_tasks_with_low_support_are_logged(run) -> None:
    _, _, logged = run
    assert sum("epoch" in line and "score" in line for line in logged) == 8
    assert any(line.startswith("note: task colour has too few labels in val") for line in logged)


def test_registered_models_predict_what_the_models_of_the_run_predict(run) -> None:
    config, done, _ = run
    mlflow.set_tracking_uri(config.track.uri)
    assert [m.name for m in done.models] == ["patches", *(f"patches.{g}" for g in done.result["grouping"])]
    folder = locate(config.data.shards)
    example = stored_example(folder, read_manifest(folder), rows=8)
    expected: dict[str, np.ndarray] = {}
    for name in done.result["grouping"]:
        local = (done.run / "models" / name).local
        assert local is not None
        model = load_model(local)
        outputs = {task: value.numpy() for task, value in model.predict(torch.from_numpy(example)).items()}
        served = mlflow.pyfunc.load_model(f"models:/patches.{name}/1").predict(example)
        names = {"colour.red", "colour.green", "colour.blue", "bright.True"}
        assert set(served) - names == set(outputs)
        for task, value in outputs.items():
            assert np.array_equal(served[task], value)
        expected |= outputs
    composite = mlflow.pyfunc.load_model(done.models[0].uri).predict(example)
    assert set(composite) == {*expected, *names}
    assert all(np.array_equal(composite[task], expected[task]) for task in expected)


def test_no_registered_file_is_a_pickle(run) -> None:
    config, done, _ = run
    mlflow.set_tracking_uri(config.track.uri)
    for model in done.models:
        folder = Path(mlflow.artifacts.download_artifacts(model.uri))
        for file in folder.rglob("*"):
            assert file.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin"), file


def test_evaluate_repeats_the_metrics_of_the_run(run) -> None:
    config, done, _ = run
    for uri in (done.models[0].uri, str(done.run)):
        found = evaluate(config, uri, "test")
        for task, metrics in done.result["metrics"].items():
            for name, value in metrics.items():
                assert found[task][name] == pytest.approx(value, rel=1e-4, abs=1e-6)
    only = evaluate(config, done.models[1].uri, "test")
    assert sorted(only) == sorted(done.result["grouping"]["group_0"])


def test_evaluate_refuses_a_model_that_does_not_exist(run) -> None:
    config, _, _ = run
    with pytest.raises(UserError, match="no registered model 'no-such'"):
        evaluate(config, "models:/no-such/1")
    with pytest.raises(UserError, match="neither a registered model nor a finished run"):
        evaluate(config, str(Path(config.run.root) / "nothing"))


def test_the_same_call_reads_the_result_and_registers_nothing_twice(run) -> None:
    config, done, _ = run
    logged: list[str] = []
    again = train(config, logged.append)
    assert again.resumed
    assert again.result == done.result
    assert any("this run is finished" in line for line in logged)
    assert {m["version"] for m in list_models(config.track)} == {1}


def test_registry_shows_tasks_grouping_and_data(run) -> None:
    config, done, _ = run
    listed = {m["name"]: m for m in list_models(config.track)}
    assert set(listed) == {m.name for m in done.models}
    shown = show_model(config.track, "patches")
    assert shown["groups"] == done.result["grouping"]
    assert shown["metrics"].keys() == done.result["metrics"].keys()
    assert shown["run_id"] == done.run_id
    with pytest.raises(UserError, match="no registered model 'patch'") as found:
        show_model(config.track, "patch")
    assert "patches" in found.value.remedy


def test_tracking_holds_parameters_metrics_data_and_report(run) -> None:
    config, done, _ = run
    client = mlflow.MlflowClient(config.track.uri)
    stored = client.get_run(done.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["train.epochs"] == "4"
    stamps = [m.timestamp for m in client.get_metric_history(done.run_id, "score/naive_mtl")]
    assert all(stored.info.start_time <= stamp <= stored.info.end_time for stamp in stamps)
    assert stored.data.metrics["normalized_gain"] == pytest.approx(done.result["normalized_gain"])
    assert [len(client.get_metric_history(done.run_id, f"score/{s}")) for s in ("naive_mtl", "start_0")] == [
        4,
        4,
    ]
    assert stored.inputs.dataset_inputs[0].dataset.digest == read_manifest(locate(config.data.shards)).digest()
    assert {"report.html", "grouping.json"} <= {f.path for f in client.list_artifacts(done.run_id)}


def test_report_is_one_page_without_a_network(run) -> None:
    _, done, _ = run
    # requests of the library's script are tested in a browser, by test_browser
    html = re.sub(r"<script.*?</script>", "", page(done.run), flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    assert html.count('<svg role="img"') == 4
    assert all(f'aria-label="{label}' in html for label in ("Tasks and ", "Probability of each"))
    for row in task_rows(done.result):
        assert row["task"] in html
    assert verdict(done.result).split(".")[0] in html


def test_a_run_that_streams_has_a_result(images: Path, tmp_path: Path) -> None:
    config = make_config(
        images, tmp_path, data={"cache": "stream"}, track={"uri": "none"}, search={"baseline": False},
        train={"epochs": 2},
    )  # fmt: skip
    done = train(config)
    assert done.run_id == ""
    assert done.models == []
    assert done.result["baseline"] == {}
    assert done.result["normalized_gain"] is None
    assert "<svg" in (done.run / "report.html").read_text()


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path, train={"learning_rate": 1e30, "epochs": 2})
    with pytest.raises(UserError, match="NaN or infinite") as found:
        train(config)
    assert "train.learning_rate" in found.value.remedy
    folder = locate(config.run.root) / config.run_name()
    assert not (folder / "result.json").exists()
    tracked = mlflow.MlflowClient(config.track.uri).get_run((folder / "tracking.json").read_json()["run_id"])
    assert tracked.info.status == "FAILED"


def test_group_models_of_a_run_folder_load(run) -> None:
    config, done, _ = run
    groups = load_groups(str(done.run), config.track)
    assert {name: [t.name for t in model.tasks] for name, model in groups.items()} == done.result["grouping"]
    assert isinstance(MetricSums(groups["group_0"].tasks), MetricSums)
    assert json.loads((done.run / "grouping.json").read_text())["groups"] == done.result["grouping"]
