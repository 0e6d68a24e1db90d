"""What encoders of other libraries have in common: names of layers, and errors of missing libraries."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn


def library(name: str, encoder: str, extra: str) -> ModuleType:
    """Import a library.

    Raises:
        ValueError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"encoder {encoder} needs the library {name}: pip install 'dmtg[{extra}]' ({error})"
        ) from error


def name_layers(model: nn.Module) -> None:
    """Set `library_name` of each module that has weights: its name in the library's own model.

    A stage has another name. Files for the library, such as those of adapters, need the library's.
    """
    for name, module in model.named_modules():
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            vars(module)["library_name"] = name


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of vectors, tokens or pixels."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear)
