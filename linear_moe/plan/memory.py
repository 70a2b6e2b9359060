"""Bytes that a rank of a layout needs: the only home of these formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from linear_moe.config.schema import Config, OptimizerConfig, ParallelConfig
from linear_moe.config.validate import ParallelLayout, stage_layers, tensor_sequence
from linear_moe.modeling.host import DTYPES, Host
from linear_moe.modeling.model import LanguageModel

STATE = ("weights", "gradients", "optimizer")
KINDS = (*STATE, "activations", "logits", "total")


def is_expert(parameter: nn.Parameter) -> bool:
    return "expert" in parameter.spec.axes.values()  # type: ignore[attr-defined]


class RankHost(Host):
    """Gives parameters the shapes that they have on one rank of a layout; cannot compute."""

    def __init__(self, parallel: ParallelConfig, dtype: torch.dtype):
        super().__init__(dtype, "meta")
        self.parallel = parallel

    def size(self, axis: str) -> int:
        return getattr(self.parallel, axis)


class RankModels:
    """A model's layers as one rank holds them, built once for each way of splitting parameters.

    Args:
        config: its `parallel` does not matter.
        rows: of the embedding.
    """

    def __init__(self, config: Config, rows: int):
        self.model, self.dtype, self.rows = config.model, DTYPES[config.training.dtype], rows
        self._built: dict[tuple[int, ...], LanguageModel] = {}

    def __call__(self, parallel: ParallelConfig) -> LanguageModel:
        """All layers, with embedding and head: no rank has all of them where there are pipeline stages."""
        key = (parallel.tensor, parallel.expert, parallel.expert_tensor)
        if key not in self._built:
            self._built[key] = LanguageModel(self.model, self.rows, RankHost(parallel, self.dtype))
        return self._built[key]


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of a pipeline stage, and what stands before and after them.

    Attributes:
        layers: by global number.
        logits: columns of the logits, full; 0 where there are none.
    """

    layers: dict[int, nn.Module]
    before: list[nn.Module]
    after: list[nn.Module]
    logits: int

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the model that the stage builds."""
        return [p for module in (*self.before, *self.layers.values(), *self.after) for p in module.parameters()]


def stage_chunks(model: LanguageModel, layout: ParallelLayout, stage: int) -> list[Chunk]:
    """What a rank of pipeline stage `stage` holds of `model` (from RankModels), chunk by chunk."""
    numbers = stage_layers(model.config.num_layers, layout.pipeline, stage)
    layers = {i: model.layers[str(i)] for i in numbers}
    first, last = stage == 0, stage == layout.pipeline - 1
    before, after = [model.embedding] if first else [], [model.norm, model.head] if last else []
    present = [[m for m in modules if m is not None] for modules in (before, after)]
    return [Chunk(layers, *present, model.vocab_size if last else 0)]


# -- parameters, gradients, optimizer ---------------------------------------------------------------------------------
def buffer(sizes: list[int], ranks: int, bucket: int | None) -> tuple[int, list[int]]:
    """One of the buffers that Megatron-Core's DDP lays parameters out in for the distributed optimizer.

    From the last parameter to the first, each begins at a multiple of 64 elements; a bucket ends after the parameter
    that brings it to `bucket` elements (None: after the last), padded to a multiple of 128 and of `ranks`, and each
    rank's shard of it is an equal part.

    Args:
        sizes: elements of the parameters, in the order of the model.

    Returns:
        Elements with padding, and how many of each rank's shard are parameters.
    """
    shards = [0] * ranks
    start, multiple = 0, math.lcm(ranks, 128)
    places: list[tuple[int, int]] = []

    def end_bucket(end: int) -> int:
        end = -(-end // multiple) * multiple
        share = (end - start) // ranks
        for low, high in places:
            for rank in range((low - start) // share, (high - 1 - start) // share + 1):
                shards[rank] += min(high, start + (rank + 1) * share) - max(low, start + rank * share)
        places.clear()
        return end

    end = 0
    for size in reversed(sizes):
        low = -(-end // 64) * 64
        end = low + size
        places.append((low, end))
        if bucket is not None and end - start >= bucket:
            start = end = end_bucket(end)
    return (end_bucket(end) if places else end), shards


def bucket_size(optimizer: OptimizerConfig, replicas: int, stage: int) -> int | None:
    """Elements that Megatron-Core's DDP reduces at once; None: all, which it does unless they overlap."""
    return max(40_000_000, 1_000_000 * replicas) if optimizer.overlap and stage == 0 else None


def optimizer_bytes(dtype: torch.dtype, optimizer: OptimizerConfig) -> int:
    """Per element of a parameter: Adam's two moments in fp32, and an fp32 copy of other weights."""
    return 8 if dtype == torch.float32 else 12


def state_bytes(
    config: Config, layout: ParallelLayout, chunks: list[Chunk], stage: int, place: tuple[int, int] | None = None
) -> dict[str, int]:
    """Weights, fp32 gradients and optimizer state.

    Args:
        place: rank among the replicas, outside and inside the routed experts; None: the most of any.
    """
    optimizer, totals = config.optimizer, dict.fromkeys(STATE, 0)
    for number, chunk in enumerate(chunks):
        # Dense and expert parameters have different replicas; each dtype has a buffer.
        kinds: dict[tuple[bool, torch.dtype], list[int]] = {}
        for p in chunk.parameters:
            if p.requires_grad:
                kinds.setdefault((is_expert(p), p.dtype), []).append(p.numel())
            else:
                totals["weights"] += p.numel() * p.element_size()
        for expert in (False, True):
            replicas = layout.expert_data if expert else layout.data
            state = [0] * replicas
            for (_, dtype), sizes in ((kind, sizes) for kind, sizes in kinds.items() if kind[0] == expert):
                numel, shards = sum(sizes), [sum(sizes)] * replicas
                if optimizer.distributed:
                    bucket = bucket_size(optimizer, replicas, stage) if number == 0 else None
                    numel, shards = buffer(sizes, replicas, bucket)
                totals["weights"] += numel * dtype.itemsize
                totals["gradients"] += numel * 4
                each = optimizer_bytes(dtype, optimizer)
                state = [bytes_ + each * shard for bytes_, shard in zip(state, shards, strict=True)]
            totals["optimizer"] += max(state) if place is None else state[place[expert]]
    return totals


# -- activations ------------------------------------------------------------------------------------------------------
def layer_elements(config: Config, layer: nn.Module, stream: float) -> float:
    """Elements per token that one layer keeps for its backward pass; fp32 ones count twice in a bf16 model.

    Args:
        layer: a `Layer` built for one rank.
        stream: elements per token of this rank's residual stream.
    """
    model, parallel, hidden = config.model, config.parallel, config.model.hidden_size
    wide = 4 / DTYPES[config.training.dtype].itemsize
    elements = 2 * stream + hidden  # inputs of both norms and of the mixer
    elements += layer.mixer.activation_elements()  # type: ignore[union-attr,operator]
    if not hasattr(layer.ffn, "experts"):
        return elements + hidden + 4 * model.ffn_size / parallel.tensor  # gate, up, silu(gate), product
    moe = model.moe
    elements += wide * 4 * moe.num_experts  # the router's scores
    elements += wide * stream if wide > 1 else 0  # its input, if that is a copy
    # A balanced router sends a rank as many tokens as it has. Those received are kept sorted by expert; those that did
    # not have to travel are kept as they were. Of each expert: gate and up.
    travels = parallel.expert * parallel.expert_tensor > 1
    elements += stream * parallel.expert_tensor * (moe.top_k if travels else 1)
    elements += 2 * moe.top_k * moe.expert_ffn_size * stream / hidden
    if moe.shared_ffn_size:
        elements += hidden + 4 * moe.shared_ffn_size / parallel.tensor
    return elements


def in_flight(layout: ParallelLayout, stage: int, chunks: int, micro_batches: int) -> list[int]:
    """How many forward passes of each chunk await their backward passes at most, under 1F1B, plain or interleaved."""
    stages = layout.pipeline
    if chunks == 1:
        return [min(stages - stage, micro_batches)]
    counts = [0] * chunks
    for i in range(min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, micro_batches * chunks)):
        counts[i // stages % chunks] += 1  # chunks take turns, `stages` micro-batches each
    return counts


def activation_bytes(config: Config, layout: ParallelLayout, chunks: list[Chunk], stage: int) -> dict[str, int]:
    """What backward passes hold at the peak, and what the logits of one micro-batch need."""
    training, parallel, hidden = config.training, config.parallel, config.model.hidden_size
    size = DTYPES[training.dtype].itemsize
    tokens = training.micro_batch * training.sequence_length
    stream = hidden / (parallel.tensor if tensor_sequence(parallel) else 1)
    micro_batches = training.global_batch // (training.micro_batch * layout.data)
    kept = logits = most = 0.0
    counts = in_flight(layout, stage, len(chunks), micro_batches)
    for chunk, count in zip(chunks, counts, strict=True):
        layers = [layer_elements(config, layer, stream) for layer in chunk.layers.values()]
        if training.recompute == "full":  # every layer's input, and all of the one being recomputed
            kept += count * len(layers) * stream
            most = max([most, *layers])
        else:
            kept += count * sum(layers)
        if chunk.logits:
            kept += stream + hidden  # inputs of the norm and of the head
            # The gradient takes the logits' place; over tensor ranks Megatron's loss takes them to fp32 first.
            copies = 1 if parallel.tensor == 1 or size == 4 else 1 + 4 / size
            logits = copies * chunk.logits / parallel.tensor
    return {
        "activations": math.ceil(tokens * size * (kept + most)),
        "logits": math.ceil(tokens * size * logits),
    }


def rank_bytes(config: Config, layout: ParallelLayout, model: LanguageModel, stage: int) -> dict[str, int]:
    """By KINDS, on the fullest rank of a pipeline stage; `model` from RankModels."""
    chunks = stage_chunks(model, layout, stage)
    return with_total(state_bytes(config, layout, chunks, stage) | activation_bytes(config, layout, chunks, stage))


def with_total(kinds: dict[str, int]) -> dict[str, int]:
    return kinds | {"total": sum(kinds.values())}
