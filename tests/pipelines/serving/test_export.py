"""Exports of every kind of encoder: the graphs and the plain weights give the model's predictions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from dmtg_core import EncoderSpec, GroupingNetwork, GroupModel, InputSpec, NetworkSpec, Task
from dmtg_core.network.composite import Composite, plain
from dmtg_core.network.inputs import NormalQuantiles
from dmtg_core.training.checkpoint import load_model, load_tensors
from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.runs.models import write_models
from pipelines.serving import export as exporting
from pipelines.serving.export import DESCRIPTION, export
from pipelines.serving.graphs import ComparedQuantiles, inputs_for
from pipelines.storage import locate
from tests.dmtg_core.pretrained import changed
from tests.pipelines.cli.test_app import call
from tests.pipelines.frozen import MODEL, SIDE, write_weights
from tests.soak import others_in_soak

TRACK = TrackSection(uri="none")
SAMPLEWISE = (
    Task("wet", "binary"),
    Task("room", "multiclass", channels=3, labels=("bath", "hall", "attic")),
    Task("floor size", "regression", offset=(5.0,), scale=(10.0,), unit="m²"),
)
DENSE = (
    Task("thing", "dense_classification", channels=4),
    Task("depth", "dense_regression", scale=(50.0,), unit="m"),
)
PICTURE = InputSpec("image", (SIDE, SIDE, 3), "uint8", (127.5,), (63.0,))
TEXT = InputSpec("tokens", (10,), "uint16", vocabulary=40)
EDGES = (-1.0, 0.0, 0.0, 0.5, 3.0)
TABLE = InputSpec("features", (4,), "float32", (0.0,) * 4, (1.0,) * 4, quantiles=(EDGES, (), EDGES, ()))
LAYERS = {"width": 16, "layers": 3, "heads": 2}
CODED = replace(TABLE, codes=((-0.7, 0.2, 0.9), (), (-0.3, 1.1), ()))
BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12,
}  # fmt: skip
LORA = {"rank": 2, "norms": True}
MEMBERS = {"width": 8, "blocks": 2, "members": 4}
LARGE = {"numbers": "piecewise_linear", "shared_input": True}
KINDS: dict[str, tuple[InputSpec, tuple[Task, ...], EncoderSpec]] = {
    "tables": (CODED, SAMPLEWISE, EncoderSpec("tabm", 0, {**MEMBERS, **LARGE})),
    "small tables": (TABLE, SAMPLEWISE, EncoderSpec("tabm", 0, MEMBERS)),
    "images": (PICTURE, SAMPLEWISE + DENSE, EncoderSpec("convnet", 1, {"widths": [4, 8]})),
    "texts": (TEXT, SAMPLEWISE, EncoderSpec("text_transformer", 1, LAYERS)),
    "last": (TEXT, SAMPLEWISE, EncoderSpec("text_transformer", 2, LAYERS, "last")),
    "lora": (TEXT, SAMPLEWISE, EncoderSpec("transformers", 2, {"config": BERT}, "lora", LORA)),
    "lora of images": (PICTURE, SAMPLEWISE, EncoderSpec("timm", 2, MODEL, "lora", LORA)),
}
# a graph takes five seconds: all kinds in both forms are in `make soak`
QUICK = [("onnx", "tables"), ("onnx", "lora"), ("torch-export", "lora of images")]


def write_run(folder: Path, kind: str) -> dict[str, GroupModel]:
    """A finished run of two groups with changed branches."""
    given, tasks, encoder = KINDS[kind]
    network = changed(
        GroupingNetwork(
            NetworkSpec(given, tasks, encoder, 2, initial="diagonal", initial_scale=1.0, decoder_width=4)
        )
    )
    models = network.eval().specialise()
    write_models(locate(str(folder / "models")), models)
    (folder / "grouping.json").write_text(network.grouping().to_json())
    return models


def predicted(models: dict[str, GroupModel], raw: np.ndarray) -> dict[str, np.ndarray]:
    """What `GroupModel.predict` returns."""
    given = torch.from_numpy(raw)
    return {name: out.numpy() for model in models.values() for name, out in model.predict(given).items()}


def graph(folder: Path, form: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """An export as a user reads it, without DMTG."""
    names = [output["name"] for output in json.loads((folder / DESCRIPTION).read_text())["outputs"]]
    if form == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == names
        return lambda raw: dict(zip(names, session.run(None, {"input": raw}), strict=True))
    module = torch.export.load(folder / "model.pt2").module()
    return lambda raw: {name: value.detach().numpy() for name, value in module(torch.from_numpy(raw)).items()}


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4 * np.abs(values).max())


@pytest.mark.parametrize(("form", "kind"), others_in_soak(product(("torch-export", "onnx"), KINDS), *QUICK))
def test_a_graph_has_the_predictions_of_the_model(kind, form, tmp_path) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    models = write_run(tmp_path / "run", kind)
    done = export(str(tmp_path / "run"), form, str(tmp_path / "out"), TRACK)
    assert done.files[-1] == DESCRIPTION
    assert done.difference <= 1e-4
    compute = graph(tmp_path / "out", form)
    for rows in (1, 3, 9):
        raw = inputs_for(KINDS[kind][0], rows)
        expected = predicted(models, raw)
        assert max(values.std() for values in expected.values()) > 1e-3 or rows == 1
        check_equal(compute(raw), expected)
    described = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert described["input"]["shape"] == ["batch", *KINDS[kind][0].shape]
    size = next(output for output in described["outputs"] if output["name"] == "floor size")
    assert (size["unit"], size["shape"], size["dtype"]) == ("m²", ["batch"], "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_a_model_without_adapters(kind, tmp_path) -> None:
    models = write_run(tmp_path / "run", kind)
    export(str(tmp_path / "run"), "merged", str(tmp_path / "out"), TRACK)
    read = {name: load_model(tmp_path / "out" / name) for name in models}
    raw = inputs_for(KINDS[kind][0], 5)
    check_equal(predicted(read, raw), predicted(models, raw))
    for name, model in read.items():
        assert model.spec.encoder.branch == "copy"
        assert not (tmp_path / "out" / name / "adapter_config.json").exists()
        assert (tmp_path / "out" / name / "encoder").exists() == (KINDS[kind][2].name in ("transformers", "timm"))


def test_the_merged_encoder_is_read_by_its_library(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    models = write_run(tmp_path / "run", "lora")
    export(str(tmp_path / "run"), "merged", str(tmp_path / "out"), TRACK)
    ids = torch.arange(1, 31).reshape(3, 10)
    for name, model in models.items():
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "out" / name / "encoder").eval()
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
            features = model.network.features(ids.int())[0]
        standardised = torch.nn.functional.layer_norm(expected, expected.shape[-1:])
        torch.testing.assert_close(features, standardised, rtol=0, atol=1e-5)


def test_the_merged_encoder_of_images_has_all_weights_of_the_library(tmp_path) -> None:
    pytest.importorskip("timm")
    file = write_weights(tmp_path)
    spec = NetworkSpec(PICTURE, SAMPLEWISE, EncoderSpec("timm", 2, MODEL | {"path": file}), groups=1)
    (model,) = GroupingNetwork(spec).specialise().values()
    exporting._write_plain(tmp_path / "plain", plain(model.eval()))
    found, given = load_tensors(tmp_path / "plain" / "encoder" / "model.safetensors"), load_tensors(Path(file))
    assert set(found) == set(given)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch) -> None:
    write_run(tmp_path / "run", "texts")
    monkeypatch.setattr(exporting, "plain", lambda model: _other(plain(model)))
    with pytest.raises(UserError, match=r"differs from the model: task 'wet' by .* at most 1e-04"):
        export(str(tmp_path / "run"), "merged", str(tmp_path / "out"), TRACK)
    assert not (tmp_path / "out").exists()


def _other(model: GroupModel) -> GroupModel:
    with torch.no_grad():
        for parameter in model.network.bank.parameters():
            parameter.mul_(1.01)
    return model


def test_a_missing_package_and_a_full_folder_are_named(tmp_path, monkeypatch) -> None:
    write_run(tmp_path / "run", "texts")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="needs the package onnxscript") as caught:
        export(str(tmp_path / "run"), "onnx", str(tmp_path / "out"), TRACK)
    assert caught.value.remedy == "pip install 'dmtg[onnx]'"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="no record of exports"):
        export(str(tmp_path / "run"), "merged", str(tmp_path / "out"), TRACK)


def test_the_command_exports_a_run(tmp_path) -> None:
    write_run(tmp_path / "run", "texts")
    code, found, _ = call(
        "models", "export", str(tmp_path / "run"), "--to", "merged", "--out", str(tmp_path / "out")
    )
    assert code == 0
    assert found["files"][-1] == DESCRIPTION
    assert Composite([load_model(tmp_path / "out" / name) for name in ("group_0", "group_1")]).tasks


def test_the_quantiles_of_a_graph_are_those_of_a_model() -> None:
    quantiles = NormalQuantiles(TABLE)
    raw = torch.linspace(-2, 4, 4001).unsqueeze(1).repeat(1, 4)
    raw[:5] = torch.tensor(EDGES).unsqueeze(1)
    expected = quantiles(raw, raw.clone())
    torch.testing.assert_close(ComparedQuantiles(quantiles)(raw, raw.clone()), expected, rtol=1e-5, atol=1e-5)
    assert expected[:, 0].max() > 5
