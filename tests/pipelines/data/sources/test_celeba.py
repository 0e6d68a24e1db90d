import logging
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from dmtg_core.loss_options import LossOptions
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, BadSampleError
from pipelines.data.sources.celeba import CelebaSource
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.pipelines.raw_data import CELEBA_NAMES, celeba_flags, write_celeba

NAMES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"


@pytest.fixture
def root(tmp_path):
    return write_celeba(tmp_path / "celeba")


def source(root, **options):
    return CelebaSource(locate(str(root)), options)


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("folders", [("", "", ""), ("Img", "Anno", "Eval"), ("Img", "", "Eval")])
def test_rows_match_the_files(tmp_path, folders):
    reader = source(write_celeba(tmp_path / "celeba", folders=folders))
    description, entries = reader.describe(), list(reader.entries())
    assert [task.name for task in description.tasks] == list(CELEBA_NAMES)
    assert {(task.kind, task.metric) for task in description.tasks} == {("binary", "accuracy")}
    assert [(e.id, e.split) for e in entries] == [
        (f"{i:06d}.jpg", split) for i, split in enumerate(["train"] * 4 + ["val", "test"], start=1)
    ]
    for entry, flags in zip(entries, celeba_flags(6), strict=True):
        row = reader.read(entry)
        assert list(row) == list(description.columns)
        assert [int(row[f"task.{name}"]) for name in CELEBA_NAMES] == [int(flag == 1) for flag in flags]
        for name, column in description.columns.items():
            assert (str(row[name].dtype), row[name].shape) == (column.dtype, column.shape)


def test_input_is_the_whole_image_in_0_to_1(root):
    left_red = np.zeros((218, 178, 3), np.uint8)
    left_red[:, :89, 0] = 255
    Image.fromarray(left_red).save(root / "img_align_celeba" / "000001.jpg", quality=100, subsampling=0)
    reader = source(root)
    spec, pixels = reader.describe().input, reader.read(next(reader.entries()))[INPUT]
    assert (spec.shape, spec.mean, spec.std) == ((64, 64, 3), (0.0,), (255.0,))
    np.testing.assert_allclose(pixels[:, :31] / 255.0, np.broadcast_to([1.0, 0, 0], (64, 31, 3)), atol=0.02)
    np.testing.assert_allclose(pixels[:, 33:] / 255.0, 0, atol=0.02)


@pytest.mark.parametrize("size", [8, 64, 200])
def test_any_size(root, size):
    reader = source(root, size=size)
    assert reader.read(next(reader.entries()))[INPUT].shape == reader.describe().input.shape == (size, size, 3)


def test_some_attributes_in_the_order_asked_for(root):
    asked = ["Wearing_Hat", "Bald"]
    reader = source(root, attributes=asked)
    assert [task.name for task in reader.describe().tasks] == asked
    for entry, flags in zip(reader.entries(), celeba_flags(6), strict=True):
        row = reader.read(entry)
        assert list(row) == [INPUT, "task.Wearing_Hat", "task.Bald"]
        assert [row[f"task.{name}"] for name in asked] == [flags[CELEBA_NAMES.index(n)] == 1 for n in asked]


def test_all_attributes_have_one_metric_and_loss(root):
    chosen = {"metric": "balanced_accuracy", "loss_options": {"pos_weight": "balanced"}}
    tasks = source(root, attributes=["Bald", "Mustache"], **chosen).describe().tasks
    assert {(t.metric, t.loss_options.pos_weight) for t in tasks} == {("balanced_accuracy", "balanced")}
    assert all(task.loss_options == LossOptions() for task in source(root).describe().tasks)


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        ({"attributes": ["Wearing_Hut"]}, "no attribute Wearing_Hut", "Wearing_Hat"),
        ({"attributes": ["Bald", "Bald"]}, "named twice: Bald, Bald", "once"),
        ({"attributes": []}, "at least 1 item", "correct"),
        ({"sise": 64}, "unknown key source.options.sise", "size"),
        ({"loss_options": {"pos_weight": 0}}, "pos_weight must be positive, got 0", "loss"),
    ],
)
def test_wrong_options(root, options, what, remedy):
    with pytest.raises(UserError, match=what) as caught:
        source(root, **options).describe()
    assert remedy in caught.value.remedy
    assert caught.value.wrong_use


def test_root_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist") as caught:
        build_source("celeba", str(tmp_path / "none"), {})
    assert "list_attr_celeba.txt" in caught.value.remedy


@pytest.mark.parametrize(("name", "folder"), [(NAMES, "Anno"), (PARTITION, "Eval"), ("img_align_celeba", "Img")])
def test_missing_file_is_named_with_its_possible_paths(root, name, folder):
    (root / name).rename(root / "elsewhere")
    with pytest.raises(UserError, match=f"no {name}") as caught:
        list(source(root).entries())
    assert str(root / name) in caught.value.remedy
    assert str(root / folder / name) in caught.value.remedy


@pytest.mark.parametrize(
    ("file", "old", "new", "what"),
    [
        (NAMES, "6\n", "7\n", "line 1 says 7 images, the file has 6 rows"),
        (NAMES, "6\n", "six\n", "not a file of attributes"),
        (NAMES, " Bald ", " Young ", "Young"),
        (NAMES, "000002.jpg ", "000002.jpg 1 ", "line 4 has 41 cells after the image, expected 40"),
        (NAMES, "000002.jpg", "000001.jpg", "1 ids occur more than once: 000001.jpg"),
        (PARTITION, "000005.jpg 1\n", "", "1 images of list_attr_celeba.txt have no split: 000005.jpg"),
        (PARTITION, "000005.jpg 1", "000005.jpg 3", "line 5 is '000005.jpg 3', expected an image and 0, 1 or 2"),
        (PARTITION, "000005.jpg 1", "000005.jpg", "line 5 is '000005.jpg'"),
        (PARTITION, "000005.jpg 1", "000004.jpg 1", "1 ids occur more than once: 000004.jpg"),
    ],
)
def test_malformed_files(root, file, old, new, what):
    change(root / file, old, new)
    with pytest.raises(UserError, match=what) as caught:
        list(source(root).entries())
    assert str(root / file) in caught.value.where


@pytest.mark.parametrize("value", ["0", "yes", "?", "-11"])
def test_value_that_is_not_a_flag_is_named_with_its_attribute(root, value):
    file = root / NAMES
    lines = file.read_text().splitlines()
    cells = lines[4].split()
    cells[1 + CELEBA_NAMES.index("Bald")] = value
    lines[4] = " ".join(cells)
    file.write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=f"line 5 has {re.escape(repr(value))} for Bald, expected 40 cells of -1 or 1"
    ):
        list(source(root).entries())


def test_images_that_cannot_be_used_are_bad_samples(root):
    reader = source(root)
    images, entries = root / "img_align_celeba", list(reader.entries())
    (images / "000001.jpg").unlink()
    (images / "000002.jpg").write_bytes((images / "000002.jpg").read_bytes()[:500])
    Image.new("RGB", (64, 64)).save(images / "000003.jpg")
    for entry, reason in zip(
        entries[:3], ["no such file", "damaged image", "is 64×64, an aligned image 178×218"], strict=True
    ):
        with pytest.raises(BadSampleError, match=reason) as caught:
            reader.read(entry)
        assert entry.id in str(caught.value)
    assert reader.read(entries[3])[INPUT].std() > 0


def test_images_that_are_left_out_are_logged(root, caplog):
    with caplog.at_level(logging.INFO):
        list(source(root).entries())
    assert not caplog.records
    (root / "img_align_celeba" / "000007.jpg").write_bytes(b"")
    (root / "img_align_celeba" / "notes.txt").write_bytes(b"")
    with (root / PARTITION).open("a") as file:
        file.write("000008.jpg 2\n")
    with caplog.at_level(logging.INFO):
        assert len(list(source(root).entries())) == 6
    assert "2 files are in no list" in caplog.text
    assert "lists 1 images without attributes" in caplog.text


def test_any_line_end_and_empty_lines_at_the_end(root):
    plain = [(e.id, e.split, e.fields) for e in source(root).entries()]
    for name in (NAMES, PARTITION):
        (root / name).write_bytes((root / name).read_bytes().replace(b"\n", b"\r\n") + b"\r\n \r\n")
    assert [(e.id, e.split, e.fields) for e in source(root).entries()] == plain


def test_reader_is_sent_to_a_worker_with_its_lists(root):
    reader = source(root)
    reader.describe()
    entry = next(reader.entries())
    expected = reader.read(entry)
    (root / NAMES).unlink()
    (root / PARTITION).unlink()
    row = pickle.loads(pickle.dumps(reader)).read(entry)  # noqa: S301
    for name, value in expected.items():
        np.testing.assert_array_equal(row[name], value)
