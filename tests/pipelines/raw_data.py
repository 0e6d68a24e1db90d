"""Small data sets in the published form of their authors, with random values."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from bench import three_cameras
from tests.pipelines.data.sources import taskonomy_files
from tests.pipelines.data.sources.array_files import write_tar

CELEBA_NAMES = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin",
    "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open",
    "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline",
    "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
]  # fmt: skip

GARMENTS = [
    "T-Shirt", "Longsleeve", "Pants", "Shoes", "Shirt", "Dress", "Outwear", "Shorts", "Hat", "Skirt",
    "Blouse",
]  # fmt: skip

ASSAYS = [
    "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma", "SR-ARE",
    "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53",
]  # fmt: skip

MOLECULES = [
    "C", "N", "O", "C#C", "C#N", "C=O", "CC", "CO", "CC#C", "CC#N", "CC=O", "NC=O", "C1CC1", "C1CO1", "CC(C)=O",
    "CC(N)=O", "NC(N)=O", "CC(C)C", "C#CC#C", "O=CC=O", "CC(=O)C#N", "N#CC(=O)C=O",
]  # fmt: skip

EMOTIONS = [
    "admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire",
    "disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief",
    "joy", "love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness",
    "surprise", "neutral",
]  # fmt: skip


def celeba_flags(rows: int) -> np.ndarray:
    """The attributes that `write_celeba` gives its rows: -1 or 1, `(rows, 40)`."""
    return np.random.default_rng(1).choice([-1, 1], (rows, len(CELEBA_NAMES)))


def write_celeba(root: Path, rows: int = 6, *, folders: Sequence[str] = ("", "", "")) -> Path:
    """CelebA: aligned images, attributes and partition.

    Args:
        folders: Folders of images, attributes and partition below the root; ("Img", "Anno", "Eval") as in the
            whole download.
    """
    images, attributes, partition = (root / folder for folder in folders)
    (images / "img_align_celeba").mkdir(parents=True)
    attributes.mkdir(exist_ok=True)
    partition.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{i:06d}.jpg" for i in range(1, rows + 1)]
    for name in names:
        pixels = rng.integers(0, 256, (218, 178, 3), np.uint8)
        Image.fromarray(pixels).save(images / "img_align_celeba" / name, quality=95)
    table = [
        f"{name} {' '.join(f'{v:2d}' for v in row)}" for name, row in zip(names, celeba_flags(rows), strict=True)
    ]
    header = [str(rows), " ".join(CELEBA_NAMES) + " "]
    (attributes / "list_attr_celeba.txt").write_text("\n".join([*header, *table]) + "\n")
    splits = [f"{name} {0 if i < rows - 2 else i - rows + 3}" for i, name in enumerate(names)]
    (partition / "list_eval_partition.txt").write_text("\n".join(splits) + "\n")
    return root


def write_taskonomy(root: Path, *, buildings: Sequence[str] = ("alpha", "beta", "gamma"), points: int = 1) -> Path:
    """Taskonomy: a PNG file of each of the five tasks for every point of view."""
    for seed, (building, point) in enumerate(product(buildings, range(points))):
        taskonomy_files.save(root, taskonomy_files.arrays(seed), building=building, point=point)
    return root


def write_clothing(root: Path, rows: int = 22) -> Path:
    """The clothing data set: every class of garment, photos of any shape."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "kids", "split"])
        for i in range(rows):
            table.writerow([f"id-{i}", GARMENTS[i % len(GARMENTS)], i % 2 == 0, ("train", "val", "test")[i % 3]])
            Image.fromarray(rng.integers(0, 256, (60, 40, 3), np.uint8)).save(root / "images" / f"id-{i}.jpg")
    return root


def write_three_cameras(root: Path) -> Path:
    """The data set that `bench.three_cameras` writes from a clothing set."""
    three_cameras.write(write_clothing(root / "photos"), root)
    return root


def write_nuclei(root: Path, rows: int = 6, side: int = 128) -> Path:
    """The nuclei data set: 8-bit images, 16-bit instance ids, and counts."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(0)
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "n_nuclei_128", "split"])
        for i in range(rows):
            ids = np.zeros((side, side), np.uint16)
            for nucleus in range(1, i + 2):
                ids[20 * nucleus - 15 : 20 * nucleus, 10:40] = nucleus
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(root / "images" / f"n{i}.png")
            Image.fromarray(ids).save(root / "masks" / f"n{i}.png")
            table.writerow([f"n{i}", i + 1, ("train", "val", "test")[i % 3]])
    return root


def write_tox21(root: Path, rows: int = 20) -> Path:
    """The Tox21 table: assays with missing labels, and the molecule."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (root / "tox21.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*ASSAYS, "mol_id", "smiles"])
        for i in range(rows):
            labels = rng.choice(["0", "1", ""], len(ASSAYS), p=[0.5, 0.3, 0.2])
            table.writerow([*labels, f"TOX{i}", "CCO" + "C" * int(rng.integers(1, 9)) + "c1ccccc1"])
    return root


def write_qm9(root: Path, rows: int = 20) -> Path:
    """MoleculeNet's table of QM9: id, molecule, rotational constants, and the properties."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    properties = ["mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298", "cv"]
    atoms = ["u0_atom", "u298_atom", "h298_atom", "g298_atom"]
    with (root / "qm9.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["mol_id", "smiles", "A", "B", "C", *properties, *atoms])
        for i in range(1, rows + 1):
            values = rng.normal(size=3 + len(properties) + len(atoms)).round(5)
            table.writerow([f"gdb_{i}", MOLECULES[i % len(MOLECULES)], *values])
    return root


def cifar100(rows: int) -> Iterator[tuple[bytes, int, int]]:
    """Images of CIFAR-100 as PNG, the class and the superclass of each."""
    rng = np.random.default_rng(0)
    for i in range(rows):
        found = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(found, "PNG")
        yield found.getvalue(), i % 100, i % 20


def write_cifar100(root: Path, rows: int = 12) -> Path:
    """CIFAR-100 as `save_to_disk` of datasets writes it."""
    import datasets

    columns = {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=[f"fine {i}" for i in range(100)]),
        "coarse_label": datasets.ClassLabel(names=[f"coarse {i}" for i in range(20)]),
    }
    held = [
        {"img": {"bytes": data, "path": None}, "fine_label": fine, "coarse_label": coarse}
        for data, fine, coarse in cifar100(rows)
    ]
    train = datasets.Dataset.from_list(held, features=datasets.Features(columns))
    datasets.DatasetDict(train=train, test=train.select(range(2))).save_to_disk(root)
    return root


def write_cifar100_webdataset(root: Path, rows: int = 12) -> Path:
    """CIFAR-100 in tar files of WebDataset."""
    samples = []
    for i, (data, fine, coarse) in enumerate(cifar100(rows)):
        labels = {"fine_label": f"fine {fine}", "coarse_label": f"coarse {coarse}"}
        samples.append((f"{i:06d}", {"png": data, "json": json.dumps(labels).encode()}))
    write_tar(root / "train-000.tar", samples)
    write_tar(root / "test-000.tar", samples[:2])
    return root


def write_goemotions(root: Path, rows: int = 12) -> Path:
    """GoEmotions: texts with ids of emotions, a file for each split."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    (root / "labels.txt").write_text("\n".join(EMOTIONS) + "\n")
    for split in ("train", "dev", "test"):
        lines = []
        for i in range(rows):
            words = rng.choice(EMOTIONS, 6)
            ids = rng.choice(len(EMOTIONS), 2, replace=False)
            lines.append(f"{' '.join(words)} {i}\t{ids[0]},{ids[1]}\t{split}{i}\n")
        (root / f"{split}.tsv").write_text("".join(lines))
    return root


def write_goemotions_minilm(root: Path) -> Path:
    """GoEmotions with the tokenizer of an encoder, whose token 0 is padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *EMOTIONS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    write_goemotions(root)
    tokenizer.save(str(root / "tokenizer.json"))
    return root
