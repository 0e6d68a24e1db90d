"""What commands print: names that are hostile, addresses with credentials, and warnings of other libraries."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from typing import Any

import pytest
import typer
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.cli.console import log, print_table, run, show
from pipelines.errors import UserError, printable

ADDRESS = "https://me:hush@mlflow.test/x?token=hush"


def fail(message: str) -> None:
    raise RuntimeError(message)


def printed(body: Any, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(typer.Exit):
        run("train", body, as_json=False, debug=False)
    return capsys.readouterr().err


@given(st.text())
@example("a\nfailed: b")
@example("\x1b]0;title\x07\x1b[2J\r\x9b2J")
@example("abc\u202edef\u2028\ud800")
def test_a_text_is_one_line_of_visible_characters(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    shown.encode()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("kind", ["error", "other error", "log", "library", "warning", "traceback"])
def test_no_line_has_credentials_or_control_characters(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process of its own
    hostile = f"task \x1b[2J\nnote: forged {ADDRESS}"

    def body() -> dict[str, Any]:
        if kind == "error":
            raise UserError(hostile, where=hostile, remedy=hostile)
        if kind == "other error":
            raise RuntimeError(hostile)
        if kind == "log":
            logging.getLogger("pipelines.x").info(hostile)
        elif kind == "library":
            logging.getLogger("library").warning("retrying %s", hostile)
        elif kind == "traceback":
            try:
                fail(hostile)
            except RuntimeError:
                logging.getLogger("library").exception("failed")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn(hostile, stacklevel=1)
        return {}

    found = printed(body, capsys)
    assert "task" in found
    assert "hush" not in found
    assert "\x1b" not in found
    if kind != "traceback":
        assert not any(line.startswith("note: forged") for line in found.splitlines())


def test_handlers_of_other_libraries_get_records_without_credentials() -> None:
    got: list[str] = []

    class Own(logging.StreamHandler):  # as MLflow has one
        def emit(self, record: logging.LogRecord) -> None:
            got.append(self.format(record))

    logger = logging.getLogger("library.own")
    logger.addHandler(handler := Own())

    def body() -> dict[str, Any]:
        logger.warning("retrying %s", ADDRESS)
        try:
            fail(ADDRESS)
        except RuntimeError:
            logger.exception("failed")
        return {}

    with pytest.raises(typer.Exit):
        run("train", body, as_json=False, debug=False)
    logger.removeHandler(handler)
    assert len(got) == 2
    assert "mlflow.test" in got[0]
    assert "Traceback" in got[1]
    assert "hush" not in "".join(got)


def test_a_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("of [red]x", [{"task": "[bold]a[/]", "value\x1b": f"b\x1b[2J\n{ADDRESS}"}])
    found = capsys.readouterr().out
    assert "[bold]a[/]" in found
    assert "[red]x" in found
    assert "\x1b" not in found
    assert "hush" not in found


@pytest.mark.parametrize("as_json", [False, True])
def test_results_go_to_stdout_unless_the_json_object_does(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> dict[str, Any]:
        log("progress")
        print_table("Values", [{"task": "a", "value": 1}], right=("value",))
        show("page: p.html")
        return {"next": None}

    with pytest.raises(typer.Exit):
        run("train", body, as_json=as_json, debug=False)
    out, err = capsys.readouterr()
    result = "Values\ntask  value\na         1\n\npage: p.html\n"
    assert "progress" in err
    assert result in (err if as_json else out)
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["done"] if as_json else out == result


def test_a_table_in_a_pipe_is_aligned_text_of_any_width(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"task": "größe", "note": "x" * 300, "end": "."}, {"task": "身長", "note": "", "end": "."}]
    print_table("Tasks", rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Tasks"
    assert lines[1].split() == ["task", "note", "end"]
    assert lines[2] == f"größe  {'x' * 300}  ."
    assert lines[3] == f"身長   {' ' * 300}  ."  # a wide character has two cells of a terminal
    assert "".join(lines).isprintable()


def test_an_answer_is_acknowledged_when_all_of_it_has_been_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []

    def body() -> dict[str, Any]:
        return {"version": 1, "answered": lambda: printed.append(capsys.readouterr().out)}

    with pytest.raises(typer.Exit):
        run("models rollback", body, as_json=True, debug=False)
    assert '"version": 1' in printed[0]
    assert "answered" not in printed[0]


def test_a_package_that_is_missing_is_named_with_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(lambda: importlib.import_module("a_package_that_is_missing.part"), capsys)
    assert "what: dmtg train needs the package a_package_that_is_missing" in shown
    assert "remedy: pip install 'dmtg[pipelines]'" in shown
    ours = printed(lambda: importlib.import_module("pipelines.attic"), capsys)
    assert "ModuleNotFoundError: No module named 'pipelines.attic'" in ours, "this is a defect, not an extra"
