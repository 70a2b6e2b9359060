"""Channel mixers: dense SwiGLU and mixture of experts."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.moe.experts import Experts
from linear_moe.modeling.moe.overlap import Branch
from linear_moe.modeling.moe.router import Router
from linear_moe.modeling.tokens import TokenLayout


class SwiGLU(nn.Module):
    """Dense FFN `down(silu(gate(x)) * up(x))`: this rank's tokens `[n, D]` -> `[n, D]`."""

    def __init__(self, dims: Dims, ffn_size: int, host: Host):
        super().__init__()
        self.host = host
        self.gate_proj = Linear(host, dims.hidden_size, ffn_size, split="column", std=dims.init_std)
        self.up_proj = Linear(host, dims.hidden_size, ffn_size, split="column", std=dims.init_std)
        self.down_proj = Linear(host, ffn_size, dims.hidden_size, split="partial", std=dims.output_init_std)

    def forward(self, x: Tensor, layout: TokenLayout | None = None) -> Tensor:
        x = self.host.activations.transient("norm", self.host.enter, x)
        return self.host.leave(self.inside(x))

    def inside(self, x: Tensor) -> Tensor:
        """Maps all tokens `[N, D]` to this rank's term `[N, D]` of a sum over tensor ranks; does not communicate."""
        activations = self.host.activations
        product = partial(activations.region, "activation", _activate)
        return self.down_proj(activations.transient("activation", product, self.gate_proj(x), self.up_proj(x)))


def _activate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class MoE(nn.Module):
    """Mixture of experts: router -> dispatch -> experts -> combine, plus the shared expert; `[n, D]` -> `[n, D]`.

    Weights have the same meaning as in Hugging Face's Mixtral, Qwen2-MoE, DeepSeek-V2 and -V3 blocks.

    With `overlap_shared_expert`, a GPU computes the shared expert's matrix products on a second stream while the main
    stream runs dispatch, experts and combine. The tensor-parallel communication of the shared expert does not overlap:
    it is issued before dispatch and after combine, on the main stream, which also orders the communication of both, so
    that every layout is safe. In training, the backward pass of the shared expert overlaps the backward passes of
    combine and experts; before the backward pass of dispatch, DDP adds up its gradients on the main stream.
    """

    def __init__(self, config: ModelConfig, dims: Dims, host: Host):
        super().__init__()
        moe = config.moe
        self.router = Router(moe, dims.hidden_size, dims.init_std, dims.layer, host)
        self.dispatcher = host.dispatcher(moe)
        self.experts = Experts(moe, dims.hidden_size, dims.init_std, dims.output_init_std, host)
        self.shared_expert = SwiGLU(dims, moe.shared_ffn_size, host) if moe.shared_ffn_size else None
        self.shared_expert_gate = Linear(host, dims.hidden_size, 1, std=dims.init_std) if moe.shared_gate else None
        self.host, self.overlap = host, moe.overlap_shared_expert

    def forward(self, x: Tensor, layout: TokenLayout | None = None) -> Tensor:
        weights, index = self.router(x, layout)
        branch = None
        if self.shared_expert is not None:
            whole = self.host.activations.transient("norm", self.host.enter, x)
            branch = Branch(self.shared_expert.inside, whole, self.overlap)
        received = self.dispatcher.dispatch(x, weights, index, self.router.limited)
        if branch is not None:
            branch.start()
        y = self.dispatcher.combine(self.experts(*received))
        if branch is None:
            return y
        shared = self.host.leave(branch.join())
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x).sigmoid() * shared
        return y + shared


def build_ffn(kind: str, config: ModelConfig, dims: Dims, host: Host) -> nn.Module:
    """Builds the channel mixer called `kind`: "moe" or "dense"."""
    return MoE(config, dims, host) if kind == "moe" else SwiGLU(dims, config.ffn_size, host)
