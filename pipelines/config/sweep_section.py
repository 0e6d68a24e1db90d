"""The section `sweep`: which settings are tried, how they are chosen, and which are stopped early."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.sections import TemperatureSection
from pipelines.config.validation import Section, Seed
from pipelines.config.value_ranges import number_or_value, parse_range


class SweepSection(Section):
    """The settings of a sweep. A key without values keeps the value of the configuration."""

    space: dict[str, list[Any] | str] = Field(
        default_factory=dict,
        description="Values of any key of network, gate, train and search: key → a list, or a range as text. "
        "uniform(low, high) and loguniform(low, high) are ranges of numbers, quniform(low, high, step) has steps; "
        "randint(low, high), lograndint(low, high) and qrandint(low, high, step) are whole numbers. Both ends "
        "belong to a range.",
    )
    groups: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((), description="Values of network.groups.")
    stems: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field((), description="Values of network.stem.")
    temperatures: tuple[TemperatureSection, ...] = Field((), description="Values of gate.temperature.")
    gate_learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="Values of gate.learning_rate."
    )
    seeds: tuple[Seed, ...] = Field(
        (), description="Values of train.seed; settings are ranked by the mean over the seeds."
    )
    search: Literal["grid", "random", "tpe"] = Field(
        "grid",
        description="How settings are chosen. grid: all combinations. random: combinations drawn with a fixed "
        "seed. tpe: each setting is proposed from the scores of the earlier ones, by the tree-structured Parzen "
        "estimator of Optuna (needs the extra optuna).",
    )
    trials: int | None = Field(
        None, ge=1, le=10**6, description="random, tpe: number of settings, each trained with every seed."
    )
    budget: float | None = Field(
        None,
        ge=1,
        description="random, tpe: the most training of the whole sweep in runs of naive MTL, naive MTL included "
        "and search.group_epochs left out. A setting starts if the most that it can cost is left.",
    )
    stop_early: bool = Field(
        True, description="Stop poor settings early (asynchronous successive halving), with all their seeds."
    )
    grace_epochs: int = Field(3, ge=1, description="Epochs of a setting before it can be stopped.")
    reduction: int = Field(
        3, ge=2, description="Reduction factor: one of this many settings that reach a stage continues."
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "samples" not in values:
            return values
        if values["samples"] is not None:
            raise ValueError("samples is called trials, and needs search: random")
        return {key: value for key, value in values.items() if key != "samples"}  # as earlier versions wrote it

    @field_validator("space", mode="before")
    @classmethod
    def _values(cls, space: Any) -> Any:
        if isinstance(space, dict):
            return {str(key): _checked(str(key), values) for key, values in space.items()}
        raise ValueError("expected key: values, such as train.learning_rate: loguniform(1e-4, 1e-2)")

    @model_validator(mode="after")
    def _complete(self) -> SweepSection:
        limited = self.trials is not None or self.budget is not None
        if self.search == "grid" and limited:
            raise ValueError("trials and budget are for search: random and search: tpe, not for a grid")
        if self.search != "grid" and not limited:
            raise ValueError(f"search: {self.search} needs trials, the number of settings, or budget")
        return self


def _checked(key: str, values: Any) -> Any:
    """The values of a key.

    Raises:
        ValueError: If they are neither a list nor a range.
    """
    if isinstance(values, str):
        try:
            parse_range(values)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return values
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{key}: expected a list of values, or a range such as uniform(0, 1), got {values!r}")
    return [number_or_value(value) for value in values]
