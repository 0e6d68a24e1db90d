"""The site is built with warnings as errors; nothing in it is dead, missing, or loaded from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown.extensions.toc import slugify

import dmtg_core
from tests.docs.pages import OF_THE_SITE, name_of
from tests.paths import ROOT

# what is loaded with a page, as (tag, attribute); a link that is followed is none of it
LOADED = {
    ("script", "src"),
    ("img", "src"),
    ("link", "href"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}
ON_GITHUB = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md",
             *OF_THE_SITE]  # fmt: skip


class Page(HTMLParser):
    """Links, ids and loaded files of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            if name in ("href", "src", "data") and value:
                self.links.append(value)
                if (tag, name) in LOADED:
                    self.loaded.append(value)


# mkdocs; the cells of notebooks, which take as long as all else, are shown and not run
UNRUN = "from docs.notebooks import _Cells; _Cells.outputs = lambda *_: []; import mkdocs.__main__ as m; m.cli()"


def built(folder: Path, *mkdocs: str) -> Path:
    """A folder with the site."""
    words = [sys.executable, *mkdocs, "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, without the outputs of notebooks."""
    return built(tmp_path_factory.mktemp("site"), "-c", UNRUN)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    # the page for addresses that do not exist has links of a server's root
    return {
        file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html") if file.name != "404.html"
    }


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 30
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.is_file(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].ids | {"__skip"}, (
                    f"{file.relative_to(site)}: {link}"
                )


def test_nothing_is_loaded_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        away = [address for address in page.loaded if urlsplit(address).netloc]
        assert not away, f"{file.relative_to(site)}: {away}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?https?:", sheet.read_text(encoding="utf-8")), sheet


def test_pages_say_something_and_no_marker_is_left(site: Path, pages: dict[Path, Page]) -> None:
    for file in pages:
        text = file.read_text(encoding="utf-8")
        assert "<!-- generated" not in text
        assert len(re.sub(r"<[^>]+>", "", text.split("<article", 1)[1].split("</article", 1)[0]).split()) > 60, (
            file
        )


def test_formulas_need_no_script(site: Path) -> None:
    text = (site / "explanation" / "method.html").read_text(encoding="utf-8")
    assert text.count("<math ") >= 6
    assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", text)


@pytest.mark.soak
def test_the_notebook_was_run(tmp_path: Path) -> None:
    text = (built(tmp_path, "-m", "mkdocs") / "examples" / "digits.html").read_text(encoding="utf-8")
    shown = text.split("<article", 1)[1].split("</article", 1)[0]
    for output in (
        "GroupedEstimator",
        "dmtg-groups",
        "group 1: ",
        "score on the test rows: 0.",
        "mean_test_score",
    ):
        assert output in re.sub(r"<code>.*?</code>", "", shown, flags=re.DOTALL), output
    assert shown.count('class="dataframe"') == 4


def test_every_public_name_of_the_library_is_in_its_reference(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}
    root = Path(dmtg_core.__file__).parent
    modules = {
        ".".join(file.relative_to(root.parent).with_suffix("").parts) for file in root.rglob("[a-z]*.py")
    } - {"dmtg_core.checkpoint"}  # for models that earlier versions registered
    assert len(modules) > 30
    assert modules <= names
    tails = {name.rpartition(".")[2] for name in names}
    assert set(dmtg_core.__all__) - {"AUGMENTATIONS", "AGGREGATORS", "ENCODERS", "Metrics"} <= tails


@cache
def anchors(page: Path) -> set[str]:
    """Those of the headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slugify(heading, "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", ON_GITHUB, ids=name_of)
def test_links_lead_somewhere_in_the_repository_too(page: Path) -> None:
    for target, anchor in re.findall(
        r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")
    ):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), target
        if anchor and "<!-- generated" not in place.read_text(encoding="utf-8"):
            assert anchor in anchors(place), f"{target}#{anchor}"
