"""Bytes of four registered groups of one text encoder: adapters with heads, beside full copies.

The encoder is that of the folder DMTG_BASE (see `make bench`), or one of the size of MiniLM with random weights.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.adapters import MINILM, RANK, TASKS, TOKENS
from dmtg_core import EncoderSpec, GroupingNetwork, NetworkSpec
from dmtg_core.network.composite import plain
from dmtg_core.training.checkpoint import BASE, save_model
from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.manifest import Manifest
from pipelines.data.sources.base import INPUT, Column, Description
from pipelines.registry.bases import ENVIRONMENT
from pipelines.registry.models import register
from pipelines.registry.tracking import connect
from pipelines.runs.models import write_models
from pipelines.storage import locate

GROUPS = 4


def _encoder(root: Path) -> str:
    """The folder of the encoder."""
    given = os.environ.pop(ENVIRONMENT, "")  # registered models would read it as well
    if given:
        return given
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**MINILM), add_pooling_layer=False)
    model.save_pretrained(root / "minilm")
    return str(root / "minilm")


def _registered(network: GroupingNetwork, root: Path) -> Path:
    """Register the groups of a network as a run does. The folder has the files of the registry."""
    run, models = root / "run", network.specialise()
    write_models(locate(str(run / "models")), models)
    track = {"uri": f"sqlite:///{root / 'mlflow.db'}", "experiment": "bench"}
    values = {"name": "bench", "data": {"shards": str(run)}, "network": {"groups": GROUPS}, "track": track}
    config = checked(Config, values)
    client = connect(config.track)
    run_id = client.create_run(client.create_experiment("bench", str(root / "artifacts"))).info.run_id
    grouping = network.grouping()
    result = {"grouping": grouping.to_dict(), "grouping_name": grouping.name, "split": "test",
              "metrics": {task.name: {task.metric: 0.5} for task in TASKS}}  # fmt: skip
    manifest = Manifest(Description(TOKENS, TASKS, {INPUT: Column(TOKENS.dtype, TOKENS.shape)}), {}, {}, source={})
    register(config, locate(str(run)), run_id, manifest, np.ones((2, *TOKENS.shape), TOKENS.dtype), result)
    return root / "artifacts"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def registry_adapters() -> tuple[Callable[[], float], Callable[[], float], Callable[[], dict[str, Any]]]:
    """MB of the registered models of four groups without that of their frozen weights, and of four full copies."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encoder = EncoderSpec("transformers", 4, {"path": _encoder(root)}, "lora", {"rank": RANK})
        spec = NetworkSpec(TOKENS, TASKS, encoder, GROUPS, initial="diagonal", initial_scale=1.0)
        network = GroupingNetwork(spec)
        models = [file.parent for file in _registered(network, root).rglob("MLmodel")]
        sizes = {place: _bytes(place) / 1e6 for place in models}
        base = next(place for place in models if any(place.rglob(f"{BASE}.safetensors")))
        groups = [size for place, size in sizes.items() if len(list(place.rglob("network.json"))) == 1]
        save_model(root / "full", plain(network.specialise()["group_0"]))
        full = GROUPS * _bytes(root / "full") / 1e6
    assert len(groups) == GROUPS
    return lambda: sum(groups), lambda: full, lambda: {"base_mb": round(sizes[base], 1)}


# name → (bound, value, function that returns numerator and denominator of the ratio, and notes)
ROWS: dict[str, tuple[str, float, Callable[[], Any]]] = {
    "registry_adapters": ("at_most", 0.05, registry_adapters),
}
