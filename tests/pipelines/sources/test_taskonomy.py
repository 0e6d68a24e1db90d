import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from dmtg_core.tasks import Task
from pipelines.errors import UserError
from pipelines.sources import INPUT, BadSampleError, build_source
from pipelines.sources.taskonomy import CLASSES, TASKS, TaskonomySource, read_splits, split_buildings
from pipelines.storage import locate

SIDE = 16
DOMAINS = {"rgb": "rgb", **{name: name for name in TASKS}, "segment_semantic": "segmentsemantic"}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "rgb": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8),
        "depth_zbuffer": rng.integers(600, 6000, (SIDE, SIDE), np.uint16),
        "normal": rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8),
        "segment_semantic": rng.integers(0, 18, (SIDE, SIDE), np.uint8),
        "keypoints2d": rng.integers(0, 2000, (SIDE, SIDE), np.uint16),
        "edge_texture": rng.integers(0, 9000, (SIDE, SIDE), np.uint16),
    }


def path(root, task, building="alpha", point=0, layout="task", domain=None):
    folder = f"{task}/{building}" if layout == "task" else f"{building}_{task}"
    return root / folder / f"point_{point}_view_3_domain_{domain or DOMAINS[task]}.png"


def save(root, values, **where):
    for task, array in values.items():
        file = path(root, task, **where)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)


def source(root, **options):
    return TaskonomySource(locate(str(root)), {"size": SIDE, **options})


def only(root, **options):
    """The row of the first entry."""
    reader = source(root, **options)
    return reader.read(reader.entries()[0])


@pytest.mark.parametrize("layout", ["task", "building"])
def test_both_layouts_give_what_is_in_the_files(tmp_path, layout):
    save(tmp_path, arrays(), layout=layout)
    reader = source(tmp_path)
    (entry,) = reader.entries()
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


@pytest.mark.parametrize("size", [SIDE, SIDE // 2, 2 * SIDE])
@pytest.mark.parametrize("task", ["depth_zbuffer", "keypoints2d", "edge_texture"])
def test_16_bit_targets_clipped_to_constants(tmp_path, task, size):
    """The trap: 16-bit files through an 8-bit picture, where everything above 255 becomes one value."""
    save(tmp_path, arrays())
    raw = only(tmp_path, size=size)[f"task.{task}"]
    values = arrays()[task]
    assert raw.dtype == np.uint16
    assert raw.mean() == pytest.approx(values.mean(), rel=0.1)
    assert raw.std() > 0.3 * values.std()
    assert len(np.unique(raw)) > 50


def test_averages_are_exact_in_16_bits(tmp_path):
    values = arrays()
    values["keypoints2d"] = np.tile(np.array([[1000, 3000], [5000, 40001]], np.uint16), (8, 8))
    save(tmp_path, values)
    assert (only(tmp_path, size=8)["task.keypoints2d"] == 12250).all()


@pytest.mark.parametrize("size", [5, 8, 11, 40])
def test_class_id_maps_resized_with_bilinear_filtering(tmp_path, size):
    """The trap: an average of the ids of a bottle (2) and a vase (17) is a microwave (10)."""
    values = arrays()
    values["segment_semantic"] = np.where(values["segment_semantic"] % 2, 2, 17).astype(np.uint8)
    save(tmp_path, values)
    reader = TaskonomySource(locate(str(tmp_path)), {"size": max(size, 8)})
    ids = reader.read(reader.entries()[0])["task.segment_semantic"]
    assert set(np.unique(ids)) == {2, 17}


def test_nearest_takes_pixel_centres(tmp_path):
    values = arrays()
    values["segment_semantic"] = np.repeat(np.arange(SIDE, dtype=np.uint8)[None], SIDE, 0)
    save(tmp_path, values)
    assert only(tmp_path, size=8)["task.segment_semantic"][0].tolist() == [1, 3, 5, 7, 9, 11, 13, 15]


def test_depth_never_mixes_with_nothing_there(tmp_path):
    values = arrays()
    values["depth_zbuffer"][::2] = 65535
    save(tmp_path, values)
    for size in (8, 11, 40):
        depth = only(tmp_path, size=size)["task.depth_zbuffer"]
        assert ((depth == 65535) | (depth < 6000)).all()


def test_normals_stay_unit_vectors_and_no_surface_stays_none(tmp_path):
    values = arrays()
    values["normal"][:] = 127
    values["normal"][:, :8] = [255, 127, 127]
    values["normal"][::2, :8] = [127, 127, 255]
    save(tmp_path, values)
    normal = only(tmp_path, size=8)["task.normal"].astype(float) / 127.5 - 1
    np.testing.assert_allclose(np.linalg.norm(normal[:, :4], axis=2), 1, atol=0.01)
    np.testing.assert_allclose(normal[0, 0], [0.707, 0, 0.707], atol=0.01)
    assert abs(normal[:, 4:]).max() < 0.01


def test_constants_of_the_tasks():
    tasks = TASKS
    depth, normal = tasks["depth_zbuffer"], tasks["normal"]
    assert (depth.offset, depth.scale, depth.valid_below, depth.loss) == ((1500.0,), (1000.0,), 8192, "l1_shift")
    assert (normal.channels, normal.metric, normal.loss) == (3, "within_30", "l1_shift")
    assert (tasks["keypoints2d"].offset, tasks["keypoints2d"].scale) == ((50.0,), (100.0,))
    assert (tasks["edge_texture"].offset, tasks["edge_texture"].scale) == ((718.0,), (1070.0,))
    segments = tasks["segment_semantic"]
    assert (segments.channels, segments.ignore_index, segments.metric) == (18, 0, "miou")
    assert (CLASSES[2], CLASSES[7], CLASSES[17]) == ("bottle", "dining table", "vase")
    assert all(isinstance(task, Task) for task in tasks.values())


def test_missing_label_is_quarantined_or_masked(tmp_path):
    save(tmp_path, arrays())
    path(tmp_path, "edge_texture").unlink()
    with pytest.raises(BadSampleError, match=r"no label file .*point_0_view_3_domain_edge_texture\.png"):
        only(tmp_path)
    row = only(tmp_path, missing="mask")
    assert row["task.edge_texture"] is None
    assert row["task.normal"] is not None


@pytest.mark.parametrize("task", ["depth_zbuffer", "keypoints2d", "edge_texture"])
def test_8_bit_file_where_16_bit_is_expected(tmp_path, task):
    save(tmp_path, {**arrays(), task: np.zeros((SIDE, SIDE), np.uint8)})
    with pytest.raises(BadSampleError, match=f"8-bit file, expected 16-bit.*{task}"):
        only(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"depth_zbuffer": np.zeros((8, SIDE), np.uint16)}, "is 16×8, its rgb 16×16"),
        ({"depth_zbuffer": np.zeros((SIDE, SIDE, 3), np.uint8)}, "8-bit RGB file, expected 16-bit"),
        ({"segment_semantic": np.full((SIDE, SIDE), 18, np.uint8)}, "class id 18, the highest there is is 17"),
        ({"segment_semantic": np.zeros((SIDE, SIDE, 3), np.uint8)}, "one channel of class ids, got RGB"),
        ({"normal": np.zeros((SIDE, SIDE), np.uint16)}, "16-bit file, expected an 8-bit image"),
        ({"rgb": np.zeros((SIDE, 8, 3), np.uint8)}, "expected a square image, got 8×16"),
    ],
)
def test_bad_files(tmp_path, wrong, reason):
    save(tmp_path, {**arrays(), **wrong})
    with pytest.raises(BadSampleError, match=reason):
        only(tmp_path)


@pytest.mark.parametrize("task", ["rgb", "depth_zbuffer", "segment_semantic"])
def test_truncated_png(tmp_path, task):
    save(tmp_path, arrays())
    file = path(tmp_path, task)
    file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(BadSampleError, match=rf"damaged image .*{DOMAINS[task]}\.png"):
        only(tmp_path)


def test_entries_come_from_names_alone_in_a_fixed_order(tmp_path):
    for building in ("beta", "alpha", "gamma"):
        for point in (1, 0):
            save(tmp_path, {"rgb": arrays()["rgb"]}, building=building, point=point)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    entries = source(tmp_path).entries()
    assert [e.id.split("_view")[0] for e in entries] == [
        f"{b}/point_{p}" for b in ("alpha", "beta", "gamma") for p in (0, 1)
    ]
    assert len({(e.id.split("/")[0], e.split) for e in entries}) == 3
    assert {e.split for e in entries} == {"train", "val", "test"}


@pytest.mark.parametrize("count", [3, 4, 12, 33])
def test_buildings_are_split_whole_whatever_their_order(count):
    names = [f"b{i}" for i in range(count)]
    splits = split_buildings(names)
    assert splits == split_buildings(names[::-1])
    found = [list(splits.values()).count(split) for split in ("train", "val", "test")]
    assert min(found) >= 1
    assert found[0] >= count / 3


def test_two_buildings_are_split_by_sample(tmp_path):
    for point in range(60):
        path(tmp_path, "rgb", point=point).parent.mkdir(parents=True, exist_ok=True)
        path(tmp_path, "rgb", point=point).write_bytes(b"")
    assert {e.split for e in source(tmp_path).entries()} == {"train", "val", "test"}


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize(
    "lines",
    [("id,train,val,test", "alpha,1,0,0", "beta,0,1,0", "gamma,0,0,1"),
     ("building,split", "alpha,train", "beta,val", "gamma,test")],
)  # fmt: skip
def test_split_files_with_any_line_end(tmp_path, lines, end):
    table = tmp_path / "splits.csv"
    table.write_bytes((end.join(lines) + end).encode())
    assert read_splits(locate(str(table))) == {"alpha": "train", "beta": "val", "gamma": "test"}
    save(tmp_path, {"rgb": arrays()["rgb"]}, building="beta")
    (entry,) = source(tmp_path, splits=str(table)).entries()
    assert entry.split == "val"


def test_building_that_the_split_file_does_not_name(tmp_path):
    save(tmp_path, {"rgb": arrays()["rgb"]}, building="delta")
    table = tmp_path / "splits.csv"
    table.write_bytes(b"id,train,val,test\ralpha,1,0,0\r")
    with pytest.raises(UserError, match="no split for building delta"):
        source(tmp_path, splits=str(table)).entries()


def test_building_in_no_split_is_left_out(tmp_path):
    for building in ("alpha", "beta"):
        save(tmp_path, {"rgb": arrays()["rgb"]}, building=building)
    table = tmp_path / "splits.csv"
    table.write_bytes(b"id,train,val,test\ralpha,1,0,0\rbeta,0,0,0\r")
    assert [e.id for e in source(tmp_path, splits=str(table)).entries()] == ["alpha/point_0_view_3"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,train,val,test\na,1,1,0\n", "'a' in line 2 has no one split"),
        ("building,split\na,train\na,val\n", "'a' in line 3 has no one split"),
        ("name,part\na,train\n", "not a split file: its columns are name, part"),
    ],
)
def test_split_files_that_cannot_be_used(tmp_path, table, message):
    (tmp_path / "splits.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        read_splits(locate(str(tmp_path / "splits.csv")))


def test_some_of_the_tasks(tmp_path):
    save(tmp_path, arrays())
    for name in ("segment_semantic", "edge_texture", "keypoints2d"):
        shutil.rmtree(tmp_path / name)
    reader = source(tmp_path, tasks=["normal", "depth_zbuffer"])
    assert [task.name for task in reader.describe().tasks] == ["normal", "depth_zbuffer"]
    assert set(reader.read(reader.entries()[0])) == {INPUT, "task.normal", "task.depth_zbuffer"}


def test_wrong_use(tmp_path):
    with pytest.raises(UserError, match=r"'depth_zbuffer', .* or 'edge_texture', got 'depht'"):
        source(tmp_path, tasks=["depht"])
    with pytest.raises(UserError, match="named twice"):
        source(tmp_path, tasks=["normal", "normal"])
    with pytest.raises(UserError) as caught:
        source(tmp_path, split="x.csv")
    assert "splits" in caught.value.remedy
    with pytest.raises(UserError, match="no rgb files"):
        source(tmp_path).entries()
    with pytest.raises(UserError) as caught:
        build_source("taskonomy", str(tmp_path / "none"), {}).entries()
    assert "<task>/<building>" in caught.value.remedy


def test_travels_to_a_worker(tmp_path):
    save(tmp_path, arrays())
    reader = source(tmp_path)
    (entry,) = reader.entries()
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    np.testing.assert_array_equal(copy.read(entry)[INPUT], arrays()["rgb"])
