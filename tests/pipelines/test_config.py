from pathlib import Path

import pytest
import yaml

from dmtg_core import GroupingNetwork
from pipelines.config import Config, load_config, recipes
from pipelines.errors import UserError
from pipelines.sources import build_source


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "data": {"shards": "s"}, "train": {"epochs": 3}}))
    return str(path)


def test_words_are_laid_over_the_file_and_parsed_as_yaml(file: str) -> None:
    config = load_config(file, ["train.epochs=7", "network.options.widths=[4, 8]", "gate.temperature.start=4"])
    assert config.train.epochs == 7
    assert config.network.options == {"widths": [4, 8]}
    assert config.gate.temperature.start == 4.0


@pytest.mark.parametrize(
    ("word", "key", "nearest"),
    [
        ("train.epoch=3", "train.epoch", "epochs"),
        ("trian.epochs=3", "trian", "train"),
        ("gate.temperature.strat=3", "gate.temperature.strat", "start"),
        ("source.knd=rooms", "source.knd", "kind"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_valid_ones(file: str, word: str, key: str, nearest: str) -> None:
    with pytest.raises(UserError) as found:
        load_config(file, [word])
    assert f"unknown key {key}" in found.value.what
    assert nearest in found.value.remedy
    assert found.value.wrong_use


@pytest.mark.parametrize(
    "word", ["train.epochs=0", "gate.sampling=gumble", "network.groups=two", "data.cache=disk"]
)
def test_value_out_of_range_is_refused_and_shown(file: str, word: str) -> None:
    key, value = word.split("=")
    with pytest.raises(UserError) as found:
        load_config(file, [word])
    assert key in found.value.what
    assert value in found.value.what


def test_word_without_equals_sign_and_missing_file_are_wrong_use(file: str) -> None:
    with pytest.raises(UserError, match="section.key=value"):
        load_config(file, ["train.epochs"])
    with pytest.raises(UserError, match="no configuration file") as found:
        load_config("no-such")
    assert "rooms" in found.value.remedy


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


def test_run_name_follows_what_changes_the_result_and_nothing_else(file: str) -> None:
    base = load_config(file).run_name()
    assert load_config(file, ["ray.workers=1", "track.uri=none", "run.root=elsewhere"]).run_name() == base
    assert load_config(file, ["train.seed=1"]).run_name() != base
    assert load_config(file, ["run.name=mine"]).run_name() == "mine"


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
