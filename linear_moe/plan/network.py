"""The GPUs of a cluster, how they are connected, and the time that a message takes."""

from __future__ import annotations

from dataclasses import dataclass

from linear_moe.gpus import GPU

LATENCY = 20e-6
"""Seconds that any collective or message takes besides the transfer of its bytes (assumed)."""


LINK_STEP, NETWORK_STEP = 1.9e-6, 4.0e-6
"""Seconds of a step of a ring within a node and to another one: NCCL's own model has these numbers for NVLink and for
a network (src/graph/tuning.cc, protocol LL128)."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in nodes.

    Attributes:
        node: GPUs in a node.
        latency: seconds that any collective or message takes besides the transfer of its bytes.
    """

    gpu: GPU
    node: int
    latency: float = LATENCY


@dataclass(frozen=True)
class Group:
    """Process group, by its size and by how many members share a node, and the time of its collectives."""

    ranks: int
    in_node: int  # members in one node
    cluster: Cluster

    @classmethod
    def of(cls, ranks: list[int], cluster: Cluster) -> Group:
        """Makes the group of global `ranks`, numbered node by node."""
        nodes = len({rank // cluster.node for rank in ranks})
        return cls(len(ranks), -(-len(ranks) // nodes), cluster)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.in_node)

    def ring(self, size: float) -> float:
        """Seconds of an all-gather whose result has `size` bytes, or of a reduce-scatter whose input has."""
        if self.ranks == 1:
            return 0.0
        gpu = self.cluster.gpu
        bandwidth = gpu.link if self.in_node == self.ranks else min(gpu.link, gpu.network * self.in_node)
        steps = (self.ranks - self.nodes) * LINK_STEP + (self.nodes - 1) * NETWORK_STEP
        return self.cluster.latency + steps + size * (self.ranks - 1) / self.ranks / bandwidth

    def exchange(self, size: float) -> float:
        """Seconds of an all-to-all into which every rank puts `size` bytes."""
        if self.ranks == 1:
            return 0.0
        gpu, outside = self.cluster.gpu, self.ranks - self.in_node
        return self.cluster.latency + size / self.ranks * ((self.in_node - 1) / gpu.link + outside / gpu.network)

    def send(self, size: float) -> float:
        """Seconds of a message of `size` bytes to the next rank of the group."""
        if self.ranks == 1:
            return 0.0
        return self.hop(size, self.in_node == 1)

    def hop(self, size: float, away: bool) -> float:
        """Seconds of a message of `size` bytes to a member in the same node or, if `away`, in another node."""
        gpu = self.cluster.gpu
        return self.cluster.latency + size / (gpu.network if away else gpu.link)
