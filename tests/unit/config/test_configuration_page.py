"""docs/configuration.md is what the configuration's fields say, and `linear-moe options` lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linear_moe.cli import main
from linear_moe.config.schema import Config
from linear_moe.modeling.mixers.registry import MIXERS

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dictionary by dotted path; those of mixers by `type` alone."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            kind = value.get("type") in MIXERS
            yield from [(f"{path}{key}", value["type"])] if kind else leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(["options", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_page_is_current(run: Any) -> None:
    assert run("--markdown") == (0, PAGE.read_text(), ""), "old: linear-moe options --markdown > docs/configuration.md"


def test_every_option_is_on_the_page_and_in_the_list_with_its_default(run: Any) -> None:
    listed = {row["path"]: row for row in json.loads(run("--json")[1])}
    symbols = {"model.symbols.NAME.mixer": None, "model.symbols.NAME.ffn": None}
    assert {path: row["default"] for path, row in listed.items()} == dict(leaves(Config().to_dict())) | symbols
    rows = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    for path, row in listed.items():
        section, _, name = path.rpartition(".")
        assert row["doc"] and f"\n| `{name}` | " in rows.get(section, PAGE.read_text()), path


def test_rows_say_what_fields_say(run: Any) -> None:
    (row,) = json.loads(run("schedule.type", "--json")[1])
    assert row["default"] == "cosine" and row["choices"] == ["cosine", "wsd", "constant"] and row["variants"] is None
    (row,) = json.loads(run("data.validation_fraction", "--json")[1])
    assert (row["type"], row["bounds"]) == ("float", [">= 0", "<= 0.5"])
    (row,) = (row for row in json.loads(run("model", "--json")[1]) if row["path"] == "model.mixer")
    assert row["default"] == "gla" and row["variants"] == sorted(MIXERS)


def test_for_people(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run("training.steps") == (0, "  training.steps=200  (int, >= 1)\n    optimizer steps\n", "")
    out = run("optimizer")[1]
    assert "  optimizer.moments=fp32  (one of fp32, bf16)\n    dtype of AdamW's moments" in out
    assert "\noptimizer.muon: For type: muon." in out  # a section inside
    assert "training.steps" not in out and max(map(len, out.splitlines())) <= 60
    assert run()[1].count("\n  ") >= len(dict(leaves(Config().to_dict())))


def test_options_of_mixers(run: Any) -> None:
    assert "  model.mixer.expand_k=" in run("model.mixer")[1]  # of the default, gla
    for path in ("model.mixer", "model.attention", "model.symbols.M.mixer"):
        out = run(path, "--type", "mamba2")[1]
        assert f"  {path}.state_size=128  (int, >= 1, <= 65536)\n" in out and "expand_k" not in out
    assert run("model.mixer.state_size", "--type", "mamba2")[1].startswith("  model.mixer.state_size=128")


WRONG = {
    "training.stepz": "training.stepz: unknown key of training; did you mean 'steps'?",
    "trainin": "trainin: unknown key of the config; did you mean 'training'?",
    "training.steps.x": "training.steps.x: training.steps is a single option",
    "model.mixer.state_size": "unknown key of model.mixer",
    "model.symbols.M.mixer.x": "model.symbols.M.mixer.x: ",
    "model.mixer --type glu": "model.mixer.type = 'glu': unknown mixer; did you mean 'gla'?",
    "training --type gla": "--type = 'gla': does nothing here",
    "training.steps --type gla": "--type = 'gla': does nothing here",
    "model --markdown": "--markdown: ",
}


@pytest.mark.parametrize("words", WRONG)
def test_mistakes_are_one_line(words: str, run: Any) -> None:
    code, out, err = run(*words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("linear-moe: ") and WRONG[words] in err
