"""Early ends of a run, and the lock that keeps two trainings out of one run folder.

A signal ends a run after a checkpoint has been saved. A loss or a gradient norm that is not finite ends it before one
is saved, so that the last good checkpoint stays the newest.
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
    """Training cannot go on. The message is one line for the user."""


class StopSignal:
    """Remembers SIGTERM, SIGINT, SIGHUP (a lost terminal) or SIGUSR1 (a scheduler's warning), so that the loop ends
    after its step and a save.

    A second SIGINT ends the process at once. A second one of the other signals does not, because it is no sign of
    impatience: a scheduler sends SIGTERM to torchrun and to its workers, and torchrun hands its own on to the workers.

    Attributes:
        received: name of the last signal; None: there was none.
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
    """Locks the run folder until this process ends, however it ends.

    The lock lasts as long as the returned file is open, so the caller must keep a reference to it.

    Raises:
        ConfigError: a live process has locked the folder: two trainings would overwrite each other's checkpoints.
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
    """Asks the kernel to send this worker SIGTERM when torchrun dies (Linux only).

    Workers run in sessions of their own, and would outlive a torchrun that is killed.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM)
