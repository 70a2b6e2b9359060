"""The rank that a watch accuses, from all ranks' statuses. tests/distributed/test_faults.py has real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from linear_moe.training.supervision import watch
from linear_moe.training.supervision.watch import Watch

TRAINING = "forward and backward"


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Watch]:
    """The watch of rank 0 of three, whose thread does nothing by itself."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(watch, "_connect", lambda rank, timeout: dist.PrefixStore("test", store))
    monkeypatch.setattr(watch, "OBSERVED", 0.0)
    monkeypatch.setattr(Watch, "_run", lambda self: None)
    own_watch = Watch(0, 3, 0.001, tmp_path)
    yield own_watch
    own_watch.end()


def status(rank: int, **said: Any) -> dict[str, Any]:
    """Status of a rank that waits in step 5, on another machine, with the entries `said`."""
    usual = {
        "host": f"host{rank}",
        "machine": "another",
        "pid": 1,
        "created": 0.0,
        "error": "",
        "where": "",
        "frame": 1,
    }
    usual |= {"beats": 10, "marks": 50, "step": 5, "phase": TRAINING, "state": "running", "waits": True}
    return usual | {"rank": rank} | said


def suspect(watching: Watch, monkeypatch: pytest.MonkeyPatch, before: list[Any], after: list[Any]) -> Any:
    looks = iter([before, after])
    monkeypatch.setattr(watching, "_everyone", lambda: next(looks))
    beats = watching.beats
    accusation = watching._suspect()
    if accusation is None or accusation[1].split()[0] not in ("failed", "died"):  # these two are known at once
        assert watching.beats > beats, "a rank that looks at the others must not seem silent to them"
    return accusation and (accusation[0] and accusation[0]["rank"], accusation[1].split()[0])


CASES: dict[str, tuple[dict[int, dict[str, Any]], Any]] = {
    "does not wait": ({2: {"waits": False, "phase": "reading data"}}, (2, "hangs:")),
    "ahead, but stuck": ({1: {"waits": False, "step": 6, "marks": 60}}, (1, "hangs:")),
    "nobody waits": ({0: {"waits": False}, 1: {"waits": False}, 2: {"waits": False}}, None),
    "behind by a step": ({1: {"step": 4, "marks": 40}}, (1, "is")),
    "all at one place": ({}, (0, "waits,")),
    "failed": ({2: {"state": "failed", "error": "ValueError: x"}}, (2, "failed")),
    "done": ({2: {"state": "done", "waits": False}}, (0, "waits,")),
}


@pytest.mark.parametrize("name", CASES)
def test_suspect(name: str, watching: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    said, expected = CASES[name]
    before = [status(rank, **said.get(rank, {})) for rank in range(3)]
    after = [entry | {"beats": 11} for entry in before]
    assert suspect(watching, monkeypatch, before, after) == expected


def test_silent_ones_first(watching: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [status(0), status(1), status(2)]
    after = [status(0, beats=11), status(1, beats=11), status(2)]
    assert suspect(watching, monkeypatch, before, after) == (2, "gives")
    assert suspect(watching, monkeypatch, [status(0), None, status(2)], [after[0], None, after[2]]) == (None, "never")
    moved = [entry | {"beats": 11, "marks": 50 + rank} for rank, entry in enumerate(before)]
    assert suspect(watching, monkeypatch, before, moved) is None, "somebody went on"


def test_lost_connection_accuses_only_who_is_gone(watching: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    watching._broken.set()
    before, after = ([status(rank, beats=beats) for rank in range(3)] for beats in (10, 11))
    assert suspect(watching, monkeypatch, before, after) is None
    after[1]["beats"] = 10
    assert suspect(watching, monkeypatch, before, after) == (1, "gives")


def test_dead_processes(watching: Watch) -> None:
    """Only a process of this machine can be known to be dead; a new process with the same number does not count."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    machine = watching.identity["machine"]
    said = status(1, machine=machine, pid=child.pid, created=psutil.Process(child.pid).create_time())
    assert not watching._is_dead(said)
    assert watching._is_dead(said | {"created": said["created"] - 60})
    child.kill()
    zombie = psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE  # False if the kill has not taken effect yet
    assert watching._is_dead(said) or not zombie
    child.wait()
    assert watching._is_dead(said)
    assert not watching._is_dead(said | {"machine": "another"}) and not watching._is_dead(said | {"machine": None})


def test_what_the_thread_sees(watching: Watch) -> None:
    """A status has the main thread's place in the package, and whether the thread waits."""
    watching.mark("saving the checkpoint", 7)
    said = watching._status("running")
    assert (said["step"], said["phase"], said["marks"]) == (7, "saving the checkpoint", 1)
    assert "watch.py" in said["where"] and not said["waits"]
    other = Watch.__new__(Watch)
    other.main = None
    assert other._stack() == ("", 0, False)


def test_a_frame_without_a_line(watching: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame without a line number, or of generated code without a file, counts as not waiting."""
    code = SimpleNamespace(co_filename=watch.__file__, co_name="f")
    for file, number in ((watch.__file__, None), ("<string>", 3), (watch.__file__, 10**6)):
        code.co_filename = file
        frame = SimpleNamespace(f_code=code, f_lineno=number, f_back=None)
        monkeypatch.setattr(sys, "_current_frames", lambda frame=frame: {watching.main: frame})
        assert watching._stack()[2] is False


PEER = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:34117"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(PEER), True),
        (RuntimeError("[../third_party/gloo/.../unbound_buffer.cc:81] Timed out waiting 9000ms for recv"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("gloo"), False),
    ],
)
def test_what_is_another_ranks_fault(error: BaseException, expected: bool) -> None:
    assert watch._is_communication(error) is expected


def test_known_from_the_first_moment(watching: Watch) -> None:
    """A rank writes its status before its thread's first beat, so that a rank which dies at once has arrived."""
    said = json.loads(watching.store.get("0"))
    assert (said["state"], said["pid"], said["phase"]) == ("running", os.getpid(), "starting")


def test_failure_is_said(watching: Watch) -> None:
    watching.mark(TRAINING, 3)
    watching._thread.join()
    watching.raised(ValueError("bad\n  document"))
    said = json.loads(watching.store.get("0"))
    assert (said["state"], said["error"], said["step"]) == ("failed", "ValueError: bad document", 3)
