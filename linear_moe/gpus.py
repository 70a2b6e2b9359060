"""GPUs by name, from the vendors' data sheets (SXM parts). Imports nothing: `--help` lists them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU and what connects it.

    Attributes:
        memory_gib: that a process can allocate.
        peak_tflops: dense bf16.
        memory_bandwidth: bytes/s.
        link: bytes/s to another GPU of the node, each way.
        network: bytes/s to other nodes, each way; as usual for this GPU, one adapter each.
    """

    memory_gib: float
    peak_tflops: float
    memory_bandwidth: float
    link: float
    network: float


GPUS = {
    "a100": GPU(79.2, 312.0, 2.0e12, 300e9, 25e9),
    "a800": GPU(79.2, 312.0, 2.0e12, 200e9, 25e9),
    "h100": GPU(79.1, 989.0, 3.35e12, 450e9, 50e9),
    "h800": GPU(79.1, 989.0, 3.35e12, 200e9, 50e9),
    "h200": GPU(139.8, 989.0, 4.8e12, 450e9, 50e9),
    "b200": GPU(178.0, 2250.0, 8.0e12, 900e9, 50e9),
}
DEFAULT_GPU = "h100"
