"""Parameters of a loop of which `make test` runs a few, and `make soak` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def others_in_soak(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values for `pytest.mark.parametrize`; those that are not among `kept` run in `make soak`.

    Raises:
        ValueError: If a kept value is none of the values.
    """
    values = list(values)
    missing = [value for value in kept if value not in values]
    if missing:
        raise ValueError(f"{missing} are not among {values}")
    return [value if value in kept else _in_soak(value) for value in values]


def _in_soak(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.soak)
