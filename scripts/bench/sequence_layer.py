"""Gated DeltaNet layer of a sequence on several ranks, forward and backward, in several ways, for sequence.py.

    alone       every rank has a sequence of its own, and nothing is sent
    ours        this repository's sequence parallelism
    fla         flash-linear-attention's context parallelism, of its recurrence and of its convolutions
    fla_padded  as fla, with key heads padded to a multiple of 64, as our op gives them to fla's kernels
    ulysses     all-to-all from tokens to heads, whole sequences in convolutions and recurrence, all-to-all back
All ways have the same projections, gates, gated norm and weights. Gradients of weights are not added up over ranks:
data parallelism does this, in the same way for all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from launcher import start_peak, used_gib
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.config.schema import Config
from linear_moe.layout.sequence import PieceOrder, order_of, padded_length
from linear_moe.modeling.host import DTYPES, Host, initialize
from linear_moe.modeling.mixers.gated_deltanet import GatedDeltaNet
from linear_moe.modeling.mixers.registry import mixer_config
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.ops.backends import import_fla, pad_keys, tiled
from linear_moe.modeling.ops.fused.short_conv import short_conv
from linear_moe.modeling.tokens import Cache, TokenLayout
from linear_moe.training.sequence.cut import cut, share, split
from linear_moe.training.step import sequence_line, token_layout

TOLERANCE = {"bf16": 3e-2, "fp32": 1e-4}


class _AllToAll(torch.autograd.Function):
    """All-to-all of `x [ranks, ...]`: block r is sent to rank r, and block r of the result comes from rank r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.forward(ctx, gradient.contiguous(), ctx.group), None


class Ulysses(GatedDeltaNet):
    """Gated DeltaNet with DeepSpeed-Ulysses' exchange (arXiv 2309.14509) around convolutions and recurrence.

    Pieces must be contiguous.
    """

    group: dist.ProcessGroup

    def start(self, config: Config) -> None:
        line = sequence_line(config)
        assert line is not None and line.group is not None
        self.group, self.ranks, self.rank = line.group, line.order.size, line.rank
        assert self.heads % self.ranks == 0 and self.v_heads % self.ranks == 0
        self.heads, self.v_heads = self.heads // self.ranks, self.v_heads // self.ranks

    def to_heads(self, x: Tensor) -> Tensor:
        """Exchanges `x [1, T / ranks, C]`, channels by head, for this rank's heads `[1, T, C / ranks]`."""
        blocks = x[0].unflatten(1, (self.ranks, -1)).transpose(0, 1).contiguous()
        return _AllToAll.apply(blocks, self.group).flatten(0, 1).unsqueeze(0)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Exchanges heads for tokens; the inverse of `to_heads`."""
        blocks = _AllToAll.apply(x[0].unflatten(0, (self.ranks, -1)).contiguous(), self.group)
        return blocks.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def projected(self, name: str, x: Tensor, layout: TokenLayout, cache: Cache | None) -> Tensor:
        y = self.to_heads(self.get_submodule(f"{name}_proj")(x).view(1, layout.length, -1))
        conv: Any = self.get_submodule(f"{name}_conv1d")
        weight = conv.weight.chunk(self.ranks)[self.rank]
        options = {"activation": conv.activation, "output_state": False, "norm_size": conv.norm_size}
        return short_conv(y, weight, None, **options)[0]

    def project(self, x: Tensor, layout: TokenLayout, cache: Cache | None) -> tuple[dict[str, Any], Tensor]:
        inputs, gate = super().project(x, layout, cache)
        gates = torch.stack([inputs["beta"].float(), inputs["g"].float()], -1)  # [1, T / ranks, H, 2]
        beta, g = self.to_heads(gates.flatten(2)).unflatten(2, (-1, 2)).unbind(-1)
        return inputs | {"beta": beta.to(inputs["beta"].dtype), "g": g}, gate

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        o, finals = super().recurrence(inputs, layout, states)
        return self.to_tokens(o.flatten(2)).unflatten(2, (-1, self.value_dim)), finals


class FlaContextParallel(GatedDeltaNet):
    """Gated DeltaNet with flash-linear-attention's context parallelism (`cp_context`); pieces must be contiguous."""

    @staticmethod
    def size(key_dim: int) -> int:
        return key_dim

    def start(self, config: Config) -> None:
        line, length = sequence_line(config), padded_length(config)
        assert line is not None
        offsets = torch.tensor([0, length])
        self.context = import_fla("ops.cp").build_cp_context(
            offsets.cuda(), group=line.group, conv1d_kernel_size=self.config.conv_size, cu_seqlens_cpu=offsets
        )

    def projected(self, name: str, x: Tensor, layout: TokenLayout, cache: Cache | None) -> Tensor:
        y = self.get_submodule(f"{name}_proj")(x).view(1, layout.length, -1)
        conv: Any = self.get_submodule(f"{name}_conv1d")
        convolve = import_fla("modules.causal_conv1d").causal_conv1d
        return convolve(y, weight=conv.weight, activation=conv.activation, cp_context=self.context)[0]

    def recurrence(self, inputs: dict[str, Any], layout: TokenLayout, states: Cache) -> tuple[Tensor, Cache]:
        size = self.size(self.key_dim)
        padded = {name: pad_keys(inputs[name], -1, size) for name in "qk"}
        run = import_fla("ops.gated_delta_rule").chunk_gated_delta_rule
        scale = self.key_dim**-0.5
        o, _ = run(**inputs | padded, scale=scale, use_qk_l2norm_in_kernel=True, cp_context=self.context)
        return o, {}


class FlaPadded(FlaContextParallel):
    """FlaContextParallel with key heads padded to a multiple of 64."""

    @staticmethod
    def size(key_dim: int) -> int:
        return tiled(key_dim)


MIXERS: dict[str, type[GatedDeltaNet]] = {"fla": FlaContextParallel, "fla_padded": FlaPadded, "ulysses": Ulysses}


def build(way: str, config: Config, device: torch.device) -> GatedDeltaNet:
    """Builds the layer for one way; weights are equal in all ways and on all ranks."""
    host = Host(dtype=DTYPES[config.training.dtype], device=device)
    settings: Any = mixer_config("gated_deltanet")
    mixer = MIXERS.get(way, GatedDeltaNet)(settings, layer_dims(config.model, 0), host)
    initialize(mixer, host, config.training.seed)
    if isinstance(mixer, Ulysses | FlaContextParallel):
        mixer.start(config)
    return mixer


def one_pass(mixer: GatedDeltaNet, x: Tensor, dy: Tensor, layout: TokenLayout) -> tuple[Tensor, ...]:
    """Runs forward and backward on `x, dy [tokens, hidden]`: output, gradients of x and of all parameters."""
    y = mixer(x, layout)
    return (y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], dy))


def relative(actual: Tensor, expected: Tensor) -> Tensor:
    """Sums of squares `[2]` of the difference, and of `expected`."""
    expected = expected.double()
    return torch.stack([(actual.double() - expected).square().sum(), expected.square().sum()])


def differences(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], shares: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Relative errors |actual - expected| / |expected| of output, tokens' gradient, and worst parameter's gradient.

    `actual` is this rank's part of the pass of all ranks, `expected` the pass on one rank, and `shares` this rank's
    share of the expected output and gradient of tokens. Collective.
    """
    sums = torch.stack([relative(own, part) for own, part in zip(actual[:2], shares, strict=True)])
    dist.all_reduce(sums)
    parts = [x.double() for x in actual[2:]]
    for part in parts:
        dist.all_reduce(part)
    parameters = torch.stack([relative(own, part) for own, part in zip(parts, expected[2:], strict=True)])
    ratios = [float(x) for x in (sums[:, 0] / sums[:, 1]).sqrt()]
    return {
        "output": ratios[0],
        "tokens": ratios[1],
        "parameters": float((parameters[:, 0] / parameters[:, 1]).max()) ** 0.5,
    }


def timed(run: Callable[[], Any], device: torch.device, seconds: float, most: int = 20) -> list[float]:
    """Milliseconds of each of so many passes as take about `seconds`, after three others. Collective.

    All passes are queued at once, so that the device does not wait for the host.
    """

    def passes(count: int) -> list[float]:
        if device.type != "cuda":
            times = [time.perf_counter()]
            for _ in range(count):
                run()
                times.append(time.perf_counter())
            return [1e3 * (end - begin) for begin, end in pairwise(times)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairwise(events)]

    first = passes(3)[-1]
    count = torch.tensor(max(3, min(most, round(1e3 * seconds / first))), device=device)
    dist.broadcast(count, 0)
    return passes(int(count))


def measure(config: Config, way: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Measures one way of the layer; `config` has parallel.sequence ranks and a micro-batch of one sequence."""
    length, line = padded_length(config), sequence_line(config)
    assert line is not None
    if way in ("fla", "fla_padded") and device.type != "cuda":
        return {"skipped": "flash-linear-attention's kernels need a GPU"}
    order = order_of(config.parallel) if way == "ours" else PieceOrder(line.order.size)
    own_cut = cut(1, length, order, line.rank)
    generator = torch.Generator(device).manual_seed(config.training.seed)
    whole = [torch.randn(1, length, config.model.hidden_size, generator=generator, device=device) for _ in range(2)]
    whole = [x.to(DTYPES[config.training.dtype]) for x in whole]
    x, dy = (share(part, own_cut).flatten(0, 1).contiguous() for part in whole)
    x.requires_grad_()
    layout = TokenLayout(1, length // order.size)
    if way == "ours":
        tokens = torch.zeros(1, length, dtype=torch.int64)
        batch = {"tokens": tokens, "labels": tokens, "loss_mask": tokens, "positions": torch.arange(length)[None]}
        batch = split(batch, order, line.rank, length)
        layout = token_layout(batch | {"positions": batch["positions"].to(device)}, line)
    mixer = build(way, config, device)
    row: dict[str, Any] = {}
    if way != "alone":
        one = build("alone", config, device)
        wanted = one_pass(one, whole[0][0].requires_grad_(), whole[1][0], TokenLayout(1, length))
        y, d_x = (share(t.unsqueeze(0), own_cut).flatten(0, 1) for t in wanted[:2])
        row["differences"] = differences(one_pass(mixer, x, dy, layout), wanted, (y, d_x))
        row["agrees"] = max(row["differences"].values()) < TOLERANCE[config.training.dtype]
        del one, wanted, y, d_x
    del whole
    start_peak()
    row["ms_of_passes"] = timed(lambda: one_pass(mixer, x, dy, layout), device, seconds)
    return row | {"milliseconds": statistics.median(row["ms_of_passes"]), "peak_gib": used_gib()["peak"]}
