"""The platform layer. Every test runs in a fresh process, because `install` changes torch for good."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")
def test_stand_ins() -> None:
    done = python(
        """
        from linear_moe.training import platform
        platform.install()
        import torch
        zeros, moved = torch.zeros, __import__("megatron.core.tensor_parallel.mappings", fromlist=["_"])
        repaired = moved._reduce
        platform.install()
        assert torch.zeros is zeros and moved._reduce is repaired, "installed twice"
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device="meta").device.type == "meta"
        x = torch.zeros(1)
        assert x.type() == "torch.FloatTensor", "CUDA type names outside the optimizer"
        torch.cuda.manual_seed(7)
        a = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(torch.rand(3), a)
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")
def test_must_come_first() -> None:
    done = python(
        """
        import megatron.core
        from linear_moe.training import platform
        platform.install()
        """
    )
    assert done.returncode != 0 and "before megatron.core is imported" in done.stderr


@pytest.mark.parametrize("first", ["linear_moe.inference.hf", "linear_moe.training.platform"])
def test_export_after_install(first: str, tmp_path: Path) -> None:
    """After `install`, device contexts, which transformers relies on, and type hints on `torch.cuda.Stream` work."""
    done = python(
        f"""
        import importlib
        importlib.import_module("{first}")
        from linear_moe.training import platform
        platform.install()
        import torch
        with torch.device("meta"):
            assert torch.tensor([]).is_meta and torch.zeros(1).is_meta
        from pathlib import Path
        from linear_moe.inference.export import export
        from tests.unit.inference.common import write_run
        run = Path("{tmp_path}/run")
        write_run(run, "gla", steps=(10,))
        assert export(run, run / "out")["tensors"] > 0
        """
    )
    assert done.returncode == 0, done.stderr
