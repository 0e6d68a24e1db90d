"""A file as people have them, in six commands to predictions of new rows, which MLflow, a server and the library
share."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from mlflow.pyfunc import scoring_server
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.config.sections import TrackSection
from pipelines.data.preprocessing import load_preparation, prepare
from pipelines.registry.models import load_whole
from pipelines.registry.tracking import connect

NAMES = ["Kunden-Nr", "Größe, in cm", "PLZ", "Geburtstag", "raucht", "Einkommen", "Befund", "Statur, groß?",
         "Sterne", "Besuche", "Körperbau", "Split"]  # fmt: skip
READ = ["Größe, in cm", "PLZ", "Geburtstag", "raucht", "Einkommen"]
BINARY, AMOUNTS, CLASSES = ["Befund", "Statur, groß?"], ["Sterne", "Besuche"], ["groß", "klein", "mittel"]
COLUMNS = [
    "Kunden-Nr",
    *BINARY,
    "Statur, groß?.ja",
    "Sterne",
    "Besuche",
    "Körperbau",
    *(f"Körperbau.{one}" for one in CLASSES),
]
FAST = ["train.epochs=1", "search.method=dmtg", "search.baseline=false", "search.wide=false", "network.groups=2"]


def write(file: Path, rows: int, seed: int) -> None:
    """Semicolons, decimal commas, CP1252; gaps of four kinds; names and words with umlauts, spaces and commas."""
    rng = np.random.default_rng(seed)
    lines = [NAMES]
    for i in range(rows):
        size, income, stars = rng.normal(175, 9), rng.normal(2500, 600), int(rng.integers(1, 6))
        lines.append([
            f"{i:06d}", f"{size:.1f}".replace(".", ","), str(rng.choice(["01067", "04109", "80331"])),
            f"{rng.integers(1, 29):02d}.{rng.integers(1, 13):02d}.{rng.integers(1950, 2005)}",
            str(rng.choice(["TRUE", "FALSE"])),
            ("NA", "?", "-", "")[i % 4] if i % 9 == 0 else f"{income:.2f}".replace(".", ","),
            "-1" if i % 11 == 0 else str(int(income > 2500)),
            ("NA", "?", "-", "")[i % 4] if i % 13 == 0 else "ja" if size > 175 else "nein",
            str(stars), str(stars + int(rng.poisson(2))),
            "groß" if size > 182 else "klein" if size < 168 else "mittel",
            ("train", "train", "val", "test")[i % 4],
        ])  # fmt: skip
    file.write_text("".join(";".join(cells) + "\r\n" for cells in lines), encoding="cp1252", newline="")


def dmtg(*arguments: str) -> tuple[str, str]:
    """What a command writes to stdout and to stderr."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.stderr
    return done.stdout, done.stderr


def next_command(stderr: str) -> list[str]:
    """The command that is printed after `next:`, as a shell splits it."""
    before, _, command = stderr.rstrip().rpartition("\n  ")
    assert "\nnext: " in before
    program, *arguments = shlex.split(command)
    assert program.endswith("dmtg")
    return arguments


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """The folder, and what each command wrote. Where a command prints the next one, that one is run."""
    place = tmp_path_factory.mktemp("walk")
    write(place / "kunden.csv", 320, 3)
    write(place / "neu.csv", 40, 4)
    said = {}
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):  # MLflow sets them to the last ones it used
            patch.delenv(name, raising=False)
        said["new"] = dmtg(
            "config", "new", "kunden.csv", "--targets", 'Befund,"Statur, groß?",Sterne', "--targets", "Besuche",
            "--targets", "Körperbau",
        )  # fmt: skip
        said["shard"] = dmtg(*next_command(said["new"][1]))
        said["inspect"] = dmtg(*next_command(said["shard"][1]))
        said["train"] = dmtg(*next_command(said["inspect"][1]), *FAST)
        said["list"] = dmtg("models", "list")
        said["show"] = dmtg(*next_command(said["list"][1]))
        said["predict"] = dmtg("predict", "models:/kunden/1", "neu.csv", "-o", "out.csv")
    return place, said


def test_what_is_assumed_is_right_and_written_down(walk) -> None:
    place, said = walk
    values = yaml.safe_load((place / "kunden.yaml").read_text(encoding="utf-8"))["source"]
    options = values["options"]
    assert options["dialect"] == {"delimiter": ";", "decimal": ",", "encoding": "cp1252"}
    assert (options["id_column"], options["split_column"]) == ("Kunden-Nr", "Split")
    assert options["categorical"] == ["PLZ", "raucht"]
    kinds = {task["column"]: task["kind"] for task in options["tasks"]}
    assert kinds == {**dict.fromkeys(BINARY, "binary"), **dict.fromkeys(AMOUNTS, "regression"),
                     "Körperbau": "multiclass"}  # fmt: skip
    assert {task["metric"] for task in options["tasks"]} == {"auto"}
    assert "Geburtstag     date        as dd.mm.yyyy" in said["new"][0]


def test_results_are_on_stdout_and_progress_is_not(walk) -> None:
    _, said = walk
    for name, (stdout, stderr) in said.items():
        assert stdout, name
        assert "next: " not in stdout
        assert "importing" not in stdout
        assert "Traceback" not in stderr
        assert "Warning" not in stderr


def test_names_and_words_are_those_of_the_file(walk) -> None:
    place, said = walk
    for name in ("inspect", "train", "show", "predict"):
        for task in (*BINARY, *AMOUNTS, "Körperbau"):
            assert task in said[name][0], (name, task)
    assert "nein:" in said["inspect"][0]
    assert "groß:" in said["inspect"][0]
    (row,) = (line for line in said["list"][0].splitlines() if line.startswith("kunden  "))
    assert '"Statur, groß?"' in row
    assert "more" not in row  # there are five tasks
    assert "Statur, groß?.ja" in said["predict"][0]
    (report,) = (place / "work").rglob("report.html")
    for page in (report, place / "work/kunden/shards/_inspect.html"):
        shown = unescape(page.read_text(encoding="utf-8"))
        assert all(task in shown for task in (*BINARY, *AMOUNTS, "Körperbau")), page
    for name in READ:
        assert name in shown
    assert all(word in shown for word in (*CLASSES, "ja", "01067"))


def same(found: pd.DataFrame, values: Mapping[str, Any]) -> None:
    """The file has these predictions."""
    for task in ("Befund", *AMOUNTS):
        np.testing.assert_allclose(found[task], values[task], rtol=1e-5, atol=1e-7)
    for share in (values["Statur, groß?"], values["Statur, groß?.ja"]):
        np.testing.assert_allclose(found["Statur, groß?.ja"], share, rtol=1e-5, atol=1e-7)
        assert list(found["Statur, groß?"]) == ["ja" if one > 0.5 else "nein" for one in share]
    for one in CLASSES:
        np.testing.assert_allclose(found[f"Körperbau.{one}"], values[f"Körperbau.{one}"], rtol=1e-5, atol=1e-7)
    shares = np.asarray(values["Körperbau"])
    np.testing.assert_allclose(found[COLUMNS[-3:]], shares, rtol=1e-5, atol=1e-7)
    assert [CLASSES[best] for best in shares.argmax(1)] == list(found["Körperbau"])


def test_predictions_are_those_of_mlflow_a_server_and_the_library(walk, monkeypatch) -> None:
    place, _ = walk
    uri = f"sqlite:///{place / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    connect(TrackSection(uri=uri))  # an earlier test can have set another registry
    out = pd.read_csv(place / "out.csv", dtype={"Kunden-Nr": str})
    assert set(out) == set(COLUMNS)
    assert list(out["Kunden-Nr"]) == [f"{i:06d}" for i in range(40)]

    german = {"sep": ";", "encoding": "cp1252"}
    new = pd.read_csv(place / "neu.csv", decimal=",", **german)
    assert (new["PLZ"].dtype, new["raucht"].dtype) == (np.int64, np.bool_)  # pandas has other types
    cells = pd.read_csv(place / "neu.csv", dtype=str, keep_default_na=False, **german)
    composite = mlflow.pyfunc.load_model("models:/kunden/1")
    same(out, composite.predict(new))
    same(out, composite.predict(cells))

    loaded = load_whole("models:/kunden/1", TrackSection(uri=uri))
    stored = torch.from_numpy(prepare(load_preparation(loaded.preparation), new))
    found: dict[str, np.ndarray] = {}
    for group in loaded.groups.values():
        found |= {task: value.numpy() for task, value in group.predict(stored).items()}
    found["Statur, groß?.ja"] = found["Statur, groß?"]  # the library has numbers, and the task has the words
    found |= {f"Körperbau.{one}": found["Körperbau"][:, place] for place, one in enumerate(CLASSES)}
    same(out, found)

    server = TestClient(scoring_server.init(composite))
    records = json.loads(new[READ].to_json(orient="records"))
    bodies = [("application/json", json.dumps({"dataframe_records": records})),
              ("text/csv", new.to_csv(index=False)),
              ("text/csv", (place / "neu.csv").read_text(encoding="cp1252"))]  # fmt: skip
    for kind, body in bodies:
        answer = server.post("/invocations", content=body.encode(), headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text
        same(out, answer.json()["predictions"])
