"""The section `network`: encoder, branches and adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from dmtg_core.addresses import FORM
from pipelines.config.validation import Section, Switch


class AdapterSection(Section):
    """Low-rank updates of frozen stages, for network.branch=lora."""

    rank: int = Field(8, ge=1, le=4096, description="Rank of an update.")
    alpha: float = Field(16.0, gt=0, description="The updates are scaled by alpha / rank.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the inputs of an update that are dropped in training."
    )
    targets: str | tuple[str, ...] = Field(
        "all",
        description="Layers that are updated: all linear layers and 1×1 convolutions, or the ends of the names of "
        "layers, as [query, value].",
    )
    norms: bool = Field(False, description="Train the layer norms of each branch as well.")


class NetworkSection(Section):
    """The encoder, its division into stem and branches, and the number of groups."""

    encoder: str = Field(
        "convnet",
        description="Encoder: one of mlp, tabm, convnet, resnet18, resnet34, resnet50, celeba_resnet, "
        "xception_taskonomy, vit, vit_b_16, timm, embedding_bag, text_transformer, transformers; "
        f"or {FORM}, a module class or a function of another package.",
    )
    stem: int = Field(0, ge=0, le=1000, description="Stages of the encoder that all groups share.")
    groups: int = Field(3, ge=1, le=1000, description="Largest number of groups, K.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the encoder.")
    branch: Literal["copy", "last", "lora"] = Field(
        "copy",
        description="What a branch is: copy has all stages after the stem and trains the stem too; last has "
        "copies of the stages after a frozen stem; lora has low-rank updates of these stages, which are frozen.",
    )
    adapter: AdapterSection = AdapterSection()
    decoder: Literal["subpixel", "xception"] = Field("subpixel", description="Decoder of the dense tasks.")
    decoder_width: int = Field(64, ge=1, le=2**16, description="Channels of the first layer of the decoder.")
    rescale_gradients: Annotated[
        Literal["off", "tasks", "published"],
        BeforeValidator(lambda value: {True: "tasks", False: "off"}[value] if isinstance(value, bool) else value),
    ] = Field(
        "off",
        description="Scale gradients by 1/√K into the stem, and into the branches by 1/√N (tasks) or 1/√K "
        "(published), or not at all (off).",
    )
    batch_branches: Switch = Field(
        "auto",
        description="Train all branches in one pass, with grouped convolutions and batched products, or one after "
        "the other; auto chooses by the device and the size of a step.",
    )
    start_from: tuple[str, ...] = Field(
        (),
        description="Folders of finished runs, or of single models, whose weights initialise the network: one "
        "model for all branches, or one model for each branch.",
    )

    @field_validator("start_from", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) and value else value or []
