"""Small images with labels, in a data set of Hugging Face and in a tar file."""

from __future__ import annotations

import io
import json
from typing import Any

import datasets
from PIL import Image

ANIMALS = ("cat", "dog", "owl")


def png(number: int, side: int = 8) -> bytes:
    """An image whose colour says which one it is."""
    found = io.BytesIO()
    Image.new("RGB", (side, side), (number, 255 - number, 7)).save(found, "PNG")
    return found.getvalue()


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Samples with the labels `kind` (one of three classes), `wild` (one of two), `age` and `tags`."""
    return [
        {
            "image": {"bytes": png(i), "path": f"{i}.png"},
            "kind": i % 3,
            "wild": i % 2,
            "age": i / 2,
            "tags": [0] if i % 2 else [0, 1],
        }
        for i in range(first, first + count)
    ]


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "kind": datasets.ClassLabel(names=list(ANIMALS)),
        "wild": datasets.ClassLabel(names=["tame", "wild"]),
        "age": datasets.Value("float32"),
        "tags": datasets.List(datasets.ClassLabel(names=["furry", "small"])),
    }
)
TASKS = [
    {"column": "kind", "kind": "multiclass"},
    {"column": "wild", "kind": "binary"},
    {"column": "age", "kind": "regression"},
    {"column": "tags.small", "kind": "binary"},
]


def dataset(count: int, first: int = 0) -> datasets.Dataset:
    """A data set of `rows`."""
    return datasets.Dataset.from_list(rows(count, first), features=FEATURES)


def splits() -> datasets.DatasetDict:
    """Three splits of 20, 6 and 4 samples."""
    return datasets.DatasetDict(train=dataset(20), validation=dataset(6, 20), test=dataset(4, 26))


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """A sample of a tar file with the labels of `rows`."""
    labels = {"kind": ANIMALS[number % 3], "age": number / 2, "wild": bool(number % 2)}
    files = {"png": png(number), "json": json.dumps(labels).encode(), "cls": str(number % 2).encode()}
    return f"{number:04d}", files
