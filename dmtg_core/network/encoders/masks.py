"""Attention of `transformers` whose masks do not depend on the values of a batch.

The library leaves a mask out if a batch has no padding. This reads the batch on the host in each step, and the
arguments of the layers would change from batch to batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

SDPA, EAGER = "dmtg_sdpa", "dmtg_eager"


def register() -> None:
    """Register the two kinds of attention with the library, each with its own masks.

    A model that computes attention in its own code takes the masks of `EAGER`, and no function.
    """
    library: Any = importlib.import_module("transformers")
    for name, kind in ((SDPA, "sdpa"), (EAGER, "eager")):
        library.AttentionInterface.register(name, library.AttentionInterface()["sdpa"])
        library.AttentionMaskInterface.register(name, _whole(library.AttentionMaskInterface()[kind]))


def _whole(mask: Callable[..., Any]) -> Callable[..., Any]:
    """`mask`, never left out."""

    def built(*args: Any, **options: Any) -> Any:
        return mask(*args, **{**options, "allow_is_bidirectional_skip": False})

    return built
