"""Links between our pages lead to files and headings that are there, and every page is linked to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md")])


def prose(text: str) -> str:
    """A page without its fenced blocks and what is in backticks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    """Yields the targets of a page's links and pictures, those on the web left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if not re.match(r"https?:", target):
            yield target


def broken(page: Path) -> Iterator[str]:
    """Yields the links of a page that lead nowhere."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield f"{page}: {target}"


def test_links_lead_somewhere() -> None:
    assert len(PAGES) > 20
    assert [line for page in PAGES for line in broken(page)] == []


def test_every_page_is_linked_to() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in links(page)}
    alone = [p for p in ROOT.glob("docs/**/*.md") if p not in linked and p.name != "index.md"]
    assert alone == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A b: c, `d_e`\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md#a-b-c-d_e) [2](b.md#no-heading) [3](c.md) [4](#x) [5](https://x.org) `[6](d.md)` ![7](e.svg)\n"
    )
    assert [line.partition(": ")[2] for line in broken(page)] == ["b.md#no-heading", "c.md", "#x", "e.svg"]
