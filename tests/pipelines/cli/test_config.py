"""`dmtg config …`: schema, show and new, without Ray."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from dmtg_core import GroupingNetwork
from dmtg_core.network.encoders.tabular import tabm_options
from pipelines.cli.app import app
from pipelines.config.loading import load_config
from pipelines.config.validation import checked
from pipelines.data.sources import SOURCES, build_source, options_model
from pipelines.data.sources.rows import read_head
from pipelines.recipes import RECIPES, recipes
from pipelines.scaffold.inference import ColumnSummary, feature, id_use, split_use, target
from pipelines.storage import locate

RUNNER = CliRunner()
SIX = ["churn", "upsell", "segment", "risk", "spend", "score"]


def call(*arguments: str) -> tuple[int, str, str]:
    found = RUNNER.invoke(app, list(arguments))
    return found.exit_code, found.stdout, found.stderr


def table(path: Path, columns: Mapping[str, Any]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Six targets of three kinds, some of them with empty cells, with numbers, categories and other columns."""
    rng, rows = np.random.default_rng(0), 400
    age, income = rng.normal(size=rows).round(3), rng.normal(size=rows).round(3)

    def with_gaps(values: Any, marker: str = "") -> list[str]:
        return [marker if hole else str(value) for value, hole in zip(values, rng.random(rows) < 0.1, strict=True)]

    return table(
        tmp_path / "my data.csv",
        {
            "customer_id": [f"c{i:04d}" for i in range(rows)],
            "age": age,
            "income": with_gaps(income, "N/A"),
            "city": rng.choice(["Bern", "Basel", "Zug"], rows),
            "signup": np.arange(rows) + 1_700_000_000,
            "constant": ["x"] * rows,
            "note": [f"note {i % 399}" for i in range(rows)],
            "churn": with_gaps((age > 0).astype(int)),
            "upsell": np.where(income > 0.5, "sold", "not"),
            "segment": with_gaps(np.array(["low", "mid", "high"])[np.digitize(age, [-0.5, 0.5])]),
            "risk": np.digitize(income, [-1, 0, 1]) + 1,
            "spend": with_gaps((30 * age).round(2)),
            "score": np.arange(rows),
        },
    )


def uncommented(text: str) -> str:
    return re.sub(r"^(\s*)#(?=\S)", r"\1", text, flags=re.MULTILINE)


class TestSchema:
    schema = json.loads(call("config", "schema")[1])

    def errors(self, values: Any) -> list[str]:
        return [error.message for error in jsonschema.Draft202012Validator(self.schema).iter_errors(values)]

    def test_all_recipes_match_the_schema(self) -> None:
        jsonschema.Draft202012Validator.check_schema(self.schema)
        for name in recipes():
            assert not self.errors(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())), name

    @pytest.mark.parametrize(
        "override",
        [
            "train.epoch=3", "train.epochs=0", "gate.sampling=gumble", "source.kind=tabel",
            "source.options.fiel=x.csv", "network.encoder=mpl", "train.aggregator=downgrad",
            "ray.workers=[1, 2, 3]",
        ],
    )  # fmt: skip
    def test_it_refuses_the_values_that_commands_refuse(self, override: str, tmp_path: Path) -> None:
        values: dict[str, Any] = {
            "name": "x", "data": {"shards": "s"}, "source": {"kind": "table", "options": {"file": "x.csv"}},
        }  # fmt: skip
        assert not self.errors(values)
        key, _, value = override.partition("=")
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[last] = yaml.safe_load(value)
        assert self.errors(values)

    def test_file_with_a_base_needs_no_other_key(self) -> None:
        assert self.errors({"data": {"shards": "s"}})
        assert self.errors({"name": "x", "data": {}})
        assert not self.errors({"base": "rooms", "data": {"cache": "stream"}, "source": {"root": "r"}})

    def test_every_key_has_a_description(self) -> None:
        readers = {options_model(kind).__name__ for kind in SOURCES} | {"LabelTask"}  # described as a whole
        for name, section in self.schema["$defs"].items():
            assert section.get("description"), name
            for key, value in section["properties"].items() if name not in readers else ():
                assert value.get("description") or "$ref" in value, f"{name}.{key}"

    def test_ray_config_has_its_own_schema(self) -> None:
        schema = json.loads(call("config", "schema", "--ray")[1])
        values = yaml.safe_load(Path("ray_config.yaml").read_text())
        jsonschema.validate(values, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | {"worker": 2}, schema)


class TestShow:
    def test_it_prints_the_configuration_that_commands_use(self, tmp_path: Path) -> None:
        code, shown, _ = call("config", "show", "-c", "tox21", "train.epochs=3", "track.uri=none")
        assert code == 0
        (tmp_path / "shown.yaml").write_text(shown)
        assert load_config(str(tmp_path / "shown.yaml")) == load_config(
            "tox21", ["train.epochs=3", "track.uri=none"]
        )

    def test_secrets_stay_hidden(self) -> None:
        code, shown, logged = call(
            "config", "show", "-c", "rooms", "track.uri=https://me:hush@mlflow.example",
            "regroup.webhook=https://hooks.example/T123/hush",
        )  # fmt: skip
        assert code == 0
        assert "https://mlflow.example" in shown
        assert "hush" not in shown + logged

    def test_options_of_the_reader_are_checked(self) -> None:
        code, _, logged = call("config", "show", "-c", "tox21", "source.options.smile=x")
        assert code == 2
        assert "unknown key source.options.smile" in logged
        code, _, logged = call("config", "show", "-c", "tox21", "source.kind=tabel")
        assert code == 2
        assert "did you mean table?" in logged


class TestNew:
    def test_a_file_in_another_folder_has_the_path_of_the_data_from_there(
        self, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "data.csv").write_bytes(Path(mixed).read_bytes())
        monkeypatch.chdir(tmp_path)
        code, _, logged = call("config", "new", "data.csv", "--targets", "churn,spend", "-o", "conf/mine.yaml")
        assert code == 0, logged
        assert yaml.safe_load(Path("conf/mine.yaml").read_text())["source"]["root"] == "../data.csv"
        config = load_config("conf/mine.yaml")
        assert (config.source.root, config.data.shards) == ("conf/../data.csv", "conf/work/data/shards")

    def test_table_of_six_targets(self, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        code, _, logged = call("config", "new", mixed, "--targets", ",".join(SIX), "-o", "mine.yaml")
        assert code == 0, logged
        config = load_config("mine.yaml")
        assert config.name == "my_data"
        assert config.source is not None
        options = config.source.options
        assert {task["column"]: task["kind"] for task in options["tasks"]} == {
            "churn": "binary", "upsell": "binary", "segment": "multiclass", "risk": "multiclass",
            "spend": "regression", "score": "regression",
        }  # fmt: skip
        assert options["id_column"] == "customer_id"
        assert options["features"] == ["age", "income", "city"]
        assert options["categorical"] == ["city"]
        assert "missing" not in options  # N/A is a usual marker
        assert (config.network.encoder, options["scaling"]) == ("tabm", "quantile")
        assert config.network.options == {**tabm_options(400, numbers=2), "dropout": 0.1}
        assert call("config", "show", "-c", "mine.yaml")[0] == 0

        # every row can be read, and the network fits
        source = build_source("table", config.source.root, options)
        description, rows = source.describe(), [source.read(entry) for entry in source.entries()]
        assert len(rows) == 400
        assert any(row["task.churn"] is None for row in rows)
        GroupingNetwork(config.network_spec(description.input, description.tasks))

    def test_each_comment_is_an_option_at_its_default(self, mixed: str, tmp_path: Path) -> None:
        file, all_on = tmp_path / "mine.yaml", tmp_path / "all.yaml"
        assert call("config", "new", mixed, "--targets", ",".join(SIX), "-o", str(file))[0] == 0
        all_on.write_text(uncommented(file.read_text()))
        assert self.same(str(file), str(all_on))
        for key in ("epochs", "prune_threshold", "webhook", "max_values"):
            assert f"{key}:" in file.read_text()

    def same(self, first: str, second: str) -> bool:
        one, other = load_config(first), load_config(second)
        assert one.source is not None
        assert other.source is not None
        model = options_model(one.source.kind)
        equal = checked(model, one.source.options) == checked(model, other.source.options)
        return equal and one.model_dump(exclude={"source"}) == other.model_dump(exclude={"source"})

    @pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind not in ("table", "folder")])
    def test_other_sources_have_a_recipe_as_base(self, kind: str, tmp_path: Path) -> None:
        file, all_on = tmp_path / "mine.yaml", tmp_path / "all.yaml"
        (tmp_path / "raw").mkdir()
        code, _, logged = call("config", "new", str(tmp_path / "raw"), "--source", kind, "-o", str(file))
        assert code == 0, logged
        config = load_config(str(file))
        assert config.source is not None
        assert (config.source.kind, config.source.root) == (kind, str(tmp_path / "raw"))
        all_on.write_text(uncommented(file.read_text()))
        assert self.same(str(file), str(all_on))

    def test_image_folder(self, images: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        assert call("config", "new", str(images), "--targets", "colour,bright,level", "-o", str(file))[0] == 0
        config = load_config(str(file))
        assert config.source is not None
        source = build_source("folder", config.source.root, config.source.options)
        assert {task.name: task.kind for task in source.describe().tasks} == {
            "colour": "multiclass", "bright": "binary", "level": "regression",
        }  # fmt: skip
        assert source.read(next(source.entries()))["input"] is not None

    def test_table_of_texts(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        data = table(
            tmp_path / "texts.csv",
            {
                "short": ["a", "b"] * 50, "body": [f"a text, number {i} of some" for i in range(100)],
                "good": [0, 1] * 50, "topic": ["x", "y", "z", "w"] * 25,
            },
        )  # fmt: skip
        file = tmp_path / "mine.yaml"
        assert call("config", "new", data, "--source", "text", "--targets", "good,topic", "-o", str(file))[0] == 0
        config = load_config(str(file))
        assert config.source is not None
        assert config.source.options["text_column"] == "body"
        assert len(list(build_source("text", config.source.root, config.source.options).entries())) == 100

    def test_it_overwrites_a_file_only_with_force(self, mixed: str, tmp_path: Path) -> None:
        arguments = ("config", "new", mixed, "--targets", "churn,spend", "-o", str(tmp_path / "mine.yaml"))
        (tmp_path / "mine.yaml").write_text("name: mine\n")
        code, _, logged = call(*arguments)
        assert code == 2
        assert "--force" in logged
        assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"
        assert call(*arguments, "--force")[0] == 0
        assert load_config(str(tmp_path / "mine.yaml")).name == "my_data"

    @pytest.mark.parametrize("text", ["id,churn\n1,0\n", "[1, 2]\n", "replicas: 3\n", "\x00PNG"])
    def test_force_overwrites_no_other_file(self, mixed: str, tmp_path: Path, text: str) -> None:
        other = tmp_path / "other"
        other.write_text(text)
        code, _, logged = call("config", "new", mixed, "--targets", "churn,spend", "-o", str(other), "--force")
        assert code == 2
        assert "is not a configuration" in logged
        assert other.read_text() == text

    def test_a_folder_is_no_file_to_write(self, mixed: str, tmp_path: Path) -> None:
        code, _, logged = call("config", "new", mixed, "--targets", "churn,spend", "-o", str(tmp_path))
        assert code == 2
        assert "it is a folder" in logged

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--targets", "churn,spent"], "no column spent"),
            (["--targets", "churn"], "two or more"),
            (["--targets", "churn,churn"], "named twice"),
            (["--targets", "churn,constant"], "target constant is 'x'"),
            (["--targets", "churn,note"], "not all numbers"),
            ([], "customer_id, age, income"),
            (["--source", "tabel", "--targets", "churn,spend"], "did you mean table?"),
            (["--source", "rooms", "--targets", "churn,spend"], "no meaning for rooms"),
        ],
    )
    def test_unusable_argument_is_named(
        self, mixed: str, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        code, _, shown = call("config", "new", mixed, *arguments, "-o", str(tmp_path / "mine.yaml"))
        assert code in (1, 2)
        assert message in shown
        assert "remedy: " in shown
        assert not (tmp_path / "mine.yaml").exists()


def column(*cells: object) -> ColumnSummary:
    return ColumnSummary("x", [str(cell) for cell in cells])


class TestGuesses:
    @pytest.mark.parametrize(
        ("cells", "options"),
        [
            ([0, 1] * 9, {"kind": "binary", "metric": "auto"}),
            (["True", "False", ""] * 9, {"kind": "binary", "metric": "auto"}),
            (["spam", "ham", "ham"] * 9, {"kind": "binary", "metric": "auto", "positive": ["spam"]}),
            ([1, 2, 2] * 9, {"kind": "binary", "metric": "auto", "positive": ["1"]}),
            ([1, 2, 3] * 20, {"kind": "multiclass", "metric": "auto"}),
            ([1, 2, 3], {"kind": "regression", "metric": "auto"}),
            ([0.5, 1.5, 2.5] * 20, {"kind": "regression", "metric": "auto"}),
            (list(range(200)), {"kind": "regression", "metric": "auto"}),
            ([*range(200), "NA"], {"kind": "regression", "metric": "auto"}),
            (["a", "b", "c"] * 9, {"kind": "multiclass", "metric": "auto"}),
        ],
    )
    def test_kind_of_a_target(self, cells: list[object], options: dict[str, object]) -> None:
        assert target(column(*cells), "here", more=False).options == {"column": "x", **options}

    @pytest.mark.parametrize(
        ("cells", "use"),
        [
            ([1.5, 2, 3], "number"),
            ([1.5, 2, 3, "?"], "number"),
            (["a", "b", "a"], "category"),
            ([1, 1, 1], "left out"),
            (["", "", ""], "left out"),
            ([f"t{i}" for i in range(101)], "left out"),
            ([f"t{i}" for i in range(101)] * 3, "category"),
            ([1, 2, 3, "about 4"], "left out"),
            ([1.7e9 + i for i in range(9)], "left out"),
        ],
    )
    def test_use_of_a_column(self, cells: list[object], use: str) -> None:
        assert feature(column(*cells)).use == use

    def test_split_needs_train_and_val(self) -> None:
        def of(*cells: str) -> str | None:
            found = split_use({"Subset": ColumnSummary("Subset", cells)})
            return found and found.use

        assert of("train", "dev", "test") == "split"
        assert of("train", "test") == "left out"
        assert of("a", "b") is None

    def test_id_is_unique_in_every_row(self) -> None:
        columns = {
            "a_id": ["1", "1"],
            "weight": ["1", "2"],
            "name": ["x", "y"],
            "paid": ["4", "5"],
            "userId": ["6", "7"],
        }
        found = id_use({name: ColumnSummary(name, cells) for name, cells in columns.items()})
        assert found is not None
        assert found.column == "userId"

    @pytest.mark.parametrize("name", ["Kunden-Nr", "Nummer", "编号", "x"])
    def test_digits_with_leading_zeros_and_numbers_are_ids(self, name: str) -> None:
        cells = [f"{i:03d}" if name == "x" else str(1000 + i) for i in range(30)]
        found = id_use({"weight": ColumnSummary("weight", cells[::-1]), name: ColumnSummary(name, cells)}
                       if name != "x" else {name: ColumnSummary(name, cells)})  # fmt: skip
        assert found is not None
        assert found.column == name


class TestHead:
    def test_first_rows_of_any_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = {"a": list(range(50)), "b": [f"ä, {i}" for i in range(50)]}
        (tmp_path / "parts").mkdir()
        pq.write_table(pa.table(columns), tmp_path / "parts" / "x.parquet")
        for place in (
            table(tmp_path / "x.csv", columns),
            str(tmp_path / "parts"),
            str(tmp_path / "parts/x.parquet"),
        ):
            rows, more = read_head(locate(place), 20)
            assert more
            assert [row.cells for row in rows] == [{"a": str(i), "b": f"ä, {i}"} for i in range(20)]
            rows, more = read_head(locate(place), 50)
            assert (len(rows), more) == (50, False)
        # the dialect is found in a text that is cut off, even inside a character
        for size in range(60, 70):
            monkeypatch.setattr("pipelines.data.sources.tables.dialect.HEAD_BYTES", size)
            rows, more = read_head(locate(str(tmp_path / "x.csv")), 20)
            assert more
            assert all(row.cells["b"] == f"ä, {row.cells['a']}" for row in rows)
            assert len(rows) == 20
