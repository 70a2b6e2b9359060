"""Bytes of a rank: weights, gradients and optimizer state, which it always holds, and the total with activations."""

from __future__ import annotations

import math

import torch
from torch import nn

from linear_moe.config.schema import Config, OptimizerConfig
from linear_moe.layout.optimizer import state_names
from linear_moe.layout.processes import ProcessMesh
from linear_moe.modeling.host import DTYPES, spec_of
from linear_moe.plan.activations import activation_bytes
from linear_moe.plan.ranks import RankChunk, RankModels, is_expert, rank_chunks

STATE = ("weights", "gradients", "optimizer")
KINDS = (*STATE, "activations", "logits", "total")


def optimizer_bytes(parameter: nn.Parameter, optimizer: OptimizerConfig) -> int:
    """Bytes of optimizer state per element of a parameter: its moments, and an fp32 copy unless the weight is fp32."""
    names = state_names(spec_of(parameter), optimizer.type)
    return len(names) * DTYPES[optimizer.moments].itemsize + (0 if parameter.dtype == torch.float32 else 4)


def buffer(
    sizes: list[int], costs: list[int], ranks: int, bucket: int | None = None, alone: frozenset[int] = frozenset()
) -> tuple[int, list[int]]:
    """Sizes of one buffer in which Megatron-Core's DDP lays parameters out for the distributed optimizer.

    Parameters are placed from the last to the first, and each begins at a multiple of 64 elements. A bucket ends after
    the parameter that brings it to `bucket` elements (None: after the last parameter). Its size is padded to a multiple
    of 128 and of `ranks`, and every rank's shard is an equal part of the bucket.

    Args:
        sizes: elements of each parameter, in the order of the model.
        costs: bytes of optimizer state per element of each parameter.
        ranks: ranks over which every bucket is sharded.
        alone: indices in `sizes` of parameters that have a bucket of their own.

    Returns:
        Elements of the buffer with padding, and for every rank the bytes of optimizer state of its shards.
    """
    shards = [0] * ranks
    start, multiple = 0, math.lcm(ranks, 128)
    places: list[tuple[int, int, int]] = []

    def end_bucket(end: int) -> int:
        end = -(-end // multiple) * multiple
        share = (end - start) // ranks
        for low, high, cost in places:
            for rank in range((low - start) // share, (high - 1 - start) // share + 1):
                own = min(high, start + (rank + 1) * share) - max(low, start + rank * share)
                shards[rank] += cost * own
        places.clear()
        return end

    end = 0
    for i in reversed(range(len(sizes))):
        low = -(-end // 64) * 64
        if i in alone and places:
            start = low = end_bucket(low)
        end = low + sizes[i]
        places.append((low, end, costs[i]))
        if i in alone or (bucket is not None and end - start >= bucket):
            start = end = end_bucket(end)
    return (end_bucket(end) if places else end), shards


def bucket_size(optimizer: OptimizerConfig, replicas: int, stage: int, chunk: int) -> int | None:
    """Elements after which Megatron-Core's DDP ends a bucket, which it reduces at once; None: one bucket has all."""
    return max(40_000_000, 1_000_000 * replicas) if optimizer.overlap and stage == chunk == 0 else None


def state_bytes(
    config: Config, layout: ProcessMesh, chunks: list[RankChunk], stage: int, place: tuple[int, int] | None = None
) -> dict[str, int]:
    """Bytes, by STATE, of the weights, fp32 gradients and optimizer state of a rank of pipeline stage `stage`.

    Args:
        chunks: the stage's chunks as the rank holds them.
        place: the rank's number among the replicas of parameters outside, and inside, the routed experts; None: the
            optimizer state is the largest of any replica.
    """
    optimizer, totals = config.optimizer, dict.fromkeys(STATE, 0)
    for expert, replicas in ((False, layout.replicas), (True, layout.expert_data)):  # experts differ in replicas
        state = [0] * replicas
        for number, chunk in enumerate(chunks):
            buffers: dict[torch.dtype, list[nn.Parameter]] = {}  # DDP makes a buffer for each dtype
            for p in chunk.parameters:
                if is_expert(p) == expert and p.requires_grad:
                    buffers.setdefault(p.dtype, []).append(p)
                elif is_expert(p) == expert:
                    totals["weights"] += p.numel() * p.element_size()
            for dtype, parameters in buffers.items():
                sizes, costs = [p.numel() for p in parameters], [optimizer_bytes(p, optimizer) for p in parameters]
                if optimizer.distributed:
                    alone = frozenset(i for i, p in enumerate(parameters) if any(p is q for q in chunk.alone))
                    bucket = bucket_size(optimizer, replicas, stage, number)
                    numel, shards = buffer(sizes, costs, replicas, bucket, alone)
                else:
                    numel = sum(sizes)
                    shards = [sum(size * cost for size, cost in zip(sizes, costs, strict=True))] * replicas
                totals["weights"] += numel * dtype.itemsize
                totals["gradients"] += numel * 4
                state = [a + b for a, b in zip(state, shards, strict=True)]
        totals["optimizer"] += max(state) if place is None else state[place[expert]]
    return totals


def rank_bytes(config: Config, layout: ProcessMesh, models: RankModels, stage: int) -> dict[str, int]:
    """Bytes by KINDS on the fullest rank of a pipeline stage."""
    chunks = rank_chunks(config, models(config.parallel), stage)
    activations = activation_bytes(config, layout, chunks, stage, models.split_needs(config.parallel))
    return with_total(state_bytes(config, layout, chunks, stage) | activations)


def with_total(kinds: dict[str, int]) -> dict[str, int]:
    return kinds | {"total": sum(kinds.values())}
