"""The updates of a branch in the format of the PEFT library, which can load them on the same encoder.

The names of layers are those of the library's model. A layer of our own encoders has the name that it has in the
stages after the stem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dmtg_core.network.adapters import AdapterOptions
from dmtg_core.network.grouping_network import GroupingNetwork

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's name of the model that is adapted


def updates_of(network: GroupingNetwork) -> dict[str, str]:
    """Return the names of the updates of a network of one branch: name in its state → name in PEFT's file.

    They are empty for a network without updates.
    """
    if network.shared is None:
        return {}
    found = {}
    for i, layer in enumerate(network.shared.adapted):
        for own, theirs in (("a", "lora_A"), ("b", "lora_B")):
            found[f"branches.0.updates.{i}.{own}"] = f"{PREFIX}{layer.name}.{theirs}.weight"
    for i, norm in enumerate(network.shared.norms):
        for key in norm.base.state_dict():
            found[f"branches.0.norms.{i}.{key}"] = f"{PREFIX}{norm.name}.{key}"
    return found


def to_peft(network: GroupingNetwork) -> dict[str, Tensor]:
    """Return the updates of a network of one branch as PEFT stores them: those of convolutions have four axes."""
    assert network.shared is not None
    layers = {f"branches.0.updates.{i}": layer.base for i, layer in enumerate(network.shared.adapted)}
    state, found = network.state_dict(), {}
    for own, theirs in updates_of(network).items():
        convolution = isinstance(layers.get(own.rpartition(".")[0]), nn.Conv2d)
        found[theirs] = state[own][..., None, None] if convolution else state[own]
    return found


def from_peft(network: GroupingNetwork, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a part of the state of a network of one branch. It is the inverse of `to_peft`.

    Raises:
        KeyError: If a tensor is missing.
        RuntimeError: If a tensor has another size.
    """
    state = network.state_dict()
    return {own: tensors[theirs].reshape(state[own].shape) for own, theirs in updates_of(network).items()}


def config_of(network: GroupingNetwork) -> dict[str, Any]:
    """Return the contents of `CONFIG` for a network of one branch with updates."""
    assert network.shared is not None
    encoder = network.spec.encoder
    options = AdapterOptions.of(encoder.adapter)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": encoder.source or None,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": [layer.name for layer in network.shared.adapted],
        "modules_to_save": [norm.name for norm in network.shared.norms] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
