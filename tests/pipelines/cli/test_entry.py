"""The entry point of `dmtg`: versions, and what it says without the packages of its extra."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from pipelines.cli.__main__ import main
from pipelines.cli.app import app


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_is_named_in_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pipelines", package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # it cannot be imported
    monkeypatch.setattr(sys, "argv", ["dmtg", "models", "list"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == f"dmtg needs the package {package}: pip install 'dmtg[pipelines]'"


def test_versions_need_no_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(sys, "argv", ["dmtg", "--version"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name} {version(name)}" for name in ("dmtg", "torch", "ray", "mlflow")]
    monkeypatch.undo()
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout.splitlines()) == (0, lines)
