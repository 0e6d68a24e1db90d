"""The words that the glossary replaces do not come back, neither in code nor in documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import ROOT

# pattern → what to write instead, see docs/reference/glossary.md
REPLACED = {
    r"tellers?|notices|keepers?": "event log, emit, event writer, events",
    r"hand(?:s|ed|ing)? over|handovers?": "publish a run",
    r"judg(?:e|es|ed|ing)|fairness": "evaluate, leakage check",
    r"nights|(?:a|one|each|the|last) night|night's": "nightly run, dated data set",
    r"contest(?:ant)?s?|standings|rivals?": "method, comparison, results, alternative",
    r"tasks (?:that|which) read the same|reading[ _]overlap": "feature overlap",
    r"undecided": "uniform gate",
    r"learn(?:s|ed|ing)? on (?:from|by)|learn_on": "distil from",
    r"restless(?![\"=])|at rest|comes? to rest": "converged, noise of the validation score",
    r"rehears\w+": "dry run",
    r"answer costs|costs of an answer": "inference cost",
    r"preflight|beforehand": "grouping signal, run identity",
    r"errands?|outbox": "pending write, background writer",
    r"lasting error": "permanent error",
    r"anew": "again, from scratch",
    r"at hand": "available",
    r"the same words|its words again": "the same command",
    r"goes on from|going on from": "resumes from",
    r"plain runs?": "runs of naive MTL",
    r"error [−-]\d": "gain, positive is better",
}
SUFFIXES = {".py", ".md", ".html", ".js", ".css", ".yaml", ".toml"}
FOLDERS = ("dmtg_core", "pipelines", "docs", "cluster", "examples", "bench", "tests")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ray_config.yaml", "pyproject.toml", "mkdocs.yml")


def texts() -> list[Path]:
    """All files with sentences, except this one."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted({*found, *(ROOT / name for name in FILES)} - {Path(__file__).resolve()})


def pattern(words: str) -> re.Pattern[str]:
    """Whole words, also as parts of an identifier, in any case; a line break counts as a space."""
    spaced = words.replace(" ", r"\s+")
    return re.compile(rf"(?<![a-z])(?:{spaced})(?![a-z])", re.IGNORECASE)


@pytest.mark.parametrize("words", REPLACED)
def test_a_replaced_word_is_not_used(words: str) -> None:
    found = []
    for path in texts():
        text = path.read_text(encoding="utf-8")
        found += [
            f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: {match.group()}"
            for match in pattern(words).finditer(text)
        ]
    assert not found, f"write {REPLACED[words]} instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("words", "text"), [("at rest", "it is at\nrest"), ("anew", "Anew."), ("restless", "self._restless()")]
)
def test_the_patterns_find_what_they_are_for(words: str, text: str) -> None:
    assert pattern(words).search(text)
    assert not pattern(words).search("renewed, data restored at breast height")
