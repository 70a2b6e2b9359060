"""The quick start with every mixer of the registry: training, resuming, export, generation by the real commands."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from linear_moe.checks.validate import validate
from linear_moe.config.load import load_config
from linear_moe.modeling.mixers.registry import MIXERS
from tests.distributed.every_mixer import CONFIG, PROMPT, SAVED, STEPS
from tests.distributed.harness import ROOT, environment

every_mixer = pytest.mark.parametrize("name", sorted(MIXERS))
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def corpus() -> dict[str, str]:
    """A small part of the standard library's sources, by file name."""
    return {path.name: path.read_text() for path in Path(json.__file__).parent.glob("*.py")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> Results:
    folder = tmp_path_factory.mktemp("every_mixer")
    (folder / "corpus").mkdir()
    for name, text in corpus.items():
        (folder / "corpus" / name).write_text(text)
    command = [sys.executable, "-m", "tests.distributed.every_mixer", str(folder), *sorted(MIXERS)]
    with (folder / "output").open("w+") as output:
        code = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=output, timeout=800
        ).returncode
        output.seek(0)
        assert code == 0, f"returned {code}:\n{output.read()[-4000:]}"
    by_mixer = {name: json.loads((folder / f"{name}.json").read_text()) for name in sorted(MIXERS)}
    shutil.rmtree(folder)
    print("seconds:", {name: round(result["seconds"], 1) for name, result in by_mixer.items()})
    return by_mixer


def losses(records: list[dict[str, Any]]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records if "event" not in record}


def byte_entropy(corpus: dict[str, str]) -> float:
    """Entropy of a single byte in nats: the smallest loss of a model that ignores all tokens before."""
    counts = Counter("".join(corpus.values()).encode())
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


@every_mixer
def test_quick_start(results: Results, corpus: dict[str, str], name: str) -> None:
    result = results[name]
    assert "error" not in result, result["error"]
    loss = losses(result["training"])
    assert list(loss) == list(range(1, STEPS + 1))
    assert loss[1] > math.log(256) - 0.5
    assert sum(loss[step] for step in range(STEPS - 9, STEPS + 1)) / 10 < byte_entropy(corpus)
    # Resuming goes on as if nothing had happened, bit for bit.
    resumed = losses(result["resumed"])
    assert resumed == {step: loss[step] for step in range(SAVED + 1, STEPS + 1)}
    validations = [
        [r["loss"] for r in result[key] if r.get("event") == "validation"] for key in ("training", "resumed")
    ]
    assert len(validations[0]) == 1 and validations[0] == validations[1]
    # Decoding with the state gives the tokens of decoding from the whole text.
    assert result["cached"]["prompts"] == [PROMPT] and len(result["cached"]["tokens"][0]) == 24
    assert result["cached"]["tokens"] == result["recomputed"]["tokens"]
    assert result["cached"]["state_bytes_per_sequence"] > 0 == result["recomputed"]["state_bytes_per_sequence"]


@every_mixer
def test_fits_the_quick_start(name: str) -> None:
    """Every mixer's defaults are valid at the quick start's own sizes, on the two ranks that the quick start uses."""
    validate(load_config(CONFIG, [f"model.mixer.type={name}"]), 2, files=False)
