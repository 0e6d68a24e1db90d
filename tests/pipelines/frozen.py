"""Groups of a frozen encoder whose weights are in a file, and pictures for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.tasks import Task
from dmtg_core.training.checkpoint import save_tensors
from pipelines.data.sources.base import INPUT, Column, Description, Entry
from pipelines.storage import Location
from tests.dmtg_core.pretrained import changed

SIDE = 32
PICTURES = InputSpec("image", (SIDE, SIDE, 3), "uint8", std=(255.0,))
TASKS = (
    Task("wet", "binary"),
    Task("room", "multiclass", channels=3, labels=("bath", "hall", "attic")),
    Task("size", "regression", offset=(5.0,), scale=(10.0,), unit="m"),
)
MODEL = {"model": "vit_tiny_patch16_224", "arguments": {"embed_dim": 8, "depth": 3, "num_heads": 2}}


def write_weights(folder: Path, seed: int = 0) -> str:
    """A file of weights of a small vision transformer of `timm`."""
    import timm

    torch.manual_seed(seed)
    name, arguments = MODEL["model"], MODEL["arguments"]
    model = timm.create_model(name, num_classes=0, img_size=SIDE, **arguments)
    file = folder / f"weights_{seed}.safetensors"
    save_tensors(file, model.state_dict())
    return str(file)


def encoder(file: str, branch: str = "lora") -> EncoderSpec:
    """The encoder with these weights: the first of its blocks is frozen, or all are."""
    return EncoderSpec("timm", 2, MODEL | {"path": file}, branch, {"rank": 2} if branch == "lora" else None)


def network(file: str, branch: str = "lora") -> GroupingNetwork:
    """Two groups of the tasks."""
    spec = NetworkSpec(PICTURES, TASKS, encoder(file, branch), 2, initial="diagonal", initial_scale=1.0)
    return changed(GroupingNetwork(spec)).eval()


def pictures(rows: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, SIDE, SIDE, 3)).astype(np.uint8)


class Pictures:
    """A source of random pictures."""

    def raw(self) -> Sequence[Location]:
        return []

    def describe(self) -> Description:
        return Description(PICTURES, TASKS, {INPUT: Column("uint8", PICTURES.shape)})

    def entries(self) -> Iterator[Entry]:
        return (Entry(str(n), "train") for n in range(4))

    def read(self, entry: Entry) -> dict[str, Any]:
        return {INPUT: pictures()[int(entry.id)]}
