"""Inputs of networks (`InputSpec`): how they are stored, and the constants of their normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dmtg_core.names import listed

INPUT_DTYPES = ("uint8", "uint16", "int16", "int32", "float16", "float32", "float64")


@dataclass(frozen=True)
class InputSpec:
    """The input of a network: stored shape and dtype, and the constants of its normalisation.

    Args:
        kind: "image" (stored `(H, W, C)`), "features" (stored `(F,)`) or "tokens" (stored `(L,)`, ids).
        shape: Stored shape of one sample.
        dtype: Name of the stored numpy dtype.
        mean, std: One value, or one for each channel (feature). Not used for tokens.
        vocabulary: Number of token ids, with padding; 0 for other kinds.
        quantiles: For each feature, quantiles of its values at equal distances of probability, from the smallest
            to the largest value. Such a feature is mapped to a normal distribution, not standardised by mean and
            std. Empty for a feature that is standardised. All that are not empty have one length.
        padding: Token id of padding.
        codes: For each feature, its repeated values in ascending order. An encoder can treat each of them as a
            category. Empty for a feature without; only features with quantiles have codes.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    vocabulary: int = 0
    quantiles: tuple[tuple[float, ...], ...] = ()
    padding: int = 0
    codes: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("shape", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("quantiles", "codes"):
            object.__setattr__(self, name, tuple(tuple(map(float, values)) for values in getattr(self, name)))
        rank = {"image": 3, "features": 1, "tokens": 1}.get(self.kind)
        if rank is None:
            raise ValueError(f"unknown input kind {self.kind!r}, expected image, features or tokens")
        if len(self.shape) != rank:
            raise ValueError(f"expected a stored shape of {rank} axes for {self.kind} input, got {self.shape}")
        if self.dtype not in INPUT_DTYPES:
            raise ValueError(f"unknown input dtype {self.dtype!r}, expected one of {', '.join(INPUT_DTYPES)}")
        if (self.kind == "tokens") != (self.vocabulary > 1):
            raise ValueError(f"{self.kind} input cannot have a vocabulary of {self.vocabulary}")
        if self.kind == "tokens" and self.dtype not in ("uint16", "int32"):
            raise ValueError(f"tokens are stored as uint16 or int32, got {self.dtype}")
        if not 0 <= self.padding < max(self.vocabulary, 1):
            raise ValueError(f"a vocabulary of {self.vocabulary} has no id {self.padding} for padding")
        self._check_constants()

    def _check_constants(self) -> None:
        if not all(isinstance(side, int) and side > 0 for side in self.shape):
            raise ValueError(f"the sides of an input are positive whole numbers, got {self.shape}")
        if not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"input std must be positive, got {self.std}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"input mean must be finite, got {self.mean}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.shape[-1]):
                raise ValueError(f"input {name} needs 1 or {self.shape[-1]} values, got {len(values)}")
        self._check_quantiles()

    def _check_quantiles(self) -> None:
        if self.quantiles and (self.kind != "features" or len(self.quantiles) != self.shape[0]):
            wanted = f"{self.shape[0]} lists" if self.kind == "features" else "none"
            raise ValueError(f"quantiles of {self.kind} input: expected {wanted}, got {len(self.quantiles)}")
        lengths = sorted({len(edges) for edges in self.quantiles if edges})
        if len(lengths) > 1 or 1 in lengths:
            raise ValueError(f"quantiles need one length of at least 2, got {listed(map(str, lengths))}")
        for place, codes in enumerate(self.codes):
            if len(self.codes) != len(self.quantiles) or (codes and not self.quantiles[place]):
                raise ValueError(f"feature {place} has codes without quantiles")
        for name in ("quantiles", "codes"):
            for values in getattr(self, name):
                if not all(map(math.isfinite, values)) or any(b < a for a, b in pairwise(values)):
                    raise ValueError(f"{name} must be finite and in ascending order, got {values[:5]} …")

    def __deepcopy__(self, memo: dict[int, Any]) -> InputSpec:
        """Return the spec itself, which does not change: copies of an encoder share its quantiles."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the fields ready for JSON, without a copy of each quantile. `InputSpec(**...)` reads them."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}
        for name in ("quantiles", "padding", "codes"):
            if not values[name]:  # as in files of earlier versions
                del values[name]
        return values
