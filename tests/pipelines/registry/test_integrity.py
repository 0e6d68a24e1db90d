"""The files of a registered model are those that were registered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from dmtg_core.network.encoders import EncoderSpec
from pipelines.data.sources.base import Source
from pipelines.errors import UserError
from pipelines.registry import integrity
from pipelines.registry.models import load_groups
from pipelines.registry.records import registered_models
from pipelines.registry.tracking import connect
from pipelines.registry.versions import show_model
from pipelines.runs.files import REGISTERED
from pipelines.storage import locate
from pipelines.training import publish
from tests.pipelines.cli.test_app import call
from tests.pipelines.untrained import Finished, finish


@pytest.fixture(scope="module")
def done(source: Source, embedded: dict[str, str], root: Path) -> Finished:
    made = finish(source, EncoderSpec("mlp"), root, embedded, name="sealed", groups=2)
    made.register()
    return made


@pytest.fixture
def stored(done: Finished) -> Path:
    """The stored files of the composite. Tests that change them put them back."""
    client = connect(done.config.track)
    model_id = client.get_model_version("sealed", "1").source.rpartition("/")[2]
    return Path(client.get_logged_model(model_id).artifact_location.removeprefix("file://"))


def appended(file: Path, content: bytes = b"\n") -> Callable[[], None]:
    """Append to a file, or create it; the function that undoes it."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes((before or b"") + content)
    return file.unlink if before is None else lambda: file.write_bytes(before)


@pytest.mark.parametrize(
    "name", ["pyfunc_model.py", "MLmodel", "files.json", "artifacts/preparation.json", "added.py",
             "artifacts/*/group_1/network.json"],
)  # fmt: skip
def test_a_model_with_a_file_that_differs_is_refused_unless_it_is_trusted(done, stored, name, caplog) -> None:
    undo = appended(next(stored.glob(name), stored / name))
    try:
        for address in ("models:/sealed/1", f"models:/{stored.parent.name}"):
            with pytest.raises(UserError, match=Path(name).name) as found:
                load_groups(address, done.config.track)
            assert "--trust-code" in found.value.remedy
        if "group_1" not in name:  # the weights have checksums of their own
            with caplog.at_level(logging.WARNING):
                assert list(load_groups("models:/sealed/1", done.config.track, trust_code=True))
            assert "because of --trust-code" in caplog.text
    finally:
        undo()
    assert list(load_groups("models:/sealed/1", done.config.track)) == ["group_0", "group_1"]


def test_a_model_without_a_record_is_loaded_with_a_warning(done, caplog) -> None:
    connect(done.config.track).delete_model_version_tag("sealed.group_0", "1", integrity.TAG)
    with caplog.at_level(logging.WARNING):
        assert load_groups("models:/sealed.group_0/1", done.config.track)
    assert "has no record of its files" in caplog.text


def test_a_run_with_damaged_weights_is_not_registered(source, embedded, root) -> None:
    made = finish(source, EncoderSpec("mlp"), root, embedded, name="dented", groups=2)
    file = made.run / "models" / "group_1" / "network.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    with pytest.raises(
        UserError, match="a group model is damaged: group_1: missing or damaged: network.safetensors"
    ):
        made.register()
    assert not registered_models(connect(made.config.track), "dented")


def test_models_that_were_deleted_from_the_registry_are_registered_again(
    source, embedded, root, monkeypatch
) -> None:
    made = finish(source, EncoderSpec("mlp"), root, embedded, name="emptied", groups=2)
    monkeypatch.setattr(publish, "stored_example", lambda *_: made.example)
    client, run = connect(made.config.track), locate(str(made.run))

    def published() -> list[str]:
        found = publish._registered(made.config, run, made.run_id, made.manifest, made.result)
        return [model.uri for model in found]

    first = ["models:/emptied/1", "models:/emptied.group_0/1", "models:/emptied.group_1/1"]
    assert published() == published() == first
    client.delete_model_version("emptied", "1")
    assert published() == published() == ["models:/emptied/2", *first[1:]]
    client.delete_model_version("emptied.group_1", "1")
    assert published() == ["models:/emptied/2", "models:/emptied.group_0/1", "models:/emptied.group_1/2"]
    assert show_model(made.config.track, "emptied/2")["members"] == {"emptied.group_0": 1, "emptied.group_1": 2}
    for name in ("emptied", "emptied.group_0", "emptied.group_1"):
        client.delete_registered_model(name)
    assert published() == first
    assert [model["uri"] for model in (run / REGISTERED).read_json()] == first
    code, found, logged = call("models", "show", "emptied@challenger", "--uri", embedded["uri"])
    assert (code, found["version"]) == (0, 1), logged
