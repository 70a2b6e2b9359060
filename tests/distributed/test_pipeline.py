"""Pipelines = one process: uneven and interleaved stages, tied embeddings, tensors that cross layers, other splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from tests.distributed.harness import run
from tests.distributed.test_parallel_training import gradients
from tests.tolerances import FP32, FP32_GRADIENT_FLOOR, assert_close, assert_gradients_close
from tests.unit.mixers.common import variants

STEPS, SAVED = 10, 3


def config(model: dict[str, Any], parallel: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A tiny model of four layers in fp32, eight sequences a step in micro-batches of two."""
    tree: dict[str, Any] = {
        "model": {
            "hidden_size": 16,
            "num_layers": 4,
            "num_heads": 2,
            "pattern": "LLLL",
            "ffn_size": 32,
            "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 16},
        },
        "training": {"sequence_length": 16, "micro_batch": 2, "global_batch": 8, "dtype": "fp32"},
        # Adam's first steps are signs of the gradients, and rounding decides the sign of one that vanishes.
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "data": {"tokenizer": {"type": "bytes"}},
        "parallel": parallel,
    }
    for name, section in {"model": model, **sections}.items():
        tree[name] = tree.get(name, {}) | section
    return tree


def families() -> dict[str, str]:
    """The registry's first mixer of every family, and every one that leaves tensors to other layers."""
    found: dict[str, str] = {}
    for name in sorted(MIXERS):
        found.setdefault(mixer_class(name).family, name)
    return found


MODELS: dict[str, dict[str, Any]] = {
    family: {"mixer": {"type": name, **variants(name)[0]}, "ffn": "dense"} for family, name in families().items()
}
MODELS |= {
    "moe-tied": {"tie_embeddings": True, "moe": {"shared_ffn_size": 16, "expert_bias": True, "global_aux_loss": 0.01}},
    "dense-tied": {"tie_embeddings": True, "ffn": "dense"},
    "crossing": {"mixer": {"type": "rwkv7"}, "ffn": "dense"},
    # RWKV-7 from the second layer on, and not in the third.
    "late-crossing": {"pattern": "NLNL", "mixer": {"type": "rwkv7", "expand_v": 2.0}, "ffn": "dense"},
    "hybrid": {"pattern": "LNLL", "symbols": {"N": {"ffn": "dense"}}},
}
