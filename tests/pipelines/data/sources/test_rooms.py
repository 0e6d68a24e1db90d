import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT
from pipelines.data.sources.rooms.render import NOTHING, render, responses
from pipelines.data.sources.rooms.solids import CHECKER, Material, Scene, ball, block, post
from pipelines.data.sources.rooms.source import RoomsOptions, RoomsSource, generate, render_scene
from pipelines.data.sources.taskonomy.source import CLASSES
from pipelines.errors import UserError
from pipelines.storage import locate

GREY = Material((0.5, 0.5, 0.5), (0.6, 0.6, 0.6), CHECKER, 0.3)
FEW = {"buildings": 3, "points": 2, "resolution": 24, "size": 16}
TANGENT = 0.6
EYE = (2.0, 0.5, 1.25)


def empty_room(*solids):
    """A room of 4 × 4 × 2.5 m; the camera looks along y at the wall 3.5 m before it."""
    shell = [
        block("background", GREY, (-1.0, 0.0), (-1, 5), (-1, 4)),
        block("background", GREY, (4.0, 5.0), (-1, 5), (-1, 4)),
        block("background", GREY, (-1, 5), (-1.0, 0.0), (-1, 4)),
        block("background", GREY, (-1, 5), (4.0, 5.0), (-1, 4)),
        block("background", GREY, (-1, 5), (-1, 5), (-1.0, 0.0)),
        block("background", GREY, (-1, 5), (-1, 5), (2.5, 3.5)),
    ]
    lamp = ball("background", GREY, (1.0, 1.0, 2.3), (0.1, 0.1, 0.1))
    return Scene((4.0, 4.0, 2.5), shell, lamp, [solids] if solids else [], EYE, (2.0, 4.0, 1.25), TANGENT)


def draw(scene, resolution=40):
    return render(scene, resolution, np.random.default_rng(0))


def slopes(resolution=40):
    return TANGENT * ((2 * np.arange(resolution) + 1) / resolution - 1)


def directions(arrays):
    return arrays["normal"].astype(float) / 127.5 - 1


def test_depth_of_walls_and_floor_by_hand():
    arrays = draw(empty_room())
    down, right = np.meshgrid(slopes(), slopes(), indexing="ij")
    # z-buffer depth: along the optical axis; the nearest of far wall, floor and ceiling, and side walls
    expected = np.minimum(3.5, np.minimum(1.25 / np.abs(down), 2.0 / np.abs(right)))
    np.testing.assert_allclose(arrays["depth_zbuffer"], 512 * expected, atol=0.51)
    assert arrays["depth_zbuffer"][20, 20] == 1792
    assert (arrays["segment_semantic"] == 1).all()


def test_normals_of_walls_floor_and_ceiling_by_hand():
    normal = directions(draw(empty_room()))
    for at, expected in (((20, 20), (0, 0, 1)), ((39, 20), (0, 1, 0)), ((0, 20), (0, -1, 0))):
        np.testing.assert_allclose(normal[at], expected, atol=0.01)
    np.testing.assert_allclose(normal[20, 0], (1, 0, 0) if slopes()[0] < -2 / 3.5 else (0, 0, 1), atol=0.01)


def test_box_ball_and_cylinder_by_hand():
    solids = {
        "couch": block("couch", GREY, (1.5, 2.5), (2.5, 3.0), (0.75, 1.75)),
        "vase": ball("vase", GREY, (2.0, 2.0, 1.25), (0.5, 0.5, 0.5)),
        "bottle": post("bottle", GREY, 2.0, 2.0, (0.5, 2.0), 0.25),
    }
    for (name, solid), metres in zip(solids.items(), (2.0, 1.0, 1.25), strict=True):
        arrays = draw(empty_room(solid), 41)  # odd: a pixel lies on the axis
        assert arrays["segment_semantic"][20, 20] == CLASSES.index(name)
        assert arrays["depth_zbuffer"][20, 20] == pytest.approx(512 * metres, abs=1)
        np.testing.assert_allclose(directions(arrays)[20, 20], (0, 0, 1), atol=0.02)


def test_turned_box():
    turned = block("tv", GREY, (1.8, 2.2), (2.3, 2.7), (1.0, 1.5), yaw=np.pi / 4)
    arrays = draw(empty_room(turned), 41)
    assert arrays["depth_zbuffer"][20, 20] == pytest.approx(512 * (2.0 - 0.2 * np.sqrt(2)), abs=4)
    left, right = directions(arrays)[20, 18], directions(arrays)[20, 22]
    np.testing.assert_allclose([left[0], right[0]], [-np.sqrt(0.5), np.sqrt(0.5)], atol=0.02)


def test_nearer_solid_hides_the_farther_and_casts_a_shadow():
    book = block("book", GREY, (1.9, 2.1), (1.5, 1.6), (1.2, 1.3))
    couch = block("couch", GREY, (1.0, 3.0), (3.0, 3.5), (0.75, 1.75))
    lamp = ball("background", GREY, (1.5, 0.5, 1.4), (0.1, 0.1, 0.1))  # its shadow falls beside the book
    arrays, without = (draw(replace(empty_room(*solids), lamp=lamp), 41) for solids in ((book, couch), (couch,)))
    assert arrays["segment_semantic"][20, 20] == CLASSES.index("book")
    seen = arrays["segment_semantic"] == CLASSES.index("couch")
    darker = without["rgb"].astype(int).sum(2) - arrays["rgb"].astype(int).sum(2)
    assert darker[seen].max() > 60


@pytest.fixture(scope="module")
def scenes():
    return [render_scene((22, i % 4, i), 64, (22, i % 4)) for i in range(20)]


def test_every_target_varies_in_every_scene(scenes):
    for arrays in scenes:
        assert arrays["rgb"].std() > 15
        for name in ("depth_zbuffer", "normal", "segment_semantic", "keypoints2d", "edge_texture"):
            assert arrays[name].std() > 0, name


def test_scenes_hold_many_classes_and_some_windows(scenes):
    found = [set(np.unique(arrays["segment_semantic"])) for arrays in scenes]
    assert len(set.union(*found)) >= 14
    assert np.mean([len(ids) for ids in found]) > 4
    for arrays in scenes:
        nothing = arrays["depth_zbuffer"] == NOTHING
        np.testing.assert_array_equal(nothing, arrays["segment_semantic"] == 0)
        assert nothing.mean() < 0.3
    assert any((arrays["depth_zbuffer"] == NOTHING).any() for arrays in scenes)


def test_geometry_is_consistent(scenes):
    for arrays in scenes:
        normal = directions(arrays)
        np.testing.assert_allclose(np.linalg.norm(normal, axis=2), 1, atol=0.015)
        depth = arrays["depth_zbuffer"][arrays["depth_zbuffer"] < NOTHING]
        assert 512 * 0.1 < depth.min() < depth.max() < 512 * 7


def test_responses_are_near_the_constants_of_taskonomy(scenes):
    keypoints = np.stack([arrays["keypoints2d"] for arrays in scenes]).astype(float)
    edges = np.stack([arrays["edge_texture"] for arrays in scenes]).astype(float)
    assert 25 < keypoints.mean() < 100
    assert 50 < keypoints.std() < 200
    assert 350 < edges.mean() < 1400
    assert 500 < edges.std() < 2000


def test_responses_of_a_flat_picture_an_edge_and_a_blob():
    picture = np.full((21, 21, 3), 100, np.uint8)
    assert not any(values.any() for values in responses(picture).values())
    picture[:, 10:] = 200
    edge = responses(picture)
    assert edge["edge_texture"][10].argmax() in (9, 10)
    assert edge["keypoints2d"].max() < 5
    picture[:] = 100
    picture[9:12, 9:12] = 200
    assert np.unravel_index(responses(picture)["keypoints2d"].argmax(), (21, 21)) == (10, 10)


def test_same_seed_same_scene():
    first, again, other = (render_scene(seed, 32) for seed in (5, 5, 6))
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert (first["rgb"] != other["rgb"]).any()


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_seed_same_bytes(tmp_path):
    for name in ("a", "b"):
        assert generate(locate(str(tmp_path / name)), RoomsOptions(**FEW)) == 6
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 6 * 6 + 1


def test_files_have_the_format_of_taskonomy(tmp_path):
    generate(locate(str(tmp_path)), RoomsOptions(**FEW))
    modes = {}
    for task in ("rgb", "depth_zbuffer", "normal", "segment_semantic", "keypoints2d", "edge_texture"):
        domain = task.replace("segment_semantic", "segmentsemantic")
        with Image.open(tmp_path / task / "room001" / f"point_1_view_0_domain_{domain}.png") as image:
            modes[task] = image.mode
            assert image.size == (24, 24)
    assert list(modes.values()) == ["RGB", "I;16", "RGB", "L", "I;16", "I;16"]


def test_source_renders_once_and_reads_as_taskonomy(tmp_path):
    reader = build_source("rooms", str(tmp_path / "new"), FEW)
    description = reader.describe()
    assert not (tmp_path / "new").exists()
    entries = list(reader.entries())
    assert len(entries) == 6
    assert {e.split for e in entries} == {"train", "val", "test"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*.png")}
    assert [e.id for e in RoomsSource(locate(str(tmp_path / "new")), FEW).entries()] == [e.id for e in entries]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*.png")}
    row = pickle.loads(pickle.dumps(reader)).read(entries[0])  # noqa: S301
    assert set(row) == set(description.columns)
    assert row[INPUT].shape == (16, 16, 3)
    assert row["task.depth_zbuffer"].std() > 0


def test_rooms_are_rendered_again_only_for_options_of_the_files(tmp_path):
    root = locate(str(tmp_path))
    list(RoomsSource(root, FEW).entries())
    first = contents(tmp_path)
    list(RoomsSource(root, {**FEW, "size": 12, "tasks": ["normal"]}).entries())
    assert contents(tmp_path) == first
    assert len(list(RoomsSource(root, {**FEW, "points": 1, "seed": 3}).entries())) == 3
    assert len(contents(tmp_path)) == 3 * 6 + 1


def test_interrupted_rendering_is_repeated(tmp_path):
    root = locate(str(tmp_path))
    list(RoomsSource(root, FEW).entries())
    whole = contents(tmp_path)
    (tmp_path / "rooms.json").rename(tmp_path / "rooms.part.json")
    (tmp_path / "rgb" / "room000" / "point_0_view_0_domain_rgb.png").unlink()
    assert len(list(RoomsSource(root, FEW).entries())) == 6
    assert contents(tmp_path) == whole


def test_images_of_another_origin_are_kept(tmp_path):
    precious = tmp_path / "rgb" / "alpha" / "point_0_view_0_domain_rgb.png"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"taskonomy")
    with pytest.raises(UserError, match="not rendered by this reader"):
        list(RoomsSource(locate(str(tmp_path)), FEW).entries())
    assert precious.read_bytes() == b"taskonomy"


def test_wrong_options(tmp_path):
    with pytest.raises(UserError) as caught:
        RoomsSource(locate(str(tmp_path)), {"building": 3})
    assert "buildings" in caught.value.remedy
    with pytest.raises(UserError, match="greater than or equal to 3"):
        RoomsSource(locate(str(tmp_path)), {"buildings": 2})


def test_other_images_among_rooms_are_never_removed(tmp_path):
    generate(locate(str(tmp_path)), RoomsOptions(**FEW))
    (tmp_path / "rgb" / "mine").mkdir()
    (tmp_path / "rgb" / "mine" / "holiday.png").write_bytes(b"x")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="rgb/mine/holiday.png"):
        generate(locate(str(tmp_path)), RoomsOptions(**FEW | {"seed": 5}))
    assert contents(tmp_path) == before
