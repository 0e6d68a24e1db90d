"""The `regroup` section of a configuration: the nightly run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipelines.config.validation import Section


class RegroupSection(Section):
    """The nightly run: its data sets, and the conditions under which a challenger replaces the champion."""

    shards: str = Field(
        "",
        description="Folder with a data set for each date, in <date> or date=<date>, or a JSON file with a list "
        'of {"date": …, "shards": …}; the newest data set is used. Empty for data.shards.',
    )
    evaluation: str = Field(
        "",
        description="Shards on whose split champion and challenger are evaluated; empty for those of the nightly "
        "run.",
    )
    split: Literal["test", "val"] = Field(
        "test", description="Split on which champion and challenger are evaluated."
    )
    margin: float = Field(0.5, ge=0, description="Smallest gain of the challenger over the champion, in per cent.")
    confidence: float = Field(
        0.95,
        gt=0,
        lt=1,
        description="Level of the bootstrap confidence interval; the interval of the gain must be above 0.",
    )
    resamples: int = Field(2000, ge=100, le=10**6, description="Number of bootstrap resamples.")
    limit: float | None = Field(
        5.0, ge=0, description="Largest increase of the error of any task, in per cent; null for no limit."
    )
    limits: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Values that replace regroup.limit for single tasks: task → per cent."
    )
    warm_start: bool = Field(True, description="Start from the weights of the champion where they fit.")
    lease_s: float = Field(
        120,
        ge=5,
        le=10**9,
        description="Seconds without a renewal after which the lease of another regroup job is free.",
    )
    webhook: str = Field("", description="HTTP(S) address to which the verdict is sent as JSON.")
    metrics: str = Field(
        "",
        description="Where a nightly run leaves its metrics for Prometheus: address of a Pushgateway (http://…), "
        "or a file that ends in .prom, for node_exporter's textfile collector.",
    )

    @field_validator("metrics")
    @classmethod
    def _is_place(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")) and not value.endswith(".prom"):
            raise ValueError("expected an http:// address of a Pushgateway, or a file that ends in .prom")
        return value
