"""Fixtures: a small corpus of made-up text files, and its configuration."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from linear_moe.config.schema import Config
from linear_moe.options.load import from_dict

WORDS = (
    "state decay gate token expert router chunk scan head key value naïve ω λ 漢字 🙂 return def self\n    \t".split(
        " "
    )
)


def write_corpus(folder: Path, files: int = 40, seed: int = 0) -> dict[str, str]:
    """Writes text files to two folders, and returns their texts by relative name."""
    rng = random.Random(seed)
    texts = {}
    for i in range(files):
        name = f"{'ab'[i % 2]}/file_{i:03}.txt"
        texts[name] = " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + "\n"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(texts[name].encode())
    return texts


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def config_of(tmp_path: Path, texts: dict[str, str]) -> Callable[..., Config]:
    """Function that makes a config of the small corpus; its arguments override `data`, `model` and `training`."""

    def make(data: dict | None = None, model: dict | None = None, **training) -> Config:
        base = {"corpus": str(tmp_path / "corpus"), "cache": str(tmp_path / "cache"), "validation_fraction": 0.2}
        return from_dict(
            Config,
            {
                "data": base | {"tokenizer": {"type": "bytes"}} | (data or {}),
                "model": model or {},
                "training": {"sequence_length": 16, "global_batch": 8, "micro_batch": 2, "steps": 30, "eval_batches": 3}
                | training,
            },
        )

    return make
