"""What this machine and its Python environment offer. Nothing is imported to find out, except torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch


@dataclass(frozen=True)
class Machine:
    """Versions are None where the package is not installed.

    Attributes:
        device: name of the GPU, or "cpu".
        devices: GPUs that this process sees, or 0.
        grouped_mm: whether torch has a grouped GEMM.
    """

    device: str
    devices: int
    torch: str
    grouped_mm: bool
    megatron_core: str | None
    triton: str | None
    flash_linear_attention: str | None
    transformer_engine: str | None

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items() if v not in (None, False))


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@cache
def machine() -> Machine:
    """This machine."""
    cuda = torch.cuda.is_available()
    return Machine(
        device=torch.cuda.get_device_name() if cuda else "cpu",
        devices=torch.cuda.device_count() if cuda else 0,
        torch=torch.__version__,
        grouped_mm=hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm"),
        megatron_core=_version("megatron-core"),
        triton=_version("triton"),
        flash_linear_attention=_version("flash-linear-attention", "fla-core"),
        transformer_engine=_version("transformer-engine"),
    )
