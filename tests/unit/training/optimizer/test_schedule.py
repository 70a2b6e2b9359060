"""Learning-rate schedules, compared with values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from linear_moe.config.schema import Config, OptimizerConfig, ScheduleConfig, TrainingConfig
from linear_moe.training.optimizer.schedule import learning_rate, set_learning_rate
from tests.tolerances import FP64


def config(**schedule: object) -> Config:
    return Config(
        optimizer=OptimizerConfig(lr=1.0),
        schedule=ScheduleConfig(**{"warmup_steps": 10, "min_lr": 0.2} | schedule),  # type: ignore[arg-type]
        training=TrainingConfig(steps=110),
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Half way, the cosine is the mean of peak and floor. A quarter of the way, it is the floor plus
        # (1 + cos 45°) / 2 of the difference.
        (
            {"type": "cosine"},
            {1: 0.1, 5: 0.5, 10: 1.0, 35: 0.2 + 0.8 * 0.8535533905932737, 60: 0.6, 110: 0.2, 500: 0.2},
        ),
        ({"type": "cosine", "decay_steps": 60}, {10: 1.0, 35: 0.6, 60: 0.2, 61: 0.2, 110: 0.2}),
        ({"type": "wsd"}, {5: 0.5, 10: 1.0, 88: 1.0, 99: 0.6, 110: 0.2}),
        ({"type": "wsd", "decay_steps": 40}, {10: 1.0, 70: 1.0, 80: 0.8, 110: 0.2}),
        ({"type": "constant"}, {1: 0.1, 10: 1.0, 110: 1.0}),
        ({"type": "constant", "warmup_steps": 0}, {1: 1.0}),
        ({"type": "cosine", "warmup_steps": 0, "decay_steps": 2}, {1: 0.6, 2: 0.2}),
        ({"type": "wsd", "decay_steps": 500}, {10: 1.0, 60: 0.6, 110: 0.2}),  # longer than the run: all after warm-up
        ({"type": "cosine", "decay_steps": 10}, {10: 1.0, 11: 0.2}),  # nothing left after the warm-up
    ],
)
def test_values(schedule: dict[str, object], expected: dict[int, float]) -> None:
    for step, value in expected.items():
        assert learning_rate(step, config(**schedule)) == pytest.approx(value, rel=FP64), step


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        learning_rate(0, config())


def test_set_learning_rate() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 2.0}])
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
