"""`dmtg models export`: a model as a graph of `torch.export` or ONNX, or as plain weights without adapters.

The folder has `export.json`: the input and the outputs with names, shapes, dtypes and units. It is written last.
A graph is one file for all groups of the model, `model.pt2` or `model.onnx`. Plain weights are a folder for each
group, which `dmtg_core.training.checkpoint.load_model` reads. There the encoder of another library is also in the
library's own form, in the folder `encoder`.

An export is read again and compared with the model before it is in the folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.composite import Composite, library_state, plain
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
from dmtg_core.tasks import Task
from dmtg_core.training.checkpoint import load_model, save_model, save_tensors
from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.runs.folders import check_folder
from pipelines.scratch import temporary_folder
from pipelines.serving.fitting import open_model
from pipelines.serving.graphs import INPUT, Run, inputs_for, write_onnx, write_torch
from pipelines.storage import locate

GRAPHS = {"torch-export": ("model.pt2", write_torch), "onnx": ("model.onnx", write_onnx)}
FORMS = (*GRAPHS, "merged")
DESCRIPTION = "export.json"
BATCHES = (1, 2, 7)  # sizes of the batches that are compared
MOST = 1e-4  # largest difference ÷ largest value of the task
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """The result of `export`: the folder, its files, the address of the model, and the largest difference."""

    out: Path
    files: list[str]
    address: str
    difference: float


def export(model: str, form: str, out: str, track: TrackSection, *, trust_code: bool = False) -> Exported:
    """Export a registered model, or the models of a run folder.

    Args:
        model: Address as in `pipelines.serving.fitting.open_model`.
        form: One of `FORMS`.
        out: Folder that does not exist, or is empty.
        track: The registry.
        trust_code: As `pipelines.registry.models.load_registered`.

    Raises:
        UserError: If the folder has contents, a package is missing, or the export differs from the model.
    """
    place = Path(out).absolute()
    check_folder(locate(str(place)), "--out", "exports", lambda: False)
    served = open_model(model, track, trust_code=trust_code)
    composite = Composite(served.groups.values()).eval()
    spec = next(iter(served.groups.values())).spec.input
    expected = [_predictions(composite, inputs_for(spec, rows)) for rows in BATCHES]
    place.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place.parent) as folder:
        run = _write(served.groups, composite, spec, form, folder)
        found = [run(inputs_for(spec, rows)) for rows in BATCHES]
        worst = max(
            _compared(task, one[task.name], other[task.name], form)
            for one, other in zip(found, expected, strict=True)
            for task in composite.tasks
        )
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        shutil.copytree(folder, place, dirs_exist_ok=True)
    place.chmod(0o755)  # that of a temporary folder is private
    described = _described(served.groups, spec, expected[0], form, served.address, worst)
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (place / DESCRIPTION).write_text(text, encoding="utf-8")
    return Exported(place, [*files, DESCRIPTION], served.address, worst)


def _predictions(composite: Composite, raw: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in composite.predict(torch.from_numpy(raw)).items()}


def _write(
    groups: Mapping[str, GroupModel], composite: Composite, spec: InputSpec, form: str, folder: Path
) -> Run:
    """Write an export, and return the function that computes its predictions."""
    if form in GRAPHS:
        name, write = GRAPHS[form]
        return write(composite, spec, folder / name)
    for name, model in groups.items():
        _write_plain(folder / name, plain(model))
    read = Composite([load_model(folder / name) for name in groups])
    return lambda raw: _predictions(read, raw)


def _write_plain(folder: Path, model: GroupModel) -> None:
    """Write a model without adapters, and its encoder in the form of its library."""
    save_model(folder, model)
    state = library_state(model.network)
    if not state:
        return
    options = model.spec.encoder.options or {}
    encoder = folder / "encoder"
    encoder.mkdir()
    file = encoder / "model.safetensors"
    save_tensors(file, state)
    if "config" in options:
        text = json.dumps(options["config"], indent=2) + "\n"
        (encoder / "config.json").write_text(text, encoding="utf-8")
    _check_encoder(model, str(encoder if "config" in options else file))


def _check_encoder(model: GroupModel, path: str) -> None:
    """Check that the encoder is that of the model when its library reads the written files.

    Raises:
        UserError: If it is not.
    """
    spec = model.spec.encoder
    read = replace(spec, options={**(spec.options or {}), "path": path})
    built = GroupingNetwork(replace(model.network.spec, encoder=read)).eval()
    with torch.no_grad():
        raw = torch.from_numpy(inputs_for(model.spec.input, 2))
        expected, found = (network.features(raw)[0] for network in (model.network, built))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= MOST:
        raise UserError(
            f"the encoder that was written differs from that of the model by {difference:.1e} (relative)",
            where=path,
            remedy="export the model to onnx or torch-export",
        )


def _compared(task: Task, found: np.ndarray, expected: np.ndarray, form: str) -> float:
    """The largest difference ÷ the largest value; of class ids, the share that differs.

    Raises:
        UserError: If it is more than `MOST`, or the shapes differ.
    """
    if found.shape != expected.shape:
        worst = float("inf")
    elif np.issubdtype(expected.dtype, np.integer):
        worst = float((found != expected).mean())
    else:
        worst = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if not worst <= MOST:
        raise UserError(
            f"the export differs from the model: task {task.name!r} by {worst:.1e} (relative), at most {MOST:.0e}",
            where=f"--to {form}",
            remedy="export it in another form; torch-export is computed by PyTorch itself",
        )
    return worst


def _described(
    groups: Mapping[str, GroupModel],
    spec: InputSpec,
    example: Mapping[str, np.ndarray],
    form: str,
    address: str,
    worst: float,
) -> dict[str, Any]:
    """The contents of `DESCRIPTION`."""
    outputs = [
        {
            "name": task.name,
            "group": name,
            "kind": task.kind,
            "shape": ["batch", *example[task.name].shape[1:]],
            "dtype": example[task.name].dtype.name,
            "unit": task.unit,
            "labels": list(task.labels),
        }
        for name, model in groups.items()
        for task in model.tasks
    ]
    return {
        "model": address,
        "form": form,
        "versions": {name: version(name) for name in ("dmtg", "torch")},
        "input": {
            "name": INPUT,
            "kind": spec.kind,
            "shape": ["batch", *spec.shape],
            "dtype": spec.dtype,
            "content": "as stored in the shards; it is normalised inside",
        },
        "outputs": outputs,
        "content": "decoded: probabilities of classes, ids of classes of pixels, values in the unit of the task",
        "largest_difference": worst,
    }
