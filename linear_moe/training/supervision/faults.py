"""How a run ends early: on a signal, after saving; or on a loss that is not a number, before it spoils a checkpoint.
And what keeps two trainings out of one run folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TextIO

from linear_moe.options.errors import ConfigError


class TrainingError(RuntimeError):
    """Training cannot go on; one line for people."""


class StopSignal:
    """Remembers SIGTERM, SIGINT, SIGHUP (a lost terminal) or SIGUSR1 (a scheduler's warning), so that the loop ends
    after its step and a save.

    A second SIGINT ends the process at once. The others may come twice: a scheduler sends SIGTERM to torchrun and to
    its workers, and torchrun hands its own on to them.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
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
            "Rerun the command to go on from the last checkpoint, with a lower optimizer.lr or a longer "
            "schedule.warmup_steps"
        )


def lock_run(run: Path) -> TextIO:
    """Claim the run folder until this process ends, however it ends; keep the returned file.

    Raises ConfigError when a live process has claimed it: two trainings would overwrite each other's checkpoints.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        fix = "stop it, or choose another run"
        raise ConfigError("run", str(run), f"process {owner} is training there", fix=fix) from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file


def end_with_parent() -> None:
    """Receive SIGTERM when torchrun dies: workers have sessions of their own and outlive a torchrun that is killed."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM)
