"""Image encoders of the `timm` library, from a local file of weights or with random weights.

A model is cut by its own structure. The first stage runs the library's `forward_features` without the blocks.
Each block, or group of blocks between changes of resolution, is a stage. The last one ends in the final norm and
the pooling, which is the library's `forward_head` before the logits.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders.calls import Call, Skipped, calls_of, leading_to, replace_module
from dmtg_core.network.encoders.layer_cut import TOLERANCE
from dmtg_core.network.encoders.library import library, name_layers

GROUPS = ("blocks", "stages", "layers")  # names of the lists of blocks in models of the library
NUMBERED = re.compile(r"(layer|s)\d+")  # names of the groups of blocks of residual networks


def timm(
    spec: InputSpec, *, model: str, path: str = "", arguments: Mapping[str, Any] | None = None
) -> list[nn.Module]:
    """A model of the `timm` library: vision transformers, ConvNeXt, EfficientNet, ResNet and others like them.

    The features are a vector `(B, F)`. Nothing is downloaded.

    Args:
        spec: An image input. Positions of a vision transformer are those of its size.
        model: The library's name of the model, such as `vit_small_patch16_224`.
        path: File of weights, `.safetensors` or a state of PyTorch. Empty for random weights.
        arguments: Further arguments of the library's function of the model, such as `depth`.

    Raises:
        ValueError: If the library or the file is missing, for an unknown model, if the model cannot be cut, or if
            the weights do not fit it.
    """
    net = _model(library("timm", "timm", "vision"), model, spec, dict(arguments or {}))
    if path:
        load_weights(net, path)
    name_layers(net)
    try:
        stages = _cut(
            net, torch.rand(2, spec.shape[2], *spec.shape[:2], generator=torch.Generator().manual_seed(0))
        )
    except ValueError as error:
        raise ValueError(f"encoder timm cannot cut the model {model!r} into stages: {error}") from error
    return [stage.train() for stage in stages]


def _model(found: Any, name: str, spec: InputSpec, arguments: Mapping[str, Any]) -> nn.Module:
    _check_name(found, name)
    options = {"pretrained": False, "num_classes": 0, "in_chans": spec.shape[2], **arguments}
    try:
        try:
            built: nn.Module = found.create_model(name, img_size=tuple(spec.shape[:2]), **options)
        except TypeError:  # convolutional networks read any size and take no argument for it
            built = found.create_model(name, **options)
    except Exception as error:  # each model has errors of its own
        raise ValueError(f"encoder timm: cannot build {name!r} for {spec.shape} ({error})") from error
    return built


def _check_name(found: Any, name: str) -> None:
    if not found.is_model(name):
        raise ValueError(f"encoder timm: the library has no model {name!r}; timm.list_models() has the names")


def preprocessing_of(model: str) -> dict[str, Any]:
    """Return how photographs are prepared for a model: the data configuration of the library.

    Returns:
        `size` in pixels, `mean` and `std` of values 0 to 255, `interpolation`, and `crop_share`, the side of the
        part that is read ÷ the shorter side of the photograph.

    Raises:
        ValueError: If the library is missing, and for an unknown model.
    """
    found = library("timm", "timm", "vision")
    _check_name(found, model)
    data = importlib.import_module("timm.data")
    given = data.resolve_data_config(pretrained_cfg=found.get_pretrained_cfg(model).to_dict(), verbose=False)
    return {
        "size": int(given["input_size"][1]),
        "mean": tuple(round(255 * value, 4) for value in given["mean"]),
        "std": tuple(round(255 * value, 4) for value in given["std"]),
        "interpolation": given["interpolation"],
        "crop_share": float(given["crop_pct"]),
    }


def load_weights(model: nn.Module, path: str) -> None:
    """Load a local file into a model of the library. The classifier of the file is left out.

    A file in the names of another implementation is read in its order, if all its tensors have the shapes and the
    kinds (weight, bias, running_mean, …) of the model's tensors in their order.

    Raises:
        ValueError: For a missing file, and for weights that do not fit. The message has the first names.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"encoder timm: no file of weights {path!r}; the option path is the .safetensors or .pth file of the "
            "model, for example model.safetensors of its page on the Hugging Face hub. Nothing is downloaded"
        )
    try:
        given = importlib.import_module("timm.models").load_state_dict(path, weights_only=True)
    except Exception as error:  # the format determines the class of the error
        raise ValueError(f"encoder timm: {path!r} is not a file of weights ({error})") from error
    convert = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    own = model.state_dict()
    if own.keys().isdisjoint(given):
        given = _in_order(given, own) or given
    elif convert is not None:
        given = convert(given, model)
    _check_fit({key: value for key, value in given.items() if not _of_classifier(key, model)}, own, path)
    model.load_state_dict({key: given[key] for key in own})


def _in_order(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the model's names, by their order; empty if they do not fit."""
    rest = list(given)[len(own) :]  # the classifier
    pairs = list(zip(own, given, strict=False))
    same = all(_kind(a) == _kind(b) and own[a].shape == given[b].shape for a, b in pairs)
    if not same or len(pairs) < len(own) or sorted(map(_kind, rest)) not in ([], ["weight"], ["bias", "weight"]):
        return {}
    return {name: given[other] for name, other in pairs}


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _of_classifier(key: str, model: nn.Module) -> bool:
    """Whether a tensor belongs to the classifier, which the encoder does not have."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return any(key.startswith(f"{name}.") for name in ([names] if isinstance(names, str) else names))


def _check_fit(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str) -> None:
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own]
    shapes = [key for key in own if key in given and own[key].shape != given[key].shape]
    found = [f"{what} {keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else f"{what} {keys[0]}"
             for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
    found += [f"{key} has shape {tuple(given[key].shape)}, expected {tuple(own[key].shape)}" for key in shapes[:1]]
    if found:
        raise ValueError(f"encoder timm: the weights in {path!r} do not fit the model: {'; '.join(found)}")


class Trunk(nn.Module):
    """Images to the input of the first block, by the library's model without its blocks and its head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the input of the first block."""
        out: Tensor = self.model.forward_features(x)
        return out


class Head(nn.Module):
    """The norm after the last block, and the pooling of the library's model."""

    def __init__(self, after: list[nn.Module], model: Any) -> None:
        super().__init__()
        self.after, self.model = nn.Sequential(*after), model

    def forward(self, x: Tensor) -> Tensor:
        """Output of the last block to `(B, F)`."""
        out: Tensor = self.model.forward_head(self.after(x), pre_logits=True)
        return out


@torch.no_grad()
def _cut(model: Any, images: Tensor) -> list[nn.Module]:
    """Cut a model into its stages, and compare them with the library's own forward.

    Raises:
        ValueError: If the model cannot be cut, with what was found.
    """
    model.eval()
    calls, features = calls_of(model, lambda: model.forward_features(images))
    pooling, expected = calls_of(model, lambda: model.forward_head(features, pre_logits=True))
    blocks = _blocks(model, calls)
    after = leading_to(calls, blocks[-1], features)
    head = _head_of(model, {call.module for call in pooling})
    _remove(model, blocks, calls, {call.module for call in pooling})
    stages = [Trunk(model), *(call.module for call in blocks)]
    stages[-1] = nn.Sequential(stages[-1], Head(after, head))
    found = nn.Sequential(*stages).eval()(images)
    if not (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise ValueError("its stages do not run one after the other")
    if found.dim() != 2:
        raise ValueError(f"its features have the shape {tuple(found.shape)}, expected (B, F)")
    return stages


def _blocks(model: nn.Module, calls: list[Call]) -> list[Call]:
    """The calls of the blocks, each of which reads the output of the one before."""
    parts = dict(model.named_children())
    lists = [m for name in GROUPS if isinstance(m := parts.get(name), nn.Sequential | nn.ModuleList) and len(m)]
    found = list(lists[0]) if lists else [m for name, m in parts.items() if NUMBERED.fullmatch(name)]
    if not found:
        raise ValueError(f"no {', '.join(GROUPS)} or layer1, layer2, … among its parts {', '.join(parts)}")
    called = {call.module: call for call in calls}
    blocks = [called[block] for block in found if block in called]
    if len(blocks) < len(found) or any(len(call.args) != 1 for call in blocks):
        raise ValueError(f"its blocks ({type(found[0]).__name__}) do not read the output of the one before alone")
    if any(b.args[0] is not a.output for a, b in pairwise(blocks)):
        raise ValueError(f"something runs between its blocks ({type(found[0]).__name__})")
    return blocks


def _head_of(model: nn.Module, pooling: set[nn.Module]) -> nn.Module:
    """A copy of the model that has only what `forward_head` uses."""
    head = copy.copy(model)
    used = {
        name: part if part in pooling or not any(True for _ in part.parameters()) else Skipped()
        for name, part in model.named_children()
    }
    vars(head).update(_modules=used, _parameters={}, _buffers={})
    return head


def _remove(model: nn.Module, blocks: list[Call], calls: list[Call], pooling: set[nn.Module]) -> None:
    """Remove from a model what runs in other stages than the first: blocks, and parts that are called later."""
    names = {module: name for name, module in model.named_modules()}
    later = {call.module for call in calls if call.begun > blocks[-1].ended} | pooling
    parts = [part for part in model.children() if part in later]
    for module in [*(call.module for call in blocks), *parts]:
        replace_module(model, names[module], Skipped())
