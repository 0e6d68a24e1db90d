import pickle

import numpy as np
import pytest
from PIL import Image

from pipelines.data.sources.base import INPUT, BadSampleError
from pipelines.data.sources.nuclei import NucleiSource, boundary, distance
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.paths import SHARED

NUCLEI = SHARED / "data" / "nuclei"

# two nuclei that touch, on a background
TWO = np.zeros((8, 10), np.uint16)
TWO[1:7, 1:5] = 7
TWO[1:7, 5:9] = 300


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    mask = np.kron(np.pad(TWO, ((1, 1), (0, 0))), np.ones((2, 2), np.uint16))
    for name in ("a", "b"):
        Image.new("RGB", (20, 20), (10, 20, 30)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "labels.csv").write_text("image,n_nuclei,n_nuclei_128,split\na,2,2,train\nb,9,4,train\n")
    return tmp_path


def source(root, size=10):
    return NucleiSource(locate(str(root)), {"size": size})


def test_boundary_runs_on_both_sides_of_where_nuclei_touch():
    expected = np.zeros(TWO.shape, np.uint8)
    expected[1:7, 1:9] = 1
    expected[2:6, 2:4] = 0
    expected[2:6, 6:8] = 0
    np.testing.assert_array_equal(boundary(TWO), expected)


def test_distance_ends_at_the_other_nucleus():
    expected = np.zeros(TWO.shape)
    for left in (1, 5):
        expected[1:7, left : left + 4] = 1
        expected[2:6, left + 1 : left + 3] = 2
    np.testing.assert_array_equal(distance(TWO), expected)


def test_distance_is_euclidean():
    ids = np.zeros((9, 9), np.uint16)
    ids[1:8, 1:8] = 5
    ids[1, 1] = 0
    assert distance(ids)[3, 3] == pytest.approx(np.sqrt(8), abs=2e-3)
    assert distance(ids)[4, 4] == 4


def test_the_frame_of_the_image_is_no_boundary():
    ids = np.zeros((4, 6), np.uint16)
    ids[:, :3] = 1
    np.testing.assert_array_equal(boundary(ids)[0], [0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(distance(ids)[0], [3, 2, 1, 0, 0, 0])


def test_rows_match_the_description(root):
    reader = source(root)
    description = reader.describe()
    for entry in reader.entries():
        row = reader.read(entry)
        assert set(row) == set(description.columns)
        for name, value in row.items():
            column = description.columns[name]
            assert (value.dtype, value.shape) == (np.dtype(column.dtype), column.shape)


def test_tasks_are_made_at_the_training_resolution(root):
    reader = source(root)
    row = reader.read(next(reader.entries()))
    ids = np.pad(TWO, ((1, 1), (0, 0)))
    np.testing.assert_array_equal(row["task.mask"], ids > 0)
    np.testing.assert_array_equal(row["task.boundary"], boundary(ids))
    assert row["task.distance"].max() == 2
    assert row["task.count"] == 2
    assert (row[INPUT] == [10, 20, 30]).all()


def test_count_constants_come_from_the_table(root):
    count = source(root).describe().tasks[3]
    assert (count.name, count.offset, count.scale, count.unit) == ("count", (3.0,), (1.0,), "nuclei")


def test_ids_above_255_stay_apart(root):
    mask = np.zeros((20, 20), np.uint16)
    mask[2:10, 2:10] = 1
    mask[2:10, 10:18] = 257  # the same as 1 in 8 bits
    Image.fromarray(mask).save(root / "masks" / "a.png")
    row = source(root, 20).read(next(source(root).entries()))
    assert row["task.boundary"][5, 9:11].tolist() == [1, 1]


def break_mask(root, case):
    file = root / "masks" / "a.png"
    if case == "8-bit":
        Image.new("L", (20, 20)).save(file)
    elif case == "size":
        Image.fromarray(np.zeros((10, 20), np.uint16)).save(file)
    elif case == "truncated":
        noise = np.random.default_rng(0).integers(0, 9, (20, 20), np.uint16)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:-40])
    elif case == "missing":
        file.unlink()
    else:
        Image.fromarray(np.full((20, 20), 3, np.uint16)).save(file)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("8-bit", "8-bit file, expected 16-bit"),
        ("size", "is 20×10, its image 20×20"),
        ("truncated", "damaged image"),
        ("missing", "no such file"),
        ("full", "one nucleus covers the whole image"),
    ],
)
def test_bad_masks(root, case, reason):
    break_mask(root, case)
    reader = source(root)
    a, b = list(reader.entries())
    with pytest.raises(BadSampleError, match=reason):
        reader.read(a)
    assert reader.read(b)["task.mask"].any()


def test_cell_without_a_count_is_missing_or_bad(root):
    (root / "labels.csv").write_text("image,n_nuclei_128,split\na,,train\nb,x,train\n")
    reader = source(root)
    a, b = list(reader.entries())
    assert reader.read(a)["task.count"] is None
    with pytest.raises(BadSampleError, match="'x' in column n_nuclei_128, line 3"):
        reader.read(b)
    with pytest.raises(UserError, match="no count"):
        reader.describe()


def test_wrong_use(root):
    with pytest.raises(UserError, match=r"unknown key source\.options\.sise"):
        NucleiSource(locate(str(root)), {"sise": 3})
    with pytest.raises(UserError, match="greater than or equal to 8"):
        source(root, 2)
    with pytest.raises(UserError, match="does not exist"):
        source(root / "none")
    (root / "labels.csv").write_text("image,n_nuclei_128,split\na,1,tain\n")
    with pytest.raises(UserError, match="unknown split 'tain'"):
        list(source(root).entries())


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="the shared nuclei data is not beside the checkout")
def test_shared_nuclei():
    reader = pickle.loads(pickle.dumps(source(NUCLEI, 64)))  # noqa: S301
    entries = list(reader.entries())
    assert [sum(e.split == s for e in entries) for s in ("train", "val", "test")] == [486, 93, 85]
    distances = []
    for entry in entries[::10]:
        row = reader.read(entry)
        np.testing.assert_array_equal(row["task.distance"] > 0, row["task.mask"] > 0)
        assert (row["task.distance"][row["task.boundary"] == 1] == 1).all()
        distances.append(row["task.distance"].astype(float))
    task = reader.describe().tasks[2]
    assert np.mean(distances) == pytest.approx(task.offset[0], rel=0.3)
    assert np.std(distances) == pytest.approx(task.scale[0], rel=0.3)
