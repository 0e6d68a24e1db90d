"""Every task of Taskonomy: stored values, resizing, network units, masks and bad files."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data.sources.base import BadSampleError
from pipelines.data.sources.taskonomy.tasks import CLASSES, MESH, TASKS, boundaries
from tests.pipelines.data.sources.taskonomy_files import (
    DOMAINS,
    SIDE,
    label,
    more_arrays,
    only,
    path,
    save,
    source,
)

ALL = list(TASKS)
SIXTEEN_BIT = [
    "depth_zbuffer",
    "depth_euclidean",
    "keypoints2d",
    "keypoints3d",
    "edge_texture",
    "edge_occlusion",
]
PICTURES = [name for name in ALL if not name.startswith("class_")]


def differs_from_a_neighbour(ids):
    """Pixel by pixel, as one would say it."""
    marked = np.zeros(ids.shape, np.uint8)
    for y, x in np.ndindex(*ids.shape):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [at for at in around if 0 <= at[0] < ids.shape[0] and 0 <= at[1] < ids.shape[1]]
        marked[y, x] = any(ids[at] != ids[y, x] for at in inside)
    return marked


def stored(task, values):
    """What must be in a shard at the size of the file."""
    if task.startswith("class_"):
        return np.uint16(values.argmax())
    if task.startswith("segment_unsup"):
        return differs_from_a_neighbour(values)
    return {"reshading": values[..., 0], "principal_curvature": values[..., :2]}.get(task, values)


def encoded(task, raw):
    """Network units of one stored label, without the axis of the batch."""
    return TASKS[task].encode(torch.from_numpy(np.asarray(raw).astype(np.int32))[None])[0]


def test_all_tasks_return_the_content_of_their_files(tmp_path):
    save(tmp_path, more_arrays())
    reader = source(tmp_path, tasks=ALL)
    (entry,) = list(reader.entries())
    row, description = reader.read(entry), reader.describe()
    assert list(row) == ["input", *(f"task.{name}" for name in ALL)]
    for task in ALL:
        value, column = row[f"task.{task}"], description.columns[f"task.{task}"]
        np.testing.assert_array_equal(value, stored(task, more_arrays()[task]), err_msg=task)
        assert (value.dtype, value.shape) == (np.dtype(column.dtype), column.shape), task


@pytest.mark.parametrize("size", [8, 11, 40])
def test_all_tasks_at_other_sizes_match_the_description(tmp_path, size):
    save(tmp_path, more_arrays())
    reader = source(tmp_path, tasks=ALL, size=size, depth_mask=True)
    row, description = reader.read(next(reader.entries())), reader.describe()
    for name, column in description.columns.items():
        assert (row[name].dtype, row[name].shape) == (np.dtype(column.dtype), column.shape), name


def test_one_channel_and_three_give_one_reshading(tmp_path):
    grey = more_arrays()["reshading"][..., 0]
    np.testing.assert_array_equal(label(tmp_path, "reshading", grey), grey)
    uneven = np.full((SIDE, SIDE, 3), [10, 20, 60], np.uint8)
    assert (label(tmp_path, "reshading", uneven) == 30).all()


# --- network units

# stored value → network units, worked out from the published formulas (8-bit ones are for 0..1)
UNITS = {
    "depth_zbuffer": [(1500, 0.0), (2500, 1.0), (0, -1.5), (8191, 6.691), (8192, None), (65535, None)],
    "depth_euclidean": [(1500, 0.0), (4096, 2.596), (8191, 6.691), (8192, None), (65535, None)],
    "keypoints2d": [(50, 0.0), (150, 1.0), (0, -0.5), (65535, 654.85)],
    "keypoints3d": [(0, -1.0), (65535, 1.0), (29491, -0.0999924)],
    "edge_texture": [(718, 0.0), (1788, 1.0), (0, -0.6710280), (65535, 60.5766355)],
    "edge_occlusion": [(0, -0.2342893), (1000, 3.9475994)],
    "normal": [((0, 255, 51), (-1.0, 1.0, -0.6)), ((127, 128, 255), (-0.0039216, 0.0039216, 1.0))],
    "reshading": [(0, -1.7434996), (255, 1.7702038), (127, 0.0064625)],
    "principal_curvature": [((127, 127), (-0.1417393, -0.0184063)), ((255, 0), (3.5142025, -13.8913649))],
    "segment_semantic": [(0, 0), (17, 17)],
    "segment_unsup2d": [(0, 0), (1, 1)],
    "segment_unsup25d": [(0, 0), (1, 1)],
    "class_object": [(0, 0), (999, 999)],
    "class_scene": [(364, 364)],
}


@pytest.mark.parametrize("task", ALL)
def test_network_units_at_fixed_values(task):
    for raw, expected in UNITS[task]:
        value = np.asarray(raw) if task.startswith("class_") else np.asarray(raw)[None, None]
        found = encoded(task, value).flatten()
        wanted = np.full(1, np.nan) if expected is None else np.atleast_1d(expected)
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=f"{task} {raw}")


def test_losses_metrics_and_thresholds():
    chosen = {name: (task.loss, task.metric) for name, task in TASKS.items()}
    assert {name for name, (loss, _) in chosen.items() if loss == "l1_shift"} == {
        "depth_zbuffer", "depth_euclidean", "normal",
    }  # fmt: skip
    assert chosen["normal"][1] == "within_30"
    assert chosen["segment_semantic"] == ("cross_entropy", "miou")
    assert chosen["class_object"] == chosen["class_scene"] == ("cross_entropy", "accuracy")
    segments = TASKS["segment_semantic"]
    assert (segments.channels, segments.ignore_index) == (18, 0)
    assert (CLASSES[0], CLASSES[1], CLASSES[2], CLASSES[7], CLASSES[17]) == (
        "uncertain", "background", "bottle", "dining table", "vase",
    )  # fmt: skip
    assert (TASKS["class_object"].channels, TASKS["class_scene"].channels) == (1000, 365)
    thresholds = {name: task.threshold for name, task in TASKS.items() if task.threshold is not None}
    assert thresholds == pytest.approx(
        {"keypoints2d": 150, "edge_texture": 1788, "keypoints3d": 29491.2, "edge_occlusion": 295.1513}
    )


@pytest.mark.parametrize("size", [SIDE, SIDE // 2, 2 * SIDE])
@pytest.mark.parametrize("task", [n for n in ALL if TASKS[n].kind == "dense_regression"])
def test_targets_are_not_constant(tmp_path, task, size):
    """The trap: 16-bit files through an 8-bit picture, where everything above 255 becomes one value."""
    values = stored(task, more_arrays()[task]).astype(float)
    spread = values.std(axis=(0, 1)) / np.asarray(TASKS[task].scale)
    found = encoded(task, label(tmp_path, task, size=size))
    assert (found.std(dim=(1, 2)).numpy() > 0.35 * spread).all()
    assert (found.std(dim=(1, 2)) > 0.15).all()
    assert len(found.unique()) > 40


# --- resizing


@pytest.mark.parametrize("task", ["keypoints2d", "keypoints3d", "edge_texture", "edge_occlusion"])
def test_averages_are_exact_in_16_bits(tmp_path, task):
    values = np.tile(np.array([[1000, 3000], [5000, 40001]], np.uint16), (8, 8))
    assert (label(tmp_path, task, values, size=8) == 12250).all()


def test_averages_of_8_bit_channels_are_apart(tmp_path):
    values = np.tile(np.array([[[0, 100, 0], [10, 100, 0]], [[20, 200, 0], [30, 200, 0]]], np.uint8), (8, 8, 1))
    assert (label(tmp_path, "principal_curvature", values, size=8) == [15, 150]).all()
    values = np.tile(np.array([[10, 20], [30, 40]], np.uint8), (8, 8))
    assert (label(tmp_path, "reshading", values, size=8) == 25).all()


@pytest.mark.parametrize("size", [8, 11, 40])
def test_class_id_maps_resized_with_bilinear_filtering(tmp_path, size):
    """The trap: an average of the ids of a bottle (2) and a vase (17) is a microwave (10)."""
    values = np.where(more_arrays()["segment_semantic"] % 2, 2, 17).astype(np.uint8)
    assert set(np.unique(label(tmp_path, "segment_semantic", values, size=size))) == {2, 17}


def test_nearest_takes_pixel_centres(tmp_path):
    values = np.repeat(np.arange(SIDE, dtype=np.uint8)[None], SIDE, 0)
    assert label(tmp_path, "segment_semantic", values, size=8)[0].tolist() == [1, 3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize("task", ["depth_zbuffer", "depth_euclidean"])
def test_depth_is_never_averaged_with_no_surface(tmp_path, task):
    values = more_arrays()[task]
    values[::2] = 65535
    for size in (8, 11, 40):
        depth = label(tmp_path, task, values, size=size)
        assert np.isin(depth, values).all()
        np.testing.assert_array_equal(encoded(task, depth)[0].isnan(), depth == 65535)


def test_normals_stay_unit_vectors_and_no_surface_stays_none(tmp_path):
    values = np.full((SIDE, SIDE, 3), 127, np.uint8)
    values[:, :8] = [255, 127, 127]
    values[::2, :8] = [127, 127, 255]
    normal = label(tmp_path, "normal", values, size=8).astype(float) / 127.5 - 1
    np.testing.assert_allclose(np.linalg.norm(normal[:, :4], axis=2), 1, atol=0.01)
    np.testing.assert_allclose(normal[0, 0], [0.707, 0, 0.707], atol=0.01)
    assert abs(normal[:, 4:]).max() < 0.01


# --- segments


def test_boundary_of_two_segments_is_one_pixel_on_each_side(tmp_path):
    values = np.full((SIDE, SIDE), 7, np.uint8)
    values[:, 8:] = 200
    for task in ("segment_unsup2d", "segment_unsup25d"):
        found = label(tmp_path, task, values)
        assert found[0].tolist() == [0] * 7 + [1, 1] + [0] * 7
        assert (found == found[0]).all()


def test_boundaries_do_not_depend_on_the_names_of_segments(tmp_path):
    values = more_arrays()["segment_unsup2d"]
    renamed = np.random.default_rng(3).permutation(256).astype(np.uint8)[values]
    np.testing.assert_array_equal(
        label(tmp_path, "segment_unsup2d", values), label(tmp_path, "segment_unsup2d", renamed)
    )


def test_segments_of_many_ids_in_16_bits(tmp_path):
    values = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) // 32 + 256
    found = label(tmp_path, "segment_unsup2d", values)
    np.testing.assert_array_equal(found, differs_from_a_neighbour(values))


def test_thin_segment_keeps_its_boundary_at_a_smaller_size(tmp_path):
    values = np.full((SIDE, SIDE), 7, np.uint8)
    values[8:10] = 9
    found = label(tmp_path, "segment_unsup2d", values, size=8)
    assert found[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


def test_one_segment_has_no_boundary():
    assert not boundaries(np.full((5, 3), 4)).any()


# --- mirrors


@pytest.mark.parametrize("task", [name for name in PICTURES if name != "normal"])
@pytest.mark.parametrize("size", [SIDE, 8])
def test_mirrored_files_give_mirrored_labels(tmp_path, task, size):
    values = more_arrays()[task]
    straight = label(tmp_path, task, values, size=size)
    mirrored = label(tmp_path, task, np.ascontiguousarray(values[:, ::-1]), size=size)
    if size == SIDE or TASKS[task].threshold is not None:  # nearest takes one of two, not always the same
        np.testing.assert_array_equal(mirrored, straight[:, ::-1])
    assert TASKS[task].flip == ()


def test_a_symmetrical_corridor_is_its_own_mirror_image(tmp_path):
    values = np.full((SIDE, SIDE, 3), 127, np.uint8)
    values[:, :4], values[:, 12:], values[:, 4:12] = [255, 127, 127], [0, 127, 127], [127, 127, 255]
    target = encoded("normal", label(tmp_path, "normal", values))  # (C, H, W)
    flip = torch.tensor(TASKS["normal"].flip).reshape(3, 1, 1)
    np.testing.assert_allclose(target.flip(2) * flip, target, atol=0.01)
    assert not np.allclose(target.flip(2), target, atol=0.5)


# --- masks by depth


@pytest.mark.parametrize("size", [SIDE, 8, 11, 40])
@pytest.mark.parametrize("task", MESH)
def test_masked_pixels_do_not_affect_the_others(tmp_path, task, size):
    values = more_arrays()
    values["depth_zbuffer"][3:6, 5:9] = 8192
    values["depth_zbuffer"][12, 12] = 65535
    options = {"tasks": [task], "size": size, "depth_mask": True}
    save(tmp_path, values)
    first = only(tmp_path, **options)
    hole = values["depth_zbuffer"] >= 8192
    values[task][hole] = np.iinfo(values[task].dtype).max - values[task][hole]
    save(tmp_path, values)
    second = only(tmp_path, **options)
    mask = first[f"mask.{task}"]
    assert mask.dtype == np.uint8
    assert 0.5 < mask.mean() < 1
    if size == SIDE:
        np.testing.assert_array_equal(mask, ~hole)
    kept = mask.astype(bool)
    np.testing.assert_array_equal(first[f"task.{task}"][kept], second[f"task.{task}"][kept])
    assert (first[f"task.{task}"] != second[f"task.{task}"]).any()


def test_only_labels_from_the_mesh_have_a_mask(tmp_path):
    reader = source(tmp_path, tasks=ALL, depth_mask=True)
    masks = [name for name in reader.describe().columns if name.startswith("mask.")]
    assert sorted(masks) == sorted(f"mask.{name}" for name in MESH)
    assert not any(name.startswith("mask.") for name in source(tmp_path, tasks=ALL).describe().columns)


def test_labels_from_the_mesh_are_missing_without_the_depth(tmp_path):
    save(tmp_path, more_arrays())
    path(tmp_path, "depth_zbuffer").unlink()
    options = {"tasks": ["normal", "edge_texture"], "depth_mask": True}
    with pytest.raises(BadSampleError, match=r"no label file .*depth_zbuffer/alpha/point_0_view_3"):
        only(tmp_path, **options)
    row = only(tmp_path, missing="mask", **options)
    assert row["task.normal"] is None
    assert row["mask.normal"] is None
    assert row["task.edge_texture"] is not None


# --- bad files


@pytest.mark.parametrize("task", SIXTEEN_BIT)
def test_8_bit_file_where_16_bit_is_expected(tmp_path, task):
    with pytest.raises(BadSampleError, match=f"8-bit file, expected 16-bit.*{task}"):
        label(tmp_path, task, np.zeros((SIDE, SIDE), np.uint8))


@pytest.mark.parametrize("task", ["rgb", *PICTURES])
def test_truncated_png(tmp_path, task):
    save(tmp_path, more_arrays())
    file = path(tmp_path, task)
    file.write_bytes(file.read_bytes()[:90])
    with pytest.raises(BadSampleError, match=rf"damaged image .*{DOMAINS[task]}\.png"):
        only(tmp_path, tasks=PICTURES)


@pytest.mark.parametrize("task", ALL)
def test_missing_label_is_quarantined_or_masked(tmp_path, task):
    save(tmp_path, more_arrays())
    path(tmp_path, task).unlink()
    with pytest.raises(BadSampleError, match=rf"no label file .*point_0_view_3_domain_{DOMAINS[task]}\."):
        only(tmp_path, tasks=ALL)
    row = only(tmp_path, tasks=ALL, missing="mask")
    assert [name for name, value in row.items() if value is None] == [f"task.{task}"]


@pytest.mark.parametrize(
    ("task", "values", "reason"),
    [
        ("depth_zbuffer", np.zeros((8, SIDE), np.uint16), "is 16×8, its rgb 16×16"),
        ("depth_euclidean", np.zeros((SIDE, SIDE, 3), np.uint8), "8-bit RGB file, expected 16-bit"),
        ("edge_occlusion", np.zeros((SIDE, SIDE, 4), np.uint8), "8-bit RGBA file, expected 16-bit"),
        ("segment_semantic", np.full((SIDE, SIDE), 18, np.uint8), "class id 18, the highest there is is 17"),
        ("segment_semantic", np.zeros((SIDE, SIDE, 3), np.uint8), "one channel of class ids, got RGB"),
        ("segment_unsup2d", np.zeros((SIDE, SIDE, 3), np.uint8), "one channel of class ids, got RGB"),
        ("normal", np.zeros((SIDE, SIDE), np.uint16), "16-bit file, expected an 8-bit image"),
        ("normal", np.zeros((SIDE, SIDE), np.uint8), "expected an RGB image, got L"),
        ("reshading", np.zeros((SIDE, SIDE), np.uint16), "16-bit file, expected an 8-bit image"),
        ("principal_curvature", np.zeros((SIDE, SIDE), np.uint8), "expected an RGB image, got L"),
        ("rgb", np.zeros((SIDE, 8, 3), np.uint8), "expected a square image, got 8×16"),
    ],
)
def test_bad_files(tmp_path, task, values, reason):
    save(tmp_path, {**more_arrays(), task: values})
    with pytest.raises(BadSampleError, match=reason) as caught:
        only(tmp_path, tasks=[task if task != "rgb" else "normal"])
    assert f"point_0_view_3_domain_{DOMAINS[task]}.png" in str(caught.value)


def test_a_palette_of_class_ids_is_read_as_ids(tmp_path):
    values = more_arrays()["segment_semantic"]
    save(tmp_path, more_arrays())
    picture = Image.fromarray(values).convert("P")
    picture.putdata(values.flatten().tolist())
    picture.save(path(tmp_path, "segment_semantic"))
    np.testing.assert_array_equal(only(tmp_path)["task.segment_semantic"], values)
