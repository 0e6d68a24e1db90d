"""`dmtg predict MODEL new.csv`: the predictions of MLflow, of a server and of the library, for all kinds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.pyfunc import scoring_server
from PIL import Image
from typer.testing import CliRunner, Result

from dmtg_core.network.grouping_network import GroupModel
from pipelines.cli.app import app
from pipelines.config.sections import TrackSection
from pipelines.data.preprocessing import load_preparation, prepare
from pipelines.data.sources.base import INPUT
from pipelines.registry.models import load_groups
from pipelines.serving import new_rows
from tests.pipelines.serving.registered import FRAME, NEW, OPTIONS, Model, register, write_data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def track(root: Path) -> dict[str, str]:
    return {"uri": f"sqlite:///{root / 'mlflow.db'}"}


@pytest.fixture(scope="module")
def models(root: Path, track: dict[str, str]) -> dict[str, Model]:
    """A registered model of each kind."""
    return register(root, track)


@pytest.fixture
def dmtg(tmp_path: Path, track: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`dmtg predict` with a model and more arguments, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(app, ["predict", *arguments, "--uri", track["uri"]], input=stdin)

    return call


def expected(groups: Mapping[str, GroupModel], stored: np.ndarray) -> dict[str, np.ndarray]:
    """Task → predictions of the library."""
    found: dict[str, np.ndarray] = {}
    for model in groups.values():
        found |= {task: value.numpy() for task, value in model.eval().predict(torch.from_numpy(stored)).items()}
    return found


def same(frame: pd.DataFrame, values: Mapping[str, Any]) -> None:
    """The columns of a file are the values, of a row or of several."""
    shares = np.asarray(values["grade"])
    for task in ("sick", "cost"):
        np.testing.assert_allclose(frame[task], values[task], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(frame[["grade.nah", "grade.fern, weit"]], shares, rtol=1e-5, atol=1e-7)
    if "krank" in frame:
        np.testing.assert_allclose(frame["krank.ja"], values["krank"], rtol=1e-5, atol=1e-7)
        assert list(frame["krank"]) == ["ja" if share > 0.5 else "nein" for share in np.asarray(values["krank"])]
    assert list(frame["grade"]) == [("nah", "fern, weit")[best] for best in shares.argmax(1)]


def test_files_mlflow_a_server_and_the_library_predict_the_same(models, track, dmtg, tmp_path) -> None:
    model = models["rows"]
    NEW.to_csv("new.csv", index=False)
    done = dmtg(model.uri, "new.csv", "-o", "out.csv")
    assert done.exit_code == 0, done.stderr
    assert "not read: note, extra" in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("sick", "grade", "cost", "krank"))]
    told = [line.split("  ")[-1].strip() for line in lines]
    assert told == ["probability of 1", "class", "value", "nein or ja"]
    found = pd.read_csv("out.csv")
    assert list(found) == ["key", "sick", "grade", "grade.nah", "grade.fern, weit", "cost", "krank", "krank.ja"]
    assert list(found["key"]) == ["s", "r", "q", "p"]

    how = load_preparation(model.source.describe().preparation)
    groups = load_groups(model.uri, TrackSection(**track))
    same(found, expected(groups, prepare(how, NEW)))
    composite = mlflow.pyfunc.load_model(model.uri)
    same(found, composite.predict(NEW))
    pieces = [mlflow.pyfunc.load_model(uri).predict(NEW) for uri in model.groups]
    same(found, pieces[0] | pieces[1])

    named = {name: composite.predict(NEW)[name] for name in ("grade.nah", "grade.fern, weit", "krank.ja")}
    assert set(composite.predict(NEW)) == {"sick", "grade", "cost", "krank", *named}
    for name, shares in named.items():
        np.testing.assert_allclose(found[name], shares, rtol=1e-5, atol=1e-7)
    assert set(composite.metadata.get_output_schema().input_names()) == set(composite.predict(NEW))

    server = TestClient(scoring_server.init(composite))
    text = NEW.to_csv(index=False)
    records = NEW.assign(age=[30, None, 40.5, 20]).to_dict("records")
    bodies = {
        "text/csv": text,
        "application/json": json.dumps({"dataframe_records": records}).replace("NaN", "null"),
    }
    for kind, body in bodies.items():
        answer = server.post("/invocations", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text
        answers = answer.json()["predictions"]
        same(found, answers)
        np.testing.assert_allclose(answers["krank.ja"], found["krank.ja"], rtol=1e-5, atol=1e-7)
    wrong = server.post("/invocations", content='age\n"', headers={"Content-Type": "text/csv"})
    assert wrong.status_code == 400
    assert "not a CSV table" in wrong.text

    alone = dmtg(model.groups[1], "new.csv", "-o", "cost.csv")
    assert alone.exit_code == 0, alone.stderr
    assert pd.read_csv("cost.csv").equals(found[["key", "cost", "krank", "krank.ja"]])


def test_every_format_and_every_place_of_a_model(models, dmtg, tmp_path) -> None:
    model = models["rows"]
    NEW.to_csv("new.csv", index=False)
    NEW.to_parquet("new.parquet", index=False)
    NEW.to_json("new.jsonl", orient="records", lines=True)
    saved = mlflow.artifacts.download_artifacts(model.uri, dst_path=str(tmp_path / "saved"))
    assert dmtg(model.uri, "new.csv", "-o", "out.csv").exit_code == 0
    text = Path("out.csv").read_text()
    for arguments in ([saved, "new.parquet"], [str(model.run.run), "new.jsonl", "--id", "key"]):
        done = dmtg(*arguments)
        assert done.exit_code == 0, done.stderr
        assert done.stdout == text
    for data in (Path("new.jsonl").read_bytes(), Path("new.parquet").read_bytes(), Path("new.csv").read_bytes()):
        assert dmtg(model.uri, "-", "-o", "-", stdin=data).stdout == text
    first = pd.read_csv("out.csv")
    assert dmtg(model.uri, "new.csv", "-o", "out.parquet").exit_code == 0
    assert dmtg(model.uri, "new.csv", "-o", "out.jsonl").exit_code == 0
    for other in (pd.read_parquet("out.parquet"), pd.read_json("out.jsonl", lines=True)):
        pd.testing.assert_frame_equal(other, first, check_dtype=False, rtol=1e-5)


def test_rows_without_ids_are_numbered_across_files_in_blocks(models, dmtg, monkeypatch) -> None:
    sizes, whole = [], new_rows.predicted
    monkeypatch.setattr(new_rows, "BLOCK_ROWS", 3)
    monkeypatch.setattr(new_rows, "predicted", lambda *a: sizes.append(len(a[1])) or whole(*a))
    NEW.drop(columns="key").to_csv("new.csv", index=False)
    NEW[["plant", "smoker", "age"]].to_csv("more.csv", index=False)
    done = dmtg(models["rows"].uri, "new.csv", "more.csv", "-o", "out.parquet")
    assert done.exit_code == 0, done.stderr
    assert "rows are numbered" in done.stderr
    found = pd.read_parquet("out.parquet")
    assert list(found["row"]) == list(range(1, 9))
    assert sizes == [3, 3, 2]
    np.testing.assert_allclose(found["cost"][:4], found["cost"][4:], rtol=1e-5)


def test_a_file_in_another_dialect_has_the_same_predictions(models, dmtg) -> None:
    NEW.to_csv("new.csv", index=False)
    assert dmtg(models["rows"].uri, "new.csv", "-o", "out.csv").exit_code == 0
    written = NEW.assign(age=NEW["age"].str.replace(".", ","), extra="größer").to_csv(index=False, sep=";")
    Path("german.csv").write_bytes(written.encode("cp1252"))
    done = dmtg(models["rows"].uri, "german.csv", "-o", "german_out.csv")
    assert done.exit_code == 0, done.stderr
    assert Path("german_out.csv").read_text() == Path("out.csv").read_text()


def test_values_that_training_did_not_have_are_counted(models, dmtg) -> None:
    NEW.assign(plant=["oak", "elm", "001", "oak"]).to_csv("new.csv", index=False)
    done = dmtg(models["rows"].uri, "new.csv", "-o", "out.csv")
    assert "column plant: 3 of 4 cells have a value that training did not have: 'oak', 'elm'" in " ".join(
        done.stderr.split()
    )
    NEW[NEW["key"] != "s"].to_csv("known.csv", index=False)  # s was not in training
    assert "training did not have" not in dmtg(models["rows"].uri, "known.csv", "-o", "known_out.csv").stderr


def test_bad_rows_are_named_and_refused_or_skipped(models, dmtg) -> None:
    NEW.assign(age=["30", "old", "40", "1e99"]).to_csv("new.csv", index=False)
    refused = dmtg(models["rows"].uri, "new.csv", "-o", "out.csv")
    assert refused.exit_code == 1
    assert "2 rows cannot be used: new.csv, line 3: 'old' in column age" in refused.stderr
    assert "new.csv, line 5: '1e99' in column age" in refused.stderr
    assert not Path("out.csv").exists()
    skipped = dmtg(models["rows"].uri, "new.csv", "-o", "out.csv", "--bad-rows", "skip", "--json")
    assert skipped.exit_code == 0, skipped.stderr
    assert "new.csv, line 3: 'old' in column age" in skipped.stderr
    told = json.loads(skipped.stdout.splitlines()[-1])
    assert (told["rows"], told["skipped"]) == (2, 2)
    assert list(pd.read_csv("out.csv")["key"]) == ["s", "q"]
    NEW.assign(age="old").to_csv("none.csv", index=False)
    assert "no row is left" in dmtg(models["rows"].uri, "none.csv", "--bad-rows", "skip").stderr


def test_lines_with_another_number_of_cells_are_bad_rows(models, dmtg) -> None:
    header, *lines = NEW[["key", "age", "plant", "smoker"]].to_csv(index=False).splitlines()
    lines[0], lines[2] = "s,30,01", "q,40.5,1,FALSE,x,y"
    Path("new.csv").write_text("\n".join([header, *lines]) + "\n")
    refused = dmtg(models["rows"].uri, "new.csv", "-o", "out.csv")
    assert refused.exit_code == 1
    assert "2 rows cannot be used: new.csv, line 2: has 3 cells, expected 4" in " ".join(refused.stderr.split())
    assert not Path("out.csv").exists()
    skipped = dmtg(models["rows"].uri, "new.csv", "-o", "out.csv", "--bad-rows", "skip", "--json")
    assert skipped.exit_code == 0, skipped.stderr
    assert "line 4: has 6 cells, expected 4: 'x' is after the last column, smoker" in " ".join(
        skipped.stderr.split()
    )
    told = json.loads(skipped.stdout.splitlines()[-1])
    assert (told["rows"], told["skipped"]) == (2, 2)
    assert list(pd.read_csv("out.csv")["key"]) == ["r", "p"]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["narrow.csv", "-o", "out.csv"], 1, "no column plant"),
        (["new.csv", "-o", "out.csv", "--id", "number"], 1, "no column number"),
        (["new.csv", "-o", "held.csv"], 2, "the file exists already"),
        (["new.csv", "-o", "new.csv", "--force"], 2, "would replace their input"),
        (["new.csv", "-o", "out.xlsx"], 2, "says no format"),
        (["new.csv", "--json"], 2, "stdout cannot hold both"),
        (["absent.csv", "-o", "out.csv"], 1, "does not exist"),
        (["empty.jsonl", "-o", "out.csv"], 1, "no rows"),
        ([], 2, "give a file with new rows"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    models, dmtg, tmp_path, arguments, code, problem
) -> None:
    NEW.to_csv("new.csv", index=False)
    NEW.drop(columns="plant").to_csv("narrow.csv", index=False)
    Path("held.csv").write_text("mine")
    Path("empty.jsonl").write_text("")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    done = dmtg(models["rows"].uri, *arguments)
    assert done.exit_code == code
    assert problem in " ".join(done.stderr.replace("│", " ").split())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_force_overwrites_a_file(models, dmtg) -> None:
    NEW.to_csv("new.csv", index=False)
    Path("held.csv").write_text("mine")
    assert dmtg(models["rows"].uri, "new.csv", "-o", "held.csv", "--force").exit_code == 0
    assert len(pd.read_csv("held.csv")) == 4


def test_texts_are_read_as_in_training(models, dmtg) -> None:
    model = models["texts"]
    FRAME[["key", "note"]].to_csv("new.csv", index=False)
    done = dmtg(model.uri, "new.csv")
    assert done.exit_code == 0, done.stderr
    stored = np.stack([model.source.read(entry)[INPUT] for entry in model.source.entries()])
    np.testing.assert_allclose(
        pd.read_csv(io.StringIO(done.stdout))["cost"], expected(model.run.models, stored)["cost"], rtol=1e-5
    )
    Path("new.tsv").write_text('note\n"a day at sea\n')  # a quote is a character there, as in training
    assert dmtg(model.uri, "new.tsv").exit_code == 0


def test_images_of_folders_and_files(models, root, dmtg) -> None:
    model = models["pictures"]
    done = dmtg(model.uri, str(root / "images"), "-o", "out.csv")
    assert done.exit_code == 0, done.stderr
    found = pd.read_csv("out.csv")
    entries = sorted(model.source.entries(), key=lambda entry: list(found["image"]).index(f"{entry.id}.png"))
    stored = np.stack([model.source.read(entry)[INPUT] for entry in entries])
    values = expected(model.run.models, stored)
    assert len(found) == 6
    for column, task in (("bright.True", "bright"), ("level", "level")):
        np.testing.assert_allclose(found[column], values[task], rtol=1e-4, atol=1e-6)

    Image.new("RGB", (30, 20)).save("good.png")
    Path("bad.png").write_bytes(b"no image")
    assert "not an image" in dmtg(model.uri, "good.png", "bad.png").stderr
    skipped = dmtg(model.uri, "good.png", "bad.png", "--bad-rows", "skip")
    assert list(pd.read_csv(io.StringIO(skipped.stdout))["image"]) == ["good.png"]
    assert "no such file" in dmtg(model.uri, "absent.png").stderr
    assert "does not record how its input is prepared" in dmtg(str(model.run.run), "good.png").stderr
    options = model.run.run / "config.yaml"
    options.write_text(json.dumps({"source": {"kind": "folder", "options": OPTIONS["pictures"][1]}}))
    from_run = dmtg(str(model.run.run), "good.png")
    assert from_run.stdout == skipped.stdout
