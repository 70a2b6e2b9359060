"""Runs many test cases in one set of processes: starting a process takes seconds, a case milliseconds.

A case is a function of one of this package's `*cases.py`, called on every rank with keyword arguments. It returns any
value that `torch.save` can store. `run` returns the values of all ranks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parents[2]
Case = tuple[str, dict[str, Any]]


class Ranks:
    """Processes that run cases one after the other, in order. They start at once; see `run` for the arguments."""

    def __init__(self, world: int, cases: dict[str, Case], timeout: float = 420.0):
        self.world, self.cases, self.deadline = world, cases, time.monotonic() + timeout
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        torch.save(cases, self.folder / "cases.pt")
        (self.folder / "output").touch()
        self._processes = [_context.Process(target=_rank, args=(self.folder, r, world)) for r in range(world)]
        with mock.patch.dict(os.environ, environment() | {"PYTHONWARNINGS": "ignore"}, clear=True):
            for process in self._processes:
                process.start()

    def results(self) -> dict[str, list[Any]]:
        """Waits for all processes, or for the first one that fails, and returns each case's results by rank."""
        running, failed = list(self._processes), ""
        try:
            while running and not failed:
                if not wait([p.sentinel for p in running], max(0.0, self.deadline - time.monotonic())):
                    failed = "are killed: time is up"
                failed = failed or next((f"returned {p.exitcode}" for p in running if p.exitcode), "")
                running = [p for p in running if p.exitcode is None]
            assert not failed, f"{self.world} processes {failed}:\n{(self.folder / 'output').read_text()[-20000:]}"
            return {
                name: [torch.load(self.folder / f"{name}.{r}.pt", weights_only=False) for r in range(self.world)]
                for name in self.cases
            }
        finally:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
                process.kill()
                process.join()
            self._folder.cleanup()


def run(world: int, cases: dict[str, Case], timeout: float = 420.0) -> dict[str, list[Any]]:
    """Runs `cases` (name -> function name and arguments) in `world` new processes with gloo, or with NCCL on GPUs.

    Args:
        world: number of processes, as of torchrun; 1: a plain Python process.
        cases: cases to run one after the other, in order.
        timeout: seconds until all processes are killed.

    Returns:
        each case's results by rank.

    Raises:
        AssertionError: a case raised an error, or time was up; the message has the end of the output.
    """
    return Ranks(world, cases, timeout).results()


# Ranks are forked from a process that has imported everything and run nothing. On a GPU they are spawned, because a
# CUDA driver does not survive a fork.
_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_context.set_forkserver_preload(["tests.distributed.worker"])


def _rank(folder: Path, rank: int, world: int) -> None:
    from tests.distributed import worker

    worker.main(folder, rank, world)


def environment() -> dict[str, str]:
    """Environment for a new process that imports this repository and is not a rank of another launcher."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in full shape, read by PyTorch's own reader."""
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
