"""The model registry: versions and their facts, and the commands on every kind of store."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException

from dmtg_core.grouping import Grouping
from dmtg_core.network.encoders import EncoderSpec
from pipelines.cli.app import app
from pipelines.config.sections import TrackSection
from pipelines.data.sources import build_source
from pipelines.data.sources.base import Source
from pipelines.errors import UserError
from pipelines.registry.aliases import champions, promote, set_challenger
from pipelines.registry.models import load_groups
from pipelines.registry.pyfunc_model import GroupPredictor
from pipelines.registry.records import LONGEST_TAG, model_card, registered_models
from pipelines.registry.tracking import connect
from pipelines.registry.versions import list_models, show_model
from tests.pipelines.cli.test_app import call
from tests.pipelines.registry.versions import THREE, TWO, add_version, aliases
from tests.pipelines.s3_server import BUCKET
from tests.pipelines.untrained import Finished, finish
from tests.soak import others_in_soak

TASKS = ["sick", "cost", "days"]


@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("dmtg models promote tabb", {"tabbed"}),
        ("dmtg predict models:/tabbed", {
            "models:/tabbed/1", "models:/tabbed.group_0/1", "models:/tabbed.group_1/1",
            "models:/tabbed@challenger", "models:/tabbed.group_0@challenger", "models:/tabbed.group_1@challenger",
        }),
    ],
)  # fmt: skip
def test_the_shell_completes_what_is_registered(
    section, tmp_path: Path, monkeypatch, capsys, begun: str, offered: set[str]
) -> None:
    if not any(model.name == "tabbed" for model in registered_models(connect(section), "tabbed")):
        add_version(section, "tabbed", TWO)
        set_challenger(section, "tabbed", 1)
    (tmp_path / "ray_config.yaml").write_text(f"tracking_uri: {section.uri}\n")
    words = begun.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dmtg"])
    for name, value in (("COMP_WORDS", "\n".join(words)), ("COMP_CWORD", str(len(words) - 1)),
                        ("_DMTG_COMPLETE", "complete_bash")):  # fmt: skip
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        app(prog_name="dmtg")
    assert set(capsys.readouterr().out.split()) == offered


def test_groups_and_versions_are_listed_in_the_order_of_their_numbers(section) -> None:
    for groups in ([[f"task_{n}"] for n in range(12)], *[TWO] * 10):
        add_version(section, "long", groups)
    groups = [f"long.group_{k}" for k in range(12)]
    assert [model.name for model in registered_models(connect(section), "long")] == ["long", *groups]
    found = {entry["name"]: entry["version"] for entry in list_models(section, "long")}
    assert list(found) == ["long", *groups]
    assert list(found.values()) == [11, 11, 11, *[1] * 10]
    assert list(show_model(section, "long/1")["groups"]) == [f"group_{k}" for k in range(12)]
    assert list(show_model(section, "long/1")["members"]) == groups
    with pytest.raises(UserError) as caught:
        show_model(section, "long/500")
    assert caught.value.remedy == "use one of 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    set_challenger(section, "long", 1)
    for version in (1, 9, 10, 11):
        promote(section, "long", version)
    assert champions(section, "long") == [1, 9, 10, 11]
    assert aliases(section, "long")["champion"] == {"": 11, ".group_0": 11, ".group_1": 11}


def test_twelve_groups_are_loaded_and_predict_in_the_order_of_their_numbers(root: Path, embedded) -> None:
    names = [f"t{n}" for n in range(12)]
    lines = [f"{i},{i},{','.join('01'[(i + n) % 2] for n in range(12))},train" for i in range(4)]
    (root / "twelve.csv").write_text("\n".join([f"id,age,{','.join(names)},split", *lines]) + "\n")
    tasks = [{"column": name, "kind": "binary"} for name in names]
    options = {"file": "twelve.csv", "id_column": "id", "features": ["age"], "tasks": tasks}
    source = build_source("table", str(root), options)
    encoder = EncoderSpec("mlp", options={"widths": [2]})
    made = finish(source, encoder, root, embedded, name="twelve", groups=12)
    (made.run / "grouping.json").write_text(Grouping.from_dict(made.result["grouping"]).to_json())
    groups = load_groups(str(made.run), TrackSection(uri="none"))
    assert list(groups) == [f"group_{k}" for k in range(12)]
    assert [task.name for model in groups.values() for task in model.tasks] == names
    predictor = GroupPredictor()
    files = {"groups": str(made.run / "models"), "grouping": str(made.run / "grouping.json")}
    predictor.load_context(SimpleNamespace(artifacts=files))
    assert list(predictor.predict(None, made.example)) == names


# a registry on a server is in `apart`; runs and files on a server are in test_tracking.py, the others are embedded
@pytest.fixture(params=others_in_soak(["embedded", "server", "apart"], "apart"))
def store(request: pytest.FixtureRequest, embedded: dict[str, str]) -> dict[str, str]:
    """The store of the commands: an SQLite file; a server with its files on S3; or runs in the SQLite file, their
    files on S3, and the registry on the server."""
    if request.param == "embedded":
        return embedded
    server = request.getfixturevalue("mlflow_server")
    return {"uri": server} if request.param == "server" else apart(embedded["uri"], server)


def apart(uri: str, registry: str) -> dict[str, str]:
    return {"uri": uri, "registry_uri": registry, "experiment": "apart"}


def made(source: Source, root: Path, store: dict[str, str], name: str, groups: int) -> Finished:
    files = f"s3://{BUCKET}/apart" if "registry_uri" in store and store["uri"].startswith("sqlite") else ""
    return finish(source, EncoderSpec("mlp"), root, store, name=name, groups=groups, files=files)


def test_a_registry_that_cannot_access_the_files_is_an_error(source, root, mlflow_server) -> None:
    other = mlflow_server.replace("127.0.0.1", "localhost")  # for MLflow a server of its own
    run = made(source, root, apart(mlflow_server, other), "unreached", 1)
    with pytest.raises(UserError, match="cannot access artifacts that are served by the tracking server"):
        run.register()
    assert not list_models(TrackSection(uri=mlflow_server), "unreached")


def test_the_commands_have_the_same_results_on_every_store(source, store, root, tmp_path) -> None:
    name = "ills" if "registry_uri" not in store else "ails"
    first, second = (made(source, root, store, name, groups) for groups in (2, 3))
    second.result["metrics"]["cost"] |= {f"quantile_{i}": i / 7 for i in range(500)}  # too long for a tag
    file = tmp_path / "ray.yaml"
    file.write_text(yaml.safe_dump({"tracking_uri": store["uri"], "registry_uri": store.get("registry_uri", "")}))

    def models(*words: str) -> dict[str, Any]:
        code, found, logged = call("models", *words, "--ray-config", str(file))
        assert code == 0, logged
        return found

    assert [model.uri for model in first.register()] == [
        f"models:/{name}/1", f"models:/{name}.group_0/1", f"models:/{name}.group_1/1",
    ]  # fmt: skip
    assert models("promote", name)["before"] is None
    second.register()
    listed = {model["uri"]: model for model in models("list")["entries"] if model["name"].startswith(name)}
    assert {uri: model["aliases"] for uri, model in listed.items()} == {
        f"models:/{name}/2": ["challenger"], f"models:/{name}/1": ["champion"],
        f"models:/{name}.group_0/2": ["challenger"], f"models:/{name}.group_0/1": ["champion"],
        f"models:/{name}.group_1/2": ["challenger"], f"models:/{name}.group_1/1": ["champion"],
        f"models:/{name}.group_2/1": ["challenger"],
    }  # fmt: skip
    assert listed[f"models:/{name}/1"]["tasks"] == "sick, days, cost"
    assert listed[f"models:/{name}.group_0/1"]["tasks"] == "sick, days"

    shown = models("show", f"{name}@challenger")
    assert shown["groups"] == {"group_0": ["sick"], "group_1": ["cost"], "group_2": ["days"]}
    assert shown["members"] == {f"{name}.group_0": 2, f"{name}.group_1": 2, f"{name}.group_2": 1}
    assert shown["metrics"] == second.result["metrics"]
    assert shown["grouping"] == second.result["grouping_name"]
    assert (shown["run"], shown["run_id"], shown["split"]) == (str(second.run), second.run_id, "test")
    assert shown["data_digest"] == second.manifest.digest()
    assert shown["config_digest"] == second.config.digest()

    compared = models("diff", name)
    assert (compared["before"]["version"], compared["after"]["version"]) == (1, 2)
    assert compared["adjusted_rand_index"] == 0
    assert compared["moved"] == ["days"]
    assert compared["notes"] == []
    by_row = {(row["task"], row["metric"]): (row["before"], row["after"]) for row in compared["metrics"]}
    assert by_row["sick", "loss"] == (1.0, 1.0)
    assert by_row["cost", "quantile_7"] == (None, 1.0)

    assert models("promote", name)["before"] == 1
    assert models("diff", f"{name}/1", f"{name}@champion")["adjusted_rand_index"] == 0
    assert list(load_groups(f"models:/{name}@champion", second.config.track)) == ["group_0", "group_1", "group_2"]
    back = models("rollback", name)
    assert (back["version"], back["before"], back["models"]) == (1, 2, [f"models:/{name}/1"])
    assert list(load_groups(f"models:/{name}@champion", first.config.track)) == ["group_0", "group_1"]
    assert call("models", "rollback", name, "--ray-config", str(file))[0] == 1
    tracking = connect(TrackSection(uri=store["uri"]))
    assert tracking.get_run(first.run_id).info.status == "RUNNING"  # its tracker ends it
    assert len(tracking.search_model_versions(f"run_id='{first.run_id}'")) == (0 if "registry_uri" in store else 3)


@pytest.fixture(scope="module")
def registered(source: Source, embedded: dict[str, str], root: Path) -> Finished:
    """A registered run of three groups."""
    done = made(source, root, embedded, "patients", 3)
    done.register()
    return done


def test_misspelt_names_are_answered_with_the_closest_ones(registered) -> None:
    section = registered.config.track
    for address, what, nearest in (
        ("patient", "no registered model 'patient'", "patients"),
        ("models:/patients/7", "patients has no version '7'", "use one of 1"),
        ("patients/one", "patients has no version 'one'", "use one of 1"),
        ("patients@challanger", "patients has no alias 'challanger'", "use one of challenger"),
        ("patients@champion", "patients has no alias 'champion'", "use one of challenger"),
    ):
        with pytest.raises(UserError, match=what) as error:
            show_model(section, address)
        assert nearest in error.value.remedy
    with pytest.raises(UserError, match="no registered model"):
        load_groups("models:/patient", section)
    code, found, _ = call("models", "promote", "patients.group_1", "--version", "1", "--uri", section.uri)
    assert code == 2
    assert "give the composite patients" in found["error"]["remedy"]
    code, found, _ = call("models", "diff", "patients.group_1/1", "patients/1", "--uri", section.uri)
    assert (code, found["error"]["what"]) == (2, "models:/patients.group_1/1 is not the composite of a grouping")


def test_models_of_different_tasks_are_compared_on_the_common_ones(section) -> None:
    add_version(section, "wide", THREE)
    add_version(section, "wide", [["cost", "sick"], ["height"]])
    add_version(section, "other", [["height"]])
    code, found, logged = call("models", "diff", "wide/1", "wide/2", "--uri", section.uri)
    assert code == 0
    assert (found["tasks"], found["only_before"], found["only_after"]) == (["sick", "cost"], ["days"], ["height"])
    assert found["notes"] == ["the two have different tasks; only those that both have are compared"]
    assert found["notes"][0] in logged
    code, found, _ = call("models", "diff", "wide/1", "other/1", "--uri", section.uri)
    assert (code, found["error"]["what"]) == (2, "models:/wide/1 and models:/other/1 have no task in common")


def test_a_version_has_its_grouping_and_the_group_of_each_task(registered) -> None:
    connect(registered.config.track)
    folder = Path(mlflow.artifacts.download_artifacts("models:/patients/1"))
    held = json.loads((folder / "artifacts" / "grouping.json").read_text())
    assert (held["name"], held["groups"]) == (registered.result["grouping_name"], registered.result["grouping"])
    assert (
        mlflow.models.get_model_info("models:/patients/1").metadata["groups_served"]
        == registered.result["grouping"]
    )
    assert not list(folder.rglob("*.pkl"))
    version = mlflow.MlflowClient().get_model_version("patients", "1")
    assert version.tags["dmtg.outcome"] == registered.result["outcome"] == version.description.splitlines()[0]
    headline = json.loads(version.tags["dmtg.headline"])
    rows = [line for line in version.description.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[:3] for row in rows] == [
        [f"| {task}", group, headline[task]]
        for group, tasks in registered.result["grouping"].items()
        for task in tasks
    ]
    assert version.tags["dmtg.data_digest"] in version.description


def card_facts(groups: dict[str, list[str]]) -> dict[str, Any]:
    """Facts of a version whose tasks all have the same figures."""
    tasks = [task for members in groups.values() for task in members]
    return {
        "grouping": "g2-1", "split": "test", "groups": groups, "data_digest": "d1", "config_digest": "c1",
        "code_version": "0.1.0", "headline": dict.fromkeys(tasks, "auroc"),
        "metrics": {task: {"auroc": 0.91234} for task in tasks}, "baseline": {tasks[0]: {"auroc": 0.9}},
    }  # fmt: skip


def test_a_model_card_has_tasks_data_and_limits() -> None:
    card = model_card(card_facts({"group_10": ["Größe, cm"], "group_9": ["売上", "a|b"]}), ["task x is rare"])
    assert card.splitlines() == [
        "Grouping g2-1.",
        "",
        "| task | group | metric | value | naive MTL |",
        "|---|---|---|---|---|",
        "| 売上 | group_9 | auroc | 0.9123 | – |",
        "| a&#124;b | group_9 | auroc | 0.9123 | – |",
        '| "Größe, cm" | group_10 | auroc | 0.9123 | 0.9 |',
        "",
        "Data: digest `d1`, metrics of its test split. Configuration `c1`, DMTG 0.1.0.",
        "",
        "Limits: the metrics hold for samples like those of this data set, from one run.",
        "- task x is rare",
    ]


@pytest.mark.parametrize(
    ("tasks", "length", "words"),
    [(100, 30, "- group_0: task 0 "), (100, 60, "100 tasks in 1 group; the artifact `details.json`")],
)
def test_the_card_of_a_model_of_many_tasks_is_shorter(tasks: int, length: int, words: str) -> None:
    card = model_card(card_facts({"group_0": [f"task {n} " + "x" * length for n in range(tasks)]}))
    assert words in card
    assert "Data: digest `d1`" in card
    assert len(card) <= LONGEST_TAG


@pytest.mark.parametrize("after", others_in_soak([0, 1, 2], 1))  # each write is killed in test_lost_runs.py
def test_a_registration_that_is_killed_between_two_models_is_completed(
    source, embedded, root, monkeypatch, after
) -> None:
    name = f"cut{after}"
    run = made(source, root, embedded, name, 2)
    create, left = mlflow.MlflowClient._create_model_version, [after]

    def killed(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise MlflowException("gone")
        left[0] -= 1
        return create(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "_create_model_version", killed)
        with pytest.raises(MlflowException, match="gone"):
            run.register()
    client = connect(run.config.track)
    names = [f"{name}.group_0", f"{name}.group_1", name]
    for held in names[:after]:  # and versions that have lost a tag
        client.delete_model_version_tag(held, "1", "dmtg.metrics")
    models = run.register()
    assert models == run.register()
    assert [model.uri for model in models] == [f"models:/{model}/1" for model in (name, *names[:2])]
    for held in names:
        (version,) = client.search_model_versions(f"name='{held}'")
        assert json.loads(version.tags["dmtg.metrics"])
    listed = list_models(run.config.track, name)
    assert {m["name"]: m["aliases"] for m in listed} == {held: ["challenger"] for held in names}


# the last one: each later test of the shared registry would list its models
def test_more_models_than_the_registry_has_on_a_page_are_listed(section) -> None:
    client, names = connect(section), [f"paged.group_{k}" for k in range(101)]
    for name in names:
        client.create_registered_model(name)
    assert [model.name for model in registered_models(client, "paged")] == names
