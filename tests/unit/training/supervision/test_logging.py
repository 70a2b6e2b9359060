"""Logged records are in metrics.jsonl and, read by TensorBoard's own reader, in the event files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from linear_moe.training.supervision.logging import Logger, duration, progress_line
from tests.tolerances import FP32

STEPS: list[dict[str, Any]] = [
    {"step": 1, "loss": 5.5, "learning_rate": 1e-4, "gradient_norm": 12.0, "tokens_per_second": 1234.5},
    {"step": 2, "loss": 5.25, "learning_rate": 2e-4, "gradient_norm": 3.0, "tokens_per_second": 2345.6},
    {"step": 3, "loss": 4.9, "learning_rate": 3e-4, "gradient_norm": 2.5, "tokens_per_second": 2400.0, "mfu": 0.4},
]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Values of every TensorBoard scalar, by tag and step."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def expected_scalars(steps: list[dict[str, Any]]) -> dict[str, dict[int, Any]]:
    by_tag: dict[str, dict[int, Any]] = {}
    for record in steps:
        for key, value in record.items():
            if key != "step":
                by_tag.setdefault(f"train/{key}", {})[record["step"]] = pytest.approx(
                    value, rel=FP32
                )  # TensorBoard has fp32
    return by_tag


def test_records_and_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(tmp_path / "run", 3, active=True, tensorboard=True)
    log.event("start", step=0, world=2, torch="2")
    for record in STEPS:
        log.step(record)
    log.validation(3, 4.75, 12345)
    log.message("no [bold]markup[/bold]")
    log.close()

    start, *steps, validation = records(tmp_path / "run")
    assert steps == STEPS
    assert start.pop("time") <= validation.pop("time")
    assert start == {"event": "start", "step": 0, "world": 2, "torch": "2"}
    assert validation == {"event": "validation", "step": 3, "loss": 4.75, "tokens": 12345}
    assert scalars(tmp_path / "run") == expected_scalars(STEPS) | {"validation/loss": {3: 4.75}}
    # Without a terminal there is a line for the first step, one every few seconds, and one for the last step.
    assert capsys.readouterr().err.splitlines() == [
        f"step 1/3  {progress_line(STEPS[0])}",
        f"step 3/3  {progress_line(STEPS[2])}",
        "step 3: validation loss 4.7500 over 12,345 tokens",
        "no [bold]markup[/bold]",
    ]


def test_records_are_there_before_the_end(tmp_path: Path) -> None:
    log = Logger(tmp_path, 3, active=True, tensorboard=False)
    log.step(STEPS[0])
    assert records(tmp_path) == STEPS[:1]  # a run that is killed keeps what it has logged
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_replaces_the_events_after_its_checkpoint(tmp_path: Path) -> None:
    again = [record | {"loss": record["loss"] - 1} for record in STEPS[1:]]
    for step, steps in ((0, STEPS), (1, again)):
        log = Logger(tmp_path, 3, active=True, tensorboard=True, step=step)
        for record in steps:
            log.step(record)
        log.close()
    assert records(tmp_path) == [*STEPS, *again]
    assert scalars(tmp_path) == expected_scalars([STEPS[0], *again])


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(tmp_path / "run", 3, active=False, tensorboard=True)
    log.event("start", step=0)
    log.step(STEPS[2])
    log.validation(3, 4.75, 1)
    log.message("text")
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_one_line() -> None:
    record = {"step": 7, "seconds_left": 3725.9, "gradient_norm": 1.005e3, "learning_rate": 3e-4, "loss": 2.34567}
    assert progress_line(record) == "loss 2.3457  lr 3.00e-04  gnorm 1005.00  1:02:05 left"
    assert (
        progress_line({"tokens_per_second": 1234567.8, "tflops_per_device": 412.34}) == "1,234,568 tok/s  412 TFLOP/s"
    )
    assert progress_line({}) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00"), (61, "1:01"), (3599.9, "59:59"), (36000, "10:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
