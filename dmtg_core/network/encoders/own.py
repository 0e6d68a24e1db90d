"""Encoders of other packages: a function that returns stages, or a class of modules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dmtg_core.addresses import load
from dmtg_core.input_spec import InputSpec

SPEC = "spec"  # parameter of a class that receives the `InputSpec`


def own_stages(address: str, spec: InputSpec, options: Mapping[str, Any]) -> list[nn.Module]:
    """Build the stages of an encoder at an address.

    A function is called as our own encoders are, `(spec, **options)`, and returns the stages. A class of modules
    is constructed with the options, and with `spec` if it has a parameter of this name. The children of an
    `nn.Sequential` are its stages; any other module is one stage, which cannot be cut.

    Raises:
        ValueError: If it does not return modules.
    """
    found = load("encoder", address)
    if not _is_module(found):
        made = found(spec, **options)
    elif SPEC in inspect.signature(found).parameters:
        made = found(**{SPEC: spec}, **options)
    else:
        made = found(**options)
    if isinstance(made, nn.Module):
        made = list(made.children()) if isinstance(made, nn.Sequential) else [made]
    stages = list(made) if isinstance(made, Sequence) else []
    if not stages or not all(isinstance(stage, nn.Module) for stage in stages):
        raise ValueError(f"encoder {address} must return modules, got {type(made).__name__}")
    return stages


def own_options(address: str) -> list[str] | None:
    """Return the names of the options of an encoder at an address; None if it takes any option."""
    found = load("encoder", address)
    names = inspect.signature(found).parameters
    if any(one.kind is one.VAR_KEYWORD for one in names.values()):
        return None
    return [name for name in names if name != SPEC] if _is_module(found) else list(names)[1:]


def own_output(address: str, stem: nn.Module, branch: nn.Module, probe: Tensor) -> Tensor:
    """Return the output of an encoder for a probe of one sample.

    Raises:
        ValueError: If its forward fails, and if the output is not features `(B, C)`, a map `(B, C, H, W)` or
            members `(B, M, C)`.
    """
    try:
        out: object = branch(stem(probe))
    except Exception as error:  # each module has errors of its own
        shape = tuple(probe.shape)
        raise ValueError(f"encoder {address} does not take an input of shape {shape}: {error}") from error
    if not isinstance(out, Tensor) or not 2 <= out.dim() <= 4:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"encoder {address} must return (B, C) or (B, C, H, W), got {got}")
    return out


def _is_module(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module)
