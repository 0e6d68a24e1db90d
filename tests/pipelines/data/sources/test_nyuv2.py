"""NYUv2 in the folders that LibMTL reads, and in HDF5."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pipelines.data.planning import unpickled
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, BadSampleError, Source
from pipelines.errors import UserError
from tests.pipelines.data.sources.array_files import nyuv2_arrays, write_nyuv2

SIZE = (16, 24)


def reader(root: Path, **options: Any) -> Source:
    return build_source("nyuv2", str(root), options)


def write_h5(root: Path, *, train: int = 3, val: int = 2) -> Path:
    root.mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        arrays = [nyuv2_arrays(number, SIZE) for number in range(count)]
        with h5py.File(root / f"{split}.h5", "w") as file:
            for name in arrays[0]:
                file[name] = np.stack([one[name] for one in arrays])
    return root


@pytest.fixture(params=[write_nyuv2, write_h5], ids=["npy", "h5"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "nyu")


def test_samples_are_those_of_the_files(root: Path) -> None:
    source = reader(root)
    description = source.describe()
    assert [task.name for task in description.tasks] == ["segmentation", "depth", "normal"]
    assert description.input.shape == (*SIZE, 3)
    entries = list(source.entries())
    assert [entry.id for entry in entries] == ["train/0", "train/1", "train/2", "val/0", "val/1"]
    copied: Source = unpickled(pickle.dumps(source))
    for entry in entries:
        row, held = copied.read(entry), nyuv2_arrays(int(entry.id.partition("/")[2]), SIZE)
        for name, column in description.columns.items():
            value = row[name]
            assert value is not None
            assert (value.dtype, value.shape) == (np.dtype(column.dtype), column.shape)
        np.testing.assert_allclose(row[INPUT], held["image"] * 255, atol=0.5001)
        np.testing.assert_array_equal(row["task.segmentation"][:, 1:], held["label"][:, 1:])
        np.testing.assert_allclose(row["task.depth"][:, 1:], held["depth"][:, 1:, 0], atol=0.004)
        np.testing.assert_allclose(row["task.normal"][:, 1:], held["normal"][:, 1:], atol=0.001)


def test_unknown_pixels_are_no_labels(root: Path) -> None:
    source = reader(root)
    row = source.read(next(source.entries()))
    for task in source.describe().tasks:
        target = task.encode(torch.from_numpy(row[f"task.{task.name}"])[None])
        missing = target == task.ignore_index if task.classes else target.isnan()
        assert missing[..., 0].all()
        assert not missing[..., 1:].any()


def break_file(root: Path, name: str, values: np.ndarray | bytes | None) -> None:
    file = root / "train" / name / "1.npy"
    if values is None:
        file.unlink()
    elif isinstance(values, bytes):
        file.write_bytes(values)
    else:
        np.save(file, values)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("depth", None, "no such file"),
        ("normal", b"\x93NUMPY", "damaged"),
        ("label", np.full(SIZE, 13.0), "expected classes from -1 to 12, got 13 to 13"),
        ("label", np.full(SIZE, 0.5), "expected classes"),
        ("image", np.full((*SIZE, 3), 200.0), "expected values from 0 to 1, got 200 to 200"),
        ("image", np.zeros((8, 24, 3)), "image is 8×24, the first image 16×24: train/1"),
        ("depth", np.zeros((*SIZE, 2)), "expected depths"),
    ],
)
def test_bad_files_are_bad_samples(tmp_path: Path, name: str, values: Any, reason: str) -> None:
    root = write_nyuv2(tmp_path / "nyu")
    break_file(root, name, values)
    source = reader(root)
    source.describe()
    with pytest.raises(BadSampleError, match=reason):
        source.read(list(source.entries())[1])


def test_some_of_the_tasks_need_only_their_files(tmp_path: Path) -> None:
    root = write_nyuv2(tmp_path / "nyu")
    break_file(root, "normal", None)
    source = reader(root, tasks=["depth"])
    assert set(source.read(list(source.entries())[1])) == {INPUT, "task.depth"}
    assert {place.name for place in source.raw()} == {"image", "depth"}


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "nyu" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="no folder or file of a split") as found:
        list(reader(tmp_path / "nyu").entries())
    assert "train/image/0.npy" in found.value.remedy
    (tmp_path / "nyu" / "train" / "image").mkdir(parents=True)
    with pytest.raises(UserError, match="no images"):
        reader(tmp_path / "nyu").describe()


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_h5(tmp_path / "nyu")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="h5py") as found:
        reader(root).describe()
    assert "dmtg[sources]" in found.value.remedy
    (root / "train.h5").write_bytes(b"none")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot open the HDF5 file"):
        reader(root).describe()
