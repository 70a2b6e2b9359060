"""Constants that the tests of our own Triton kernels share; these run on a GPU, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.tolerances import BF16_ROUNDING, BF16_SAME

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = 2 * BF16_ROUNDING if INTERPRETED else BF16_SAME  # the interpreter truncates to bf16
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs CUDA"),
]
