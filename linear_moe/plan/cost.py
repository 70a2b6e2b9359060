"""How long a step of a layout takes, by a model simple enough to check by hand: for ranking layouts, not for promises.

The slowest pipeline stage sets the pace. A micro-batch costs it, forward and backward,

- compute: its FLOPs at EFFICIENCY of the GPU's peak, the head's HEAD_SPEED times as fast, but no layer less than
  LAYER_SECONDS, in which the host launches its kernels; what is recomputed counts again. t tensor ranks are only
  t**TENSOR_SPEED times as fast, for their products are thinner, and have TENSOR_LAUNCHES times as many launches;
- weights: they are read in both directions, and their gradients written and added up in fp32, at MEMORY_EFFICIENCY of
  the memory's bandwidth;
- tensor: in each pass, every tensor-parallel region gathers its tokens and scatters its sums;
- expert: in each pass, every MoE layer sends its tokens to experts and back; with the dispatcher "alltoall" the device
  idles for WAIT_SECONDS a layer, because the host has to know how many;
- pipeline: activations sent to the next stage, gradients back.

A step is as many of those as there are micro-batches, and the pipeline's bubble: (stages - 1) / chunks of them. Then
data: the replicas sum fp32 gradients and, with the distributed optimizer, gather new weights; with optimizer.overlap as
much of that is free as fits into the last backward and the first forward pass. Last, optimizer: its state is read and
written once. A collective of n ranks moves (n - 1) / n of its data through each rank, by the node's links or, between
nodes, by the network adapters of its members in a node; each takes at least LATENCY.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from linear_moe.config.schema import Config
from linear_moe.config.validate import ParallelLayout, expert_dispatcher, rank_tokens, recomputed
from linear_moe.flops import Flops
from linear_moe.gpus import GPU
from linear_moe.modeling.host import DTYPES
from linear_moe.plan.memory import optimizer_bytes
from linear_moe.plan.ranks import RankChunk, is_expert
from linear_moe.stages import HEAD_SPEED

EFFICIENCY = 0.35
MEMORY_EFFICIENCY = 0.5
LAYER_SECONDS = 7e-3
TENSOR_SPEED = 0.7
TENSOR_LAUNCHES = 1.3
WAIT_SECONDS = 4e-3
LATENCY = 20e-6


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    node: int  # GPUs in one


@dataclass(frozen=True)
class Group:
    """A process group's members, and how data travels between them."""

    ranks: int
    in_node: int  # members in one node
    cluster: Cluster

    @classmethod
    def of(cls, ranks: list[int], cluster: Cluster) -> Group:
        nodes = len({rank // cluster.node for rank in ranks})
        return cls(len(ranks), -(-len(ranks) // nodes), cluster)

    def ring(self, size: float) -> float:
        """Seconds of an all-gather to, or reduce-scatter from, `size` bytes."""
        if self.ranks == 1:
            return 0.0
        gpu = self.cluster.gpu
        bandwidth = gpu.link if self.in_node == self.ranks else min(gpu.link, gpu.network * self.in_node)
        return LATENCY + size * (self.ranks - 1) / self.ranks / bandwidth

    def exchange(self, size: float) -> float:
        """Seconds of an all-to-all of `size` bytes of each rank."""
        if self.ranks == 1:
            return 0.0
        gpu, outside = self.cluster.gpu, self.ranks - self.in_node
        return LATENCY + size / self.ranks * ((self.in_node - 1) / gpu.link + outside / gpu.network)

    def send(self, size: float) -> float:
        """Seconds of `size` bytes to the neighbour."""
        if self.ranks == 1:
            return 0.0
        return LATENCY + size / (self.cluster.gpu.link if self.in_node > 1 else self.cluster.gpu.network)


@dataclass(frozen=True)
class StageCost:
    """Seconds of one pipeline stage: of one micro-batch by kind, forward and backward, and of the rest of a step."""

    micro_batch: dict[str, float]
    data: float
    optimizer: float


def stage_cost(
    config: Config, layout: ParallelLayout, chunks: list[RankChunk], flops: Flops, cluster: Cluster
) -> StageCost:
    """Of a rank that holds `chunks`.

    Args:
        flops: of the model.
    """
    training, gpu = config.training, cluster.gpu
    size, hidden = DTYPES[training.dtype].itemsize, config.model.hidden_size
    tokens = rank_tokens(config)
    modules, concerned = recomputed(config)
    groups = {axis: Group.of(ranks[0], cluster) for axis, ranks in layout.groups.items()}

    seconds = dict.fromkeys(("compute", "weights", "tensor", "expert", "pipeline"), 0.0)
    rate = gpu.peak_tflops * 1e12 * EFFICIENCY * layout.tensor**TENSOR_SPEED
    launches = LAYER_SECONDS * (TENSOR_LAUNCHES if layout.tensor > 1 else 1)
    stream = size * tokens * hidden
    for chunk in chunks:
        for number, layer in chunk.layers.items():
            recompute = modules if number in concerned else frozenset()
            once = flops.layers[number]["mixer"] + flops.layers[number]["ffn"]
            again = flops.again(number, recompute)
            passes = 3 + again / once  # the backward pass costs two
            seconds["compute"] += max(passes * tokens * once / rate, launches * passes / 3)
            moe = hasattr(layer.ffn, "experts")
            halves = {"mixer": 1, "ffn": 1 if not moe or config.model.moe.shared_ffn_size else 0}
            for half, regions in halves.items():
                travels = 3 if recompute & {"layer", half} else 2
                seconds["tensor"] += regions * 2 * travels * groups["tensor"].ring(stream)
                if moe and half == "ffn":
                    seconds["expert"] += 2 * travels * dispatch(config, groups, stream / layout.tensor)
                    seconds["expert"] += WAIT_SECONDS * waits(config, groups)
        if chunk.logits:
            seconds["compute"] += (4 if "logits" in modules else 3) * tokens * flops.head / (HEAD_SPEED * rate)
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
    """Whether the host waits for the device before tokens travel."""
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


def step_seconds(config: Config, layout: ParallelLayout, stages: list[StageCost]) -> dict[str, float]:
    """Seconds of one optimizer step by kind, of which the last is their sum, `total`."""
    micro_batches = config.training.global_batch // (config.training.micro_batch * layout.data)
    slowest = max((stage.micro_batch for stage in stages), key=lambda kinds: sum(kinds.values()))
    seconds = {kind: micro_batches * value for kind, value in slowest.items()}
    seconds["bubble"] = (layout.pipeline - 1) / config.parallel.virtual_pipeline * sum(slowest.values())
    seconds["data"] = max(stage.data for stage in stages)
    seconds["optimizer"] = max(stage.optimizer for stage in stages)
    return seconds | {"total": math.fsum(seconds.values())}
