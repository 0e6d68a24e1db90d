"""The reader of Taskonomy: layouts, listing, splits and options. What files hold is in `test_taskonomy_tasks`."""

import pickle
import shutil

import numpy as np
import pytest

from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT
from pipelines.errors import UserError
from pipelines.storage import Location
from tests.pipelines.data.sources.taskonomy_files import FOLDERS, arrays, more_arrays, only, path, save, source


@pytest.mark.parametrize("layout", FOLDERS)
def test_every_layout_returns_the_content_of_the_files(tmp_path, layout):
    save(tmp_path, arrays(), layout=layout)
    reader = source(tmp_path)
    (entry,) = list(reader.entries())
    assert entry.id == "alpha/point_0_view_3"
    row, description = reader.read(entry), reader.describe()
    assert set(row) == set(description.columns)
    for task, values in arrays().items():
        name = INPUT if task == "rgb" else f"task.{task}"
        np.testing.assert_array_equal(row[name], values)
        column = description.columns[name]
        assert (row[name].dtype, row[name].shape) == (np.dtype(column.dtype), column.shape)


@pytest.mark.parametrize(
    ("task", "domain"),
    [("segment_semantic", "segment_semantic"), ("depth_zbuffer", "depthzbuffer"), ("edge_texture", "edgetexture")],
)
def test_domains_with_and_without_underscore(tmp_path, task, domain):
    save(tmp_path, arrays())
    path(tmp_path, task).rename(path(tmp_path, task, domain=domain))
    np.testing.assert_array_equal(only(tmp_path)[f"task.{task}"], arrays()[task])


def test_scenes_under_the_name_of_their_folder(tmp_path):
    save(tmp_path, more_arrays())
    path(tmp_path, "class_scene").rename(path(tmp_path, "class_scene", domain="class_scene"))
    assert only(tmp_path, tasks=["class_scene"])["task.class_scene"] == more_arrays()["class_scene"].argmax()


def test_entries_come_from_names_alone_in_a_fixed_order(tmp_path):
    for building in ("beta", "alpha", "gamma"):
        for point in (1, 0):
            save(tmp_path, {"rgb": arrays()["rgb"]}, building=building, point=point)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    entries = list(source(tmp_path).entries())
    assert [e.id.split("_view")[0] for e in entries] == [
        f"{b}/point_{p}" for b in ("alpha", "beta", "gamma") for p in (0, 1)
    ]
    assert len({(e.id.split("/")[0], e.split) for e in entries}) == 3
    assert {e.split for e in entries} == {"train", "val", "test"}


def test_two_buildings_are_split_by_sample(tmp_path):
    for point in range(60):
        path(tmp_path, "rgb", point=point).parent.mkdir(parents=True, exist_ok=True)
        path(tmp_path, "rgb", point=point).write_bytes(b"")
    assert {e.split for e in source(tmp_path).entries()} == {"train", "val", "test"}


def test_building_that_the_split_file_does_not_name(tmp_path):
    save(tmp_path, {"rgb": arrays()["rgb"]}, building="delta")
    table = tmp_path / "splits.csv"
    table.write_bytes(b"id,train,val,test\ralpha,1,0,0\r")
    with pytest.raises(UserError, match="no split for building delta"):
        list(source(tmp_path, splits=str(table)).entries())


def write_rgb(root, *buildings, layout="task"):
    for building in buildings:
        save(root, {"rgb": arrays()["rgb"]}, building=building, layout=layout)


def write_table(root, text):
    (root / "splits.csv").write_bytes(text.encode())
    return str(root / "splits.csv")


def test_building_in_no_split_is_left_out(tmp_path):
    write_rgb(tmp_path, "alpha", "beta")
    table = write_table(tmp_path, "id,train,val,test\ralpha,1,0,0\rbeta,0,0,0\r")
    assert [e.id for e in source(tmp_path, splits=table).entries()] == ["alpha/point_0_view_3"]


def test_a_small_split_of_a_large_download(tmp_path):
    write_rgb(tmp_path, "alpha", "beta", "gamma")
    table = write_table(tmp_path, "building,split\nalpha,train\ngamma,test\n")
    entries = list(source(tmp_path, splits=table, unlisted="leave_out").entries())
    assert [(e.id, e.split) for e in entries] == [
        ("alpha/point_0_view_3", "train"),
        ("gamma/point_0_view_3", "test"),
    ]
    with pytest.raises(UserError, match="no split for building beta") as caught:
        list(source(tmp_path, splits=table).entries())
    assert "unlisted" in caught.value.remedy


def test_a_split_file_of_other_buildings(tmp_path, caplog):
    write_rgb(tmp_path, "alpha", "beta")
    table = write_table(tmp_path, "building,split\ngamma,train\n")
    with pytest.raises(UserError, match="none of the 2 buildings is in a split: alpha, beta"):
        list(source(tmp_path, splits=table, unlisted="leave_out").entries())
    table = write_table(tmp_path, "building,split\nalpha,train\nbeta,val\ngamma,train\n")
    assert len(list(source(tmp_path, splits=table).entries())) == 2
    assert "1 buildings of the split file do not exist: gamma" in caplog.text


def test_folder_without_images_is_not_a_building(tmp_path):
    write_rgb(tmp_path, "alpha")
    (tmp_path / "rgb" / "notes").mkdir()
    table = write_table(tmp_path, "building,split\nalpha,train\n")
    assert len(list(source(tmp_path, splits=table).entries())) == 1


@pytest.mark.parametrize("layout", FOLDERS)
def test_only_folders_that_are_needed_are_listed(tmp_path, monkeypatch, layout):
    """On S3 every thousand files of a listing are a request, and Taskonomy has millions."""
    for building in ("alpha", "beta", "gamma"):
        save(tmp_path, arrays(), building=building, layout=layout)
    listed = []
    files = Location.files
    monkeypatch.setattr(
        Location, "files", lambda self, **options: listed.append((self.path, options)) or files(self, **options)
    )
    table = write_table(tmp_path, "building,split\nalpha,train\nbeta,val\n")
    list(source(tmp_path, splits=table, unlisted="leave_out").entries())
    expected = [str(path(tmp_path, "rgb", building=b, layout=layout).parent) for b in ("alpha", "beta")]
    assert sorted(listed, key=str) == [(folder, {"recursive": False}) for folder in expected]


def test_some_of_the_tasks(tmp_path):
    save(tmp_path, arrays())
    for name in ("segment_semantic", "edge_texture", "keypoints2d"):
        shutil.rmtree(tmp_path / name)
    reader = source(tmp_path, tasks=["normal", "depth_zbuffer"])
    assert [task.name for task in reader.describe().tasks] == ["normal", "depth_zbuffer"]
    assert set(reader.read(next(reader.entries()))) == {INPUT, "task.normal", "task.depth_zbuffer"}


def test_wrong_use(tmp_path):
    with pytest.raises(UserError, match=r"'depth_zbuffer', .* or 'class_scene', got 'depht'"):
        source(tmp_path, tasks=["depht"])
    with pytest.raises(UserError, match="named twice"):
        source(tmp_path, tasks=["normal", "normal"])
    with pytest.raises(UserError) as caught:
        source(tmp_path, split="x.csv")
    assert "splits" in caught.value.remedy
    with pytest.raises(UserError, match="no rgb files"):
        list(source(tmp_path).entries())
    with pytest.raises(UserError) as caught:
        list(build_source("taskonomy", str(tmp_path / "none"), {}).entries())
    assert "<task>/<building>" in caught.value.remedy


def test_reader_can_be_sent_to_a_worker(tmp_path):
    save(tmp_path, arrays())
    reader = source(tmp_path)
    (entry,) = list(reader.entries())
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    np.testing.assert_array_equal(copy.read(entry)[INPUT], arrays()["rgb"])
