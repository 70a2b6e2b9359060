"""`linear-moe mixers`: the table's numbers for every mixer are those of a model with this mixer."""

from __future__ import annotations

import json

import pytest
import torch

from linear_moe.cli import main
from linear_moe.config.schema import Config
from linear_moe.inference.cache import DecodingState
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.registry import MIXERS
from linear_moe.modeling.model import LanguageModel
from linear_moe.options.load import from_dict
from linear_moe.plan import make_plan
from linear_moe.plan import mixers as mixers_table

SIZES = ["--hidden", "128", "--heads", "4", "--length", "50"]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, object]]:
    return {name: mixers_table.describe_mixer(name, 128, 4, 50) for name in MIXERS}


def test_json(rows: dict[str, dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixers", *SIZES, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == [rows[name] for name in sorted(MIXERS)]
    for row in printed:
        assert list(row)[:6] == ["name", "family", "recurrence", "paper", "backends", "capabilities"]
        assert list(row)[6:] == ["params", "state_bytes", "problem"]
        keys = ["tensor_parallel", "sequence_parallel", "packing", "decoding"]
        assert list(row["capabilities"]) == keys
        assert row["backends"] and ("gpu" not in row["backends"] or torch.cuda.is_available())


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_costs_are_those_of_a_model(rows: dict[str, dict[str, object]], name: str) -> None:
    assert rows[name]["problem"] is None
    model = {"hidden_size": 128, "num_heads": 4, "num_layers": 2, "pattern": "LL", "mixer": {"type": name}}
    tree = from_dict(Config, {"model": model | {"ffn": "dense", "ffn_size": 8}})
    layer = make_plan(tree, 1).layers[1].params - 3 * 128 * 8 - 2 * 128
    assert rows[name]["params"] == layer
    built = LanguageModel(tree.model, 256, Host(torch.bfloat16), layers=range(1, 2))
    assert rows[name]["state_bytes"] == DecodingState.empty(built, 3, 50).bytes_per_sequence()


def test_a_width_that_defaults_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixers", "--hidden", "130", "--heads", "4", "--json"]) == 0
    gla = next(row for row in json.loads(capsys.readouterr().out) if row["name"] == "gla")
    assert gla["params"] is None and gla["state_bytes"] is None
    assert gla["problem"].startswith("model.mixer.num_heads = 4: must divide the key width 65")
    assert main(["mixers", "--hidden", "130", "--heads", "4"]) == 0
    assert "* gla: model.mixer.num_heads = 4: must divide the key width 65" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 160])
def test_tables(
    rows: dict[str, dict[str, object]],
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["mixers", *SIZES]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    for name, row in rows.items():
        assert out.count(f"\n {name} ") == 2  # in the table of recurrences, and in that of costs
        assert str(row["paper"]).removeprefix("arXiv ") in out
    assert "50 tokens" in out and "…" not in out


def test_kernels_are_listed_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for fla in (True, False):
        monkeypatch.setattr(mixers_table, "has_fla", lambda fla=fla: fla)
        assert ("gpu" in mixers_table.backends("decay")) == fla
