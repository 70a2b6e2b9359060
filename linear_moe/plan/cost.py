"""Estimate of the seconds of a training step, for ranking layouts, by a model simple enough to check by hand.

The slowest pipeline stage sets the pace. One micro-batch, forward and backward, costs the stage the sum of

- compute: the FLOPs of its layers at EFFICIENCY of the GPU's peak, and the head's at HEAD_SPEED times that speed. A
  layer takes at least LAYER_SECONDS, in which the host launches its kernels. Recomputed FLOPs count again. t tensor
  ranks are only t**TENSOR_SPEED times as fast as one, because their matrix products are thinner, and they have
  TENSOR_LAUNCHES times as many launches;
- weights: reading weights in both directions, and writing and adding up gradients in fp32, at MEMORY_EFFICIENCY of the
  memory's bandwidth;
- tensor: in each pass, every tensor-parallel region gathers its tokens and scatters its sums;
- expert: in each pass, every MoE layer sends its tokens to experts and back. With the dispatcher "alltoall", the device
  also idles for WAIT_SECONDS in every layer, because the host must know how many tokens are sent;
- sequence: the messages between ranks that share out sequences (`traffic`), less the time that local work hides, and
  the local work that only those messages need. Causal attention may cost one rank more than others: `compute` includes
  the excess;
- pipeline: activations are sent to the next stage, and gradients back.

A step takes the time of all its micro-batches, and of the pipeline's bubble: (stages - 1) / chunks micro-batches. Two
terms are added once a step. Data: the replicas sum fp32 gradients and, with the distributed optimizer, gather new
weights; with optimizer.overlap, only the part counts that does not fit into the last backward pass or the first forward
pass. Optimizer: its state is read and written once.

A collective of n ranks moves (n - 1) / n of its data through each rank, over the links of the node or, between nodes,
over the network adapters of the members in a node. It takes LATENCY, and one step for every hop of NCCL's ring:
LINK_STEP within a node, NETWORK_STEP to the next node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linear_moe.config.schema import Config
from linear_moe.gpus import GPU
from linear_moe.layout.flops import Flops
from linear_moe.layout.pipeline import HEAD_SPEED
from linear_moe.layout.processes import ProcessMesh
from linear_moe.layout.recompute import recomputed
from linear_moe.layout.sequence import padded_length, rank_tokens
from linear_moe.modeling.host import DTYPES
from linear_moe.modeling.moe.config import expert_dispatcher
from linear_moe.plan.memory import optimizer_bytes
from linear_moe.plan.needs import SequenceNeeds
from linear_moe.plan.network import Cluster, Group
from linear_moe.plan.ranks import RankChunk, is_expert
from linear_moe.plan.traffic import LayerTraffic, SequenceSplit, Speed, layer_exchange

EFFICIENCY = 0.35
MEMORY_EFFICIENCY = 0.5
LAYER_SECONDS = 7e-3
TENSOR_SPEED = 0.7
TENSOR_LAUNCHES = 1.3
WAIT_SECONDS = 4e-3


@dataclass(frozen=True)
class StageCost:
    """Seconds of one pipeline stage.

    Attributes:
        micro_batch: seconds of one micro-batch, forward and backward, by the kinds that the module lists.
        data: seconds a step in which replicas sum gradients and gather weights.
        optimizer: seconds a step in which the optimizer updates weights.
    """

    micro_batch: dict[str, float]
    data: float
    optimizer: float


def speed(gpu: GPU, tensor: int) -> Speed:
    """Speed of one GPU, and of `tensor` tensor-parallel GPUs together, at the efficiencies of this module."""
    rate = gpu.peak_tflops * 1e12 * EFFICIENCY
    return Speed(rate, rate * tensor**TENSOR_SPEED, MEMORY_EFFICIENCY * gpu.memory_bandwidth)


def layer_seconds(
    config: Config,
    number: int,
    layer: Any,
    flops: Flops,
    group: Group,
    needs: SequenceNeeds | None,
    split: SequenceSplit,
) -> tuple[float, LayerTraffic]:
    """Seconds of one layer's compute for a micro-batch, and its exchanges between the ranks of a sequence.

    Args:
        number: index of the layer in the model.
        layer: the layer as one rank holds it.
        flops: FLOPs of the whole model.
        group: ranks that share out a sequence.
        needs: exchanges that the layer needs; None: sequences are not cut into pieces.
    """
    tokens, length, parts = rank_tokens(config), padded_length(config), flops.layers[number]
    tensor = config.parallel.tensor
    fast, launches = speed(group.cluster.gpu, tensor), LAYER_SECONDS * (TENSOR_LAUNCHES if tensor > 1 else 1)
    once, again = parts["mixer"] + parts["ffn"], flops.again(number, recomputed_in(config, number))
    passes = 3 + again / once  # in units of a forward pass; the backward pass costs two
    compute = max(passes * tokens * once / fast.together, launches * passes / 3)
    if needs is None:
        return compute, LayerTraffic()
    core = layer.mixer.recurrence_flops
    exchange = layer_exchange(needs, split, group, core, length, fast)
    behind = passes * tokens * parts["core"] * (exchange.imbalance - 1) / fast.together
    return compute + behind, exchange


def recomputed_in(config: Config, number: int) -> frozenset[str]:
    """Names of the modules of layer `number` that the backward pass computes again."""
    modules, concerned = recomputed(config)
    return modules if number in concerned else frozenset()


def stage_cost(
    config: Config,
    layout: ProcessMesh,
    chunks: list[RankChunk],
    flops: Flops,
    cluster: Cluster,
    needs: Mapping[int, SequenceNeeds],
) -> StageCost:
    """Seconds of the pipeline stage whose ranks hold `chunks`.

    Args:
        flops: FLOPs of the whole model.
        needs: exchanges of every layer, by layer number; empty if sequences are not cut into pieces.
    """
    training, gpu = config.training, cluster.gpu
    size, hidden = DTYPES[training.dtype].itemsize, config.model.hidden_size
    tokens = rank_tokens(config)
    groups = {axis: Group.of(ranks[0], cluster) for axis, ranks in layout.groups.items()}
    line, split = groups.get("sequence", Group.of([0], cluster)), SequenceSplit.of(config)

    seconds = dict.fromkeys(("compute", "weights", "tensor", "expert", "sequence", "pipeline"), 0.0)
    stream = size * tokens * hidden
    for chunk in chunks:
        for number, layer in chunk.layers.items():
            recompute = recomputed_in(config, number)
            compute, exchange = layer_seconds(config, number, layer, flops, line, needs.get(number), split)
            seconds["compute"] += compute
            seconds["sequence"] += exchange.cost(again=bool(recompute & {"layer", "mixer", "core"}))
            moe = hasattr(layer.ffn, "experts")
            halves = {"mixer": 1, "ffn": 1 if not moe or config.model.moe.shared_ffn_size else 0}
            for half, regions in halves.items():
                travels = 3 if recompute & {"layer", half} else 2
                seconds["tensor"] += regions * 2 * travels * groups["tensor"].ring(stream)
                if moe and half == "ffn":
                    seconds["expert"] += 2 * travels * dispatch(config, groups, stream / layout.tensor)
                    seconds["expert"] += WAIT_SECONDS * waits(config, groups)
        if chunk.logits:
            passes = 4 if "logits" in training.recompute_modules else 3
            seconds["compute"] += passes * tokens * flops.head / (HEAD_SPEED * speed(gpu, layout.tensor).together)
            seconds["tensor"] += 2 * groups["tensor"].ring(stream)
        weights = sum(p.numel() * (4 * p.element_size() + 8) for p in chunk.parameters if p.requires_grad)
        seconds["weights"] += weights / (MEMORY_EFFICIENCY * gpu.memory_bandwidth)
        seconds["pipeline"] += 2 * groups["pipeline"].send(stream / layout.tensor)

    forward = seconds["compute"] / 3
    data = update = 0.0
    for axis, expert in (("data", False), ("expert_data", True)):
        parameters = [p for chunk in chunks for p in chunk.parameters if p.requires_grad and is_expert(p) == expert]
        reduce = groups[axis].ring(4 * sum(p.numel() for p in parameters))
        gather = groups[axis].ring(sum(p.numel() * p.element_size() for p in parameters))
        if not config.optimizer.distributed:
            reduce, gather = 2 * reduce, 0.0
        if config.optimizer.overlap:
            reduce, gather = max(0.0, reduce - 2 * forward), max(0.0, gather - forward)
        data += reduce + gather
        replicas = groups[axis].ranks if config.optimizer.distributed else 1
        moved = sum(p.numel() * (2 * optimizer_bytes(p, config.optimizer) + 4) for p in parameters)
        update += moved / replicas / (MEMORY_EFFICIENCY * gpu.memory_bandwidth)
    return StageCost(seconds, data, update)


def waits(config: Config, groups: dict[str, Group]) -> bool:
    """Whether the host waits for the device before an MoE layer sends its tokens."""
    moe, ranks = config.model.moe, groups["expert"].ranks
    sent = ranks * groups["expert_tensor"].ranks > 1 and expert_dispatcher(moe, ranks) == "alltoall"
    return sent and not moe.capacity_pad


def dispatch(config: Config, groups: dict[str, Group], stream: float) -> float:
    """Seconds of sending this rank's tokens, `stream` bytes, to their experts."""
    expert, inside = groups["expert"], groups["expert_tensor"]
    if expert_dispatcher(config.model.moe, expert.ranks) == "allgather":
        return expert.ring(stream * expert.ranks) + inside.ring(stream * expert.ranks * inside.ranks)
    rows = stream * config.model.moe.top_k
    return expert.exchange(rows) + inside.ring(rows * inside.ranks)


def step_seconds(config: Config, layout: ProcessMesh, stages: list[StageCost]) -> dict[str, float]:
    """Seconds of one optimizer step by kind; `total` is the sum of the others."""
    micro_batches = config.training.global_batch // (config.training.micro_batch * layout.data)
    slowest = max((stage.micro_batch for stage in stages), key=lambda kinds: sum(kinds.values()))
    seconds = {kind: micro_batches * value for kind, value in slowest.items()}
    seconds["bubble"] = (layout.pipeline - 1) / config.parallel.virtual_pipeline * sum(slowest.values())
    seconds["data"] = max(stage.data for stage in stages)
    seconds["optimizer"] = max(stage.optimizer for stage in stages)
    return seconds | {"total": math.fsum(seconds.values())}
