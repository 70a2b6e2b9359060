"""How a run ends early: on a signal, after saving; or on a loss that is not a number, before it spoils a checkpoint."""

from __future__ import annotations

import math
import signal
from types import FrameType


class TrainingError(RuntimeError):
    """Training cannot go on; one line for people."""


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1 (a scheduler's warning) so that the loop saves and ends after its step.

    A second SIGINT ends the process at once. The others may come twice: a scheduler sends SIGTERM to torchrun and to
    its workers, and torchrun hands its own on to them.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def check_finite(step: int, loss: float, gradient_norm: float) -> None:
    """Raises TrainingError when a step's loss or gradient norm is not finite."""
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise TrainingError(
            f"step {step}: loss {loss}, gradient norm {gradient_norm}; training stopped before saving. "
            "Rerun the command to go on from the last checkpoint, with a lower optimizer.lr or a longer schedule.warmup_steps"
        )
