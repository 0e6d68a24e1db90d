"""Tables with images, tar files and arrays in a bucket are read as local ones, by the bytes of each sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipelines.data.sources import build_source
from pipelines.storage import locate
from tests.pipelines.data.sources.array_files import nyuv2_arrays, write_tar
from tests.pipelines.data.sources.image_files import TASKS, sample, splits
from tests.pipelines.data.sources.labelled_images.test_table import save_delta, save_plain
from tests.pipelines.data.test_s3 import upload
from tests.pipelines.s3_server import BUCKET


def save_dict(root: Path) -> None:
    splits().save_to_disk(root)


def save_tar(root: Path) -> None:
    for name, first in (("train", 0), ("val", 20)):
        write_tar(root / f"{name}-0.tar", [sample(i) for i in range(first, first + 6)])


def save_h5(root: Path) -> None:
    root.mkdir()
    for name in ("train", "val"):
        with h5py.File(root / f"{name}.h5", "w") as file:
            for key, values in nyuv2_arrays(0, (8, 12)).items():
                file[key] = values[None]


IMAGES = {"size": 8, "tasks": [TASKS[0], TASKS[2]]}
SAVED: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "save_to_disk": ("image_table", save_dict, IMAGES),
    "parquet": ("image_table", save_plain, IMAGES),
    "delta": ("image_table", save_delta, IMAGES),
    "tar": ("webdataset", save_tar, IMAGES),
    "h5": ("nyuv2", save_h5, {}),
}


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("form", SAVED)
def test_samples_in_a_bucket_are_those_on_files(form: str, tmp_path: Path) -> None:
    kind, save, options = SAVED[form]
    save(tmp_path / "t")
    upload(tmp_path / "t", locate(f"s3://{BUCKET}/sources/{form}"))
    local = build_source(kind, str(tmp_path / "t"), options)
    remote = build_source(kind, f"s3://{BUCKET}/sources/{form}", options)
    assert remote.describe() == local.describe()
    entries = list(remote.entries())
    assert entries == list(local.entries())
    for entry in entries[::5]:
        found, expected = remote.read(entry), local.read(entry)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
