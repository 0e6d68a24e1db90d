"""Three cameras, from photos of garments: `python -m bench.three_cameras CLOTHING FOLDER [PIXELS]`.

A sample is one image whose three channels are three different grey photos, like the images of three cameras in one
file. The tasks of a camera depend only on its channel. Tasks of different cameras share only general features of
photos. The recipe `three_cameras` reads the data set.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIZE = 32  # pixels of an edge
CAMERAS = ("first", "second", "third")
NO_GARMENT = ("Not sure", "Skip", "Other")


def write(clothing: Path, folder: Path, size: int = SIZE) -> int:
    """Write images and `labels.csv` in the format of `source.kind: folder`. Return the number of images.

    Args:
        clothing: The folder of the clothing set: `images/<image>.jpg`, `labels.csv`.
        folder: The output folder. Each photo is used once by each camera, within its split.
        size: Edge of the images in pixels.
    """
    with (clothing / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] not in NO_GARMENT]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    grey = {row["image"]: _grey(clothing / "images" / f"{row['image']}.jpg", size) for row in rows}
    rng = np.random.default_rng(0)
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", *CAMERAS, "split"])
        for split in ("train", "val", "test"):
            part = [row for row in rows if row["split"] == split]
            orders = [rng.permutation(len(part)) for _ in CAMERAS]
            for i, seen in enumerate(zip(*orders, strict=True)):
                name = f"{split}_{i:05d}"
                pixels = np.stack([grey[part[j]["image"]] for j in seen], axis=2)
                Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
                table.writerow([name, *(part[j]["label"] for j in seen), split])
    return len(rows)


def _grey(file: Path, size: int) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(ImageOps.fit(image.convert("L"), (size, size)))


if __name__ == "__main__":
    source, target, *pixels = sys.argv[1:]
    print(f"{write(Path(source), Path(target), *map(int, pixels))} images in {target}")
