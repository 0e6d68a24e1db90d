"""Text encoders of the `transformers` library, from a local folder or from a configuration."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.network.encoders.text import Mean, Tokens, read
from dmtg_core.tasks import InputSpec

# model type of the library → path of its layers. A layer maps tokens and a mask to tokens `(B, L, F)`.
LAYERS: Mapping[str, str] = {"bert": "encoder.layer", "distilbert": "transformer.layer"}


def transformers(
    spec: InputSpec, *, path: str = "", config: Mapping[str, Any] | None = None, dropout: float = 0.0
) -> list[nn.Module]:
    """A BERT or DistilBERT of the `transformers` library, with a stage for the embedding and one for each layer.

    The last stage ends in the mean over the tokens that are not padding. A text that is only padding is read as
    one padding token. Nothing is downloaded.

    Args:
        spec: A token input with ids of the model's own tokenizer.
        path: Folder written by `save_pretrained`, with `config.json` and safetensors. Empty for random weights.
        config: The library's configuration of the architecture. By default `EncoderSpec` reads it from `path`, so
            that a saved network can be built without the folder.
        dropout: Share of values dropped during training. It replaces that of `config`. See `text_transformer`.

    Raises:
        ValueError: If the library or the folder is missing, if the architecture is not supported, or if the
            input's vocabulary, length or padding does not fit the model.
    """
    described = with_config({"path": path, "config": config})["config"]
    if not described:
        raise ValueError("encoder transformers needs the option path (a local folder) or config, got neither")
    library = _library()
    kind = described.get("model_type")
    if kind not in LAYERS:
        raise ValueError(f"encoder transformers cuts {' and '.join(LAYERS)} into stages, got model type {kind!r}")
    architecture = library.AutoConfig.for_model(kind).from_dict(dict(described))
    _check(spec, architecture)
    model = _model(library, architecture, path)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    layers: list[nn.Module] = [_Layer(layer) for layer in attrgetter(LAYERS[kind])(model)]
    return [_Embedding(model.embeddings), *layers[:-1], nn.Sequential(layers[-1], Mean())]


def with_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `transformers` with the configuration of their folder, unless they contain one.

    Raises:
        ValueError: If the folder has no configuration.
    """
    path = options.get("path")
    if not path or options.get("config"):
        return dict(options)
    try:
        return {**options, "config": json.loads(Path(path, "config.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError) as error:
        raise ValueError(f"encoder transformers: no model in the folder {path!r} ({error})") from error


def _library() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"encoder transformers needs the library of that name: pip install 'transformers>=5' ({error})"
        ) from error


def _check(spec: InputSpec, architecture: Any) -> None:
    found = {
        "vocabulary": (spec.vocabulary, architecture.vocab_size),
        "length": (spec.shape[0], architecture.max_position_embeddings),
    }
    for what, (mine, most) in found.items():
        if mine > most:
            raise ValueError(f"encoder transformers: the input's {what} is {mine}, the model's at most {most}")
    if architecture.pad_token_id != 0:
        raise ValueError(
            f"encoder transformers: the model pads with id {architecture.pad_token_id}, the input with 0"
        )


def _model(library: ModuleType, architecture: Any, path: str) -> Any:
    options = {"attn_implementation": "sdpa", "dtype": torch.float32}
    if not path:
        return library.AutoModel.from_config(architecture, **options)
    try:
        return library.AutoModel.from_pretrained(
            path, config=architecture, local_files_only=True, use_safetensors=True, **options
        )
    except OSError as error:
        raise ValueError(f"encoder transformers: cannot load the weights in {path!r} ({error})") from error


class _Embedding(nn.Module):
    """The embedding of ids `(B, L)` with positions."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, ids: Tensor) -> Tokens:
        return self.embeddings(ids), read(ids)


class _Layer(nn.Module):
    """One layer of the library's model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, state: Tokens) -> Tokens:
        tokens, mask = state
        seen = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)  # (B, 1, L, L)
        return self.layer(tokens, seen), mask
