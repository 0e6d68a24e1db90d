"""Group models as graphs of PyTorch and ONNX: stored input `(B, …)` to a decoded prediction for each task."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.composite import Composite
from dmtg_core.network.inputs import NormalQuantiles
from pipelines.errors import UserError

TRACED = 3  # samples of the input that is traced; with one sample, the number would be a constant
INPUT = "input"
Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]

# numerators and denominators of the rational functions of `normal_quantile`, the constant first
CENTRE = (
    (3.3871327179, 50.434271938, 159.29113202, 59.109374720),
    (1.0, 17.895169469, 78.757757664, 67.187563600),
)
MIDDLE = ((1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (1.0, 0.73700164250, 0.12021132975))
TAIL = ((6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (1.0, 0.24197894225, 0.012258202635))


class Decoded(nn.Module):
    """Computes the predictions of `GroupModel.predict` for all tasks.

    Args:
        composite: The models.
    """

    def __init__(self, composite: Composite) -> None:
        super().__init__()
        self.composite = composite

    def forward(self, raw: Tensor) -> dict[str, Tensor]:
        """Compute task name → prediction from stored input."""
        outputs = self.composite(raw)
        return {task.name: task.decode(outputs[task.name]) for task in self.composite.tasks}


class ComparedQuantiles(nn.Module):
    """`NormalQuantiles` in operators that ONNX has."""

    edges: Tensor
    places: Tensor

    def __init__(self, quantiles: NormalQuantiles) -> None:
        super().__init__()
        self.largest, self.columns = quantiles.LARGEST, quantiles.places.tolist()
        self.register_buffer("places", quantiles.places)
        self.register_buffer("edges", quantiles.edges)

    def forward(self, raw: Tensor, standardised: Tensor) -> Tensor:
        """Replace the features with quantiles in `standardised` `(B, F)` by their normal scores."""
        x = raw.index_select(1, self.places).unsqueeze(2)  # (B, N, 1)
        last = self.edges.shape[1] - 1
        first, after = (self.edges < x).long().sum(2), (self.edges <= x).long().sum(2)
        low, high = (after - 1).clamp(0, last), first.clamp(0, last)
        edges = self.edges.unsqueeze(0).expand(x.shape[0], -1, -1)
        left, right = (edges.gather(2, place.unsqueeze(2)).squeeze(2) for place in (low, high))
        width = right - left
        share = torch.where(width > 0, (x.squeeze(2) - left) / torch.where(width > 0, width, 1.0), 0.5).clamp(0, 1)
        share = torch.where(after > first, 0.5, share)
        probability = (low + share * (high - low)) / last
        score = normal_quantile(probability).clamp(-self.largest, self.largest)
        columns = list(standardised.unbind(1))
        for number, place in enumerate(self.columns):
            columns[place] = score[:, number]
        return torch.stack(columns, 1)


def normal_quantile(probability: Tensor) -> Tensor:
    """The quantiles of the normal distribution, to about 7 digits (Wichura 1988, algorithm AS 241, PPND7)."""
    centred = probability - 0.5
    square = 0.180625 - centred * centred
    inside = centred * _ratio(square, *CENTRE)
    rest = torch.minimum(probability, 1 - probability).clamp(min=1e-30)
    root = (-rest.log()).sqrt()
    outside = torch.where(root <= 5, _ratio(root - 1.6, *MIDDLE), _ratio(root - 5, *TAIL))
    return torch.where(centred.abs() <= 0.425, inside, outside * centred.sign())


def _ratio(x: Tensor, above: tuple[float, ...], below: tuple[float, ...]) -> Tensor:
    return _polynomial(x, above) / _polynomial(x, below)


def _polynomial(x: Tensor, terms: tuple[float, ...]) -> Tensor:
    out = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        out = out * x + term
    return out


def inputs_for(spec: InputSpec, rows: int) -> np.ndarray:
    """Random stored input for the comparison of a graph with its model."""
    rng = np.random.default_rng(rows)
    shape = (rows, *spec.shape)
    if spec.kind == "tokens":
        ids = rng.integers(0, spec.vocabulary, shape)
        lengths = rng.integers(1, spec.shape[0] + 1, (rows, 1))
        return np.where(np.arange(spec.shape[0]) < lengths, ids, spec.padding).astype(spec.dtype)
    if np.issubdtype(np.dtype(spec.dtype), np.integer):
        return rng.integers(0, np.iinfo(spec.dtype).max, shape, endpoint=True).astype(spec.dtype)
    found = (np.array(spec.mean) + np.array(spec.std) * rng.normal(size=shape)).astype(spec.dtype)
    for place, codes in enumerate(spec.codes):
        if codes:  # every other sample has a value with a vector of its own
            found[::2, place] = rng.choice(codes, len(found[::2]))
    return found


def write_torch(composite: Composite, spec: InputSpec, file: Path) -> Run:
    """Write a graph of `torch.export`, and read it again."""
    with _quiet():
        torch.export.save(_traced(composite, spec), file)
        graph = torch.export.load(file).module()

    def run(raw: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name: value.numpy() for name, value in graph(torch.from_numpy(raw)).items()}

    return run


def write_onnx(composite: Composite, spec: InputSpec, file: Path) -> Run:
    """Write an ONNX graph, and open it in ONNX Runtime.

    Raises:
        UserError: If one of the packages is missing.
    """
    runtime = [_package(name) for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    for model in composite.modules():
        held = getattr(model, "quantiles", None)
        if isinstance(held, NormalQuantiles):
            model.quantiles = ComparedQuantiles(held)
    names = [task.name for task in composite.tasks]
    with _quiet():
        program = torch.onnx.export(
            _traced(composite, spec), dynamo=True, input_names=[INPUT], output_names=names, verbose=False
        )
    assert program is not None
    program.save(file)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda raw: dict(zip(names, session.run(None, {INPUT: raw}), strict=True))


def _traced(composite: Composite, spec: InputSpec) -> torch.export.ExportedProgram:
    example = torch.from_numpy(inputs_for(spec, TRACED))
    with torch.no_grad(), _quiet():
        return torch.export.export(
            Decoded(composite), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the export to ONNX needs the package {name} ({error})",
            where="--to onnx",
            remedy="pip install 'dmtg[onnx]'",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the messages of the exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
