"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.fused.rotary import rotate as rotate
from linear_moe.modeling.tokens import TokenLayout


def token_positions(layout: TokenLayout, device: torch.device) -> Tensor:
    """The layout's positions, `[B or 1, T]`."""
    return torch.arange(layout.length, device=device).unsqueeze(0) if layout.positions is None else layout.positions


def rotary_angles(positions: Tensor, base: float, size: int) -> Tensor:
    """`positions [B, T]` -> angles `[B, T, 1, size / 2]` in fp32."""
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    return (positions.float().unsqueeze(-1) * frequencies).unsqueeze(2)


def rotations(layout: TokenLayout, device: torch.device, base: float, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at the layout's positions, as `rotate` takes them: `[B or 1, T, 1, size / 2]` fp32."""
    angles = rotary_angles(token_positions(layout, device), base, size)
    return angles.cos(), angles.sin()
