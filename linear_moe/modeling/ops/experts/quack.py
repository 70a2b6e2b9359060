"""The experts' GEMMs by the CuTe-DSL kernels of quack-kernels (https://github.com/Dao-AILab/quack).

Rows are gathered as they are read, and the activation, forward and backward, is computed from products that are still
in registers. The columns of `gate_up` are gates and ups in turns; projections and their gradients have the gates first,
as in the other implementations (`concat_layout`). The weights of rows are applied in `combine`, because the epilogue of
the forward GEMM cannot apply them. A kernel is compiled, and kept on disk, once for each product, dtype and
configuration, whatever the sizes; nothing is tuned.

In quack's names, A is `[M, K]`, B `[E, N, K]` and D `[M, N]`. With `cu_seqlens_k`, A is `[M, K]`, B `[N, K]` and D
`[E, M, N]`, where K are all rows. `A_idx` gathers along A's rows, or along K.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from quack.gemm import gemm
from quack.gemm_act import gemm_act
from quack.gemm_dact import gemm_dact
from torch import Tensor

from linear_moe.modeling.ops.experts.assignment import Assignment
from linear_moe.modeling.ops.experts.products import Products


class Tile(NamedTuple):
    """The configuration that a kernel is compiled for."""

    rows: int
    columns: int
    cluster: tuple[int, int]  # thread blocks, along rows and along columns, that share the inputs they read
    pingpong: bool = False  # two groups of warps take turns with tiles, instead of sharing one
    dynamic: bool = False  # the hardware hands out tiles: Blackwell only

    def options(self) -> dict[str, Any]:
        """Returns the configuration as keyword arguments of quack's GEMMs."""
        return {
            "tile_count_semaphore": None,
            "tile_M": self.rows,
            "tile_N": self.columns,
            "cluster_M": self.cluster[0],
            "cluster_N": self.cluster[1],
            "pingpong": self.pingpong,
            "is_dynamic_persistent": self.dynamic,
        }


# The fastest configurations that were measured on an H100. `columns` counts columns of D: gates and ups for `up`, pairs
# of a gate and an up for `down_backward`. It must be a multiple of 32 for `up`, and at most 208 with pingpong. In the
# products that gather rows, all but `down` and `up_backward`, clusters must be along rows.
HOPPER = {
    "up": Tile(128, 256, (2, 1)),
    "down": Tile(128, 256, (1, 2)),
    "down_backward": Tile(128, 256, (2, 1)),
    "down_gradient": Tile(256, 160, (2, 1)),
    "up_backward": Tile(128, 256, (2, 1)),
    "up_gradient": Tile(256, 128, (2, 1)),
}


@cache
def tile(product: str, device: torch.device) -> Tile:
    """Returns the configuration of a product on `device`: ours on Hopper, quack's default elsewhere."""
    if torch.cuda.get_device_capability(device)[0] == 9:
        return HOPPER[product]
    from quack.gemm_interface import default_config

    config = default_config(device)
    cluster = (config.cluster_m, config.cluster_n)
    return Tile(config.tile_m, config.tile_n, cluster, config.pingpong, config.is_dynamic_persistent)


def aligned(x: Tensor) -> Tensor:
    """Returns `x`, detached, and copied if a row does not begin at a multiple of 16 bytes, as the kernels require."""
    x, step = x.detach(), 16 // x.element_size()
    rows_begin = x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in x.stride()[:-1])
    return x if rows_begin and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def tokens_of_rows(to: Assignment) -> Tensor | None:
    """Returns `A_idx`, the token of each row, `[M]` int32; None: the tokens are the rows."""
    return None if to.slot is None else to.slot // to.top_k


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocates a tensor on the device of `like`, in `dtype` or in that of `like`."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


class Fused(Products):
    """`Products` by quack's GEMMs."""

    def up(self, x: Tensor, proj: Tensor, weights: Tensor, to: Assignment) -> tuple[Tensor, Tensor]:
        rows, ffn = weights.numel(), proj.shape[2]
        gate_up, h = empty(x, rows, 2 * ffn), empty(x, rows, ffn)
        gemm_act(
            aligned(x), aligned(proj).flatten(1, 2), gate_up, None, h, activation="swiglu",
            cu_seqlens_m=to.offsets, A_idx=tokens_of_rows(to), concat_layout=("B",), **tile("up", x.device).options(),
        )  # fmt: skip
        return gate_up, h

    def down(self, h: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        y = empty(h, len(h), proj.shape[1])
        gemm(h, aligned(proj), y, None, cu_seqlens_m=to.offsets, **tile("down", h.device).options())
        return y

    def combine(self, y: Tensor, weights: Tensor, to: Assignment) -> Tensor:
        return self.around.combine(y, to, weights)

    def gather(self, tokens: Tensor, to: Assignment) -> Tensor:
        return aligned(tokens)

    def down_backward(
        self, dy: Tensor, proj: Tensor, gate_up: Tensor, weights: Tensor, to: Assignment
    ) -> tuple[Tensor, Tensor]:
        options = tile("down_backward", dy.device).options()
        (rows, _), ffn = gate_up.shape, proj.shape[2]
        flat = weights.detach().flatten()
        h = empty(dy, rows, ffn)
        parts = empty(dy, rows, -(-ffn // options["tile_N"]), dtype=torch.float32)  # a tile of columns each
        # gate_up can be overwritten in place: the block that reads a tile of it then writes this tile, and does not use
        # the rows of other experts that it reads with the tile.
        gemm_dact(
            dy, aligned(proj).mT, gate_up, gate_up, h, activation="swiglu",
            colvec_scale=aligned(flat if to.slot is None else flat.index_select(0, to.slot)), colvec_reduce=parts,
            cu_seqlens_m=to.offsets, A_idx=tokens_of_rows(to), **options,
        )  # fmt: skip
        return h, self.around.slot_sums(parts, weights, to)

    def down_gradient(self, dy: Tensor, h: Tensor, to: Assignment) -> Tensor:
        dproj = empty(h, len(to.counts), dy.shape[1], h.shape[1])
        gemm(
            dy.T, h.T, dproj, None, cu_seqlens_k=to.offsets, A_idx=tokens_of_rows(to),
            **tile("down_gradient", h.device).options(),
        )  # fmt: skip
        return dproj

    def up_backward(self, gate_up: Tensor, proj: Tensor, to: Assignment) -> Tensor:
        dx = empty(gate_up, len(gate_up), proj.shape[3])
        gemm(
            gate_up, aligned(proj).flatten(1, 2).mT, dx, None, cu_seqlens_m=to.offsets, concat_layout=("B",),
            **tile("up_backward", dx.device).options(),
        )  # fmt: skip
        return dx

    def up_gradient(self, gate_up: Tensor, x: Tensor, to: Assignment) -> Tensor:
        dproj = empty(gate_up, len(to.counts), 2, gate_up.shape[1] // 2, x.shape[1])
        gemm(
            aligned(x).T, gate_up.T, dproj.flatten(1, 2).mT, None, cu_seqlens_k=to.offsets, A_idx=tokens_of_rows(to),
            concat_layout=("out",), **tile("up_gradient", x.device).options(),
        )  # fmt: skip
        return dproj
