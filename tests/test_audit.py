"""`make audit` finds an insecure pin, and says when it could not ask the database."""

from __future__ import annotations

import sys

import pytest
from packaging.version import Version

from tests import audit


def test_no_stored_advisory_applies_to_the_lock() -> None:
    found = audit.pins(audit.LOCK.read_text(encoding="utf-8"))
    assert {"torch", "ray", "mlflow"} <= set(found)
    assert audit.insecure(found) == []


def test_an_insecure_pin_is_named() -> None:
    found = audit.pins("pillow==9.0.0 \\\n    --hash=sha256:0\ntorch==2.6.0\n")
    assert found == {"pillow": Version("9.0.0"), "torch": Version("2.6.0")}
    assert audit.insecure(found) == ["pillow==9.0.0 is insecure (CVE-2025-48379): use 11.3.0 or newer"]


@pytest.mark.parametrize(
    ("code", "answered"),
    [
        ("raise SystemExit(0)", 0),
        ("import sys; print('Found 1 known vulnerability', file=sys.stderr); raise SystemExit(1)", 1),
        ("raise SystemExit('cannot connect')", None),
        ("print('a could not be audited\\n' * 1000)", None),
    ],
)
def test_an_answer_of_the_database_is_told_from_none(code: str, answered: int | None) -> None:
    assert audit.database((sys.executable, "-c", code))[0] == answered


def test_without_pip_audit_the_stored_advisories_are_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = audit.database
    monkeypatch.setattr(audit, "database", lambda: ask(("no-such-command",)))
    assert audit.main() == 0
    assert "stored advisories only" in capsys.readouterr().out
