"""`linear-moe plan`: what a configuration costs, from its model built on the meta device; no GPU, no groups."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linear_moe.config.load import load_config
from linear_moe.config.schema import Config, ParallelConfig
from linear_moe.config.validate import (
    ParallelLayout,
    parallel_layout,
    recomputed,
    smallest_world,
    stage_layers,
    tensor_sequence,
    validate,
)
from linear_moe.config.vocabulary import vocab_size
from linear_moe.modeling.host import DTYPES, Host
from linear_moe.modeling.model import LanguageModel
from linear_moe.modeling.ops.linear_cross_entropy import BLOCK_ELEMENTS
from linear_moe.modeling.pattern import resolve_layers

KINDS = ("weights", "gradients", "optimizer", "activations", "total")


class RankHost(Host):
    """Gives parameters the shapes that they have on one rank of a layout; cannot compute."""

    def __init__(self, parallel: ParallelConfig, dtype: torch.dtype):
        super().__init__(dtype, "meta")
        self.parallel = parallel

    def size(self, axis: str) -> int:
        return getattr(self.parallel, axis)


@dataclass(frozen=True)
class LayerPlan:
    mixer: str
    ffn: str
    params: int
    active_params: int


@dataclass(frozen=True)
class Plan:
    """Parameters are counted once over all ranks; memory is that of the rank that needs most.

    Attributes:
        active_params: those that one token meets: of the routed experts, top_k.
        forward_flops: per token, at training.sequence_length; training costs three times that.
    """

    layers: list[LayerPlan]
    total_params: int
    active_params: int
    active_params_without_embeddings: int
    forward_flops: float
    vocab_size: int
    layout: ParallelLayout
    memory: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        layout = self.layout
        sizes = {axis: len(groups[0]) for axis, groups in layout.groups.items()}
        return {
            "total_params": self.total_params,
            "active_params": self.active_params,
            "active_params_without_embeddings": self.active_params_without_embeddings,
            "flops_per_token": 3 * self.forward_flops,
            "forward_flops_per_token": self.forward_flops,
            "vocab_size": self.vocab_size,
            "layers": [{"mixer": p.mixer, "ffn": p.ffn, "params": p.params} for p in self.layers],
            "memory_per_rank_bytes": self.memory,
            "world": layout.world,
            "parallel": sizes,
            "groups": layout.groups,
        }


def make_plan(config: Config, world: int | None = None) -> Plan:
    """The plan for `world` ranks (None: the fewest possible); raises ConfigError when the config cannot run on them."""
    world = smallest_world(config.parallel) if world is None else world
    validate(config, world, files=False)
    layout = parallel_layout(config, world)
    rows = vocab_size(config)
    model = LanguageModel(config.model, rows, Host(DTYPES[config.training.dtype], "meta"))
    total, active = _count(model, config)
    outside = sum(p.numel() for name in ("embedding", "head") for p in _parameters(getattr(model, name)))
    layers = [
        LayerPlan(layer.mixer.type, layer.ffn, *_count(model.layers[str(i)], config))
        for i, layer in enumerate(resolve_layers(config.model))
    ]
    stages = [_stage_memory(config, layout, rows, stage) for stage in range(layout.pipeline)]
    memory = max(stages, key=lambda kinds: kinds["total"])
    flops = _forward_flops(model, config)
    return Plan(layers, total, active, active - outside, flops, rows, layout, memory)


def flops_per_token(config: Config) -> float:
    """Model FLOPs per trained token, forward and backward, without recomputation; over all ranks' shares.

    Two FLOPs per active weight that takes part in a matrix product (the embedding's lookup is none) and what the mixers
    declare for their recurrences at training.sequence_length; the backward pass costs twice the forward pass.
    """
    model = LanguageModel(config.model, vocab_size(config), Host(DTYPES[config.training.dtype], "meta"))
    return 3 * _forward_flops(model, config)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


def _is_expert(parameter: nn.Parameter) -> bool:
    return "expert" in parameter.spec.axes.values()  # type: ignore[attr-defined]


def _active(parameter: nn.Parameter, config: Config) -> int:
    """Elements of `parameter` that one token meets."""
    moe = config.model.moe
    return parameter.numel() * moe.top_k // moe.num_experts if _is_expert(parameter) else parameter.numel()


def _count(module: nn.Module, config: Config) -> tuple[int, int]:
    """(total, active) parameters."""
    parameters = _parameters(module)
    return sum(p.numel() for p in parameters), sum(_active(p, config) for p in parameters)


def _forward_flops(model: LanguageModel, config: Config) -> float:
    lookup = None if config.model.tie_embeddings or model.embedding is None else model.embedding.weight
    products = sum(_active(p, config) for p in model.parameters() if p.dim() >= 2 and p is not lookup)
    length = config.training.sequence_length
    return 2.0 * products + sum(layer.mixer.recurrence_flops(length) for layer in model.layers.values())  # type: ignore[union-attr,operator]


# -- memory -----------------------------------------------------------------------------------------------------------
def _stage_memory(config: Config, layout: ParallelLayout, rows: int, stage: int) -> dict[str, int]:
    """Bytes by kind on a rank of one pipeline stage."""
    first, last = stage == 0, stage == layout.pipeline - 1
    host = RankHost(config.parallel, DTYPES[config.training.dtype])
    layers = stage_layers(config.model.num_layers, layout.pipeline, stage)
    model = LanguageModel(config.model, rows, host, layers, first, last)

    weights = gradients = optimizer = 0
    for p in model.parameters():
        weights += p.numel() * p.element_size()
        if not p.requires_grad:
            continue
        gradients += p.numel() * 4  # Megatron's DDP accumulates in an fp32 buffer
        state = 8 if p.dtype == torch.float32 else 12  # Adam's two moments, and an fp32 copy of other weights
        replicas = layout.expert_data if _is_expert(p) else layout.data
        optimizer += math.ceil(p.numel() * state / (replicas if config.optimizer.distributed else 1))
    kinds = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": _activations(config, layout, model, stage),
    }
    return kinds | {"total": sum(kinds.values())}


def _activations(config: Config, layout: ParallelLayout, model: LanguageModel, stage: int) -> int:
    """Estimate of what backward passes hold at the peak: micro-batches in flight under 1F1B, and one set of logits."""
    training, parallel = config.training, config.parallel
    size = DTYPES[training.dtype].itemsize
    tokens = training.micro_batch * training.sequence_length
    stream = config.model.hidden_size / (parallel.tensor if tensor_sequence(parallel) else 1)
    modules, concerned = recomputed(config)
    kept, again = 0.0, 0.0
    for index, layer in model.layers.items():
        layer_modules = modules if int(index) in concerned else frozenset()
        elements, largest = layer_activation_elements(config, layer, stream, layer_modules)
        kept, again = kept + size * elements, max(again, size * largest)
    micro_batches = training.global_batch // (training.micro_batch * layout.data)
    per_token, head = min(layout.pipeline - stage, micro_batches) * kept, 0.0
    if model.norm is not None:
        logits = tokens * model.vocab_size / parallel.tensor
        per_token += size * (stream + config.model.hidden_size)
        if "logits" in modules:  # those of a block; the gradient of the head's input is summed in fp32
            head = size * min(BLOCK_ELEMENTS, logits) + 4 * tokens * config.model.hidden_size
        else:
            # The gradient takes their place; over tensor ranks Megatron's loss copies to fp32 and keeps a softmax.
            head = logits * (size if parallel.tensor == 1 else size + 4 + 4)
    return math.ceil(tokens * per_token + max(head, tokens * again))  # the logits are gone when layers go backward


def layer_activation_elements(
    config: Config, layer: nn.Module, stream: float, modules: frozenset[str] = frozenset()
) -> tuple[float, float]:
    """What one layer keeps for its backward pass; fp32 elements count twice in a bf16 model.

    Args:
        layer: a `Layer` built for one rank.
        stream: elements per token of this rank's residual stream.
        modules: those computed again, as `Activations` names them.

    Returns:
        Elements per token that it keeps, and most that the backward pass makes again at a time.
    """
    model, parallel, hidden = config.model, config.parallel, config.model.hidden_size
    wide = 4 / DTYPES[config.training.dtype].itemsize
    mixer: Any = layer.mixer
    core = mixer.core_elements()
    inside = {"mixer": mixer.activation_elements(), "ffn": 0.0}  # of both halves, besides the norm's output
    normed = {"mixer": float(hidden), "ffn": float(hidden)}  # that output, as it is used
    parts = {"core": ("mixer", core)}  # that can be left out of them
    if hasattr(layer.ffn, "experts"):
        moe = model.moe
        # A balanced router sends a rank as many tokens as it has. Those received are kept sorted by expert; those that
        # did not have to travel are kept as they were. Of each expert: gate and up.
        travels = parallel.expert * parallel.expert_tensor > 1
        received = stream * parallel.expert_tensor * (moe.top_k if travels else 1)
        # The router's input, if that is a copy; the experts'; the shared expert's, if that is another.
        normed["ffn"] = (wide * stream if wide > 1 else 0) + (0 if travels else received)
        normed["ffn"] += hidden if moe.shared_ffn_size and (travels or parallel.tensor > 1) else 0
        gate_up = 2 * moe.top_k * moe.expert_ffn_size * stream / hidden
        inside["ffn"] = wide * 4 * moe.num_experts + (received if travels else 0) + gate_up
        parts["experts"] = "ffn", gate_up
    dense = (moe.shared_ffn_size if hasattr(layer.ffn, "experts") else model.ffn_size) / parallel.tensor
    inside["ffn"] += 4 * dense  # gate, up, silu(gate), product
    parts["activation"] = "ffn", 2 * dense
    if "layer" in modules:
        return stream, 2 * stream + sum(inside.values()) + sum(normed.values())
    kept, again = 2 * stream, [0.0]  # inputs of both norms
    for half in ("mixer", "ffn"):
        left_out = {name: elements for name, (of, elements) in parts.items() if of == half and name in modules}
        if half in modules:
            kept += 0 if "norm" in modules else stream
            again.append(normed[half] + inside[half])
            continue
        kept += inside[half] - sum(left_out.values()) + (0 if "norm" in modules else normed[half])
        again.append(max([0.0, *left_out.values()]) + (normed[half] if "norm" in modules else 0))
    return kept, max(again)


# -- command ----------------------------------------------------------------------------------------------------------
def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    plan = make_plan(config, args.world)
    if args.json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        show(plan, config, args.config)
    return 0


def human(number: float, unit: str = "", base: int = 1000) -> str:
    """3 significant digits with a prefix: 2.49 B parameters, 1.96 GFLOP, 4.63 GiB (base 1024)."""
    prefixes = ("", "k", "M", "G", "T", "P") if unit else ("", "k", "M", "B", "T")
    power = 0
    while number >= base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    prefix = prefixes[power].upper() + "i" if base == 1024 and power else prefixes[power]
    digits = max(0, 2 - int(math.log10(number))) if power else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def show(plan: Plan, config: Config, title: str) -> None:
    """The plan as tables on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)

    def show_table(name: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, show_header=bool(columns[0]))
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row, style="bold" if row[0] in ("total", "active without embeddings") else "")
        console.print(f"[bold cyan]{escape(name)}[/]")
        console.print(table)

    layers = [(str(i), p.mixer, p.ffn, human(p.params), human(p.active_params)) for i, p in enumerate(plan.layers)]
    columns = ("layer", "mixer", "ffn", "parameters", "active per token")
    show_table(f"{title}: {len(layers)} layers, {config.model.pattern}", columns, layers)

    length = config.training.sequence_length
    totals = [
        ("parameters", human(plan.total_params)),
        ("active per token", human(plan.active_params)),
        ("active without embeddings", human(plan.active_params_without_embeddings)),
        ("vocabulary", f"{plan.vocab_size:,}"),
        ("forward per token", human(plan.forward_flops, "FLOP")),
        ("training per token", human(3 * plan.forward_flops, "FLOP")),
    ]
    show_table(f"Model, at sequence length {length}", ("", ""), totals)

    groups = []
    for axis, ranks in plan.layout.groups.items():
        members = " ".join(map(str, ranks[0][:6])) + (" ..." if len(ranks[0]) > 6 else "")
        groups.append((axis, str(len(ranks[0])), str(len(ranks)), members))
    show_table(f"Process groups, world size {plan.layout.world}", ("axis", "size", "groups", "first group"), groups)

    memory = [(kind, human(plan.memory[kind], "B", 1024)) for kind in KINDS]
    show_table("Memory of the fullest rank; activations are an estimate", ("", ""), memory)
