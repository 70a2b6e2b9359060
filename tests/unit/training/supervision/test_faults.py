"""Signals and locks in real processes, and losses that are not finite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.options.errors import ConfigError
from linear_moe.training.supervision.faults import TrainingError, check_finite, lock_run

ROOT = Path(__file__).resolve().parents[4]


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a Python process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_not_finite(loss: float, norm: float) -> None:
    with pytest.raises(TrainingError, match=f"^step 12: loss {loss}, gradient norm {norm};"):
        check_finite(12, loss, norm)


def test_finite() -> None:
    check_finite(12, 0.0, 1e300)


SIGNALS = """
import os, signal, sys
from linear_moe.training.supervision.faults import StopSignal
stop = StopSignal()
print(stop.received)
for name in sys.argv[1:]:
    os.kill(os.getpid(), signal.Signals[name])
    print(stop.received, flush=True)
"""


@pytest.mark.parametrize(
    ("sent", "seen", "code"),
    [
        (["SIGTERM", "SIGTERM"], ["SIGTERM", "SIGTERM"], 0),
        (["SIGHUP", "SIGHUP"], ["SIGHUP", "SIGHUP"], 0),
        (["SIGUSR1", "SIGUSR1"], ["SIGUSR1", "SIGUSR1"], 0),
        (["SIGINT", "SIGTERM"], ["SIGINT", "SIGTERM"], 0),
        (["SIGINT", "SIGINT"], ["SIGINT"], -signal.SIGINT),  # Ctrl-C twice: the user does not want to wait
    ],
    ids=["term", "hup", "usr1", "int-term", "int-int"],
)
def test_signals(sent: list[str], seen: list[str], code: int) -> None:
    process = start(SIGNALS, *sent)
    output, errors = process.communicate(timeout=240)
    assert (output.split(), process.returncode) == (["None", *seen], code), errors


HOLD = """
import sys
from pathlib import Path
from linear_moe.training.supervision.faults import lock_run
lock = lock_run(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_one_process_a_run_folder(end: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    first = start(HOLD, str(run))
    try:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        for _ in range(2):  # a refused attempt must not break the lock
            with pytest.raises(ConfigError, match=rf"process {first.pid} on {os.uname().nodename} is training there"):
                lock_run(run)
        lock_run(tmp_path / "runs" / "b").close()
        if end == "kill":
            first.kill()
        _, errors = first.communicate(timeout=240)
        assert first.returncode == (-signal.SIGKILL if end == "kill" else 0), errors
    finally:
        first.kill()
        first.wait()

    with lock_run(run):
        second = start(HOLD, str(run))
        _, errors = second.communicate(timeout=240)
        assert second.returncode == 1 and "ConfigError" in errors
        assert f"process {os.getpid()} on" in errors
    lock_run(run).close()
