"""Registered models of a table, of texts and of photographs, for the tests of predictions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dmtg_core.network.encoders import EncoderSpec
from pipelines.data.sources import build_source
from pipelines.data.sources.base import Source
from pipelines.runs.identity import record_identity
from pipelines.storage import locate
from tests.pipelines.conftest import TASKS, write_images
from tests.pipelines.untrained import Finished, finish

LABELS = [{"column": "sick", "kind": "binary"}, {"column": "cost", "kind": "regression"},
          {"column": "grade", "kind": "multiclass", "classes": ["nah", "fern, weit"]},
          {"column": "krank", "kind": "binary"}]  # fmt: skip
OPTIONS: dict[str, tuple[str, dict[str, Any], EncoderSpec]] = {
    "rows": ("table", {"file": "t.csv", "id_column": "key", "features": ["age", "plant", "smoker"],
                       "categorical": ["plant", "smoker"], "tasks": LABELS}, EncoderSpec("mlp")),
    "texts": ("text", {"file": "t.csv", "id_column": "key", "tasks": LABELS[:2], "text_column": "note",
                       "length": 8}, EncoderSpec("embedding_bag")),
    "pictures": ("folder", {"suffix": ".png", "size": 16, "resize": "crop", "tasks": TASKS},
                 EncoderSpec("convnet", options={"widths": [4, 8]})),
}  # fmt: skip
FRAME = pd.DataFrame({
    "key": ["p", "q", "r", "s"], "age": ["20", "40.5", "", "30"], "plant": ["001", "1", "", "01"],
    "smoker": ["TRUE", "FALSE", "TRUE", ""], "note": ["a day at sea", 'so "no", she said', "NA", "zzz"],
    "sick": ["1", "0", "1", "0"], "cost": ["3", "5.5", "4", "1"], "grade": ["nah", "nah", "fern, weit", "nah"],
    "krank": ["ja", "nein", "ja", "nein"], "split": ["train", "train", "train", "val"],
})  # fmt: skip
NEW = FRAME.drop(columns=["sick", "cost", "grade", "krank", "split"]).assign(extra="x").iloc[::-1]


@dataclass
class Model:
    """A registered model: its source, its run, and the addresses of the composite and the models of its groups."""

    source: Source
    run: Finished
    uri: str
    groups: list[str]


def write_data(root: Path) -> Path:
    """Write the raw data of all kinds."""
    write_images(root, rows=6)
    FRAME.to_csv(root / "t.csv", index=False)
    return root


def register(root: Path, track: dict[str, str], *names: str) -> dict[str, Model]:
    """A registered model of each kind, or of some."""
    found = {}
    for name in names or OPTIONS:
        kind, options, encoder = OPTIONS[name]
        source = build_source(kind, str(root), options)
        run = finish(source, encoder, root, track, name=name, groups=2, raw={"kind": kind, "options": options})
        record_identity(locate(str(run.run)), run.config, "data", source.describe().preparation)
        (run.run / "grouping.json").write_text(json.dumps(run.result["grouping"]))
        composite, *groups = run.register()
        found[name] = Model(source, run, composite.uri, [group.uri for group in groups])
    return found
