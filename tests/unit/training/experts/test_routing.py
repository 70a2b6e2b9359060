"""The figures of a layer's routing, their records and displayed lines, and warnings of dead experts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from linear_moe.training import platform
from linear_moe.training.supervision.logging import Logger, routing_line
from tests.tolerances import FP32

platform.install()

from linear_moe.training.experts.routing import LayerRouting, summary  # noqa: E402

EVEN = LayerRouting(layer=1, load=[1.0] * 4, dropped=0.0, idle=[0, 0, 0, 0], bias=None)
SKEWED = LayerRouting(layer=3, load=[2.0, 1.0, 1.0, 0.0], dropped=0.25, idle=[0, 0, 3, 9], bias=[-0.5, 0.0, 0.0, 0.5])


def test_figures() -> None:
    assert (EVEN.max_load, EVEN.entropy, EVEN.dead(5)) == (1.0, 1.0, [])
    assert SKEWED.max_load == 2.0
    assert SKEWED.entropy == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4))
    assert (SKEWED.dead(10), SKEWED.dead(9), SKEWED.dead(2)) == ([], [3], [2, 3])
    assert LayerRouting(0, [1.0], 0.0, [0], None).entropy == 1.0  # with a single expert the load is even
    one = LayerRouting(0, [4.0, 0.0, 0.0, 0.0], 0.0, [0, 1, 1, 1], None)
    assert f"{one.entropy}" == "0.0"  # and not "-0.0"


def test_summary_is_of_the_worst_layer() -> None:
    record = summary([EVEN, SKEWED], 9)
    assert record == {
        "max_load": 2.0,
        "max_load_layer": 3,
        "load_entropy": SKEWED.entropy,
        "dropped_fraction": 0.125,
        "dead_experts": 1,
    }
    line = "experts: max/mean load 2.00 (layer 3)  entropy 0.750  dropped 12.50%  dead 1"
    assert routing_line(record) == line
    assert (summary([], 9), routing_line({"loss": 1.0})) == ({}, "")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_records_events_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(tmp_path, 2, active=True, tensorboard=True)
    log.step({"step": 2, "loss": 1.0} | summary([EVEN, SKEWED], 9))
    log.routing(2, [EVEN, SKEWED])
    log.close()
    step, routing = records(tmp_path)
    assert (step["max_load"], step["dead_experts"]) == (2.0, 1)
    assert (routing["event"], routing["step"]) == ("routing", 2)
    assert routing["layers"]["1"] == {"load": [1.0] * 4, "max_load": 1.0, "entropy": 1.0, "dropped": 0.0}
    assert routing["layers"]["3"]["bias"] == SKEWED.bias
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("max_load", "entropy", "dropped"):
        (scalar,) = events.Scalars(f"routing_{name}/layer_3")
        assert (scalar.step, scalar.value) == (2, pytest.approx(getattr(SKEWED, name), rel=FP32))
    assert set(events.Tags()["histograms"]) == {"routing_load/layer_1", "routing_load/layer_3", "routing_bias/layer_3"}
    assert events.Histograms("routing_load/layer_3")[0].histogram_value.num == 4
    assert "  experts: max/mean load 2.00 (layer 3)" in capsys.readouterr().err


def idle(layer: int, *steps: int, bias: list[float] | None = None) -> LayerRouting:
    return LayerRouting(layer, [1.0] * len(steps), 0.0, list(steps), bias)


def test_dead_experts_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first dead experts are warned of, then twice as many; not a few more, nor experts that die again."""
    log = Logger(tmp_path, 9, active=True, tensorboard=False)
    one, two, alive = idle(3, 0, 0, 8, 9), idle(3, 0, 0, 9, 12), idle(3, 0, 0, 0, 0)
    for step, layer in enumerate((alive, one, one, alive, one, two, two)):
        log.dead_experts(step, [EVEN, layer], 9)
    log.dead_experts(7, [idle(1, 9, 0, 0, 0), two], 9)
    log.dead_experts(8, [idle(layer, *[9] * 8) for layer in range(5)], 9)
    log.close()
    warned = [(r["step"], r["layers"]) for r in records(tmp_path)]
    every = {str(layer): [*range(8)] for layer in range(5)}
    assert warned == [(1, {"3": [3]}), (5, {"3": [2, 3]}), (8, every)]
    first, _, last = capsys.readouterr().err.splitlines()
    assert first == (
        "warning: step 1: 1 of 8 experts are dead, chosen by no token in the last 9 steps (layer 3: 3); "
        "set model.moe.expert_bias, or raise model.moe.aux_loss"
    )
    names = "0, 1, 2, 3, 4, 5 and 2 more"
    assert f"(layer 0: {names}; layer 1: {names}; layer 2: {names} and 2 more)" in last and len(last) < 300


def test_advice_on_dead_experts_where_there_are_biases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Logger(tmp_path, 9, active=True, tensorboard=False).dead_experts(1, [SKEWED], 9)
    assert capsys.readouterr().err.endswith("; raise model.moe.bias_update_rate\n")


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(tmp_path / "run", 9, active=False, tensorboard=True)
    log.routing(1, [SKEWED])
    log.dead_experts(1, [SKEWED], 9)
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")
