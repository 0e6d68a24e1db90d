"""`dmtg config new`: amounts and codes, molecules, texts, names of targets, kinds that can be changed alone."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.config.loading import Config, load_config
from pipelines.config.validation import checked
from pipelines.data.sources import build_source
from pipelines.data.sources.labels import LabelTask
from pipelines.scaffold.inference import ColumnSummary, chosen_targets, feature, target
from pipelines.scaffold.inputs import longest_text, molecules
from tests.paths import SHARED

RUNNER = CliRunner()


def of(name: str, counts: Mapping[int, int]) -> str:
    cells = [str(value) for value, rows in counts.items() for _ in range(rows)]
    return str(target(ColumnSummary(name, cells), "here", more=False).options["kind"])


def drawn(numbers: Any, rows: int = 500) -> dict[int, int]:
    values, counts = np.unique(numbers(np.random.default_rng(0), rows), return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


@pytest.mark.parametrize(
    "counts",
    [
        drawn(lambda rng, n: rng.poisson(1.2, n)),
        drawn(lambda rng, n: rng.geometric(0.4, n) - 1),
        drawn(lambda rng, n: rng.integers(1, 6, n)),  # ratings, even if each is as frequent
        dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 8, 9, 10), 30),
        dict.fromkeys((-2, -1, 0, 1, 2), 30),
        dict.fromkeys((10, 20, 30, 50, 40), 30),
        {2: 16215, 3: 10014, 4: 3736, 5: 1374, 6: 323, 7: 134, 8: 47, 9: 6, 10: 4, 11: 2, 12: 2},  # children
        {0: 1, 1: 4, 2: 10, 3: 14, 4: 9, 5: 15, 6: 34, 7: 79, 8: 566, 9: 1094, 10: 3},  # Apgar scores
        {0: 575, 1: 2, 2: 5, 3: 5, 5: 11, 6: 6, 8: 2, 10: 50, 12: 1, 15: 7, 20: 39, 30: 6},  # cigarettes a day
        drawn(lambda rng, n: rng.binomial(20, 0.5, n) + 7),
        drawn(lambda rng, n: 18 - rng.poisson(3, n)),
    ],
)
def test_values_like_amounts_ratings_and_counts_are_numbers(counts: dict[int, int]) -> None:
    assert of("x", counts) == "regression"


@pytest.mark.parametrize(
    "counts",
    [
        dict.fromkeys((3, 17, 44, 9), 30),
        dict.fromkeys(range(10), 30),  # ten digits
        dict.fromkeys((1, 2, 3), 30),
        dict.fromkeys((101, 205, 310, 411, 500), 30),
        {3: 40, 4: 300, 7: 20, 8: 150, 9: 2, 11: 90, 12: 400, 13: 11},  # frequent and rare ones side by side
        {3: 400, 4: 200, 7: 100, 8: 50, 9: 3},  # too few values to see an order
        drawn(lambda rng, n: rng.choice(12, n, p=rng.dirichlet([1] * 12)), 5000),
    ],
)
def test_values_in_no_order_are_codes(counts: dict[int, int]) -> None:
    assert of("x", counts) == "multiclass"


@pytest.mark.parametrize(
    "name", ["n_rooms", "age", "overall rating", "itemCount", "Anzahl Zimmer", "价格", "房间数量", "Цена"]
)
def test_a_name_of_an_amount_decides(name: str) -> None:
    assert of(name, {3: 30, 17: 30, 44: 30}) == "regression"


@pytest.mark.parametrize("name", ["class", "zip code", "customerType", "age_group", "Kategorie", "类别", "код"])
def test_a_name_of_codes_decides(name: str) -> None:
    assert of(name, drawn(lambda rng, n: rng.poisson(1.2, n))) == "multiclass"


def test_the_reason_names_the_word_that_changes_it() -> None:
    ratings = target(ColumnSummary("x", ["1", "2", "3", "4", "5"] * 20), "here", more=False)
    assert "from 1 to 5; for classes write kind: multiclass" in ratings.why
    codes = target(ColumnSummary("x", ["3", "17", "44"] * 20), "here", more=False)
    assert codes.why.endswith("for an amount write kind: regression")
    words = target(ColumnSummary("x", ["groß", "klein", "klein"] * 20), "here", more=False)
    assert words.why == "33% are groß, the rarer value; for the other write positive: [klein]"


CELLS = {"binary": ("0", "1"), "multiclass": ("3", "17", "44"), "regression": ("1", "2", "3", "4", "5")}
METRICS = {"binary": "auroc", "multiclass": "balanced_accuracy", "regression": "rmse"}


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CELLS, 2)))
def test_the_kind_of_a_generated_task_can_be_changed_alone(tmp_path: Path, first: str, second: str) -> None:
    cells = list(CELLS[first])
    file = write(
        tmp_path / "t.csv", {"x": [i / 7 for i in range(90)], "x2": range(90), "y": cells * (90 // len(cells))}
    )
    config = new(tmp_path, file, "--targets", "y,x2")
    assert config.source is not None
    tasks = config.source.options["tasks"]
    assert tasks[0]["kind"] == first
    tasks[0]["kind"] = second
    if second == "binary":  # the cells are neither yes nor no, whatever the file says
        assert checked(LabelTask, tasks[0], "task").headline == "auroc"
        return
    (found, _) = build_source("table", str(file), config.source.options).describe().tasks
    assert (found.kind, found.metric) == (second, METRICS[second])
    assert found.labels == (tuple(cells) if second == "multiclass" else ())


def test_a_task_of_two_words_can_become_one_of_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"x": range(90), "y": ["groß", "klein", "klein"] * 30, "z": range(90)})
    config = new(tmp_path, file, "--targets", "y", "--targets", "z")
    assert config.source is not None
    options = config.source.options
    assert options["tasks"][0]["positive"] == ["groß"]
    assert build_source("table", str(file), options).describe().tasks[0].labels == ("klein", "groß")
    options["tasks"][0]["kind"] = "multiclass"
    assert build_source("table", str(file), options).describe().tasks[0].labels == ("groß", "klein")


# ---------------------------------------------------------------- names on the command line


COLUMNS = ["a", "Größe, in cm", 'say "hi"', "grade[1]", "b", "x,y"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a,b"], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["Größe, in cm", "a"], ["Größe, in cm", "a"]),
        (['"Größe, in cm", grade[1]'], ["Größe, in cm", "grade[1]"]),
        (['"say ""hi""",a', "x,y"], ['say "hi"', "a", "x,y"]),
        (["Gro\u0308ße, in cm", " a "], ["Größe, in cm", "a"]),
    ],
)
def test_targets_are_repeated_or_quoted_as_in_csv(given: list[str], names: list[str]) -> None:
    assert chosen_targets(given, COLUMNS, "here") == names


def test_an_unknown_target_lists_names_like_it(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"Price": range(9), "amount": range(9), "x": range(9)})
    done = RUNNER.invoke(app, ["config", "new", str(file), "--targets", "PRICE,amont"])
    assert done.exit_code == 2
    assert "no column PRICE, amont; did you mean Price, amount?" in done.stderr
    assert "with quotes as in CSV" in done.stderr
    shown = " ".join(RUNNER.invoke(app, ["config", "new", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "Repeat the option for each column" in shown
    assert "as in CSV" in shown


# ---------------------------------------------------------------- molecules and texts


SMILES = [
    "CCO",
    "c1ccccc1",
    "CC(=O)Oc1ccccc1C(=O)O",
    "C[C@H](N)C(=O)O",
    "[Na+].[Cl-]",
    "CN1C=NC2=C1C(=O)N(C)C(=O)N2C",
]


@pytest.mark.parametrize("installed", [True, False])
def test_molecules_are_recognised(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        pytest.importorskip("rdkit")
    else:
        monkeypatch.setattr("pipelines.scaffold.inputs.importlib.util.find_spec", lambda name: None)
    for name, cells in (("x", SMILES), ("canonical_smiles", [*SMILES, "no structure"])):
        found = molecules({"b": ColumnSummary("b", ["1"]), name: ColumnSummary(name, cells)})
        assert found is not None
        assert found.name == name


@pytest.mark.parametrize(
    "cells",
    [
        ["B", "C", "N", "F"],
        ["CC", "NC", "SC", "IN"],
        ["Bern", "Basel", "Zug (ZG)"],
        ["A(1)", "B(2)", "C(3)"],
        ["1", "2", "3"],
        [*SMILES[:2], "a word", "of this", "and that"],
    ],
)
def test_words_and_codes_are_no_molecules(cells: list[str]) -> None:
    assert molecules({"x": ColumnSummary("x", cells)}) is None


@pytest.mark.parametrize("installed", [True, False])
def test_a_table_with_molecules(tmp_path: Path, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"id": range(60), "structure": SMILES * 10, "mass": range(60), "a": [0, 1] * 30, "b": [0, 0, 1] * 20}
    file = write(tmp_path / "t.csv", columns)
    if installed:
        pytest.importorskip("rdkit")
    else:
        monkeypatch.setattr("pipelines.scaffold.inputs.importlib.util.find_spec", lambda name: None)
    config = new(tmp_path, file, "--targets", "a,b")
    assert config.source is not None
    options = config.source.options
    assert (options["smiles"], options["id_column"]) == ("structure", "id")
    assert options["molecule_features"] == ("descriptors" if installed else "ngrams")
    assert config.network.encoder == ("tabm" if installed else "mlp")
    assert config.network.options.get("embedding") == (2 if installed else None)  # of 216 descriptors and mass
    said = " ".join((tmp_path / "c.yaml").read_text().replace("#", "").split())
    assert ("not read: mass;" in said) is not installed
    reader = build_source("table", str(file), options)
    features = reader.describe().preparation.get("features")
    assert len(list(reader.entries())) == 60
    if installed:
        assert [feature["column"] for feature in features] == ["structure", "mass"]


def test_molecules_without_other_columns(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    columns = {"note": [f"{i} words, of no use to anyone at all" for i in range(60)], "smiles": SMILES * 10}
    file = write(tmp_path / "t.csv", columns | {"a": [0, 1] * 30, "b": [0, 0, 1] * 20})
    config = new(tmp_path, file, "--targets", "a,b")
    assert config.source is not None
    assert (config.source.options["features"], config.network.encoder) == ([], "tabm")
    described = build_source("table", str(file), config.source.options).describe()
    assert [feature["column"] for feature in described.preparation["features"]] == ["smiles"]


def test_a_table_with_texts_has_the_text_encoder(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    rows = 60
    columns = {
        "ticket": [f"t{i}" for i in range(rows)],
        "body": [f"the printer number {i} does not print any more, please help" for i in range(rows)],
        "title": [f"a printer with the number {i}" for i in range(rows)],
        "channel": ["mail", "phone"] * (rows // 2), "urgent": [0, 1] * (rows // 2), "risk": range(rows),
    }  # fmt: skip
    file = write(tmp_path / "t.csv", columns)
    config = new(tmp_path, file, "--targets", "urgent,risk")
    assert config.source is not None
    assert (config.source.kind, config.network.encoder) == ("text", "embedding_bag")
    options = config.source.options
    assert (options["text_column"], options["id_column"]) == ("body", "ticket")
    said = " ".join((tmp_path / "c.yaml").read_text().replace("#", "").split())
    assert "not read: title, channel; to predict from these instead, dmtg config new --source table" in said
    assert len(list(build_source("text", config.source.root, options).entries())) == rows

    config = new(tmp_path, file, "--targets", "urgent,risk", "--source", "table", "--force")
    assert config.source is not None
    assert "channel" in config.source.options["categorical"]


def test_texts_of_scripts_without_spaces_are_texts() -> None:
    texts = [f"打印机第{i}号已经不能打印了，请帮助我们解决问题" for i in range(30)]
    assert longest_text({"x": ColumnSummary("x", texts)}) is not None
    assert feature(ColumnSummary("x", texts)).why.startswith("30 different texts of several words")
    assert longest_text({"x": ColumnSummary("x", ["北京", "上海", "广州"] * 10)}) is None
    assert (
        longest_text({"x": ColumnSummary("x", ["a text of five words", "another text of five words"] * 9)}) is None
    )


def test_every_generated_file_has_regularisation(tmp_path: Path, images: Path) -> None:
    file = write(tmp_path / "t.csv", {"x": range(60), "a": [0, 1] * 30, "b": [0, 0, 1] * 20})
    for place, targets in ((file, "a,b"), (images, "colour,level")):
        config = new(tmp_path, place, "--targets", targets, "--force")
        assert config.train.optimizer == "adamw"
        assert config.train.weight_decay > 0
        assert config.network.options["dropout"] == 0.1
        assert config.train.patience == config.train.epochs // 3


@pytest.mark.parametrize("targets", ["NR-AR,NR-ER"])
def test_tox21(tmp_path: Path, targets: str) -> None:
    data = SHARED / "data" / "tox21" / "tox21.csv"
    if not data.exists():
        pytest.skip("shared/data/tox21 is not here")
    config = new(tmp_path, data, "--targets", targets)
    assert config.source is not None
    assert config.source.options["smiles"] == "smiles"


def write(file: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))
    return file


def new(folder: Path, data: Path, *arguments: str) -> Config:
    done = RUNNER.invoke(app, ["config", "new", str(data), *arguments, "-o", str(folder / "c.yaml")])
    assert done.exit_code == 0, done.stderr
    return load_config(str(folder / "c.yaml"))
