"""Cuts a text encoder of the `transformers` library by its own structure.

The first stage runs the library's forward with its layers replaced by recorders. It yields the embedded tokens
and the arguments that each layer gets, such as masks and positions. Those that are tensors become further parts
of the state `(tokens, mask, *extras)`. Each layer is a stage that calls the library's layer with its arguments.
Modules between the last layer and the output belong to the last stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.network.encoders.calls import Call, Skipped, calls_of, leading_to, replace_module
from dmtg_core.network.encoders.masks import register
from dmtg_core.network.encoders.text import Tokens, read, without_padding

TOLERANCE = 1e-4  # difference between the stages and the library's forward, relative to the size of the features


class _OfLibrary(nn.Module):
    """A stage whose configuration names the attention of `masks`, also in another process."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register()


@dataclass(frozen=True)
class Extra:
    """One tensor among the arguments of the layers.

    Args:
        layer, place: The first layer that gets it, and its place among the tensors there.
        batched: Whether its first axis is that of the samples.
        rank: Number of its axes.
    """

    layer: int
    place: int
    batched: bool
    rank: int

    def carried(self, value: Tensor, rows: int) -> Tensor:
        """Return the tensor with the samples as first axis, as every part of a state.

        Four axes mean a feature map, and are avoided.
        """
        value = value if self.batched else value.unsqueeze(0).expand(rows, *value.shape)
        return value.unsqueeze(1) if value.dim() == 4 else value

    def restored(self, value: Tensor) -> Tensor:
        """The inverse of `carried`."""
        value = value.squeeze(1) if self.rank + (not self.batched) == 4 else value
        return value if self.batched else value[0]


class Recorder(nn.Module):
    """In the place of a layer: returns the tokens unchanged, and keeps the other arguments until `take`."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        plain = {key: value for key, value in vars(layer).items() if not key.startswith("_") and key != "training"}
        vars(self).update(plain)  # models read attributes of their layers, such as the type of attention
        self.outputs = outputs
        self.seen: tuple[Any, ...] = ()

    def forward(self, tokens: Tensor, *args: Any, **options: Any) -> Any:
        """Return the tokens, or a tuple of them and None, as the layer does."""
        self.seen = args, options
        return (tokens, *[None] * (self.outputs - 1)) if self.outputs else tokens

    def take(self) -> tuple[Any, list[Tensor]]:
        """Return the arguments with `Place` for each tensor, and the tensors; forget both."""
        tensors: list[Tensor] = []
        seen, self.seen = self.seen, ()
        return _mapped(seen, lambda value: _plain(value, tensors)), tensors


class Embedding(_OfLibrary):
    """Ids `(B, L)` to the state of the first layer, by the library's model without its layers."""

    def __init__(self, model: nn.Module, layers: str, padding: int) -> None:
        super().__init__()
        self.model, self.layers, self.padding = model, layers, padding
        self.extras: tuple[Extra, ...] = ()

    def recorders(self) -> list[Recorder]:
        """The recorders in the order of the layers."""
        return [m for m in self.model.get_submodule(self.layers).children() if isinstance(m, Recorder)]

    def record(self, ids: Tensor) -> tuple[Tensor, Tensor, list[tuple[Any, list[Tensor]]]]:
        """Return tokens, mask, and the arguments of each layer as `Recorder.take`."""
        mask = read(ids, self.padding)
        tokens = output_of(self.model, ids, mask)
        return tokens, mask, [recorder.take() for recorder in self.recorders()]

    def forward(self, ids: Tensor) -> Tokens:
        """Compute the state `(tokens, mask, *extras)`."""
        ids = without_padding(ids, self.padding)
        tokens, mask, found = self.record(ids)
        return tokens, mask, *(e.carried(found[e.layer][1][e.place], ids.shape[0]) for e in self.extras)


class Layer(_OfLibrary):
    """One layer of the library's model.

    Args:
        layer: The layer.
        arguments: Its arguments after the tokens: a tuple and a dictionary, with `Place` for a part of the state.
        extras: All further parts of the state.
    """

    def __init__(self, layer: nn.Module, arguments: Any, extras: tuple[Extra, ...]) -> None:
        super().__init__()
        self.layer, self.arguments, self.extras = layer, arguments, extras

    def forward(self, state: Tokens) -> Tokens:
        """State to state."""
        tokens, mask, *carried = state

        def given(value: Any) -> Any:
            if not isinstance(value, Place):
                return value
            return self.extras[value.number].restored(carried[value.number])

        args, options = _mapped(self.arguments, given)
        out = self.layer(tokens, *args, **options)
        return (out[0] if isinstance(out, tuple) else out, mask, *carried)


class After(nn.Module):
    """The modules that run between the last layer and the output, on the tokens."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.Sequential(*modules)

    def forward(self, state: Tokens) -> Tokens:
        """State to state."""
        return (self.parts(state[0]), *state[1:])


@dataclass(frozen=True)
class Place:
    """Stands for a tensor in a structure of arguments."""

    number: int


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a structure of arguments with `change` applied to all that is no tuple, list or dictionary."""
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return change(value)


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """Add a tensor to `tensors` and return its `Place`. Refuse an object with a state, such as a cache."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Place(len(tensors) - 1)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"its layers get a {type(value).__name__}")


def output_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The last tokens of the library's own forward."""
    out: Tensor = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return out


def cut(model: nn.Module, ids: Tensor, padding: int) -> list[nn.Module]:
    """Cut a model into its stages: the embedding, and each layer; the last ends in the final norm, if any.

    The model itself becomes the first stage, without what runs in the other stages and without what has no effect
    on its tokens, such as a pooler. All stages are compared with the library's own forward.

    Args:
        model: A model of `transformers`. It is in evaluation mode afterwards.
        ids: Ids `(3, L)` for a trial. Some are padding.
        padding: Id of padding.

    Raises:
        ValueError: If the model cannot be cut, with what was found.
    """
    model.eval()
    with torch.no_grad():
        calls, expected = calls_of(model, lambda: output_of(model, ids, read(ids, padding)))
        path = _list_of_layers(model, calls)
        called = {call.module: call for call in calls}
        layers = [called[layer] for layer in model.get_submodule(path).children()]
        _check_between(model, calls, layers)
        after = leading_to(calls, layers[-1], expected)
        first = _without(model, path, layers, calls, padding)
        stages = _stages(first, [call.module for call in layers], ids)
        if after:
            stages[-1] = nn.Sequential(stages[-1], After(after))
        found = nn.Sequential(*stages).eval()(ids)[0]
    kept = read(ids, padding)
    if not (found - expected)[kept].abs().max() <= TOLERANCE * expected[kept].abs().max():
        raise ValueError(f"its layers in {path} get other arguments, or do not run one after the other")
    return stages


def _list_of_layers(model: nn.Module, calls: list[Call]) -> str:
    """Name of the list of layers: the largest, each of whose modules of one class is called once."""
    times = Counter(call.module for call in calls)
    lists = {name: list(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = {name: ms for name, ms in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    whole = {n: ms for n, ms in outer.items() if len({*map(type, ms)}) == 1 and all(times[m] == 1 for m in ms)}
    if whole:
        return max(whole, key=lambda name: sum(p.numel() for m in whole[name] for p in m.parameters()))
    if not outer:
        raise ValueError(f"no list of layers in {', '.join(name for name, _ in model.named_children())}")
    name, layers = next(iter(outer.items()))
    if times[layers[0]] > 1:
        raise ValueError(f"its layers share their weights: {name}.0 is called {times[layers[0]]} times")
    raise ValueError(
        f"the list {name} ({len(layers)} × {type(layers[0]).__name__}) has layers that are not called once"
    )


def _check_between(model: nn.Module, calls: list[Call], layers: list[Call]) -> None:
    """Refuse modules that run between layers, and layers that run in another order."""
    if any(b.begun < a.ended for a, b in pairwise(layers)):
        raise ValueError("its layers do not run one after the other")
    inside = {module for call in layers for module in call.module.modules()}
    names = {module: name for name, module in model.named_modules()}
    span = range(layers[0].begun, layers[-1].ended)
    others = [names[c.module] for c in calls if c.begun in span and c.ended in span and c.module not in inside]
    if others:
        raise ValueError(f"{', '.join(others)} runs between its layers")
    if any(not (call.args and isinstance(call.args[0], Tensor)) for call in layers):
        raise ValueError("its layers do not take the tokens as their first argument")


def _without(model: nn.Module, path: str, layers: list[Call], calls: list[Call], padding: int) -> Embedding:
    """The model without its layers and without all that is called after them."""
    names = {module: name for name, module in model.named_modules()}
    recorders = []
    for call in layers:
        outputs = len(call.output) if isinstance(call.output, tuple) else 0
        recorders.append(Recorder(call.module, outputs))
    for call in calls:
        if call.begun > layers[-1].ended:
            replace_module(model, names[call.module], Skipped())
    replace_module(model, path, nn.ModuleList(recorders))
    return Embedding(model, path, padding)


def _stages(first: Embedding, layers: list[nn.Module], ids: Tensor) -> list[nn.Module]:
    """Learn the arguments of the layers from two passes of different size."""
    *_, small = first.record(ids[:2])
    *_, large = first.record(ids[:3])
    extras: list[Extra] = []
    places: dict[
        int, int
    ] = {}  # id of a tensor → number of its extra; a tensor that all layers get is carried once
    arguments = []
    for number, ((structure, tensors), (other, larger)) in enumerate(zip(small, large, strict=True)):
        if structure != other:
            raise ValueError("the arguments of its layers depend on the number of samples")
        for place, (a, b) in enumerate(zip(tensors, larger, strict=True)):
            if id(a) not in places:
                places[id(a)] = len(extras)
                extras.append(Extra(number, place, _has_samples(a, b), a.dim()))
        numbers = [places[id(tensor)] for tensor in tensors]
        arguments.append(_mapped(structure, partial(_renumbered, numbers)))
    first.extras = tuple(extras)
    built = [Layer(layer, given, first.extras) for layer, given in zip(layers, arguments, strict=True)]
    return [first, *built]


def _renumbered(numbers: list[int], value: Any) -> Any:
    return Place(numbers[value.number]) if isinstance(value, Place) else value


def _has_samples(small: Tensor, large: Tensor) -> bool:
    """Whether the first axis of a tensor is that of the samples, from passes of 2 and 3 samples."""
    if small.shape == large.shape:
        return False
    if small.dim() and small.shape[1:] == large.shape[1:] and (len(small), len(large)) == (2, 3):
        return True
    raise ValueError(f"its layers get a tensor of shape {tuple(large.shape)} for 3 samples")
