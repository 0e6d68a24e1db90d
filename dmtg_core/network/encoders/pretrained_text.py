"""Text encoders of the `transformers` library, from a local folder or from a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders.layer_cut import cut
from dmtg_core.network.encoders.library import library, name_layers
from dmtg_core.network.encoders.masks import EAGER, SDPA, register
from dmtg_core.network.encoders.pooling import POOLINGS, pooling_of

TRIAL = 8  # tokens of a text of the trial that compares the stages with the library's model


def transformers(
    spec: InputSpec,
    *,
    path: str = "",
    config: Mapping[str, Any] | None = None,
    pooling: str = "auto",
    dropout: float = 0.0,
) -> list[nn.Module]:
    """An encoder of the `transformers` library, with a stage for the embedding and one for each layer.

    The model is cut by its own structure; see `layer_cut`. The last stage ends in the pooling of the tokens. A
    text that is only padding is read as one padding token. Nothing is downloaded.

    Args:
        spec: A token input with ids of the model's own tokenizer.
        path: Folder written by `save_pretrained`, with `config.json` and safetensors. Empty for random weights.
        config: The library's configuration of the architecture. By default `EncoderSpec` reads it from `path`, so
            that a saved network can be built without the folder.
        pooling: "mean" over the tokens that are not padding, "max" over them, or "cls" for the first token. With
            "auto", `EncoderSpec` reads it from the files of sentence-transformers in `path`; without them it is
            "mean".
        dropout: Share of values dropped during training. It replaces that of `config`. See `text_transformer`.

    Raises:
        ValueError: If the library or the folder is missing, if the model cannot be cut, if its weights are
            incomplete, or if the input's vocabulary, length or padding does not fit the model.
    """
    options = with_config({"path": path, "config": config, "pooling": pooling})
    if not options["config"]:
        raise ValueError("encoder transformers needs the option path (a local folder) or config, got neither")
    if options["pooling"] not in POOLINGS:
        raise ValueError(
            f"encoder transformers: unknown pooling {pooling!r}, expected {', '.join(POOLINGS)} or auto"
        )
    model, missing = _model(
        library("transformers", "transformers", "transformers"), options["config"], path, dropout
    )
    _check(spec, model)
    name_layers(model)
    named = {parameter: name for name, parameter in model.named_parameters()}
    try:
        stages = cut(model, _trial(spec), spec.padding)
    except ValueError as error:
        kind = options["config"].get("model_type")
        raise ValueError(
            f"encoder transformers cannot cut the model type {kind!r} into stages: {error}"
        ) from error
    lacking = [named[p] for stage in stages for p in stage.parameters() if named[p] in missing]
    if lacking:
        raise ValueError(f"encoder transformers: the weights in {path!r} lack {lacking[0]}")
    stages[-1] = nn.Sequential(stages[-1], POOLINGS[options["pooling"]]())
    return [stage.train() for stage in stages]


def with_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `transformers` with the configuration and the pooling of their folder.

    Options that have a configuration keep it. Their pooling is "mean" unless they name another.

    Raises:
        ValueError: If the folder has no configuration, or names a pooling that is not known.
    """
    path, pooling = options.get("path"), options.get("pooling", "auto")
    if not path or options.get("config"):
        return {**options, "pooling": "mean" if pooling == "auto" else pooling}
    try:
        config = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"encoder transformers: no model in the folder {path!r}, as save_pretrained writes it ({error})"
        ) from error
    return {**options, "config": config, "pooling": pooling_of(path) if pooling == "auto" else pooling}


def _model(found: ModuleType, config: Mapping[str, Any], path: str, dropout: float) -> tuple[Any, set[str]]:
    """The library's model, and the names of the weights that the folder lacks."""
    kind = config.get("model_type")
    try:
        architecture = found.AutoConfig.for_model(str(kind)).from_dict(dict(config))
        for name, value in vars(architecture).items():
            if "dropout" in name and isinstance(value, float | int):
                setattr(architecture, name, dropout)
        register()
        try:
            return _loaded(found, architecture, path, SDPA)
        except ValueError:  # a model that computes attention in its own code
            return _loaded(found, architecture, path, EAGER)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"encoder transformers: no encoder of the model type {kind!r} ({reason})") from error


def _loaded(found: ModuleType, architecture: Any, path: str, attention: str) -> tuple[Any, set[str]]:
    options = {"attn_implementation": attention, "dtype": torch.float32}
    if not path:
        return found.AutoModel.from_config(architecture, **options), set()
    try:
        with _quiet(found.utils.logging):
            model, loaded = found.AutoModel.from_pretrained(
                path, config=architecture, local_files_only=True, use_safetensors=True, output_loading_info=True,
                **options,
            )  # fmt: skip
    except OSError as error:
        raise ValueError(
            f"cannot load the weights in {path!r}, which has to have model.safetensors ({error})"
        ) from error
    return model, set(loaded["missing_keys"])


@contextmanager
def _quiet(progress: Any) -> Iterator[None]:
    """Show no progress bar for each branch whose weights are read."""
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            progress.enable_progress_bar()


def _check(spec: InputSpec, model: Any) -> None:
    config = model.config
    if not hasattr(config, "vocab_size"):
        raise ValueError(f"encoder transformers reads token ids, the model type {config.model_type!r} does not")
    found = {"vocabulary": (spec.vocabulary, config.vocab_size), "length": (spec.shape[0], _longest(model))}
    for what, (mine, most) in found.items():
        if most is not None and mine > most:
            raise ValueError(f"encoder transformers: the input's {what} is {mine}, the model's at most {most}")
    if config.pad_token_id != spec.padding:
        raise ValueError(
            f"encoder transformers: the model pads with id {config.pad_token_id}, the input with {spec.padding}"
        )


def _longest(model: Any) -> int | None:
    """The longest text in tokens. A model that pads with another id than 0 may count positions from there."""
    longest = getattr(model.config, "max_position_embeddings", -1)
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    counted = [m.padding_idx + 1 for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return longest - max(counted, default=0) if longest > 0 else None  # relative positions have no limit


def _trial(spec: InputSpec) -> Tensor:
    """Three short texts of different length."""
    length = min(spec.shape[0], TRIAL)
    ids = torch.randint(spec.vocabulary, (3, length), generator=torch.Generator().manual_seed(0))
    ids[ids == spec.padding] = (spec.padding + 1) % spec.vocabulary
    for row in (1, 2):
        ids[row, max(length // row - 1, 1) :] = spec.padding
    return ids
