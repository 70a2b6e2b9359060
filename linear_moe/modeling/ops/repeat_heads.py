"""Keys or queries that groups of heads share, repeated for every head and scaled by it if need be, in one pass."""

from __future__ import annotations

from torch import Tensor

from linear_moe.modeling.ops.fused import fused, upcast


def repeat_heads(x: Tensor, weight: Tensor | None = None, *, heads: int | None = None) -> Tensor:
    """`y[.., h, :] = weight[.., h] * x[.., h // (H / G), :]`, rounded once. Triton kernels on CUDA.

    Args:
        x: `[..., G, K]`.
        weight: `[..., H]`, H a multiple of G; without it, 1.
        heads: H, where there is no weight.

    Returns:
        `[..., H, K]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if weight is None:
        if heads is None or heads % x.shape[-2]:
            raise ValueError(f"heads must be a multiple of {x.shape[-2]}, got {heads}")
        if not x.is_cuda:
            return definition(x, None, heads=heads)  # autograd keeps nothing for it
    elif heads is not None or weight.shape[:-1] != x.shape[:-2] or weight.shape[-1] % x.shape[-2]:
        raise ValueError(
            f"weight must be {[*x.shape[:-2], 'a multiple of ' + str(x.shape[-2])]}, got {[*weight.shape]}, and "
            f"heads is for no weight, got {heads}"
        )
    else:
        heads = weight.shape[-1]
    return fused(definition, "repeat_heads_gpu", x, weight, heads=heads)


def definition(x: Tensor, weight: Tensor | None, *, heads: int) -> Tensor:
    """See `repeat_heads`."""
    repeated = x.repeat_interleave(heads // x.shape[-2], dim=-2)
    return repeated if weight is None else (upcast(repeated) * weight.unsqueeze(-1)).to(x.dtype)
