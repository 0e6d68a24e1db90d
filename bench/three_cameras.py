"""Photos of garments as three cameras would see them: `python -m bench.three_cameras CLOTHING FOLDER`.

A sample is one image whose three channels are three different photos in grey, as where cameras are read into one
file. The tasks of a camera depend on its channel alone, so that those of different cameras share nothing but what
all photos have in common. The recipe `three_cameras` reads it.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIZE = 32
CAMERAS = ("first", "second", "third")
NO_GARMENT = ("Not sure", "Skip", "Other")


def write(clothing: Path, folder: Path) -> int:
    """Images and `labels.csv` in `folder`, in the format of `source.kind: folder`; how many.

    Args:
        clothing: The folder of the clothing set: `images/<image>.jpg`, `labels.csv`.
        folder: Where to write. Every photo is seen once by every camera, within its split.
    """
    with (clothing / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] not in NO_GARMENT]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    grey = {row["image"]: _grey(clothing / "images" / f"{row['image']}.jpg") for row in rows}
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


def _grey(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(ImageOps.fit(image.convert("L"), (SIZE, SIZE)))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    print(f"{write(source, target)} images in {target}")
