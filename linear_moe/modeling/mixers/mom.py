"""Mixture of memories: a router sends every token to a few of several recurrent states (arXiv 2502.13685)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, Matrices, constant, normal
from linear_moe.modeling.layers import conv
from linear_moe.modeling.layers.initializers import inverse_softplus_step, log_uniform_rate
from linear_moe.modeling.layers.linear import Linear
from linear_moe.modeling.layers.norm import GatedRMSNorm
from linear_moe.modeling.mixers.base import LinearMixer, MixerConfig
from linear_moe.modeling.mixers.checks import check_head_dims
from linear_moe.modeling.ops.fused.gates import gate
from linear_moe.modeling.ops.fused.grouping import Grouping
from linear_moe.modeling.ops.recurrences.decay import decay
from linear_moe.modeling.ops.recurrences.decay.fla import MIN_GATE
from linear_moe.modeling.ops.recurrences.delta import delta
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.options.checks import check, unused
from linear_moe.options.fields import opt


@dataclass
class MoMConfig(MixerConfig):
    type: str = opt("mom", "name of the mixer")
    memory: str = opt("gated_deltanet", "recurrence of every memory", choices=("gated_deltanet", "gla"))
    num_memories: int = opt(4, "memories that the router chooses from", ge=2, le=2**10)
    # The weights of a token's memories sum to 1: the weight of a single memory would be 1 and not train the router.
    top_k: int = opt(2, "memories per token", ge=2, le=2**10)
    shared_memory: bool = opt(True, "one more memory, to which all tokens are sent")
    single_kv_proj: bool = opt(False, "all memories share one projection of keys, values and gates")
    balance_loss: float = opt(0.01, "coefficient of the router's load-balancing loss in training; 0: off", ge=0)
    num_heads: int | None = opt(None, "heads of every memory; null: model.num_heads", ge=1, le=2**16)
    head_dim: int | None = opt(None, "size of a key head; null: hidden_size / num_heads / 2", ge=1, le=2**16)
    expand_v: float = opt(1.0, "size of a value head over head_dim", gt=0, le=64)
    conv_size: int = opt(4, "taps of the short convolutions on q, k and v", ge=1, le=2**10)
    gate_rank: int = opt(16, "with memory: gla, rank of the decay gate's projection", ge=1, le=2**20)
    gate_normalizer: float = opt(16.0, "with memory: gla, the log decay is logsigmoid(.) / gate_normalizer", gt=0)


class MemoryRouter(Linear):
    """Linear layer that computes the memories' logits in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.host.shared(self.weight).float())


class MemoryConv(conv.ShortConv):
    """ShortConv with one filter for all memories; each memory is convolved over its own tokens."""

    def forward(  # type: ignore[override]
        self, x: Tensor, grouping: Grouping, layout: TokenLayout, cache: Cache | None
    ) -> Tensor:
        """Convolves regrouped inputs `x [B, T, heads, M, D]`; the state holds the last inputs of all memories."""
        heads, memories, size = x.shape[2:]
        weight = self.weight.unflatten(0, (heads, 1, size)).expand(-1, memories, -1, -1).flatten(0, 2)
        y, state, last = x.flatten(2), None if cache is None else cache[self.name], None
        if state is not None:  # the new state is the last inputs of each memory, among its old and new tokens
            window = torch.cat([state, y.mT.to(state.dtype)], dim=-1).unflatten(1, (heads, memories, -1))
            index = grouping.counts[:, None, :, None, None] + torch.arange(self.size - 1, device=x.device)
            last = window.gather(-1, index.expand(*window.shape[:-1], -1)).flatten(1, 3)
        before = state if state is not None or self.size == 1 else grouping.before(x, self.size - 1)
        options: Any = {"cu_seqlens": layout.cu_seqlens, "norm_size": self.norm_size}
        y, _ = conv.short_conv(y, weight, None, state=before, output_state=False, **options)
        if state is not None and last is not None:
            state.copy_(last)
        return y.view(x.shape)


class MixtureOfMemories(LinearMixer):
    """Weights (for memory: gated_deltanet) are those of flash-linear-attention's `MomAttention`, with the same names,
    except that `k_proj`, `v_proj`, `b_proj` and `a_proj` are single weights instead of lists with one entry for each
    memory. Their rows are ordered by head, then memory, then channel; the shared memory (`shared_k`, ...) comes last.
    Weights of convolutions are `[C, W]` instead of `[C, 1, W]`.

    Every memory, with its convolutions, sees only the tokens that are routed to it: other tokens neither decay the
    memory nor write to it. All memories are heads of one recurrence, in which each memory has its own tokens at the
    start of a document, and neutral tokens, which change nothing, behind them.

    In flash-linear-attention's training mode, convolutions reach from one memory's tokens into the next memory's; here
    they do not.
    """

    Config = MoMConfig
    family = "delta"
    formula = "S_t^m = Theta_t^m S_{t-1}^m + f(k_t^m, v_t^m) for m chosen by t,  o_t = sum_m w_t^m (S_t^m)^T q_t^m"
    paper = "arXiv 2502.13685"

    def __init__(self, config: MoMConfig, dims: Dims, host: Host):
        super().__init__(config, dims, host)
        self.num_heads = config.num_heads or dims.num_heads
        self.heads, self.memories = host.split(self.num_heads), config.num_memories + config.shared_memory
        self.key_dim = config.head_dim or dims.hidden_size // (2 * self.num_heads)
        self.value_dim = round(self.key_dim * config.expand_v)
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        own = 1 if config.single_kv_proj else self.memories  # number of projections
        column = partial(Linear, host, dims.hidden_size, split="column", std=dims.init_std)
        whole: Any = {"split": "shared", "std": dims.init_std}
        self.gate = MemoryRouter(host, dims.hidden_size, config.num_memories, **whole, matrices=None)

        def by_memory(size: int, heads: int = self.num_heads) -> Matrices:
            return Matrices((size,) * own, repeat=heads)

        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            column(n, matrices=matrices)
            for n, matrices in (
                (keys, Matrices()),
                (own * keys, by_memory(self.key_dim)),
                (own * values, by_memory(self.value_dim)),
                (values, Matrices()),
            )
        )
        if config.memory == "gla":
            matrices = by_memory(config.gate_rank, heads=1)
            self.gk_down = Linear(host, dims.hidden_size, own * config.gate_rank, **whole, matrices=matrices)
            shape = (self.num_heads, own, self.key_dim)
            up = partial(host.parameter, *shape, axes={0: "tensor"})
            self.gk_up = host.parameter(*shape, config.gate_rank, init=normal(dims.init_std), axes={0: "tensor"})
            self.gk_bias = up(init=constant(0.0), decay=False)
        else:
            self.a_proj, self.b_proj = (column(own * self.num_heads, matrices=by_memory(1)) for _ in range(2))
            per_head = partial(host.parameter, self.num_heads, axes={0: "tensor"}, decay=False, fp32=True)
            self.A_log = per_head(init=log_uniform_rate(1e-4, 16.0))  # published: U(0, 16), where 0 has no logarithm
            self.dt_bias = per_head(init=inverse_softplus_step())
        for name, channels in {"q": keys, "k": keys, "v": values}.items():
            norm = self.key_dim if name != "v" and config.memory == "gated_deltanet" else None
            part = MemoryConv(host, channels, config.conv_size, name=f"conv_{name}", norm_size=norm)
            self.add_module(f"{name}_conv1d", part)
        self.o_norm = GatedRMSNorm(host, self.value_dim, dims.norm_eps, split="shared")
        self.o_proj = Linear(host, values, dims.hidden_size, split="row", std=dims.output_init_std)

    @classmethod
    def validate(cls, config: MoMConfig, dims: Dims, tensor: int, path: str) -> None:
        heads = config.num_heads or dims.num_heads
        size = dims.hidden_size
        check(f"{path}.num_heads", heads, lambda n: n % tensor == 0, f"must be divisible by parallel.tensor = {tensor}")
        if config.head_dim is None:
            check(
                f"{path}.num_heads",
                heads,
                lambda n: n % tensor == 0 and size % (2 * n) == 0,
                f"must divide hidden_size / 2 = {size / 2:g} unless head_dim is set",
            )
        memories = config.num_memories
        check(f"{path}.top_k", config.top_k, lambda n: n <= memories, f"must be at most num_memories = {memories}")
        head_dim = config.head_dim or size // (2 * heads)
        check_head_dims(path, head_dim, config.expand_v)
        if config.memory != "gla":
            unused(path, config, "gate_rank", "gate_normalizer", needs="set memory to gla")

    def route(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses memories for tokens `x [N, hidden]`.

        Args:
            padding: `[N, 1]` bool, tokens that do not count in the load-balancing loss.

        Returns:
            Weights of the memories `[N, M]` fp32, 0 where not chosen, and whether they are chosen, `[N, M]` bool.
        """
        config = self.config
        scores = self.gate(x).softmax(-1)
        top, index = scores.topk(config.top_k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, index, top / top.sum(-1, keepdim=True))
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
        if config.balance_loss and torch.is_grad_enabled():
            counted, sums = (t if padding is None else t.masked_fill(padding, 0) for t in (chosen, scores))
            load = self.host.activations.once(partial(self.host.sum_over_sequence, counted.sum(0)))
            tokens = load.sum() / config.top_k
            balance = config.num_memories * (load * sums.sum(0)).sum() / tokens**2
            weights = self.host.auxiliary_loss(weights, "memory_balance_loss", balance, config.balance_loss, tokens)
        if config.shared_memory:
            weights, chosen = F.pad(weights, (0, 1), value=1.0), F.pad(chosen, (0, 1), value=True)
        return weights, chosen

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        """Makes the inputs `[B, T, heads * M, D]` of the recurrence in the grouping's order, with memories as heads."""
        padding = None if layout.padding is None else layout.padding.view(-1, 1)
        weights, chosen = (t.view(layout.batch, layout.length, -1) for t in self.route(x, padding))
        grouping = Grouping(chosen, layout.cu_seqlens)
        q, k, v = (self._convolved(name, x, grouping, layout, cache) for name in "qkv")
        inputs: dict[str, Any] = {}
        if self.config.memory == "gla":
            neutral = ~grouping.filled[:, :, None, :, None]
            k = k.masked_fill(neutral, 0.0)  # convolutions reach behind a memory's last token
            inputs["g"] = self._log_decay(x, grouping).masked_fill(neutral, 0.0)
        else:
            per_head = (layout.batch, layout.length, self.heads, -1, 1)
            a, b = self.a_proj(x), self.b_proj(x)
            bias = self.dt_bias.repeat_interleave(a.shape[-1] // self.heads)
            g = gate(a, "softplus", scale=-1.0, bias=bias, log_rate=self.A_log, floor=MIN_GATE)
            for name, y in {"beta": gate(b, "sigmoid"), "g": g}.items():
                inputs[name] = grouping.collect(y.view(per_head)).squeeze(-1)
        inputs = {name: t.flatten(2, 3) for name, t in (inputs | {"q": q, "k": k, "v": v}).items()}
        return inputs | {"grouping": grouping, "weights": weights}, self.g_proj(x)

    def _convolved(self, name: str, x: Tensor, grouping: Grouping, layout: TokenLayout, cache: Cache | None) -> Tensor:
        """Computes q, k or v `[B, T, heads, M, D]` of every memory, convolved over the memory's own tokens."""
        y = self.get_submodule(f"{name}_proj")(x)
        size = self.value_dim if name == "v" else self.key_dim
        y = grouping.collect(y.view(layout.batch, layout.length, self.heads, -1, size))
        return self.get_submodule(f"{name}_conv1d")(y, grouping, layout, cache)

    def _log_decay(self, x: Tensor, grouping: Grouping) -> Tensor:
        """Computes GLA's log decay of every memory, `[B, T, heads, M, K]` fp32."""
        low = self.gk_down(x).view(*grouping.places.shape[1:], 1, -1, self.config.gate_rank)
        up, bias = (t.expand(-1, self.memories, *t.shape[2:]) for t in (self.gk_up, self.gk_bias))
        high = torch.einsum("btmr,hmkr->bthmk", grouping.collect(low).squeeze(2), up) + bias
        return gate(high, "logsigmoid", scale=1 / self.config.gate_normalizer, floor=MIN_GATE)

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        grouping: Grouping = inputs["grouping"]
        op = decay if self.config.memory == "gla" else delta
        o, state = op(
            **{name: t for name, t in inputs.items() if name not in ("grouping", "weights")},
            bounded=True,
            initial_state=states.get("state"),
            cu_seqlens=layout.cu_seqlens,
        )
        o = o.unflatten(2, (self.heads, self.memories))
        return grouping.combine(o, inputs["weights"]), {"state": state}

    def output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return self.o_proj(self.o_norm(o, gate))

    def state_shapes(self, batch: int, max_length: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        heads, history = self.heads * self.memories, self.config.conv_size - 1
        sizes = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
            f"conv_{name}": ((batch, heads * size, history), None) for name, size in sizes.items()
        }
        return shapes | {"state": ((batch, heads, self.key_dim, self.value_dim), torch.float32)}

    def recurrence_flops(self, length: int) -> float:
        states = self.num_heads * (
            self.config.top_k + self.config.shared_memory
        )  # states that a token updates and reads
        return (4.0 if self.config.memory == "gla" else 6.0) * states * self.key_dim * self.value_dim
