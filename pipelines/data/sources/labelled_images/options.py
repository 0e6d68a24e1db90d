"""How photographs are stored, for all readers whose samples are a photograph and labels in columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders.pretrained_images import preprocessing_of
from pipelines.config.validation import Section
from pipelines.data.sources.base import INPUT, Column, Description
from pipelines.data.sources.images import fitted, image_input, rgb
from pipelines.data.sources.labels import Target


class ImageOptions(Section):
    """How photographs are stored: `size` × `size`.

    `resize` is "pad" (the whole image with its aspect ratio, on mid-grey, which is near zero after normalisation),
    "crop" (the central square) or "stretch" (the whole image, without its aspect ratio).

    `preprocessing` names a model of `timm`: mean and std of the input are those of the model, and so are, unless
    they are set, `size`, `interpolation` and `crop_share`, with `resize: crop`. `crop_share` is the side of the
    part that "crop" keeps ÷ the shorter side of the image.
    """

    size: int = Field(64, ge=1)
    resize: Literal["stretch", "crop", "pad"] = "pad"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    crop_share: float = Field(1.0, gt=0, le=1)
    preprocessing: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_model(cls, values: Any) -> Any:
        """Add the values of the model that `preprocessing` names."""
        if not isinstance(values, dict) or not isinstance(name := values.get("preprocessing"), str) or not name:
            return values
        found = preprocessing_of(name)
        kept = {key: found[key] for key in ("size", "interpolation", "crop_share")}
        if values.get("resize", "crop") != "crop":
            del kept["crop_share"]
        return {"resize": "crop", **kept, **values}

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        """Refuse a share that would be ignored."""
        if self.crop_share < 1 and self.resize != "crop":
            raise ValueError(f"crop_share has no meaning beside resize: {self.resize}")
        return self

    @property
    def input(self) -> InputSpec:
        """The stored input with the constants of its normalisation."""
        if not self.preprocessing:
            return image_input(self.size)
        found = preprocessing_of(self.preprocessing)
        return image_input(self.size, found["mean"], found["std"])

    def stored(self, image: Image.Image, name: str) -> np.ndarray:
        """An image as uint8 (size, size, 3), in RGB; `name` is for a message.

        Raises:
            BadSampleError: For an image that cannot be stored in 8 bits.
        """
        return fitted(
            rgb(image, name), self.size, self.resize, interpolation=self.interpolation, share=self.crop_share
        )

    def description(self, targets: Sequence[Target]) -> Description:
        """The image and one number for each task."""
        columns = {INPUT: Column("uint8", (self.size, self.size, 3))}
        columns |= {f"task.{target.task.name}": target.stored for target in targets}
        notes = [target.note for target in targets if target.note]
        if self.preprocessing:
            notes.append(
                f"images are prepared as for {self.preprocessing}: {self.resize} to {self.size}×{self.size}, "
                f"{self.interpolation}, crop_share {self.crop_share}"
            )
        return Description(self.input, tuple(t.task for t in targets), columns, notes=tuple(notes))


def with_validation(split: str, key: str, share: float) -> str:
    """The split of a sample, if a share of the training samples is for validation, by the hash of `key`."""
    if split != "train" or not share:
        return split
    # other digits than those of `hash_split`
    return "val" if int(hashlib.sha256(key.encode()).hexdigest()[8:16], 16) < share * 2**32 else split
