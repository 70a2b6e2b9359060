"""Keys or queries that groups of heads share, repeated for every head and scaled by it, in one pass."""

from __future__ import annotations

from torch import Tensor

from linear_moe.modeling.ops.fused import fused, upcast


def repeat_heads(x: Tensor, weight: Tensor) -> Tensor:
    """`y[.., h, :] = weight[.., h] * x[.., h // (H / G), :]`, rounded once. Triton kernels on CUDA.

    Args:
        x: `[..., G, K]`.
        weight: `[..., H]`, H a multiple of G.

    Returns:
        `[..., H, K]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if weight.shape[:-1] != x.shape[:-2] or weight.shape[-1] % x.shape[-2]:
        raise ValueError(
            f"weight must be {[*x.shape[:-2], 'a multiple of ' + str(x.shape[-2])]}, got {[*weight.shape]}"
        )
    return fused(definition, "repeat_heads_gpu", x, weight)


def definition(x: Tensor, weight: Tensor) -> Tensor:
    """See `repeat_heads`."""
    repeated = x.repeat_interleave(weight.shape[-1] // x.shape[-2], dim=-2)
    return (upcast(repeated) * weight.unsqueeze(-1)).to(x.dtype)
