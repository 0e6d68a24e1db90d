import json
from pathlib import Path

import pytest
import yaml

from dmtg_core import AGGREGATORS, ENCODERS, GroupingNetwork, InputSpec, SearchOptions, Task, TrainSettings
from pipelines.config.loading import Config, load_config
from pipelines.config.network_section import NetworkSection
from pipelines.config.sections import TrainSection
from pipelines.config.validation import checked
from pipelines.data.sources import build_source
from pipelines.errors import UserError
from pipelines.recipes import recipes


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "data": {"shards": "s"}, "train": {"epochs": 3}}))
    return str(path)


def test_overrides_replace_values_of_the_file_and_are_parsed_as_yaml(file: str) -> None:
    config = load_config(file, ["train.epochs=7", "network.options.widths=[4, 8]", "gate.temperature.start=4"])
    assert config.train.epochs == 7
    assert config.network.options == {"widths": [4, 8]}
    assert config.gate.temperature.start == 4.0


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("train.epoch=3", "train.epoch", "epochs"),
        ("trian.epochs=3", "trian", "train"),
        ("gate.temperature.strat=3", "gate.temperature.strat", "start"),
        ("source.knd=rooms", "source.knd", "kind"),
        ("search.distil_share=0.5", "search.distil_share", "distil"),  # a key of earlier versions
        ("search.affinity_share=0.5", "search.affinity_share", "budget"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_valid_ones(
    file: str, override: str, key: str, nearest: str
) -> None:
    with pytest.raises(UserError) as found:
        load_config(file, [override])
    assert f"unknown key {key}" in found.value.what
    assert nearest in found.value.remedy
    assert found.value.wrong_use


@pytest.mark.parametrize(
    "override", ["train.epochs=0", "gate.sampling=gumble", "network.groups=two", "data.cache=disk"]
)
def test_value_out_of_range_is_refused_and_shown(file: str, override: str) -> None:
    key, value = override.split("=")
    with pytest.raises(UserError) as found:
        load_config(file, [override])
    assert key in found.value.what
    assert value in found.value.what


def test_override_without_equals_sign_and_missing_file_are_wrong_use(file: str) -> None:
    with pytest.raises(UserError, match="section.key=value"):
        load_config(file, ["train.epochs"])
    with pytest.raises(UserError, match="no configuration file") as found:
        load_config("no-such")
    assert "rooms" in found.value.remedy


def test_former_name_of_a_method_is_refused_with_the_new_one(file: str, tmp_path: Path) -> None:
    stored = write(tmp_path, "old.yaml", name="x", data={"shards": "s"}, compare={"methods": ["wide", "reading"]})
    for path, overrides in ((file, ["compare.methods=[wide,reading]"]), (stored, [])):
        with pytest.raises(UserError, match="compare.methods: .*feature_overlap") as caught:
            load_config(path, overrides)
        assert caught.value.wrong_use
    assert "feature_overlap" in load_config(file, ["compare.methods=[feature_overlap]"]).compare.methods


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(UserError) as found:
        load_config(str(path))
    assert found.value.where == str(path)


def test_ray_section_comes_from_its_own_file(file: str, tmp_path: Path) -> None:
    ray = tmp_path / "ray.yaml"
    ray.write_text("workers: 5\n")
    assert load_config(file, [], str(ray)).ray.workers == 5
    assert load_config(file, ["ray.workers=3"], str(ray)).ray.workers == 3


def test_run_name_changes_only_with_values_that_change_the_result(file: str) -> None:
    base = load_config(file).run_name()
    assert load_config(file, ["ray.workers=1", "track.uri=none", "run.root=elsewhere"]).run_name() == base
    assert load_config(file, ["train.seed=1"]).run_name() != base
    assert load_config(file, ["run.name=mine"]).run_name() == "mine"


@pytest.mark.parametrize(
    ("overrides", "places"),
    [
        ([], ()),
        (["network.start_from=runs/a"], ("runs/a",)),
        (["network.start_from=[runs/a, s3://runs/b]"], ("runs/a", "s3://runs/b")),
        (["network.start_from=null"], ()),
    ],
)
def test_start_from_is_one_place_or_a_list(file: str, overrides: list[str], places: tuple[str, ...]) -> None:
    config = load_config(file, overrides)
    assert config.network.start_from == places
    assert (config.digest() == load_config(file).digest()) == (not places)


def write(folder: Path, file: str, /, **values: object) -> str:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(yaml.safe_dump(values))
    return str(folder / file)


def network(path: str, *overrides: str) -> dict[str, object]:
    return load_config(path, overrides).network.model_dump(include={"encoder", "options", "groups"})


def test_file_is_merged_into_its_base_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "bases/first.yaml", name="first", data={"shards": "s", "tasks": ["a", "b"]},
          train={"epochs": 3, "seed": 1}, gate={"temperature": {"start": 4, "family": "linear"}})  # fmt: skip
    write(
        tmp_path, "bases/second.yaml", base="first.yaml", train={"epochs": 4}, gate={"temperature": {"start": 3}}
    )
    path = write(tmp_path, "mine.yaml", base="bases/second.yaml", name="mine", data={"tasks": ["c"]})
    config = load_config(path, ["train.seed=2"])
    assert (config.name, config.data.tasks) == ("mine", ["c"])
    assert config.data.shards == f"{tmp_path}/bases/s"  # a path is relative to the file that has it
    assert (config.train.epochs, config.train.seed) == (4, 2)
    assert (config.gate.temperature.start, config.gate.temperature.family) == (3.0, "linear")


def test_null_replaces_the_value_of_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", name="x", data={"shards": "s", "tasks": ["a"]}, source={"kind": "rooms"})
    path = write(tmp_path, "mine.yaml", base="base.yaml", data={"tasks": None}, source=None)
    assert load_config(path).data.tasks is None
    assert load_config(path).source is None
    assert load_config(str(tmp_path / "base.yaml"), ["data.tasks=null"]).data.tasks is None


@pytest.mark.parametrize("base", ["rooms", "rooms.yaml", "paper/celeba9_k2"])
def test_recipe_can_be_a_base(tmp_path: Path, base: str) -> None:
    path = write(tmp_path, "mine.yaml", base=base, train={"epochs": 1})
    expected = load_config(base)
    assert load_config(path) == expected.model_copy(
        update={"train": expected.train.model_copy(update={"epochs": 1})}
    )


def test_resolved_configuration_needs_no_base(tmp_path: Path) -> None:
    values = load_config("paper/celeba9_k4").model_dump(mode="json")
    assert "base" not in values
    assert load_config(write(tmp_path, "resolved.yaml", **values)) == load_config("paper/celeba9_k4")


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ({"groups": 2}, {"widths": [4, 8]}),
        ({"encoder": "convnet"}, {"widths": [4, 8]}),
        ({"options": {"dense_stride": 4}}, {"widths": [4, 8], "dense_stride": 4}),
        ({"encoder": "resnet18"}, {}),
        ({"encoder": "mlp", "options": {"widths": [7]}}, {"widths": [7]}),
    ],
)
@pytest.mark.parametrize("named", [{}, {"encoder": "convnet"}])
def test_options_of_an_encoder_do_not_pass_to_another(
    tmp_path: Path, over: dict[str, object], expected: dict[str, object], named: dict[str, object]
) -> None:
    base = {"name": "x", "data": {"shards": "s"}, "network": {**named, "options": {"widths": [4, 8]}}}
    path = write(tmp_path, "base.yaml", **base)
    overrides = [f"network.{key}={json.dumps(value)}" for key, value in over.items()]
    mine = write(tmp_path, "mine.yaml", base="base.yaml", network=over)
    for found in (network(mine), network(path, *overrides)):
        assert found["options"] == expected
        assert found["encoder"] == over.get("encoder", "convnet")


def test_options_of_a_reader_do_not_pass_to_another() -> None:
    config = load_config("rooms", ["source.kind=taskonomy", "source.options.size=128"])
    assert config.source is not None
    assert config.source.options == {"size": 128}


def test_bases_that_form_a_cycle_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", base="b.yaml")
    write(tmp_path, "b.yaml", base="sub/../a.yaml")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="cycle: a.yaml → b.yaml → a.yaml"):
        load_config(path)
    with pytest.raises(UserError, match="cycle: c.yaml → c.yaml"):
        load_config(write(tmp_path, "c.yaml", base="c.yaml"))


@pytest.mark.parametrize(("base", "what"), [("none.yaml", "'none.yaml'"), (["rooms"], "base: expected the name")])
def test_base_that_cannot_be_used_is_wrong_use(tmp_path: Path, base: object, what: str) -> None:
    with pytest.raises(UserError, match=what) as found:
        load_config(write(tmp_path, "mine.yaml", base=base))
    assert str(tmp_path) in found.value.where
    assert found.value.wrong_use


def test_base_cannot_be_an_override(file: str) -> None:
    with pytest.raises(UserError, match="unknown key base"):
        load_config(file, ["base=rooms"])


@pytest.mark.parametrize("name", recipes())
def test_recipe_is_valid_and_names_no_machine(name: str) -> None:
    config = load_config(name)
    assert isinstance(config, Config)
    config.settings()
    assert config.source is not None
    assert not Path(config.source.root).is_absolute()
    assert not Path(config.data.shards).is_absolute()


def test_recipe_of_the_demo_builds_its_network(tmp_path: Path) -> None:
    config = load_config("rooms", [f"source.root={tmp_path}"])
    assert config.source is not None
    described = build_source(config.source.kind, config.source.root, config.source.options).describe()
    network = GroupingNetwork(config.network_spec(described.input, described.tasks))
    assert len(network.pairs) == 15


def test_every_training_setting_of_the_core_can_be_configured(file: str) -> None:
    overrides = [
        "train.recompute=true", "train.compile=false", "train.sync_batchnorm=true", "train.clip_norm=2",
        "train.epochs=9", "gate.learning_rate=0.3",
        "gate.entropy_weight=0.5", "search.share=0.3", "train.seed=5", "train.batch_size=11",
    ]  # fmt: skip
    settings, plain = load_config(file, overrides).settings(), TrainSettings()
    assert load_config(file, ["train.accumulate=3"]).settings().accumulate == 3
    set_here = {
        "recompute",
        "compile",
        "sync_batchnorm",
        "clip_norm",
        "epochs",
        "gate_learning_rate",
    }
    set_here |= {"entropy_weight", "search_share", "seed", "batch_size"}
    assert {name for name in vars(settings) if vars(settings)[name] != vars(plain)[name]} >= set_here
    from_sections = {"search_share", "gate_learning_rate", "temperature", "entropy_weight", "prune_threshold"}
    from_sections |= {"batch_branches", "average", "lr_hold"}  # the search sets the last one
    assert vars(settings).keys() - from_sections <= load_config(file).train.model_dump().keys()


@pytest.mark.parametrize(("value", "runs"), [("null", None), ("1", 1.0), ("7.5", 7.5), ("auto", 4 * (3 + 2.0))])
def test_the_budget_of_a_search_is_a_number_of_runs(file: str, value: str, runs: float | None) -> None:
    config = load_config(file, [f"search.budget={value}", "network.groups=3"])
    assert config.search_options().budget == runs


@pytest.mark.parametrize("value", ["0.9", "-3", "often", "true", ".inf", ".nan", "[4]"])
def test_a_budget_below_one_run_is_refused(file: str, value: str) -> None:
    with pytest.raises(UserError, match=r"search.budget: .*expected auto, or a number .* at least 1"):
        load_config(file, [f"search.budget={value}"])


def test_every_option_of_the_search_can_be_configured(file: str) -> None:
    given = {"method": "guided", "starts": 2, "wide": False, "budget": 6.0, "rung": 0.3, "compare": 0.4,
             "probability": 1.0, "within": 0.1, "distil": False}  # fmt: skip
    found = load_config(file, [f"search.{key}={json.dumps(value)}" for key, value in given.items()])
    assert vars(found.search_options()) == given
    assert vars(load_config(file).search_options()) == vars(SearchOptions())


def test_pruning_can_be_turned_off(file: str) -> None:
    assert load_config(file, ["gate.prune=off"]).settings().prune_threshold == 0
    assert load_config(file, ["gate.prune=on"]).settings().prune_threshold > 0


def test_weights_of_tasks_can_be_learned(file: str) -> None:
    config = load_config(file, ["train.task_weighting=uncertainty"])
    assert (
        config.network_spec(InputSpec("image", (8, 8, 3)), [Task("t", "binary")]).task_weighting == "uncertainty"
    )


def test_batch_normalisation_over_workers_needs_whole_batches(file: str) -> None:
    with pytest.raises(UserError, match="sync_batchnorm normalises over whole batches: set accumulate to 1"):
        load_config(file, ["train.sync_batchnorm=true", "train.accumulate=2"]).settings()


def test_guided_search_needs_no_uniform_gate_and_the_published_search_does(file: str) -> None:
    load_config(file, ["search.starts=0"]).check_options()
    with pytest.raises(UserError, match="starts must be at least 1, got 0") as caught:
        load_config(file, ["search.starts=0", "search.method=dmtg"]).check_options()
    assert caught.value.where == "search"
    assert caught.value.wrong_use


def test_configuration_is_read_from_storage_as_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text("base: rooms\nname: best\nnetwork: {groups: 2}\n")
    address = file.as_uri()  # s3:// addresses are read in the same way
    assert load_config(address, ["train.epochs=3"]) == load_config(str(file), ["train.epochs=3"])
    file.write_text("- a list\n")
    for wrong, named in ((address, "expected sections"), (f"{address}x", "cannot read"), ("ftp://b/c", "ftp://")):
        with pytest.raises(UserError, match=named) as caught:
            load_config(wrong)
        assert caught.value.wrong_use


@pytest.mark.parametrize(
    ("field", "names"),
    [(NetworkSection.model_fields["encoder"], ENCODERS), (TrainSection.model_fields["aggregator"], AGGREGATORS)],
)
def test_the_description_of_a_key_lists_the_names_that_the_core_has(field, names) -> None:
    assert f"one of {', '.join(names)}" in str(field.description)


@pytest.mark.parametrize(("value", "read"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_on_and_off_are_words_and_do_not_change_the_digest(file: str, value: str, read: str) -> None:
    config = load_config(file, [f"network.batch_branches={value}"])
    assert config.network.batch_branches == read
    assert config.settings().batch_branches == read
    assert config.digest() == load_config(file).digest()
    assert Config(**yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("value", "read", "before"),
    [("off", "off", False), ("false", "off", False), ("true", "tasks", True), ("tasks", "tasks", True),
     ("published", "published", "published")],
)  # fmt: skip
def test_rescaled_gradients_of_earlier_versions_are_booleans_with_the_same_digest(
    file: str, value: str, read: str, before: object
) -> None:
    config = load_config(file, [f"network.rescale_gradients={value}"])
    assert config.network.rescale_gradients == read
    dumped = config.model_dump(mode="json")
    dumped["network"]["rescale_gradients"] = before
    assert checked(Config, dumped).digest() == config.digest()
    assert (config.digest() == load_config(file).digest()) == (read == "off")


def test_early_stopping_changes_the_digest_only_if_it_is_on(file: str) -> None:
    assert load_config(file, ["train.patience=0"]).digest() == load_config(file).digest()
    stopping = load_config(file, ["train.patience=3"])
    assert stopping.digest() != load_config(file).digest()
    assert stopping.settings().patience == 3


PLACES = {
    "source": {"kind": "table", "root": "raw"},
    "data": {"shards": "work/shards"},
    "run": {"root": "work/runs"},
    "track": {"uri": "sqlite:///mlflow.db"},
    "network": {"start_from": ["old", "/abs", "s3://b/c"]},
}


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a folder below the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "x", **PLACES}))
    return path


def test_paths_of_a_file_are_beside_it_and_those_of_overrides_are_not(apart: Path) -> None:
    config = load_config("conf/c.yaml", ["data.like=other"])
    assert config.source is not None
    assert (config.source.root, config.data.shards) == ("conf/raw", "conf/work/shards")
    assert config.run.root == "conf/work/runs"
    assert config.track.uri == "sqlite:///conf/mlflow.db"
    assert config.network.start_from == ("conf/old", "/abs", "s3://b/c")
    assert config.data.like == "other"
    (apart.parent / "d.yaml").write_text("base: c.yaml\nrun: {root: mine}\n")
    derived = load_config("conf/d.yaml")
    assert (derived.run.root, derived.data.shards) == ("conf/mine", "conf/work/shards")
    stored = load_config("conf/c.yaml", ["ray.storage=s3://bucket/x"])
    assert (stored.data.shards, stored.run.root) == ("s3://bucket/x/work/shards", "s3://bucket/x/work/runs")


def test_a_run_is_the_same_from_every_folder(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("conf/c.yaml")
    absolute = load_config(str(apart))
    again = Path("again.yaml")
    again.write_text(yaml.safe_dump(config.model_dump(mode="json")))  # as a run folder stores it
    assert load_config("again.yaml").digest() == config.digest()
    monkeypatch.chdir(apart.parent)
    beside = load_config("c.yaml")
    assert beside.data.shards == "work/shards"
    assert beside.digest() == config.digest() == absolute.digest() == load_config("../again.yaml").digest()


def test_a_file_whose_places_are_in_the_working_directory_is_read_as_before(
    apart: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("work/shards").mkdir(parents=True)
    caplog.set_level("INFO")
    config = load_config("conf/c.yaml")
    assert (config.data.shards, config.run.root) == ("work/shards", "work/runs")
    assert "data.shards=work/shards is in the current folder, not beside conf/c.yaml" in caplog.text
    assert config.digest() == checked(Config, {"name": "x", **PLACES}).digest()
    (apart.parent / "work" / "shards").mkdir(parents=True)
    assert load_config("conf/c.yaml").run.root == "conf/work/runs"
