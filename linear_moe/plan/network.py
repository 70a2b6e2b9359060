"""The GPUs of a cluster, how they are connected, and the time that a message takes."""

from __future__ import annotations

from dataclasses import dataclass

from linear_moe.gpus import GPU

LATENCY = 20e-6


LINK_STEP, NETWORK_STEP = 1.9e-6, 4.0e-6
"""As NCCL's own model has them for rings over NVLink and over a network (src/graph/tuning.cc, protocol LL128)."""


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes.

    Attributes:
        node: GPUs in one.
        latency: seconds that any collective or message takes.
    """

    gpu: GPU
    node: int
    latency: float = LATENCY


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

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.in_node)

    def ring(self, size: float) -> float:
        """Seconds of an all-gather to, or reduce-scatter from, `size` bytes."""
        if self.ranks == 1:
            return 0.0
        gpu = self.cluster.gpu
        bandwidth = gpu.link if self.in_node == self.ranks else min(gpu.link, gpu.network * self.in_node)
        steps = (self.ranks - self.nodes) * LINK_STEP + (self.nodes - 1) * NETWORK_STEP
        return self.cluster.latency + steps + size * (self.ranks - 1) / self.ranks / bandwidth

    def exchange(self, size: float) -> float:
        """Seconds of an all-to-all of `size` bytes of each rank."""
        if self.ranks == 1:
            return 0.0
        gpu, outside = self.cluster.gpu, self.ranks - self.in_node
        return self.cluster.latency + size / self.ranks * ((self.in_node - 1) / gpu.link + outside / gpu.network)

    def send(self, size: float) -> float:
        """Seconds of `size` bytes to the neighbour."""
        if self.ranks == 1:
            return 0.0
        return self.hop(size, self.in_node == 1)

    def hop(self, size: float, away: bool) -> float:
        """Seconds of a message of `size` bytes to a member in the same node, or in another (`away`)."""
        gpu = self.cluster.gpu
        return self.cluster.latency + size / (gpu.network if away else gpu.link)
