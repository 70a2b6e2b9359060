"""docs/mixers.md is what the registry says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from linear_moe.cli import main
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class

PAGE = Path(__file__).parents[3] / "docs" / "mixers.md"


def test_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixers", "--markdown"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out, "old: linear-moe mixers --markdown > docs/mixers.md"


def test_has_costs_and_options_of_all() -> None:
    page = PAGE.read_text()
    assert "\n\\* " not in page  # a mixer whose defaults do not fit the page's width
    sections = {name: page.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in MIXERS}
    for name in MIXERS:
        for field in dataclasses.fields(mixer_class(name).Config):
            assert field.name == "type" or f"\n| `{field.name}` | " in sections[name]
