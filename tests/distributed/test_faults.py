"""If a rank dies, hangs or fails, the whole job ends within the time-out, with a line that names the rank."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.harness import ROOT, environment

TIMEOUT = 15.0  # training.timeout_minutes of the jobs that wait for the time-out, in seconds
LATEST = 30.0  # seconds after the time-out, or after a death, until the whole job has ended; torchrun waits as long
CONFIG: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "pattern": "LN", "ffn": "dense", "ffn_size": 64},
    "data": {"tokenizer": {"type": "bytes"}, "validation_fraction": 0.0},
    "schedule": {"warmup_steps": 5},
    "training": {"dtype": "fp32", "sequence_length": 32, "micro_batch": 1, "global_batch": 6, "steps": 10**6},
    "checkpoint": {"every": 0},
    "logging": {"tensorboard": False},
}


class Job:
    """A training in several processes."""

    def __init__(self, root: Path, name: str, command: list[str], env: dict[str, str] | None = None, **training: Any):
        self.run = root / name
        data = CONFIG["data"] | {"corpus": str(root / "corpus"), "cache": str(root / "cache")}
        tree = CONFIG | {"data": data, "training": CONFIG["training"] | training}
        config = root / f"{name}.yaml"
        config.write_text(json.dumps(tree))  # JSON is YAML
        words = [word.replace("CONFIG", str(config)) for word in command]
        self.output = (root / f"{name}.output").open("w+")
        self.process = psutil.Popen(
            [*words, f"run={self.run}"],
            cwd=ROOT,
            env=environment() | (env or {}),
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.since = self.ended = time.monotonic()
        self.pid = 0
        self._reaper = threading.Thread(target=self._reap)
        self._reaper.start()

    def _reap(self) -> None:
        self.process.wait()
        self.ended = time.monotonic()

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()
            time.sleep(0.02)
        self.since = time.monotonic()

    def strike(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank that is training."""
        self.wait_until(lambda: self.steps() > 4)
        time.sleep(3)  # so that the other ranks know a status of the training rank; each writes one every second
        (process,) = [p for p in self.process.children(recursive=True) if p.environ().get("RANK") == str(rank)]
        self.pid = process.pid
        process.send_signal(number)
        self.since = time.monotonic()

    def finish(self) -> None:
        self._reaper.join(240)
        assert not self._reaper.is_alive(), self.text()

    def kill(self) -> None:
        if self.process.is_running():
            for process in [*self.process.children(recursive=True), self.process]:
                process.kill()
        self.output.close()

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()


def torchrun(ranks: int, *module: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launcher, *module, "train", "CONFIG"]


def commands(folder: Path) -> Path:
    """Folder with the commands that a launch script calls, `torchrun` and `linear-moe`, for this interpreter."""
    folder.mkdir()
    for name, module in {"torchrun": "torch.distributed.run", "linear-moe": "linear_moe"}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@dataclass
class Outcome:
    code: int
    took: float
    text: str
    pid: int
    events: list[dict[str, Any]]

    @property
    def lines(self) -> dict[int, str]:
        """Line that each rank printed about the lost rank, by rank."""
        matches = re.findall(r"^linear-moe: \[rank (\d+)\] (rank \d.*)$", self.text, re.MULTILINE)
        return {int(rank): line for rank, line in matches}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Outcome of a job for every fault. Jobs that run into the time-out do so while the next jobs start."""
    root = tmp_path_factory.mktemp("faults")
    (root / "corpus").mkdir()
    (root / "corpus" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    minutes = TIMEOUT / 60
    jobs: dict[str, Job] = {}

    def start(name: str, command: list[str], **options: Any) -> Job:
        jobs[name] = Job(root, name, command, **options)
        return jobs[name]

    def faulty(name: str, rank: int, **options: Any) -> Job:
        return start(name, torchrun(2, "tests.distributed.faulty", name, str(rank)), **options)

    try:
        start("stop", torchrun(3, "linear_moe"), timeout_minutes=minutes).strike(2, signal.SIGSTOP)
        hang = faulty("hang", 1, timeout_minutes=minutes)
        hang.wait_until(lambda: hang.steps() > 2)  # records of the start event and of two steps
        faulty("late", 1, timeout_minutes=minutes)
        for name, rank in {"data": 1, "memory": 0}.items():
            faulty(name, rank).finish()
        path = os.pathsep.join([str(commands(root / "bin")), os.environ["PATH"]])
        kill = start("kill", ["bash", "scripts/launch.sh", "CONFIG"], env={"GPUS": "3", "PATH": path})
        kill.strike(2, signal.SIGKILL)
        by_fault = {}
        for name, job in jobs.items():
            job.finish()
            log = job.run / "metrics.jsonl"
            records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            events = [record for record in records if record.get("event") == "rank_failure"]
            by_fault[name] = Outcome(job.process.returncode, job.ended - job.since, job.text(), job.pid, events)
        return by_fault
    finally:
        for job in jobs.values():
            job.kill()


def check(outcome: Outcome, rank: int, *parts: str, known: bool = True) -> dict[str, Any]:
    """Asserts that the job has failed, and that all other ranks and the log name the rank in one and the same line."""
    assert outcome.code != 0
    assert outcome.lines and rank not in outcome.lines, outcome.text
    (line,) = set(outcome.lines.values())
    assert line.startswith(f"rank {rank} ") and all(part in line for part in parts), line
    (event,) = outcome.events
    assert event["rank"] == rank and event["message"] == line
    if known:
        assert f"host {os.uname().nodename}, pid {event['pid']}" in line
        assert event["host"] == os.uname().nodename and event["step"] >= 1
        assert f"step {event['step']}, {event['phase']}" in line
    return event


def test_killed(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["kill"]
    event = check(outcome, 2, "died")
    assert event["pid"] == outcome.pid
    assert outcome.took < LATEST
    last = outcome.text.splitlines()[-1]
    assert last == f"linear-moe: {event['message']}", "scripts/launch.sh shows it last"


def test_stopped(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["stop"]
    event = check(outcome, 2, "gives no sign of life")
    assert event["pid"] == outcome.pid
    assert len(outcome.lines) == 2, "every rank that is left says it"
    assert outcome.took < TIMEOUT + LATEST


def test_hangs(outcomes: dict[str, Outcome]) -> None:
    event = check(outcomes["hang"], 1, "hangs", "reading data", "step 3")
    assert re.fullmatch(r"linear_moe/training/\S+\.py:\d+ in \w+", event["where"])
    assert outcomes["hang"].took < TIMEOUT + LATEST


def test_never_arrives(outcomes: dict[str, Outcome]) -> None:
    check(outcomes["late"], 1, "never arrived", "nothing is known of it", known=False)


@pytest.mark.parametrize(
    ("name", "rank", "error"),
    [
        ("data", 1, "ValueError: document 7 is damaged"),
        ("memory", 0, "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 TiB"),
    ],
)
def test_exception_on_one_rank(outcomes: dict[str, Outcome], name: str, rank: int, error: str) -> None:
    outcome = outcomes[name]
    check(outcome, rank, f"failed with {error}", "step 3")
    assert outcome.text.count("Traceback (most recent call last)") >= 1 and error in outcome.text
    others = [line for line in outcome.text.splitlines() if "gloo" in line]
    assert not others, "the other ranks show no errors of their own"
