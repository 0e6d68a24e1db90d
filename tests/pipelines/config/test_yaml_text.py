"""YAML that would take long or fill the memory is refused; every number is checked for finiteness and size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import yaml_text
from pipelines.config.loading import load_config
from pipelines.config.yaml_text import DEEPEST, LARGEST_TEXT, load_yaml
from pipelines.errors import UserError

NAMES = "abcdefghij"
FEW_VALUES = 2_000  # the limit of one case here: as many values as the real one take seconds to parse
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise(NAMES)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name}\n  <<: [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise(NAMES)
)
REFUSED = {
    "aliases": BOMB,
    "merge keys": MERGES,
    "an alias of itself": "a: &a [*a]\n",
    "nested lists": "a: " + "[" * 100_000,
    "nested mappings": "".join(f"{' ' * i}a:\n" for i in range(300)),
    "a long text": f"name: {'x' * LARGEST_TEXT}\n",
    "many values": f"a: [{'0,' * (FEW_VALUES + 1)}]\n",
    "a date without a day": "a: 2026-02-31\n",
    "a number of many digits": f"a: {'9' * 10_000}\n",
    "an object": "a: !!python/object/apply:os.system [true]\n",
}
NUMBERS = [
    "train.learning_rate=.inf", "train.learning_rate=.nan", "train.learning_rate=1e400", "train.seed=-1",
    "train.seed=18446744073709551616", "train.seed=1.5", "network.groups=100000", "data.shuffle_mib=.inf",
    "data.shuffle_mib=1e300", "gate.entropy_weight=.nan", "gate.initial_scale=-.inf", "compare.seeds=[1, -1]",
    "sweep.groups=[100000]", "sweep.temperatures=[{start: .inf}]", "regroup.limits={a: .inf}",
    "network.options.widths=[.inf]", "network.options.widths=[99999999999999999999]", "ray.timeout_s=1e300",
    "compare.variants={a: {within: .nan}}", "ray.workers=10000000",
]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_text_that_would_take_long_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "many values":
        monkeypatch.setattr(yaml_text, "MOST_VALUES", FEW_VALUES)
    file = tmp_path / "c.yaml"
    file.write_text(REFUSED[kind])
    with pytest.raises(UserError, match="cannot read the configuration") as found:
        load_config(str(file))
    assert found.value.where == str(file)
    assert len(found.value.what) < 300
    with pytest.raises(UserError, match="the value is not YAML"):
        load_config("rooms", [f"train.epochs={REFUSED[kind]}"])


@pytest.mark.parametrize("override", NUMBERS)
def test_a_number_that_is_not_finite_or_too_large_is_refused(override: str) -> None:
    with pytest.raises(UserError) as found:
        load_config("rooms", [override])
    assert override.partition("=")[0].removesuffix(".widths").removesuffix(".seed") in found.value.what
    assert found.value.wrong_use


def test_limits_admit_what_is_used() -> None:
    config = load_config("rooms", [f"train.seed={2**63 - 1}", "network.groups=1000", "train.learning_rate=1e-12"])
    assert config.train.seed == 2**63 - 1
    deep = "[" * (DEEPEST - 2) + "]" * (DEEPEST - 2)
    assert load_yaml(f"a: {deep}") == yaml.safe_load(f"a: {deep}")
    assert load_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}
    assert load_yaml("") is None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_other_texts_are_read_as_the_safe_loader_reads_them(value: object) -> None:
    text = yaml.safe_dump(value)
    assert load_yaml(text) == yaml.safe_load(text)
