"""Three photos as the channels of one image, as a folder that `source.kind: folder` reads."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.three_cameras import CAMERAS, SIZE, write
from pipelines.config.loading import load_config


@pytest.fixture
def clothing(tmp_path: Path) -> Path:
    """Plain grey photos, each of its own brightness, in the clothing set's format."""
    (tmp_path / "clothing" / "images").mkdir(parents=True)
    with (tmp_path / "clothing" / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "kids", "split"])
        for i in range(12):
            Image.new("RGB", (40, 50), (20 * i,) * 3).save(
                tmp_path / "clothing" / "images" / f"p{i}.jpg", quality=95
            )
            label = "Skip" if i == 11 else ("Dress", "Pants")[i % 2]
            table.writerow([f"p{i}", label, "False", ("train", "val", "test")[i % 3]])
    return tmp_path / "clothing"


def test_every_camera_sees_every_photo_of_a_split_once_with_its_label(clothing: Path, tmp_path: Path) -> None:
    assert write(clothing, tmp_path / "three") == 11
    with (tmp_path / "three" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    seen: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        pixels = np.asarray(Image.open(tmp_path / "three" / "images" / f"{row['image']}.png"))
        assert pixels.shape == (SIZE, SIZE, 3)
        for channel, camera in enumerate(CAMERAS):
            photo = round(pixels[..., channel].mean() / 20)
            assert row[camera] == ("Dress", "Pants")[photo % 2]
            assert row["split"] == ("train", "val", "test")[photo % 3]
            seen.setdefault((camera, row["split"]), []).append(photo)
    for (_, split), photos in seen.items():
        assert sorted(photos) == [i for i in range(11) if ("train", "val", "test")[i % 3] == split]


def test_its_recipe_names_tasks_of_each_camera() -> None:
    config = load_config("three_cameras")
    assert [task["column"] for task in config.source.options["tasks"]] == list(CAMERAS)
