"""Code by address: what is an address, what may be imported, and what is recorded of it."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

import pytest

from dmtg_core import EncoderSpec, Task, TrainSettings, addresses
from dmtg_core.addresses import CodeError, allow_code, check_code, full_name, installed, is_address, load, recorded

ADDRESS = "own_package.inner.code:double"
SOURCE = (
    "LOADED = []\n\ndef double(x):\n    return 2 * x\n\nclass Outer:\n    @staticmethod\n    def inner(): ...\n"
)


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_allowed", {})
    monkeypatch.setattr(addresses, "_loaded", {})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the Python path, with the metadata of an installed distribution and an entry point."""
    inner = tmp_path / "own_package" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("")
    (inner / "code.py").write_text(SOURCE)
    info = tmp_path / "own_dist-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-dist\nVersion: 1.2.3\n")
    (info / "top_level.txt").write_text("own_package\n")
    (info / "entry_points.txt").write_text(f"[dmtg.losses]\ndoubled = {ADDRESS}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["a:b", "a.b.c:D.e", "_x:y1"])
def test_an_address_has_a_module_and_a_name(name: str) -> None:
    assert is_address(name)


@pytest.mark.parametrize(
    "name", ["", "mlp", "a:", ":b", "a b:c", "s3://a/b", "C:\\x", "a:b:c", "1a:b", "a..b:c", "a:b\n"]
)
def test_other_names_are_none(name: str) -> None:
    assert not is_address(name)


def test_nothing_is_imported_before_it_is_allowed(package: Path) -> None:
    with pytest.raises(CodeError, match="--trust-code") as found:
        load("loss", ADDRESS)
    assert ADDRESS in str(found.value)
    assert not [name for name in sys.modules if name.startswith("own_package")]
    allow_code(ADDRESS)
    assert load("loss", ADDRESS)(4) == 8
    assert load("loss", ADDRESS) is load("loss", ADDRESS)


def test_the_record_has_package_version_and_digest_and_imports_nothing(package: Path) -> None:
    found = recorded("loss", ADDRESS)
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    assert found.to_dict() == {
        "kind": "loss", "address": ADDRESS, "distribution": "own-dist", "version": "1.2.3", "sha256": digest,
    }  # fmt: skip
    assert not [name for name in sys.modules if name.startswith("own_package")]


def test_the_record_of_imported_code_is_that_of_the_import(package: Path) -> None:
    allow_code(ADDRESS)
    load("loss", ADDRESS)
    before = recorded("loss", ADDRESS)
    (package / "own_package" / "inner" / "code.py").write_text("def double(x): ...\n")
    assert recorded("loss", ADDRESS) == before


def test_a_module_of_no_package_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lonely_module.py").write_text("def f(x): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = recorded("loss", "lonely_module:f")
    assert (found.distribution, found.version, found.package) == ("", "", "the module lonely_module")


def test_a_missing_package_is_named_with_its_version(package: Path) -> None:
    known = recorded("loss", ADDRESS).to_dict()
    for folder in list(sys.path):
        if folder == str(package):
            sys.path.remove(folder)
    with pytest.raises(CodeError, match=r"pip install 'own-dist==1\.2\.3'"):
        check_code([("loss", ADDRESS)], [known], trust=True)
    with pytest.raises(CodeError, match="the package that has own_package.inner.code"):
        check_code([("loss", ADDRESS)], [], trust=True)


def test_other_code_is_refused_with_both_versions_and_used_if_trusted(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = recorded("loss", ADDRESS).to_dict() | {"version": "1.0.0", "sha256": "0" * 64}
    allow_code(ADDRESS)
    with pytest.raises(CodeError, match=r"own-dist==1\.0\.0.*installed is own-dist==1\.2\.3"):
        check_code([("loss", ADDRESS)], [known], trust=False)
    with caplog.at_level(logging.WARNING):
        check_code([("loss", ADDRESS)], [known], trust=True)
    assert "own-dist==1.0.0" in caplog.text


def test_stored_code_needs_a_permission_of_its_own(package: Path) -> None:
    known = recorded("loss", ADDRESS).to_dict()
    with pytest.raises(CodeError, match="not imported"):
        check_code([("loss", ADDRESS)], [known], trust=False)
    with pytest.raises(CodeError, match="not imported"):  # without a record, too
        check_code([("loss", ADDRESS)], [], trust=False)
    allow_code(ADDRESS)
    check_code([("loss", ADDRESS)], [known], trust=False)
    assert not [name for name in sys.modules if name.startswith("own_package")]


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("own_package.inner.code:triple", "no attribute 'triple'"),
        ("own_package.inner.code:LOADED", "is a list"),
        ("own_package.other:f", "not installed here"),
        ("own_package.inner.broken:f", "RuntimeError: on import"),
    ],
)
def test_what_cannot_be_imported_is_named(package: Path, address: str, text: str) -> None:
    (package / "own_package" / "inner" / "broken.py").write_text("raise RuntimeError('on import')\n")
    allow_code(address)
    with pytest.raises(CodeError, match=text):
        load("loss", address)


def test_a_folder_without_a_file_of_its_own_is_a_package(package: Path) -> None:
    place = package / "own_package" / "space" / "deep"
    place.mkdir(parents=True)
    (place / "code.py").write_text(SOURCE)
    assert recorded("loss", "own_package.space.deep.code:double").distribution == "own-dist"
    assert not [name for name in sys.modules if name.startswith("own_package")]
    with pytest.raises(CodeError, match="not installed here"):
        recorded("loss", "own_package.space.other.code:double")


def test_a_name_inside_a_class_is_an_address(package: Path) -> None:
    allow_code("own_package.inner.code:Outer.inner")
    assert load("loss", "own_package.inner.code:Outer.inner")() is None


def test_an_entry_point_is_a_short_name_and_our_own_names_come_first(package: Path) -> None:
    assert full_name("loss", "doubled") == ADDRESS
    assert full_name("loss", "doubled", ("doubled",)) == "doubled"
    assert full_name("metric", "doubled") == "doubled"
    assert Task("a", "regression", loss="doubled").loss == ADDRESS


def test_unknown_names_are_refused_with_those_that_are_known(package: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown loss 'foo', expected one of mse, l1, .*doubled, or package.module:name"
    ):
        Task("a", "regression", loss="foo")
    with pytest.raises(
        ValueError, match="unknown metric 'foo', expected one of rmse, mae, r2, or package.module:name"
    ):
        Task("a", "regression", metric="foo")
    with pytest.raises(
        ValueError, match="unknown aggregator 'foo', expected one of sum, mean, .*package.module:name"
    ):
        TrainSettings(aggregator="foo")
    with pytest.raises(ValueError, match="unknown encoder 'foo', expected one of mlp, .*package.module:name"):
        EncoderSpec("foo").check()


def test_an_address_in_stored_values_is_only_a_text(package: Path) -> None:
    task = Task.from_dict(Task("a", "regression", loss=ADDRESS, metric=ADDRESS).to_dict())
    assert (task.loss, task.metric) == (ADDRESS, ADDRESS)
    assert not [name for name in sys.modules if name.startswith("own_package")]
    assert installed(addresses.Code("loss", ADDRESS)).distribution == "own-dist"
