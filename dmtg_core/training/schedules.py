"""Temperature of the gate over a run, as a pure function of progress, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Each maps (start, end, progress in [0, 1]) to a temperature.
FAMILIES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda start, _end, _t: start,
    "linear": lambda start, end, t: start + (end - start) * t,
    "cosine": lambda start, end, t: end + (start - end) * 0.5 * (1 + math.cos(math.pi * t)),
    "exponential": lambda start, end, t: start * (end / start) ** t,
}


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperature τ at each moment of a run.

    Args:
        family: A key of `FAMILIES`.
        start: τ at the beginning. The paper's is 2.5 on CelebA and 4 on Taskonomy, constant.
        end: τ at the end; "constant" has none.
        warmup: Share of the run, in [0, 1), during which τ stays at `start`.

    Raises:
        ValueError: For an unknown family, a temperature that is not positive, or a warm-up outside [0, 1).
    """

    family: str = "constant"
    start: float = 2.5
    end: float = 0.5
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(
                f"unknown temperature schedule {self.family!r}, expected one of {', '.join(FAMILIES)}"
            )
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"temperatures must be positive, got start={self.start}, end={self.end}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the run in [0, 1), got {self.warmup}")

    def __call__(self, progress: float) -> float:
        """τ at `progress`, the share of the run that is done; clamped to [0, 1]."""
        t = (min(max(progress, 0.0), 1.0) - self.warmup) / (1 - self.warmup)
        return FAMILIES[self.family](self.start, self.end, max(t, 0.0))
