"""From the tokens of a text to one vector: the pooling that a pretrained model was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dmtg_core.network.encoders.text import Mean, Tokens


class ClassToken(nn.Module):
    """The first token, `(B, F)`."""

    def forward(self, state: Tokens) -> Tensor:
        """`(B, L, F)` and `(B, L)` to `(B, F)`."""
        return state[0][:, 0]


class Max(nn.Module):
    """The maximum of each feature over the tokens that are read, `(B, F)`."""

    def forward(self, state: Tokens) -> Tensor:
        """`(B, L, F)` and `(B, L)` to `(B, F)`."""
        return state[0].masked_fill(~state[1].unsqueeze(2), -float("inf")).amax(1)


POOLINGS: Mapping[str, type[nn.Module]] = {"mean": Mean, "cls": ClassToken, "max": Max}

# fields of sentence-transformers, in a file of its pooling → name here
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


def pooling_of(folder: str) -> str:
    """Return the pooling that the files of sentence-transformers in a folder name; "mean" if there are none.

    Raises:
        ValueError: For a pooling that is not a key of `POOLINGS`.
    """
    file = Path(folder, _place(Path(folder, "modules.json")), "config.json")
    if not file.is_file():
        return "mean"
    described = _json(file)
    found = {
        _FLAGS.get(key, key) for key, on in described.items() if key.startswith("pooling_mode_") and on is True
    }
    if isinstance(named := described.get("pooling_mode"), str):
        found = {named}
    if len(found) == 1 and found <= set(POOLINGS):
        return found.pop()
    raise ValueError(
        f"encoder transformers: {file} names the pooling {', '.join(sorted(found)) or 'none'}, expected one of "
        f"{', '.join(POOLINGS)}; set the option pooling"
    )


def _place(modules: Path) -> str:
    """The folder of the pooling in the list of a model's modules."""
    listed = _json(modules) if modules.is_file() else []
    places = [module["path"] for module in listed if str(module.get("type", "")).endswith("Pooling")]
    return places[0] if places else "1_Pooling"


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"encoder transformers: cannot read {file} ({error})") from error
