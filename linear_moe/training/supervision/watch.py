"""Detection of a rank that died, hangs or failed: the other ranks name it in one line, within the time-out.

Every rank has a watch thread. At every beat the thread writes the status of its rank to the store that torchrun keeps
(rank 0, without torchrun), over a connection of its own, and checks the next rank: whether that rank still beats, and,
if both are on one machine, whether its process still exists. The thread also checks its own main thread. If this has
been in one and the same wait (for a collective, or for the device) for `training.timeout_minutes`, the watch thread
reads the statuses of all ranks, and accuses the rank that does not wait, or else the rank furthest behind. The first
accusation holds; every rank prints it and ends.

PyTorch's own time-outs (gloo's of each operation, NCCL's watchdog, which aborts the process and names no rank) are set
somewhat longer. They end a run whose fault the watch threads do not detect.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist

from linear_moe.config.schema import Config

RANK_LOST = 4
"""Exit code of the ranks that were not at fault."""

FAILURE_FILE = "LINEAR_MOE_FAILURE_FILE"
"""Environment variable: path of a file in which to leave the line for the launcher, which shows it last."""

VERDICT = "verdict"
# Seconds: the least time without a beat before a rank is called silent, and the time that a failed rank gets to exit.
OBSERVED = 3.0
# A line of Python that contains one of these waits for other ranks or for the device.
WAITS = (".wait(", ".item(", ".tolist(", "synchronize(", ".cpu(", "_engine_run_backward", "barrier(")

Status = dict[str, Any]
"""A rank's status in the store: who and where it is, its beats, its step and phase, and whether it waits."""


def backstop(config: Config) -> timedelta:
    """PyTorch's own time-out of a collective, longer than the watch's `training.timeout_minutes`."""
    return timedelta(seconds=60 * config.training.timeout_minutes * 1.1 + 10 * OBSERVED)


class Watch:
    """The watch thread of this rank, and the main thread's interface to it.

    Args:
        rank, world: this rank and the number of ranks, from the launcher.
        timeout: seconds without a beat, or in one wait, after which a rank is accused.
        run: run folder; an accusation is added to its metrics.jsonl.

    Raises:
        SystemExit: there is no store to connect to; a line on stderr has said so.
    """

    def __init__(self, rank: int, world: int, timeout: float, run: Path):
        self.rank, self.world, self.timeout, self.run = rank, world, timeout, run
        self.interval = min(1.0, timeout / 20)
        self.main = threading.main_thread().ident
        self.step, self.phase, self.marks = 0, "starting", 0
        process = psutil.Process()
        self.identity: Status = {
            "rank": rank,
            "host": os.uname().nodename,
            "machine": _machine(),
            "pid": process.pid,
            "created": process.create_time(),
        }
        self.beats = 0
        self.begun = time.monotonic()
        self._wait: tuple[Any, float] = (None, self.begun)  # call in which the main thread waits, and since when
        self._neighbour: tuple[Any, float] = (None, self.begun)  # the next rank's last news, and their time
        self._stop, self._broken = threading.Event(), threading.Event()
        self.store = _connect(rank, timeout)
        self._own = self.store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._publish()  # before the first beat, so that the others know a rank that dies in its first second
        self._thread = threading.Thread(target=self._run, name="linear-moe watch", daemon=True)
        self._thread.start()

    # -- the rank's side ----------------------------------------------------------------------------------------------
    def mark(self, phase: str, step: int | None = None) -> None:
        """Records the phase, and the step, that this rank's main thread begins."""
        self.phase, self.marks = phase, self.marks + 1
        if step is not None:
            self.step = step

    def raised(self, error: BaseException) -> None:
        """Tells the other ranks the error that ends this rank. Does not return if another rank caused the error."""
        if _is_communication(error):
            self._broken.set()
            # The thread accuses another rank and ends the process; or it ends, without a suspect or without the store.
            self._thread.join(12 * OBSERVED)
        self._finish("failed", f"{type(error).__name__}: {error}")

    def end(self) -> None:
        """Tells the other ranks that this rank has done its work, and ends the watch thread."""
        self._finish("done")

    def _finish(self, state: str, error: str = "") -> None:
        self._stop.set()
        self._thread.join(2 * OBSERVED)
        if not self._thread.is_alive():  # a thread that is still alive waits for the store, and writing would wait too
            with contextlib.suppress(RuntimeError):
                self._own.set(str(self.rank), json.dumps(self._status(state) | {"error": _one_line(error)}))

    # -- the thread's side --------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._stop.wait(0 if self._broken.is_set() else self.interval):
            try:
                self._beat()
                if self._broken.is_set():
                    for _ in range(3):  # the rank that caused the error may not have said yet that it failed
                        if (suspect := self._suspect()) is not None:
                            self._accuse(*suspect)
                    return
            except RuntimeError as error:  # of the store
                if not self._stop.wait(2 * self.interval):
                    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                    text = f"the launcher or rank 0, which keeps the store at {place}, is gone: {_one_line(str(error))}"
                    self._say_and_end(text, {})

    def _publish(self) -> Status:
        """Writes this rank's status to the store, and ends the process if a rank has been accused."""
        self.beats += 1
        status = self._status("running")
        self._own.set(str(self.rank), json.dumps(status))
        if self._own.check([VERDICT]):
            self._obey(self._own.get(VERDICT))
        return status

    def _beat(self) -> None:
        """Publishes the status, checks the next rank, and looks for a suspect if the main thread waits too long."""
        status = self._publish()
        self._look_after_neighbour()
        now, wait = time.monotonic(), (status["marks"], status["frame"])
        if not status["waits"] or wait != self._wait[0]:
            self._wait = (wait, now)
        elif now - self._wait[1] > self.timeout:
            if (suspect := self._suspect()) is not None:
                self._accuse(*suspect)
            self._wait = (wait, now)

    def _look_after_neighbour(self) -> None:
        """Accuses the next rank if its process is gone, it has failed, or it has been silent for the time-out."""
        status, now = self._read((self.rank + 1) % self.world), time.monotonic()
        gone = status is not None and status["state"] == "running" and self._is_dead(status)
        seen = status and (status["state"], status["beats"], gone)
        if seen != self._neighbour[0]:
            self._neighbour = (seen, now)
        silent = now - self._neighbour[1]
        if status is None or status["state"] == "running":
            if gone and silent > 0:  # gone at two beats: a rank that fails says so in the store before it ends
                self._accuse(status, "died")
            if silent > self.timeout:
                self._accuse(status, self._silence(status))
        elif status["state"] == "failed" and silent > OBSERVED:  # until then this rank may fail with the same error
            self._accuse(status, f"failed with {status['error']}")

    def _suspect(self) -> tuple[Status | None, str] | None:
        """The rank that keeps this rank waiting, and the accusation.

        The status is None for a rank that has never written one. Returns None if no rank is known to be at fault.
        """
        before = self._everyone()
        for status in before:
            if status and status["state"] == "failed":
                return status, f"failed with {status['error']}"
            if status and status["state"] == "running" and self._is_dead(status):
                return status, "died"
        end = time.monotonic() + max(OBSERVED, 8 * self.interval)
        while time.monotonic() < end:  # goes on beating, because other ranks may be looking for a suspect as well
            time.sleep(self.interval)
            self._publish()
        after = self._everyone()
        for rank, (old, new) in enumerate(zip(before, after, strict=True)):
            if new is None:
                self.missing = rank
                return None if self._broken.is_set() else (None, self._silence(None))
            if old and new["state"] == "running" and old["beats"] == new["beats"] and rank != self.rank:
                return new, self._silence(new)
        if self._broken.is_set():
            return None
        running = [new for new in after if new and new["state"] == "running"]
        moved = [(old or {}).get("marks") != new["marks"] for old, new in zip(before, after, strict=True) if new]
        busy = [status for status in running if not status["waits"]]
        if any(moved) or len(busy) == len(running):
            return None
        behind = min(busy or running, key=lambda status: (status["step"], status["marks"]))
        if busy:
            return behind, f"hangs: the others have waited for it for {self.timeout:g} s"
        if len({(status["step"], status["phase"]) for status in running}) > 1:
            return behind, f"is behind the others: all have waited for {self.timeout:g} s"
        return behind, f"waits, as all ranks have in the same phase for {self.timeout:g} s: a collective hangs"

    def _everyone(self) -> list[Status | None]:
        return [self._read(rank) for rank in range(self.world)]

    def _read(self, rank: int) -> Status | None:
        self.missing = rank
        return json.loads(self._own.get(str(rank))) if self._own.check([str(rank)]) else None

    def _silence(self, status: Status | None) -> str:
        if status is None:
            return f"never arrived: no sign of it in {time.monotonic() - self.begun:.0f} s"
        return "gives no sign of life: it is stopped, or its machine cannot be reached"

    def _status(self, state: str) -> Status:
        where, frame, waits = self._stack() if state == "running" else ("", 0, False)
        now = {"beats": self.beats, "marks": self.marks, "step": self.step, "phase": self.phase, "state": state}
        return self.identity | now | {"where": where, "frame": frame, "waits": waits}

    def _stack(self) -> tuple[str, int, bool]:
        """State of the main thread.

        Returns:
            its innermost line in this package, for people; an identity of its innermost frame, by which to tell whether
            it is still in the same call; and whether it waits for other ranks or for the device.
        """
        innermost = frame = sys._current_frames().get(self.main or 0)
        package = str(Path(__file__).parents[2])
        while frame is not None and not frame.f_code.co_filename.startswith(package):
            frame = frame.f_back
        if innermost is None:
            return "", 0, False
        file = innermost.f_code.co_filename
        distributed = "/torch/distributed/" in file and "/checkpoint/" not in file
        waits = distributed or any(word in _line(file, innermost.f_lineno) for word in WAITS)
        return _place(frame or innermost, package), id(innermost), waits

    def _is_dead(self, status: Status) -> bool:
        """Whether the process that wrote the status has ended; False if it runs on another machine."""
        if status["machine"] is None or status["machine"] != self.identity["machine"]:
            return False
        return _process(status) is None

    # -- the end ------------------------------------------------------------------------------------------------------
    def _accuse(self, status: Status | None, what: str) -> NoReturn:
        """Writes the verdict that the rank of `status` is at fault, if there is none yet, and ends the process."""
        status = status or {"rank": self.missing, "state": "missing"}
        known = [f"host {status['host']}, pid {status['pid']}"] if "pid" in status else []
        if "phase" in status:
            known += [f"step {status['step']}" if status["step"] else "before the first step", status["phase"]]
            known += [status["where"]] if status.get("where") else []
        text = f"rank {status['rank']} {what} ({', '.join(known) or 'nothing is known of it'})"
        verdict = json.dumps({"text": text, "by": self.rank, "what": what, "status": status})
        self._obey(self._own.compare_set(VERDICT, "", verdict))

    def _obey(self, verdict: bytes) -> NoReturn:
        """Prints the verdict and ends the process; the rank that accused also adds it to metrics.jsonl."""
        accusation = json.loads(verdict)
        status = accusation["status"]
        if accusation["by"] == self.rank:
            fields = {key: status.get(key) for key in ("rank", "host", "pid", "phase", "where")}
            event = {"event": "rank_failure", "time": time.time(), "step": status.get("step", 0)}
            with contextlib.suppress(OSError):
                self.run.mkdir(parents=True, exist_ok=True)
                with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as log:
                    words = {"reason": accusation["what"], "message": accusation["text"]}
                    log.write(json.dumps(event | fields | words) + "\n")
        self._say_and_end(accusation["text"], status)

    def _say_and_end(self, text: str, status: Status) -> NoReturn:
        now = {"py_callstack": text, "timestamp": str(int(time.time()))}
        report = json.dumps({"message": {"message": text, "extraInfo": now}})  # the format that torchrun reads
        files = {FAILURE_FILE: f"linear-moe: {text}\n", "TORCHELASTIC_ERROR_FILE": report}
        for variable, content in files.items():
            if file := os.environ.get(variable):
                with contextlib.suppress(OSError), open(file, "x", encoding="utf-8") as out:
                    out.write(content)
        os.write(2, f"linear-moe: [rank {self.rank}] {text}\n".encode())  # the main thread may hold sys.stderr's lock
        stuck = status.get("state") == "running" and status.get("machine") == self.identity["machine"] is not None
        if stuck and status["pid"] != os.getpid() and (process := _process(status)) is not None:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)  # torchrun would wait half a minute for the hanging process
        os._exit(RANK_LOST)


_current: Watch | None = None


def mark(phase: str, step: int | None = None) -> None:
    """Records the phase, and the step, that this rank begins, for the message if the rank is lost.

    Does nothing where there is no watch, because there is one rank only.
    """
    if _current is not None:
        _current.mark(phase, step)


def store() -> dist.Store | None:
    """The watch's store, for `init_process_group`; None: there is one rank only."""
    return _current.store if _current is not None else None


@contextlib.contextmanager
def watching(config: Config) -> Iterator[None]:
    """Runs the watch thread during the `with` block, if there are other ranks."""
    global _current
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield
        return
    # NCCL also has a monitor that aborts the process if NCCL's watchdog thread hangs; it must not act before the watch.
    seconds = int(backstop(config).total_seconds() + 10 * OBSERVED)
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(seconds, 480)))
    watch = _current = Watch(int(os.environ["RANK"]), world, 60 * config.training.timeout_minutes, Path(config.run))
    try:
        yield
    except BaseException as error:
        watch.raised(error)
        raise
    finally:
        _current = None
    watch.end()


def _connect(rank: int, timeout: float) -> dist.Store:
    """The store of torchrun's agent, or one that rank 0 keeps. SystemExit, after a line on stderr, without either."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        tcp = dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=not agent,
        )
    except RuntimeError as error:
        text = f"the launcher or rank 0 keeps no store at {address}:{port}: {_one_line(str(error))}"
        print(f"linear-moe: [rank {rank}] {text}", file=sys.stderr, flush=True)
        raise SystemExit(RANK_LOST) from None
    return dist.PrefixStore(f"linear_moe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", tcp)


def _machine() -> str | None:
    """Identity of the boot and of the process namespace, equal for processes that can see each other; None: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _process(status: Status) -> psutil.Process | None:
    """The process that wrote the status; None if it has ended."""
    try:
        process = psutil.Process(status["pid"])
        same = abs(process.create_time() - status["created"]) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _is_communication(error: BaseException) -> bool:
    """Whether the error says that the connection to another rank was lost, or that waiting for one timed out."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    words = ("gloo", "NCCL", "Connection closed by peer", "Socket Timeout", "Connection reset")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


@cache
def _lines(file: str) -> list[str]:
    """Lines of a source file; none where it cannot be read. `linecache` will not do: the main thread may change it."""
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _line(file: str, number: int | None) -> str:
    """A line of a source file.

    Returns "" where there is no such line: a frame between two lines has no number, and generated code has no file.
    """
    lines = _lines(file)
    return lines[number - 1] if number is not None and 0 < number <= len(lines) else ""


def _place(frame: FrameType, package: str) -> str:
    code = frame.f_code
    return f"{os.path.relpath(code.co_filename, Path(package).parent)}:{frame.f_lineno} in {code.co_name}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:300] + "..."
