"""`dmtg inspect` on small shards with known numbers: its findings and its page."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dmtg_core import InputSpec, Task
from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.data import shards
from pipelines.data.manifest import FILE, read_manifest
from pipelines.data.planning import make_plans
from pipelines.data.reader import Reader
from pipelines.data.shards import write_shard
from pipelines.data.sources.base import BadSampleError, Column, Description, Entry
from pipelines.report import contact_sheet, pictures
from pipelines.report import inspect as inspecting
from pipelines.report.dataset import frequent_reasons
from pipelines.report.inspect import inspect
from pipelines.storage import locate
from tests.pipelines.conftest import make_config
from tests.pipelines.data.test_shards import manifest_of

VOID = {"meta", "img", "br", "hr", "link", "input"}
SIDE = 4
TASKS = (
    Task("colour", "multiclass", 3, labels=("red", "green", "blue")),
    Task("bright", "binary"),
    Task("level", "regression", offset=(10.0,), scale=(5.0,), unit="cd"),
    Task("depth", "dense_regression", offset=(1500.0,), scale=(1000.0,), valid_below=8192.0, unit="1/512 m"),
    Task("normal", "dense_regression", 3, metric="within_30", offset=(127.5,), scale=(127.5,)),
    Task("bend", "dense_regression", 2, offset=(100.0, 50.0), scale=(10.0, 2.0)),
    Task("seg", "dense_classification", 3, ignore_index=0, labels=("none", "wall", "chair")),
)
COLUMNS = {
    "input": Column("uint8", (SIDE, SIDE, 3)),
    "task.colour": Column("uint8"),
    "task.bright": Column("uint8"),
    "task.level": Column("float32"),
    "task.depth": Column("uint16", (SIDE, SIDE)),
    "task.normal": Column("uint8", (SIDE, SIDE, 3)),
    "mask.normal": Column("uint8", (SIDE, SIDE)),
    "task.bend": Column("uint8", (SIDE, SIDE, 2)),
    "task.seg": Column("uint8", (SIDE, SIDE)),
}
IMAGES = Description(InputSpec("image", (SIDE, SIDE, 3), "uint8", (0.0,), (255.0,)), TASKS, COLUMNS)


class Rows:
    """A source with samples in memory; a text in place of a sample is the reason why it is bad."""

    def __init__(self, description: Description, samples: Mapping[str, Sequence[Any]]) -> None:
        self.description = description
        self.samples = {f"{split}-{i}": row for split, rows in samples.items() for i, row in enumerate(rows)}

    def describe(self) -> Description:
        return self.description

    def entries(self) -> list[Entry]:
        return [Entry(name, name.split("-")[0]) for name in self.samples]

    def read(self, entry: Entry) -> dict[str, np.ndarray | None]:
        found = self.samples[entry.id]
        if isinstance(found, str):
            raise BadSampleError(found)
        return found


def write(
    tmp_path: Path, description: Description, samples: Mapping[str, Sequence[Any]], **data: object
) -> Config:
    """Shards of samples in memory, and their configuration."""
    config = make_config(tmp_path, tmp_path, data={"rows_per_shard": 4, **data})
    source = Rows(description, samples)
    assert config.source is not None
    plans = make_plans(source.entries(), description, config.source, config.data)
    folder = locate(config.data.shards)
    parts = {plan.digest: write_shard(source, description, plan, folder, "lz4") for plan in plans}
    shards._publish(folder, description, plans, parts, config.source, {})
    return config


def image_sample(i: int) -> dict[str, np.ndarray | None]:
    """Every third sample is red, every other one bright; labels are known in closed form."""
    depth = np.full((SIDE, SIDE), 1000 + 1000 * (i % 2), np.uint16)
    depth[0, 0] = 65535
    mask = np.ones((SIDE, SIDE), np.uint8)
    mask[0] = 0
    seg = np.full((SIDE, SIDE), 1, np.uint8)
    seg[2:], seg[0, 0] = 2, 0
    bend = np.zeros((SIDE, SIDE, 2), np.uint8)
    bend[..., 0], bend[..., 1] = 90 + 20 * (i % 2), 50
    return {
        "input": np.full((SIDE, SIDE, 3), 40 * (i % 6), np.uint8),
        "task.colour": np.asarray(i % 3, np.uint8),
        "task.bright": None if i % 4 == 3 else np.asarray(i % 2, np.uint8),
        "task.level": np.asarray(5 + 10 * (i % 2), np.float32),
        "task.depth": depth,
        "task.normal": np.tile(np.array([255, 127, 0], np.uint8), (SIDE, SIDE, 1)),
        "mask.normal": mask,
        "task.bend": bend,
        "task.seg": seg,
    }


def image_samples(train: int = 12, others: int = 6) -> dict[str, list[Any]]:
    return {split: [image_sample(i) for i in range(n)] for split, n in (("train", train), ("val", others))}


class Page(HTMLParser):
    """Tables, pictures, references and text of a page; refuses tags that are not closed in their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [
            str(found[key]) for key in ("src", "href", "action", "data", "xlink:href") if key in found
        ]
        self.references += [tag] if tag in ("script", "link", "iframe", "object", "base") else []
        assert not [key for key in found if key.startswith("on")]
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> is no HTML"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data.strip()

    def row(self, *begin: str) -> list[str]:
        """The other cells of the only row that begins with these cells."""
        (found,) = [row[len(begin) :] for row in self.cells if tuple(row[: len(begin)]) == begin]
        return found

    def picture(self, alt: str) -> Image.Image:
        """The only picture with an alternative text that begins with `alt`."""
        (found,) = [one for one in self.images if str(one["alt"]).startswith(alt)]
        return Image.open(io.BytesIO(base64.b64decode(str(found["src"]).partition(",")[2])))


def page_of(config: Config) -> Page:
    return Page(Path(inspect(config)["page"]).read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write(tmp_path_factory.mktemp("images"), IMAGES, image_samples()))


def test_page_is_self_contained(page: Page) -> None:
    assert {reference.partition(",")[0] for reference in page.references} == {"data:image/png;base64"}
    assert all(str(one["alt"]).strip() for one in page.images)
    assert len(page.images) > 12 * 5
    assert "http" not in page.text


def test_page_counts_classes_flags_and_missing_labels(page: Page) -> None:
    assert page.row("train")[0] == "12"
    assert page.row("red") == ["4", "33.3%", "33.3%"]
    # the first row and the first pixel: 7 walls and 8 chairs of 15 pixels
    assert page.row("wall") == ["84", "46.7%", "46.7%"]
    assert page.row("chair") == ["96", "53.3%", "53.3%"]
    assert not [row for row in page.cells if row[0] == "none"]
    assert page.row("bright", "binary")[1:] == ["25.0%", "16.7%"]
    assert page.row("bright", "3") == ["33.3%", "2", "40.0%"]
    assert page.row("depth", "dense regression") == ["m", "0.0%, pixels 6.2%", "0.0%, pixels 6.2%"]
    assert page.row("normal", "dense regression") == ["", "0.0%, pixels 25.0%", "0.0%, pixels 25.0%"]


def test_page_shows_values_in_raw_and_in_network_units(page: Page) -> None:
    assert page.row("level (cd)", "train") == ["10", "5", "5", "15", "0", "1", "-1", "1"]
    assert page.row("depth (m)", "val") == ["2.93", "0.9766", "1.953", "3.906", "0", "0.5", "-0.5", "0.5"]
    assert page.row("normal, channel 2", "train") == ["0", "0", "0", "0", "-1", "0", "-1", "-1"]
    # every channel has its own offset and scale
    assert page.row("bend, channel 0", "train") == ["100", "10", "90", "110", "0", "1", "-1", "1"]
    assert page.row("bend, channel 1", "train") == ["50", "0", "50", "50", "0", "0", "0", "0"]


def test_contact_sheet_draws_every_label(page: Page) -> None:
    def name_of(alt: str) -> str:
        return str(alt).partition(" of sample ")[2].partition(":")[0].partition(",")[0]

    ids = {name_of(str(one["alt"])) for one in page.images} - {""}
    assert ids == {f"train-{i}" for i in range(12)}
    assert page.picture("input of sample train-1,").convert("RGB").getpixel((0, 0)) == (40, 40, 40)
    normal = page.picture("normal of sample train-1:")
    assert normal.getpixel((0, 3)) == (255, 127, 0)
    assert normal.getpixel((0, 0)) in pictures.STRIPES
    depth = [page.picture(f"depth of sample train-{i}:").convert("RGB") for i in (0, 1)]
    ends = [pictures._heat_colours()[0], pictures._heat_colours()[-1]]
    assert [picture.getpixel((3, 3)) for picture in depth] == ends
    assert depth[0].getpixel((0, 0)) in pictures.STRIPES
    assert page.picture("bend, channel 0 of sample train-1:").convert("RGB").getpixel((0, 0)) == ends[1]
    seg = page.picture("seg of sample train-1: chair 50%, wall 44%, 6% without a label").convert("RGB")
    shown = ["#" + bytes(seg.getpixel(place)).hex() for place in ((1, 0), (0, 2))]
    assert shown == [pictures.class_colour(0), pictures.class_colour(1)]
    assert "level15 cd" in re.sub(r"\s*\n\s*", "", page.text)
    assert "depth: 3.906 to 3.906 m, 6% without a label" in page.text


def test_problems_are_on_top_and_readable_samples_are_drawn(tmp_path: Path) -> None:
    samples = image_samples()
    for sample in samples["train"]:
        sample["task.bright"] = None
    config = write(tmp_path, IMAGES, samples)
    (victim,) = (tmp_path / "shards").glob("train-00001-*.parquet")
    victim.write_bytes(victim.read_bytes()[:-40])
    found = inspect(config)
    page = Page(Path(found["page"]).read_text())
    assert len(found["problems"]) == 2
    top = page.text[: page.text.index("Missing labels")]
    assert f"{victim.name} has" in top
    assert "task bright is constant in the training split: it has no label" in top
    assert page.row("red") == ["4", "33.3%", "33.3%"]  # counted when the shards were made
    assert sum("input of sample" in str(one["alt"]) for one in page.images) == 8
    assert page.text.count("missing") >= 8
    for shard in (tmp_path / "shards").glob("train-*.parquet"):
        shard.unlink()
    assert "No shard of the training split is readable." in page_of(config).text


def test_missing_labels_are_marked(tmp_path: Path) -> None:
    samples = image_samples(train=3)
    for sample in samples["train"]:
        sample |= {f"task.{name}": None for name in ("level", "depth", "seg", "normal")}
    page = page_of(write(tmp_path, IMAGES, samples))
    text = re.sub(r"\s*\n\s*", "", page.text)
    assert [text.count(f"{name}missing") for name in ("level", "depth", "seg", "normal")] == [3] * 4
    assert not [one for one in page.images if str(one["alt"]).startswith("depth")]
    assert page.row("level (cd)", "train") == ["–"] * 8


def test_the_drawn_samples_are_reproducible_and_at_most_all(images: Path, tmp_path: Path) -> None:
    _, folder, manifest = manifest_of(tmp_path, images)
    reader = Reader(folder, manifest, manifest.description.tasks)
    first, again = (contact_sheet.pick(reader, 12) for _ in range(2))
    assert len({sample.id for sample in first}) == 12
    assert [sample.id for sample in first] == [sample.id for sample in again]
    assert len(contact_sheet.pick(reader, 1000)) == manifest.rows("train")
    # what is drawn is the sample that its id names
    for sample in first:
        stored = np.asarray(Image.open(images / "images" / f"{sample.id}.png"))
        assert np.array_equal(sample.inputs, stored)


def plain(kind: str, shape: tuple[int, ...], dtype: str, values: np.ndarray, **more: Any) -> dict[str, Any]:
    """Arguments of `write`: ten samples of one input and a flag."""
    preparation = more.pop("preparation", {})
    columns = {"input": Column(dtype, shape), "task.ok": Column("uint8")}
    described = Description(InputSpec(kind, shape, dtype, **more), (Task("ok", "binary"),), columns, preparation)
    rows = [{"input": values, "task.ok": np.asarray(i % 2, np.uint8)} for i in range(5)]
    return {"description": described, "samples": {"train": rows, "val": rows}}


def test_features_are_a_strip_in_network_units(tmp_path: Path) -> None:
    values = np.array([7.0, 1.0, 100.0], np.float32)
    given = plain("features", (3,), "float32", values, mean=(5.0, 1.0, 0.0), std=(2.0, 1.0, 1.0))
    page = page_of(write(tmp_path, **given))
    strip = page.picture("input of sample train-1, 3 features: 7, 1, 100").convert("RGB")
    colours = pictures._heat_colours()
    cell = strip.width // 3
    # 1, 0 and 100 deviations on a scale from 0 to 3
    assert [strip.getpixel((cell * i + 2, 2)) for i in range(3)] == [colours[64 // 3], colours[0], colours[-1]]
    assert "0 to 3 in network units" in page.text


def test_long_features_have_several_rows_and_the_last_row_is_padded_with_stripes() -> None:
    strip = pictures.strip(np.linspace(0, 1, 70), (0.0, 1.0), "70 features")
    image = Image.open(io.BytesIO(base64.b64decode(strip.source.partition(",")[2]))).convert("RGB")
    cell = pictures.SIDE // pictures.STRIP
    assert image.size == (pictures.STRIP * cell, 2 * cell)
    assert image.getpixel((5 * cell, cell)) not in pictures.STRIPES
    assert image.getpixel((6 * cell, cell)) in pictures.STRIPES


def test_tokens_without_a_tokenizer_are_ids(tmp_path: Path) -> None:
    page = page_of(
        write(tmp_path, **plain("tokens", (4,), "uint16", np.array([5, 3, 0, 0], np.uint16), vocabulary=9))
    )
    assert page.text.count("token ids [5, 3]") == 5


def test_tokens_with_a_tokenizer_are_text(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from pipelines.data.preprocessing import load_preparation
    from pipelines.data.sources.tokens import train_tokenizer

    text = 'Thanks & "kind" <b>words</b>'
    trained = train_tokenizer([text, "kind words"], 300, 64, lowercase=False)
    preparation = {"kind": "text", "column": "text", "dtype": "uint16", "tokenizer": trained.to_str()}
    ids = load_preparation(preparation).row({"text": text})
    given = plain("tokens", (64,), "uint16", ids, vocabulary=300, preparation=preparation)
    page = page_of(write(tmp_path, **given))
    assert page.text.count(text) == 5


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint16"), (2, "float32"), (3, "float32"), (5, "uint8")])
def test_image_of_any_depth_is_drawn(channels: int, dtype: str) -> None:
    values = np.zeros((300, 200, channels), dtype)
    values[150:] = 200
    picture = pictures.photo(values, "an image")
    image = Image.open(io.BytesIO(base64.b64decode(picture.source.partition(",")[2]))).convert("RGB")
    assert max(image.size) == pictures.SIDE
    top = (0, 0, 0)
    bottom = (200, 200, 200) if dtype == "uint8" else (255, 255, 255)
    assert (image.getpixel((5, 5)), image.getpixel((5, image.height - 5))) == (top, bottom)


def test_a_table_of_many_classes_has_the_most_and_the_least_frequent(tmp_path: Path) -> None:
    task = Task("kind", "multiclass", 200)
    columns = {"input": Column("float32", (1,)), "task.kind": Column("uint8")}
    described = Description(InputSpec("features", (1,)), (task,), columns)
    # class i occurs i + 1 times, up to class 49
    rows = [
        {"input": np.zeros(1, np.float32), "task.kind": np.asarray(i, np.uint8)}
        for i in range(50)
        for _ in range(i + 1)
    ]
    page = page_of(write(tmp_path, described, {"train": rows, "val": rows[:20]}, rows_per_shard=4000))
    assert "200 classes, 150 of them without a label in train" in page.text
    assert "10 between them are left out" in page.text
    shown = [row[0] for row in page.cells if len(row) == 4 and row[0].isdigit() and "%" in row[2]]
    assert shown == [str(i) for i in (*range(49, 29, -1), *range(19, -1, -1))]


def test_similar_reasons_of_quarantine_are_counted_together(tmp_path: Path) -> None:
    samples = image_samples()
    samples["train"] += [f"no such file: raw/images/x{i}.png" for i in range(3)] + ["x is 12×13, its rgb 14×14"]
    config = write(tmp_path, IMAGES, samples)
    reasons = frequent_reasons(locate(config.data.shards))
    assert [reason["count"] for reason in reasons] == [3, 1]
    found = inspect(config)
    page = Page(Path(found["page"]).read_text())
    assert found["quarantined"] == 4
    assert "no such file: raw/images/x" in page.row("3")[0]
    assert "its rgb 14×14" in page.row("1")[0]


def test_page_is_beside_the_shards_or_at_the_given_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, IMAGES, image_samples(2, 2))
    assert inspect(config)["page"] == str(tmp_path / "shards" / "_inspect.html")
    assert inspect(config, str(tmp_path))["page"] == str(tmp_path / "inspect.html")
    assert inspect(config, str(tmp_path / "new" / "a.html"))["page"] == str(tmp_path / "new" / "a.html")
    monkeypatch.setattr(inspecting.os, "access", lambda path, mode: False)  # root may write everywhere
    assert inspect(config)["page"] == str(tmp_path / "runs" / "patches-inspect.html")
    assert (tmp_path / "runs" / "patches-inspect.html").is_file()


def test_command_names_the_page_and_fails_on_a_problem(images: Path, tmp_path: Path) -> None:
    import yaml

    config, folder, manifest = manifest_of(tmp_path, images)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["inspect", "-c", str(path), "--out", str(tmp_path / "page.html"), "--json"]
    result = CliRunner().invoke(app, command)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, found["page"]) == (0, str(tmp_path / "page.html"))
    assert sum(found["statistics"]["train"]["colour"]["classes"]) == 58
    assert f"page: {tmp_path / 'page.html'}" in result.stderr
    victim = Path((folder / manifest.shards["train"][0].file).path)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    result = CliRunner().invoke(app, command)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, found["status"]) == (1, "failed")
    assert found["problems"] == [f"{victim.name} has another checksum than the manifest says"]
    assert found["problems"][0] in Path(found["page"]).read_text()


def test_only_the_chosen_tasks_are_shown(tmp_path: Path) -> None:
    page = page_of(write(tmp_path, IMAGES, image_samples(4, 4), tasks=["bright"]))
    assert "bright" in page.text
    assert "depth" not in page.text


def test_names_from_the_data_are_text_and_not_markup(tmp_path: Path) -> None:
    task = Task("<b>", "multiclass", 2, labels=("<script>", "b&c"))
    columns = {"input": Column("float32", (1,)), "task.<b>": Column("uint8")}
    described = Description(InputSpec("features", (1,)), (task,), columns)
    rows = [{"input": np.ones(1, np.float32), "task.<b>": np.asarray(i % 2, np.uint8)} for i in range(6)]
    page = page_of(write(tmp_path, described, {"train": rows, "val": rows}))
    assert page.row("<script>") == ["3", "50.0%", "50.0%"]


def test_shards_without_sums_of_channels_show_the_total_and_no_network_units(tmp_path: Path) -> None:
    config = write(tmp_path, IMAGES, image_samples(4, 4))
    folder = locate(config.data.shards)
    values = read_manifest(folder).to_dict()
    for split in values["splits"].values():
        split["statistics"] = {
            name: {key: value for key, value in sums.items() if key != "channels"}
            for name, sums in split["statistics"].items()
        }
    del values["seal"]  # as in shards of earlier versions
    (folder / FILE).write_json(values)
    assert page_of(config).row("bend", "train") == ["75", "25.98", "50", "110", "–", "–", "–", "–"]


def test_the_notes_report_drift_of_numbers_in_standard_deviations(tmp_path: Path) -> None:
    samples = image_samples(48, 48)
    for sample in samples["val"]:
        sample["task.level"] = sample["task.level"] + np.float32(10)
        sample["task.level"] = np.asarray(sample["task.level"], np.float32)
    found = inspect(write(tmp_path, IMAGES, samples, rows_per_shard=100))
    notes = [note for note in found["notes"] if "differs" in note]
    assert notes == ["task level differs in val: mean 20, in train 10, 2.0 standard deviations apart"]
