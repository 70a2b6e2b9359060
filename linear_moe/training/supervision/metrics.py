"""A run's figures of itself: throughput, model FLOP/s utilisation (MFU), memory and time since the start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

from linear_moe.gpus import GPUS


def peak_tflops(configured: float | None) -> float | None:
    """Peak bf16 TFLOP/s of this device: the configured number, else that of the GPU's name in `GPUS`; None: unknown."""
    if configured is not None or not torch.cuda.is_available():
        return configured
    name = torch.cuda.get_device_name()
    return next((gpu.peak_tflops for known, gpu in GPUS.items() if known.upper() in name), None)


def memory_gib() -> float:
    """Peak device memory allocated by this process, or its resident set on a CPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def seconds_alive() -> float:
    """Seconds since this process started, imports included."""
    return time.time() - psutil.Process().create_time()


@dataclass
class Throughput:
    """Speed of the steps since the last call of `lap`, and the time left, from a smoothed step time.

    Args:
        tokens_per_step: tokens of a global batch, over all ranks.
        flops_per_token: FLOPs per token of the whole model, forward and backward pass.
        devices: number of ranks.
        peak: peak TFLOP/s of one device, for MFU; None: no MFU is reported.
    """

    tokens_per_step: int
    flops_per_token: float
    devices: int
    peak: float | None
    _last: float = field(default_factory=time.perf_counter)
    _smoothed: float | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent in the `with` block, such as a validation or a save, out of the next lap."""
        start = time.perf_counter()
        yield
        self._last += time.perf_counter() - start

    def lap(self, steps: int, steps_left: int) -> dict[str, float]:
        """Figures of the `steps` steps since the last lap, by their keys in a step's record."""
        now = time.perf_counter()
        seconds = (now - self._last) / steps
        self._last = now
        # The first step compiles and tunes kernels, so its time would spoil the average for long: the smoothed time is
        # at most twice the last one.
        self._smoothed = seconds if self._smoothed is None else min(0.9 * self._smoothed + 0.1 * seconds, 2 * seconds)
        tokens_per_second = self.tokens_per_step / seconds
        tflops = tokens_per_second * self.flops_per_token / self.devices / 1e12
        figures = {
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "tflops_per_device": tflops,
            "seconds_left": self._smoothed * steps_left,
        }
        if self.peak:
            figures["mfu"] = tflops / self.peak
        return figures
