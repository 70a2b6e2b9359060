"""Speed figures on a simulated clock, compared with numbers worked out by hand."""

from __future__ import annotations

import time

import pytest
import torch

from linear_moe.training.supervision import metrics
from linear_moe.training.supervision.metrics import Throughput, memory_gib, peak_tflops, seconds_alive
from tests.tolerances import FP64


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    return clock


def speed(clock: Clock, peak: float | None = 4.0) -> Throughput:
    return Throughput(tokens_per_step=1000, flops_per_token=8e9, devices=2, peak=peak, _last=clock.now)


def test_lap_over_several_steps(clock: Clock) -> None:
    throughput = speed(clock)
    clock.now += 8
    # 4 steps of 1000 tokens in 8 s: 500 tokens/s, 4 TFLOP/s, 2 on each of two devices, half of the peak.
    expected = {"step_seconds": 2, "tokens_per_second": 500, "tflops_per_device": 2, "seconds_left": 20, "mfu": 0.5}
    assert throughput.lap(4, 10) == pytest.approx(expected, rel=FP64)
    clock.now += 1
    assert throughput.lap(1, 0) == pytest.approx(
        {"step_seconds": 1, "tokens_per_second": 1000, "tflops_per_device": 4, "seconds_left": 0, "mfu": 1}, rel=FP64
    )


def test_no_mfu_without_a_peak(clock: Clock) -> None:
    throughput = speed(clock, peak=None)
    clock.now += 1
    assert throughput.lap(1, 1).keys() == {"step_seconds", "tokens_per_second", "tflops_per_device", "seconds_left"}


def test_pauses_do_not_count(clock: Clock) -> None:
    throughput = speed(clock)
    clock.now += 1
    for seconds in (50, 7):
        with throughput.paused():
            clock.now += seconds
        clock.now += 2
    assert throughput.lap(2, 1)["step_seconds"] == pytest.approx(2.5, rel=FP64)
    clock.now += 3  # a pause is taken off the lap that it falls into only
    assert throughput.lap(1, 1)["step_seconds"] == pytest.approx(3, rel=FP64)


def test_time_left_is_smoothed(clock: Clock) -> None:
    throughput = speed(clock)
    # (seconds of a step, smoothed estimate): the first step's time is taken as it is; then each step counts a tenth,
    # and the estimate is at most twice the last step.
    for seconds, estimate in ((100, 100), (2, 4), (1.5, 3), (3, 3), (13, 4)):
        clock.now += seconds
        assert throughput.lap(1, 7)["seconds_left"] == pytest.approx(7 * estimate, rel=FP64)


@pytest.mark.parametrize(
    ("device", "configured", "expected"),
    [
        (None, None, None),
        (None, 12.5, 12.5),
        ("NVIDIA H100 80GB HBM3", None, 989.0),
        ("NVIDIA H100 80GB HBM3", 12.5, 12.5),
        ("NVIDIA A100-SXM4-80GB", None, 312.0),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_peak(
    device: str | None, configured: float | None, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert peak_tflops(configured) == expected


def test_seconds_alive_go_on() -> None:
    start, before = seconds_alive(), time.perf_counter()
    time.sleep(0.1)
    assert seconds_alive() - start == pytest.approx(time.perf_counter() - before, abs=0.05)
    assert start > 0.1  # importing PyTorch alone takes longer


def test_memory_of_a_cpu_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = memory_gib()
    held = torch.ones(2**26)  # a quarter of a GiB; only memory that is written to counts
    assert memory_gib() - before == pytest.approx(0.25, abs=0.05)
    del held
