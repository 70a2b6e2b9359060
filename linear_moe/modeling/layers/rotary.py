"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.modeling.ops.fused.rotary import rotate as rotate
from linear_moe.modeling.tokens import TokenLayout


def token_positions(layout: TokenLayout, device: torch.device) -> Tensor:
    """Positions of the layout's tokens, `[B or 1, T]` int64."""
    return torch.arange(layout.length, device=device).unsqueeze(0) if layout.positions is None else layout.positions


def rotary_angles(positions: Tensor, base: float, size: int) -> Tensor:
    """Rotary angles `[B, T, 1, size / 2]` fp32 at `positions [B, T]`."""
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    return (positions.float().unsqueeze(-1) * frequencies).unsqueeze(2)


def rotations(layout: TokenLayout, device: torch.device, base: float, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B or 1, T, 1, size / 2]` fp32 of the rotary angles at the layout's positions, for `rotate`."""
    angles = rotary_angles(token_positions(layout, device), base, size)
    return angles.cos(), angles.sin()
