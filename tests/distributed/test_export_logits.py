"""An exported model of every mixer has the logits of the training model, also when it decodes step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import linear_moe.inference.hf  # noqa: F401  registers the classes
from linear_moe.inference.export import export
from tests.distributed.harness import run
from tests.tolerances import DECODE, FP32, assert_close
from tests.unit.inference.common import CASES, VOCAB, prompt

LENGTH = 24
TOKENS = torch.tensor([prompt(LENGTH), prompt(LENGTH, seed=1)])


def config(folder: Path, case: str) -> dict[str, Any]:
    """A model of the inference tests on two tensor ranks, which also share out tokens, vocabulary and experts."""
    return {
        "run": str(folder / case),
        "model": CASES[case] | {"vocab_size": VOCAB},
        "parallel": {"tensor": 2, "expert": 2},
        "data": {"tokenizer": {"type": "bytes"}},
        "schedule": {"warmup_steps": 0},
        "training": {"sequence_length": LENGTH, "micro_batch": 2, "global_batch": 2, "dtype": "fp32"},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Run folder and logits `[B, T, V]` of every case."""
    root = tmp_path_factory.mktemp("runs")
    results = run(2, {case: ("logits", {"config": config(root, case), "tokens": TOKENS}) for case in CASES})
    by_case = {}
    for case, ranks in results.items():
        ranks = sorted(ranks, key=lambda rank: rank["first"])
        assert [rank["first"] for rank in ranks] == [0, VOCAB // 2] and all(rank["tensor_sequence"] for rank in ranks)
        by_case[case] = root / case, torch.cat([rank["logits"] for rank in ranks], -1)
    return by_case


@pytest.mark.parametrize("case", CASES)
def test_exported_logits(trained: dict[str, tuple[Path, Tensor]], case: str, tmp_path: Path) -> None:
    folder, expected = trained[case]
    assert expected.dtype == torch.float32 and expected.shape == (2, LENGTH, VOCAB)
    record = export(folder, tmp_path / "out")
    assert record["dtype"] == "float32" and record["step"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        full = model(TOKENS).logits
        assert_close(full, expected, FP32, "logits of the export against the training model's")
        out = model(TOKENS[:, :1], use_cache=True)
        steps = [out.logits]
        for t in range(1, LENGTH):
            out = model(TOKENS[:, t : t + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
    assert_close(torch.cat(steps, 1), full, DECODE, "decoding step by step against the full forward pass")
