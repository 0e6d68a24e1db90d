"""The code of other packages that a configuration names is allowed; nothing else is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmtg_core import Task, addresses
from dmtg_core.addresses import CodeError, is_allowed
from dmtg_core.own_code import code_of_tasks
from pipelines.config.code import allow_named, check_allowed, code_named, records_of
from pipelines.config.loading import Config
from pipelines.config.sections import KINDS
from pipelines.config.validation import checked
from pipelines.data.raw_data import differences, identity
from pipelines.data.sources import SOURCES, build_source, options_model
from pipelines.errors import UserError
from pipelines.runs.files import CONFIG, RESULT
from pipelines.scaffold.template import new_config
from pipelines.training.failures import permanent_error
from pipelines.training.publish import register_run

LOSS, METRIC = "tests.dmtg_core.own:absolute", "tests.dmtg_core.own:distance"
READER = "own_reader:Reader"


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_allowed", {})
    monkeypatch.setattr(addresses, "_loaded", {})


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module with a reader; it reads no files."""
    file = tmp_path / "own_reader.py"
    file.write_text("class Reader:\n    def __init__(self, root, options): ...\n    def raw(self): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("own_reader", None)


def config_of(**sections: Any) -> Config:
    values: dict[str, Any] = {"name": "a", "data": {"shards": "shards"}}
    return checked(Config, values | sections)


def test_a_configuration_names_code_in_six_places() -> None:
    tasks = [
        {"column": "a", "kind": "regression", "loss": LOSS, "metric": METRIC},
        {"column": "b", "kind": "binary"},
    ]
    config = config_of(
        source={"kind": "a.b:source", "root": "x", "options": {"tasks": tasks}},
        network={"encoder": "a.b:encoder"},
        train={"aggregator": "a.b:rule"},
        compare={"methods": ["guided", "a.b:method"]},
    )
    assert code_named(config.model_dump()) == (
        ("encoder", "a.b:encoder"), ("aggregator", "a.b:rule"), ("source", "a.b:source"), ("loss", LOSS),
        ("metric", METRIC), ("method", "a.b:method"),
    )  # fmt: skip
    assert code_named(config_of().model_dump()) == ()
    missing = {"distribution": "", "version": "", "sha256": ""}
    assert {"kind": "source", "address": "a.b:source", **missing} in records_of(config.model_dump())


def test_its_own_code_is_allowed_and_that_of_shards_is_not() -> None:
    task = Task("a", "regression", loss=LOSS, metric=METRIC)
    allow_named(config_of(network={"encoder": METRIC}).model_dump())
    assert is_allowed(METRIC)
    with pytest.raises(UserError, match=f"the shards name the loss {LOSS}") as found:
        check_allowed(code_of_tasks([task]), trust_code=False)
    assert "--trust-code" in found.value.remedy
    check_allowed(code_of_tasks([task]), trust_code=True)
    assert is_allowed(LOSS)


def test_trust_changes_no_name_of_a_run() -> None:
    assert config_of(run={"trust_code": True}).digest() == config_of().digest()


def test_the_readers_that_a_configuration_knows_are_those_that_there_are() -> None:
    assert set(KINDS) == set(SOURCES)


def test_a_reader_of_another_package_is_constructed_with_root_and_options(reader: Path) -> None:
    assert type(build_source(READER, str(reader), {"any": 1})).__name__ == "Reader"
    assert checked(options_model(READER), {"any": 1}).model_dump() == {"any": 1}


def test_no_configuration_is_created_for_a_reader_of_another_package(reader: Path) -> None:
    with pytest.raises(UserError, match="write it by hand"):
        new_config(READER, str(reader), [], "")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("foldr", "did you mean folder"),
        ("x", "use one of celeba, folder, .*, or package.module:name"),
        ("own_reader:Other", "no attribute 'Other'"),
        ("nowhere_at_all:Reader", "install the package that has nowhere_at_all"),
    ],
)
def test_a_reader_that_there_is_not_is_refused(reader: Path, kind: str, text: str) -> None:
    with pytest.raises(UserError, match=text) as found:
        build_source(kind, "", {})
    assert found.value.where == "source.kind"
    assert found.value.wrong_use


def test_shards_are_stale_if_the_code_of_their_reader_has_changed(reader: Path) -> None:
    config = config_of(source={"kind": READER})
    assert config.source is not None
    assert config.source.given  # it needs no root
    source = build_source(READER, "", {})
    made = identity(source, config.source, config.data)
    assert not differences(made, identity(source, config.source, config.data))
    reader.write_text(f"{reader.read_text()}\n# changed\n")
    addresses._loaded.clear()  # as in a new process
    now = identity(source, config.source, config.data)
    assert differences(made, now) == ["the code of the reader has changed"]
    assert made["folders"] != now["folders"]  # shards that were complete are created again


def test_training_that_cannot_resume_with_other_code_is_not_tried_again() -> None:
    found = permanent_error(CodeError("other code", "install it"), config_of(), "run", 2)
    assert found is not None
    assert (found.what, found.where, found.remedy) == ("other code", "run", "install it")


def test_a_run_folder_cannot_allow_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = config_of(run={"trust_code": True}, track={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    (tmp_path / CONFIG).write_text(yaml.safe_dump(held.model_dump(mode="json")))
    (tmp_path / RESULT).write_text("{}")
    used: list[bool] = []

    def stop(config: Config, _run: object) -> None:
        used.append(config.run.trust_code)
        raise UserError("stop")

    monkeypatch.setattr("pipelines.training.publish._data_of", stop)
    for trust in (False, True):
        with pytest.raises(UserError, match="stop"):
            register_run(str(tmp_path), trust_code=trust)
    assert used == [False, True]
