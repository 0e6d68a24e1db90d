"""Runs that start from models of earlier runs: these are found, checked, and copied into the run folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dmtg_core import EncoderSpec, GroupingNetwork, GroupModel, InputSpec, NetworkSpec, Task
from dmtg_core.training.checkpoint import save_model, save_network
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.runs.files import METRICS, RESULT, read_jsonl
from pipelines.runs.models import warm_start
from pipelines.runs.warm_start import START, baseline_notes, keep_models, open_models
from pipelines.storage import Location, locate
from pipelines.training.driver import Trained, train
from tests.pipelines.conftest import make_config
from tests.pipelines.s3_server import BUCKET

Run = tuple[Config, Trained, list[str]]
COLOUR = Task("colour", "multiclass", 3, labels=("blue", "green", "red"))
IMAGE = InputSpec("image", (16, 16, 3), "uint8")
ENCODER = EncoderSpec("convnet", 0, {"widths": [8, 16]})


def write_model(folder: Path, *tasks: Task, image: InputSpec = IMAGE, seed: int = 1) -> str:
    """An untrained model of the small set in a folder."""
    save_model(folder, GroupModel(NetworkSpec(image, tasks or (COLOUR,), ENCODER, 1, seed=seed)))
    return str(folder)


def write_run(folder: Path, *models: int) -> str:
    """The folder of a finished run with these group models, as far as it is needed for a start."""
    for number in models:
        write_model(folder / "models" / f"group_{number}", seed=number)
    (folder / RESULT).write_text("{}")
    return str(folder)


def starting(images: Path, work: Path, *places: str, **network: object) -> Config:
    return make_config(images, work, network={"start_from": places, **network}, track={"uri": "none"})


def run_of(config: Config) -> Location:
    return locate(config.run.root) / config.run_name()


def first_score(run: Location) -> float:
    """Validation score of the search's first epoch."""
    score: float = next(r["val_score"] for r in read_jsonl(run / METRICS) if r["stage"] == "start_0")
    return score


def test_models_are_found_in_the_order_of_places_and_of_groups(images: Path, tmp_path: Path) -> None:
    one, many = write_model(tmp_path / "one"), write_run(tmp_path / "many", 10, 2, 0)
    models = open_models(starting(images, tmp_path, many, one, groups=4), locate(str(tmp_path / "run")))
    assert models is not None
    assert models.names == (*(f"{many}/models/group_{k}" for k in (0, 2, 10)), one)
    assert [model.spec.seed for model in models.models] == [0, 2, 10, 1]
    assert open_models(starting(images, tmp_path), locate(str(tmp_path / "run"))) is None


@pytest.mark.usefixtures("s3")
def test_models_in_a_bucket_equal_local_ones(images: Path, tmp_path: Path) -> None:
    folder = Path(write_run(tmp_path / "run", 0, 1))
    place = locate(f"s3://{BUCKET}/starting")
    for file in folder.rglob("*.*"):
        (place / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
    config = starting(images, tmp_path, str(place))
    models, local = (open_models(c, place / "new") for c in (config, starting(images, tmp_path, str(folder))))
    assert models is not None
    assert local is not None
    assert models.digest() == local.digest()
    held = keep_models(models, place / "new")
    assert [str(kept) for _, kept in held] == [f"{place}/new/{START}/{i}" for i in (0, 1)]
    kept = warm_start(held)
    assert kept is not None
    assert (kept.digest(), kept.names) == (models.digest(), models.names)


def damage(folder: Path) -> None:
    weights = folder / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def test_unusable_models_are_refused_before_shards_are_written(images: Path, tmp_path: Path) -> None:
    model, empty, unfinished = write_model(tmp_path / "model"), tmp_path / "empty", tmp_path / "unfinished"
    empty.mkdir()
    write_model(unfinished / "models" / "group_0")
    broken, bare, several = tmp_path / "broken", tmp_path / "bare", tmp_path / "several"
    damage(Path(write_model(broken)))
    (Path(write_model(bare)) / "network.safetensors").unlink()
    save_network(several, GroupingNetwork(NetworkSpec(IMAGE, (COLOUR,), ENCODER, groups=3)))
    for config, message in (
        (starting(images, tmp_path, str(tmp_path / "gone")), "there is no such folder"),
        (starting(images, tmp_path, str(empty)), "neither a model nor a finished run"),
        (starting(images, tmp_path, str(unfinished)), "neither a model nor a finished run"),
        (starting(images, tmp_path, str(broken)), f"{broken}/network.safetensors: missing or damaged"),
        (starting(images, tmp_path, str(bare)), f"{bare}/network.safetensors: missing or damaged"),
        (starting(images, tmp_path, str(several)), f"{several}: holds a network of 3 branches"),
        (starting(images, tmp_path, model, model, model), "3 models do not fit 2 branches"),
        (starting(images, tmp_path, model, options={"widths": [8]}), r"widths=\[8, 16\].*widths=\[8\]"),
        (starting(images, tmp_path, model, write_model(tmp_path / "b", seed=2), stem=1), "set network.stem=0"),
    ):
        with pytest.raises(UserError, match=message) as found:
            train(config)
        assert found.value.remedy
        assert found.value.where
    assert not (tmp_path / "shards").exists()


def test_a_model_for_other_data_is_refused_before_training(run: Run, images: Path, tmp_path: Path) -> None:
    shards = {"shards": run[0].data.shards, "min_support": 8}
    large = write_model(tmp_path / "large", image=InputSpec("image", (32, 32, 3), "uint8"))
    hat = write_model(tmp_path / "hat", Task("hat", "binary"))
    for place, message in (
        (large, r"shape \(32, 32, 3\), the network image of shape \(16, 16, 3\)"),
        (hat, "none of the tasks: it was trained for hat, the network is for colour"),
    ):
        config = starting(images, tmp_path, place)
        with pytest.raises(UserError, match=message) as found:
            train(config.model_copy(update={"data": config.data.model_copy(update=shards)}))
        assert found.value.where == "network.start_from"
        assert not (run_of(config) / START).exists()


def test_naive_mtl_that_did_not_start_from_the_models_is_noted(images: Path, tmp_path: Path) -> None:
    config = starting(images, tmp_path)
    one, two = (("a", locate("a")),), (("a", locate("a")), ("b", locate("b")))
    assert "started from 2 trained models, naive MTL from scratch" in baseline_notes(config, two)[0]
    alone = config.model_copy(update={"search": config.search.model_copy(update={"baseline": False})})
    assert baseline_notes(config, ()) == baseline_notes(config, one) == baseline_notes(alone, two) == []


def test_a_run_starts_from_another_and_reads_it_only_once(run: Run, tmp_path: Path) -> None:
    config, done, _ = run
    before = tmp_path / "before"
    assert done.run.local is not None
    shutil.copytree(done.run.local / "models", before / "models")
    shutil.copy(done.run.local / RESULT, before)
    values = config.model_dump(mode="json")
    values["network"] |= {"start_from": str(before)}
    values["train"] |= {"epochs": 1, "learning_rate": 1e-4}
    values["ray"] |= {"workers": 1}
    values["search"] |= {"baseline": False}
    values |= {"track": {"uri": "none"}, "run": {"root": str(tmp_path / "runs")}}
    config, logged = checked(Config, values), []
    started = train(config, logged.append)

    groups = done.result["grouping"]
    for k, (group, tasks) in enumerate(groups.items()):
        where = "every branch" if len(groups) == 1 else f"branch {k}"
        line = f"{where} starts from {before}/models/{group} with its heads of {', '.join(tasks)}"
        assert any(text.startswith(line) for text in logged)
    first, fresh = first_score(started.run), first_score(done.run)
    assert first < fresh - 0.5  # the mean logarithm of the losses

    given = open_models(config, locate(str(tmp_path / "new")))
    assert given is not None
    shutil.rmtree(before)
    (started.run / RESULT).delete()  # as if it had been interrupted
    assert open_models(config, started.run) is None
    kept = warm_start(keep_models(None, started.run))
    assert kept is not None
    assert (kept.digest(), kept.names) == (given.digest(), given.names)
