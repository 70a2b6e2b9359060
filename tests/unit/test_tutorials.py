"""Every page of docs/tutorials does what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tutorials import PAGES, ROOT, Block, Page, Wrong, blocks, missing


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The outcome of every page, all run by one program: importing takes longer than most pages."""
    folder = tmp_path_factory.mktemp("tutorials")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LINEAR_MOE_")}
    environment |= {"COLUMNS": "200", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.unit.tutorials", str(folder), *PAGES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {page: json.loads(Path(folder, f"{page}.json").read_text()) for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[page]
    assert not result["error"], result["error"]
    assert sum(result["ran"].values()) == len(list(blocks((ROOT / "docs" / "tutorials" / page).read_text()))) > 3
    assert result["ran"].get("bash", 0) + result["ran"].get("python", 0) > 2


def test_there_are_pages() -> None:
    assert set(PAGES) >= {"your_data.md", "your_yaml.md", "choose_a_layout.md", "debug_a_run.md", "python_api.md"}


def test_lines_are_looked_for_in_order() -> None:
    output = "a 1\n  b 2.5 c\nd\n"
    assert missing("a 1\nb ... c\n", output) is None
    assert missing("...\nd", output) is None
    assert missing("d\na 1", output) == "a 1"
    assert missing("a", output) == "a"


WRONG = {
    "no command": [Block(1, "bash", "ls\n")],
    "a failure that is not shown": [Block(1, "bash", "linear-moe check none.yaml\n"), Block(2, "python", "1")],
    "another output": [Block(1, "python", "print(1)"), Block(2, "text", "2\n")],
    "another error": [Block(1, "", "$ linear-moe check none.yaml\nlinear-moe: some words\n")],
    "an unknown language": [Block(1, "rust", "fn main() {}")],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_so_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page()
    *before, last = WRONG[name]
    for block in before:
        page.run(block)
    with pytest.raises(Wrong):
        page.run(last)


def test_what_is_so_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page()
    for kind, text in [
        ("yaml", "# a.yaml\ntraining: {stepz: 1}\n"),
        ("bash", "linear-moe check a.yaml  # a remark\n"),
        ("text", "linear-moe: training.stepz: ...\n"),
        ("python", "x = 3\n"),
        ("python", "print(x)\n"),
        ("text", "3\n"),
    ]:
        page.run(Block(1, kind, text))
    assert page.ran == {"yaml": 1, "bash": 1, "text": 2, "python": 2}
