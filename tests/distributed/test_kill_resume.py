"""A training that is killed in mid-run, or stopped by a signal, and run again computes what an unbroken one does."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.distributed.harness import ROOT, all_tensors, environment

# Steps of the run, steps between checkpoints, and least number of steps that are compared after a resume.
STEPS, EVERY, COMPARED = 60, 10, 20
# Keys of a step's record that are compared; the other keys are times and memory.
NUMBERS = ("loss", "gradient_norm", "learning_rate", "load_balancing_loss", "router_z_loss")
NUMBERS += ("max_load", "load_entropy", "dropped_fraction", "dead_experts")
CONFIG = {
    "model": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "pattern": "LN",
        "moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 32, "shared_ffn_size": 32, "expert_bias": True},
    },
    "parallel": {"expert": 2},
    "data": {"tokenizer": {"type": "bytes"}, "validation_fraction": 0.2},
    "schedule": {"warmup_steps": 5},
    "training": {
        "dtype": "fp32",
        "sequence_length": 32,
        "micro_batch": 2,
        "global_batch": 4,
        "steps": STEPS,
        "eval_every": 16,
        "eval_batches": 2,
    },
    "checkpoint": {"every": EVERY},
    "logging": {"tensorboard": False},
}


def records(run: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl, all of whose lines must be whole."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Job:
    """`torchrun ... linear_moe train CONFIG run=RUN` in two processes; killed when the test leaves its block."""

    def __init__(self, config: Path, run: Path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "linear_moe", "train", str(config), f"run={run}"]
        self.run = run
        self.output = run.with_suffix(".output").open("w+")
        self.process = psutil.Popen(
            command, cwd=ROOT, env=environment(), stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.signal_all(signal.SIGKILL)
        self.process.wait(10)
        self.output.close()

    def signal_all(self, number: signal.Signals) -> None:
        """Sends a signal to torchrun and its workers at once, as a scheduler does; waits until killed ones are gone."""
        processes = [*self.process.children(recursive=True), self.process] if self.process.is_running() else []
        for process in processes:
            process.send_signal(number)
        if number is signal.SIGKILL:
            _, alive = psutil.wait_procs(processes, 10)
            assert not alive

    def wait_until(self, condition: Callable[[], bool], timeout: float = 240.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not after {timeout} s:\n{self.text()}"
            assert self.process.poll() is None, f"ended too early:\n{self.text()}"
            time.sleep(0.005)

    def finish(self) -> None:
        assert self.process.wait(90) == 0, self.text()

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()[-20000:]


@dataclass
class Session:
    """Records that one start of the training wrote to metrics.jsonl."""

    start: int
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    validations: dict[int, tuple[float, int]] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    routings: dict[int, dict[str, Any]] = field(default_factory=dict)
    stopped: int | None = None


def sessions(run: Path) -> list[Session]:
    all_sessions: list[Session] = []
    for record in records(run):
        event, step = record.get("event"), record["step"]
        if event == "start":
            all_sessions.append(Session(step))
        elif event == "validation":
            all_sessions[-1].validations[step] = record["loss"], record["tokens"]
        elif event == "checkpoint":
            all_sessions[-1].checkpoints.append(step)
        elif event == "stopped":
            all_sessions[-1].stopped = step
        elif event == "routing":
            all_sessions[-1].routings[step] = record["layers"]
        else:
            assert event is None
            all_sessions[-1].steps[step] = {key: record[key] for key in NUMBERS}
    return all_sessions


def last_step(run: Path) -> int:
    return max((r["step"] for r in records(run) if "event" not in r), default=0)


@dataclass
class Results:
    straight: Session
    killed: Session
    resumed: Session  # from the checkpoint before the kill, until a SIGTERM
    again: Session  # from the checkpoint of the SIGTERM to the end
    folders: tuple[Path, Path]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("kill")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 8))) for _ in range(200)]
    for i in range(40):
        path = root / "corpus" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(rng.choices(words, k=300)) + "\n")
    data = CONFIG["data"] | {"corpus": str(root / "corpus"), "cache": str(root / "cache")}
    config = root / "config.yaml"
    config.write_text(json.dumps(CONFIG | {"data": data}))  # JSON is YAML

    straight, interrupted = root / "straight", root / "interrupted"
    with Job(config, straight) as job:
        job.finish()
    with Job(config, interrupted) as job:
        job.wait_until(lambda: last_step(interrupted) >= EVERY + 2)
        job.signal_all(signal.SIGKILL)
    with Job(config, interrupted) as job:
        job.wait_until(lambda: len(sessions(interrupted)) == 2)
        stop_after = sessions(interrupted)[-1].start + COMPARED + 2
        job.wait_until(lambda: max(sessions(interrupted)[-1].steps, default=0) >= stop_after)
        job.signal_all(signal.SIGTERM)
        job.process.wait(60)  # without a check of the exit code: torchrun reports that a signal ended it
    with Job(config, interrupted) as job:
        job.finish()
    (whole,) = sessions(straight)
    killed, resumed, again = sessions(interrupted)
    return Results(whole, killed, resumed, again, (straight, interrupted))


def assert_same(session: Session, straight: Session, last: int) -> None:
    """Asserts that steps from the session's start to `last`, and validations, equal the straight run's bit for bit."""
    assert list(session.steps) == list(range(session.start + 1, last + 1))
    for step, numbers in session.steps.items():
        assert numbers == straight.steps[step], step
    assert session.validations == {s: v for s, v in straight.validations.items() if session.start < s <= last}
    for step in session.routings.keys() & straight.routings.keys():  # a session also records its first step
        assert session.routings[step] == straight.routings[step], step


def test_straight_run(results: Results) -> None:
    straight = results.straight
    assert straight.start == 0 and list(straight.steps) == list(range(1, STEPS + 1))
    assert straight.checkpoints == [*range(EVERY, STEPS + 1, EVERY)]
    assert list(straight.validations) == [16, 32, 48, 60]
    assert list(straight.routings) == [1, 50, 60]
    assert any(straight.routings[60]["0"]["bias"])
    for key in ("loss", "gradient_norm"):
        assert len({numbers[key] for numbers in straight.steps.values()}) == STEPS
    assert straight.steps[STEPS]["loss"] < 0.8 * straight.steps[1]["loss"], "nothing was learnt"


def test_resume_after_kill_9(results: Results) -> None:
    killed, resumed = results.killed, results.resumed
    died_at = max(killed.steps)
    assert killed.start == 0 and died_at < STEPS and killed.stopped is None
    # The kill may come after a checkpoint has been saved, and before its event is written.
    assert resumed.start in (killed.checkpoints[-1], killed.checkpoints[-1] + EVERY)
    assert resumed.start < died_at, "there must be steps to be made again"
    assert len(resumed.steps) >= COMPARED
    assert_same(resumed, results.straight, max(resumed.steps))


def test_resume_after_sigterm(results: Results) -> None:
    resumed, again = results.resumed, results.again
    assert resumed.stopped == max(resumed.steps) == resumed.checkpoints[-1] < STEPS
    assert again.start == resumed.stopped and len(again.steps) >= COMPARED and again.stopped is None
    assert_same(again, results.straight, STEPS)


def test_final_checkpoints_are_equal(results: Results) -> None:
    expected, actual = (all_tensors(run / "checkpoints" / f"step_{STEPS:08}") for run in results.folders)
    assert expected.keys() == actual.keys()
    assert {key.split(".")[0] for key in expected} == {"model", "optimizer"}
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
