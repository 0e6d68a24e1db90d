import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from pipelines.data.new_samples import raw_form
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, BadSampleError, Entry
from pipelines.data.sources.folder import FolderSource
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.paths import SHARED
from tests.pipelines.data.memory_plans import plans

CLOTHING = SHARED / "data" / "clothing"

KIND = {"column": "kind", "kind": "multiclass"}
FLAG = {"column": "flag", "kind": "binary"}
PRICE = {"column": "price", "kind": "regression"}


def write(root, csv, images=("a", "b", "c", "d"), size=(20, 10), colour=(200, 40, 40)):
    (root / "images").mkdir(exist_ok=True)
    for name in images:
        Image.new("RGB", size, colour).save(root / "images" / f"{name}.jpg")
    (root / "labels.csv").write_bytes(csv.encode() if isinstance(csv, str) else csv)
    return root


@pytest.fixture
def root(tmp_path):
    return write(
        tmp_path,
        "image,kind,flag,price,split\n"
        "a,hat,True,1.0,train\n"
        "b,shoe,no,3.0,train\n"
        "c,,,,validation\n"
        "d,hat,1,9.5,test\n",
    )


def source(root, *tasks, **options):
    return FolderSource(locate(str(root)), {"tasks": list(tasks) or [KIND, FLAG, PRICE], **options})


def rows(reader):
    return {entry.id: reader.read(entry) for entry in reader.entries()}


def test_rows_match_the_description(root):
    reader = source(root)
    description = reader.describe()
    assert [task.name for task in description.tasks] == ["kind", "flag", "price"]
    assert description.tasks[0].labels == ("hat", "shoe")
    assert [(e.id, e.split) for e in reader.entries()] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "val"),
        ("d", "test"),
    ]
    for row in rows(reader).values():
        assert set(row) == set(description.columns)
        for name, value in row.items():
            column = description.columns[name]
            assert value is None or (value.dtype == column.dtype and value.shape == column.shape)


def test_values(root):
    found = rows(source(root))
    assert [found[i]["task.kind"] for i in "abd"] == [0, 1, 0]
    assert [found[i]["task.flag"] for i in "abd"] == [1, 0, 1]
    assert [found[i]["task.price"] for i in "abd"] == [1.0, 3.0, 9.5]


def test_empty_cell_is_a_missing_label(root):
    row = rows(source(root))["c"]
    assert [row[f"task.{name}"] for name in ("kind", "flag", "price")] == [None] * 3


def test_regression_constants_are_from_training_rows_only(root):
    (task,) = source(root, PRICE).describe().tasks
    assert (task.offset, task.scale) == ((2.0,), (1.0,))


def test_constant_regression_column_gets_scale_1(tmp_path):
    write(tmp_path, "image,price,split\na,2,train\nb,2,train\n")
    (task,) = source(tmp_path, PRICE).describe().tasks
    assert (task.offset, task.scale) == ((2.0,), (1.0,))


def test_drop_removes_rows_and_classes_and_logs_it(root, caplog):
    reader = source(root, {**KIND, "drop": ["shoe"], "one_vs_rest": "all"}, FLAG)
    with caplog.at_level(logging.INFO):
        assert [entry.id for entry in reader.entries()] == ["a", "c", "d"]
    assert "1 of 4 rows left out" in caplog.text
    assert [task.name for task in reader.describe().tasks] == ["kind.hat", "flag"]


def test_one_vs_rest(tmp_path):
    write(tmp_path, "image,label,split\na,T-Shirt,train\nb,Not sure,val\nc,Hat,test\nd,,train\n")
    task = {"column": "label", "kind": "multiclass", "one_vs_rest": "all"}
    reader = source(tmp_path, task)
    assert [t.name for t in reader.describe().tasks] == ["label.Hat", "label.Not sure", "label.T-Shirt"]
    assert {t.kind for t in reader.describe().tasks} == {"binary"}
    found = rows(reader)
    assert [found[i]["task.label.Hat"] for i in "abc"] == [0, 0, 1]
    assert found["d"]["task.label.Hat"] is None
    chosen = source(tmp_path, {**task, "one_vs_rest": ["Hat"], "name": "is"}).describe().tasks
    assert [t.name for t in chosen] == ["is.Hat"]
    with pytest.raises(UserError, match="names Boot"):
        source(tmp_path, {**task, "one_vs_rest": ["Boot"]}).describe()


def test_label_outside_its_classes_is_a_bad_sample(root):
    reader = source(root, {**KIND, "classes": ["hat", "boot"]})
    a, b, *_ = list(reader.entries())
    assert reader.read(a)["task.kind"] == 0
    with pytest.raises(BadSampleError, match="a label outside its classes: 'shoe' in column kind, line 3"):
        reader.read(b)


@pytest.mark.parametrize(
    ("task", "cell", "reason"),
    [
        (FLAG, "maybe", "'maybe' is neither yes .* in column flag, line 3"),
        (PRICE, "cheap", "'cheap' is not a finite number in column price, line 3"),
        (PRICE, "inf", "not a finite number"),
        (PRICE, "1e99", "not a finite number"),
    ],
)
def test_cell_that_is_not_a_label_is_a_bad_sample(tmp_path, task, cell, reason):
    column = task["column"]
    write(tmp_path, f"image,{column},split\na,1,train\nb,{cell},train\n")
    reader = source(tmp_path, task)
    with pytest.raises(BadSampleError, match=reason):
        reader.read(list(reader.entries())[1])


def test_positive_values_of_a_binary_task(root):
    found = rows(source(root, {"column": "kind", "kind": "binary", "positive": ["shoe"]}))
    assert [found[i]["task.kind"] for i in "ab"] == [0, 1]
    assert found["c"]["task.kind"] is None


def test_positive_values_that_no_row_has_are_refused_or_noted(root):
    task = {"column": "kind", "kind": "binary"}
    with pytest.raises(UserError, match=r"positive of column kind names Shoe, expected some of .*shoe"):
        source(root, {**task, "positive": ["Shoe"]}).describe()
    (note,) = source(root, {**task, "positive": ["shoe", "Boot"]}).describe().notes
    assert note == "positive of column kind names Boot, which is not in the data"
    assert not source(root, {**task, "positive": ["shoe"]}).describe().notes


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_image_is_a_bad_sample(root, kind, kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    file = io.BytesIO()
    noise.save(file, kind)
    (root / "images" / "a.jpg").write_bytes(file.getvalue()[: int(kept * len(file.getvalue()))])
    reader = source(root)
    with pytest.raises(BadSampleError, match=r"image:? .*a\.jpg"):
        reader.read(next(reader.entries()))


def test_missing_and_damaged_images_are_bad_samples(root):
    reader = source(root)
    _, b, c, _ = list(reader.entries())
    (root / "images" / "b.jpg").unlink()
    with pytest.raises(BadSampleError, match=r"b\.jpg: no such file"):
        reader.read(b)
    (root / "images" / "c.jpg").write_bytes(b"not a picture")
    with pytest.raises(BadSampleError, match=r"not an image: .*c\.jpg"):
        reader.read(c)


def test_16_bit_image_is_a_bad_sample(root):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(file, "PNG")
    (root / "images" / "a.jpg").write_bytes(file.getvalue())
    reader = source(root)
    with pytest.raises(BadSampleError, match="16-bit file, expected an 8-bit image"):
        reader.read(next(reader.entries()))


def test_pad_keeps_the_aspect_on_grey(root):
    image = rows(source(root, resize="pad", size=8))["a"][INPUT]  # 20×10 becomes 8×4
    assert (image[:2] == 127).all()
    assert (image[-2:] == 127).all()
    assert abs(image[2:6].astype(int) - [200, 40, 40]).max() < 8


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_crop_and_stretch_fill_the_square(root, resize):
    image = rows(source(root, resize=resize, size=8))["a"][INPUT]
    assert abs(image.astype(int) - [200, 40, 40]).max() < 8


def test_crop_takes_the_middle(root):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(root / "images" / "a.png")
    (root / "labels.csv").write_text("image,flag\na.png,1\n")
    reader = source(root, FLAG, resize="crop", size=10)
    assert reader.read(next(reader.entries()))[INPUT].min() == 255


def test_the_preprocessing_of_a_model_is_that_of_its_library(root):
    data = pytest.importorskip("timm.data")
    reader = source(root, FLAG, preprocessing="tf_efficientnet_lite0", size=64)
    description = reader.describe()
    assert (description.input.mean, description.input.std) == ((127.5,) * 3, (127.5,) * 3)
    assert description.notes == (
        "images are prepared as for tf_efficientnet_lite0: crop to 64×64, bicubic, crop_share 0.875",
    )
    photo = np.asarray(Image.open(root / "images" / "a.jpg").resize((256, 256), Image.Resampling.BICUBIC))
    Image.fromarray(photo).save(root / "images" / "a.png")
    (root / "labels.csv").write_text("image,flag\na.png,1\n")
    reader = source(root, FLAG, preprocessing="tf_efficientnet_lite0", size=64)
    found = reader.read(next(reader.entries()))[INPUT]
    theirs = data.create_transform(64, interpolation="bicubic", crop_pct=0.875, mean=(0,) * 3, std=(1,) * 3)
    expected = 255 * theirs(Image.open(root / "images" / "a.png")).permute(1, 2, 0).numpy()
    assert abs(found - expected).max() < 8  # they round between resizing and cutting
    form = raw_form({"kind": "folder", "options": {"preprocessing": "tf_efficientnet_lite0", "tasks": [FLAG]}})
    assert (form["interpolation"], form["crop_share"]) == ("bicubic", 0.875)
    kept = source(root, FLAG, preprocessing="tf_efficientnet_lite0", resize="pad", interpolation="nearest")
    assert kept.describe().input.shape == (224, 224, 3)
    assert "pad to 224×224, nearest, crop_share 1.0" in kept.describe().notes[0]


def test_preprocessings_that_cannot_be_used(root):
    with pytest.raises(UserError, match="the library has no model 'resnet_of_nobody'"):
        source(root, FLAG, preprocessing="resnet_of_nobody")
    with pytest.raises(UserError, match="crop_share has no meaning beside resize: pad"):
        source(root, FLAG, crop_share=0.5)


def test_rotated_photo_and_transparent_picture(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to the right to see it upright"
    Image.fromarray(np.repeat(np.array([[255], [0]], np.uint8), 16, 1).repeat(8, 0)).save(
        root / "images" / "a.jpg", exif=exif
    )
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(root / "images" / "b.png")
    (root / "labels.csv").write_text("image,flag\na,1\nb.png,0\n")
    found = rows(source(root, FLAG, size=8))
    assert found["a"][INPUT][:, 6:].min() > 200
    assert found["a"][INPUT][:, :2].max() < 50
    assert (found["b.png"][INPUT] == 255).all()


def test_ids_with_and_without_an_extension(tmp_path):
    write(tmp_path, "image,flag\nv1.2,1\nb.jpg,1\n", images=("v1.2", "b"))
    assert list(rows(source(tmp_path, FLAG))) == ["v1.2", "b.jpg"]


def test_split_without_a_column_follows_from_the_hash_of_the_id(tmp_path):
    ids = [f"id{i}" for i in range(400)]
    write(tmp_path, "image,flag\n" + "".join(f"{i},1\n" for i in ids), images=())
    splits = [entry.split for entry in source(tmp_path, FLAG).entries()]
    assert splits[:4] == ["train", "test", "val", "train"]
    assert 0.6 < splits.count("train") / 400 < 0.8
    assert min(splits.count("val"), splits.count("test")) > 30


def test_duplicate_ids_are_named(tmp_path):
    write(tmp_path, "image,flag\n" + "".join(f"x{i},1\nx{i},0\n" for i in range(7)))
    with pytest.raises(UserError, match="7 ids occur more than once: x0, x1, x2, x3, x4 and 2 more"):
        plans(source(tmp_path, FLAG))


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("image,other\na,1\n", "no column flag"),
        ("image,flag\n", "has no rows"),
        ("image,flag\n,1\n", "no image id in line 2"),
        ("image,flag\na,1,2\n", "line 2 has 3 cells, expected 2"),
        ("image,flag,flag\na,1,2\n", "column flag occurs more than once"),
        ("image,flag,split\na,1,tain\n", "unknown split 'tain'"),
        (b"image,flag\n\x81,1\n", "line 2, byte 1 of it: 0x81 is not UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, csv, message):
    with pytest.raises(UserError, match=message):
        list(source(write(tmp_path, csv), FLAG).entries())


def test_missing_column_lists_the_existing_columns(root):
    with pytest.raises(UserError) as caught:
        list(source(root, {"column": "colour", "kind": "binary"}).entries())
    assert "image, kind, flag, price, split" in caught.value.remedy
    with pytest.raises(UserError, match="no column fold"):
        list(source(root, split_column="fold").entries())


def test_byte_order_mark_quotes_and_carriage_returns(tmp_path):
    write(tmp_path, b'\xef\xbb\xbfimage,kind\r"a","x, y"\rb,z\r')
    reader = source(tmp_path, KIND)
    assert reader.describe().tasks[0].labels == ("x, y", "z")


def test_unknown_option_names_the_nearest(root):
    with pytest.raises(UserError) as caught:
        source(root, sise=32)
    assert "source.options.sise" in caught.value.what
    assert "size" in caught.value.remedy


@pytest.mark.parametrize(
    "task",
    [
        {**PRICE, "one_vs_rest": "all"},
        {**PRICE, "classes": ["a"]},
        {**FLAG, "classes": ["a"]},
        {**FLAG, "name": " "},
        {**KIND, "one_vs_rest": "all", "positive": ["a"]},
        {**FLAG, "kind": "flag"},
    ],
)
def test_options_that_do_not_fit_are_refused(root, task):
    with pytest.raises(UserError):
        source(root, task)


def test_invalid_tasks_are_refused(root):
    with pytest.raises(UserError, match="unknown metric"):
        source(root, {**FLAG, "metric": "rmse"}).describe()
    with pytest.raises(UserError, match="unique"):
        source(root, FLAG, FLAG).describe()
    with pytest.raises(UserError, match="at least 2 classes"):
        source(root, {**KIND, "drop": ["shoe"]}).describe()


def test_missing_root_names_the_expected_content(tmp_path):
    with pytest.raises(UserError) as caught:
        build_source("folder", str(tmp_path / "none"), {"tasks": [FLAG]})
    assert "none" in caught.value.where
    assert "labels.csv" in caught.value.remedy


def test_reader_is_sent_to_a_worker_without_the_table(root):
    reader = source(root)
    reader.describe()
    entries = list(reader.entries())
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301
    (root / "labels.csv").unlink()
    assert isinstance(entries[0], Entry)
    assert copy.read(entries[0])["task.kind"] == 0


@pytest.mark.skipif(not CLOTHING.is_dir(), reason="the shared clothing data is not beside the checkout")
def test_clothing():
    label = {"column": "label", "kind": "multiclass", "drop": ["Not sure", "Skip"]}
    reader = source(CLOTHING, label, {"column": "kids", "kind": "binary"}, size=64)
    entries = list(reader.entries())
    assert len(entries) == 5398 - 228 - 7
    assert reader.describe().tasks[0].channels == 18
    for entry in entries[:: len(entries) // 20]:
        row = reader.read(entry)
        assert row[INPUT].std() > 5
        assert row["task.kids"] in (0, 1)
