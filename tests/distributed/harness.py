"""Runs many cases in one set of processes: starting one takes seconds, a case milliseconds.

A case is a function of this package's `cases.py`, called on every rank with keyword arguments; it returns whatever
`torch.save` can store. `run` gives back what each rank returned.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parents[2]
Case = tuple[str, dict[str, Any]]


def run(world: int, cases: dict[str, Case], timeout: float = 420.0) -> dict[str, list[Any]]:
    """Run `cases` (a name to function name and arguments) in `world` gloo processes.

    Args:
        world: number of processes, under torchrun; 1: a plain Python process.
        cases: run one after the other, in order.
        timeout: seconds until everything is killed.

    Returns:
        Each case's results by rank.

    Raises:
        AssertionError: a case raised, or time was up; with the end of the output.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(cases, Path(folder, "cases.pt"))
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", "--rdzv_backend=c10d"]
        launcher += ["--rdzv_endpoint=localhost:0", "--max_restarts=0"]
        command = [sys.executable, *(launcher if world > 1 else []), "-m", "tests.distributed.worker", folder]
        env = environment() | {"PYTHONWARNINGS": "ignore"}
        with open(Path(folder, "output"), "w+") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = f"nothing, killed after {timeout} s"
            finally:
                _kill(process)
            output.seek(0)
            assert code == 0, f"{world} processes returned {code}:\n{output.read()[-20000:]}"
        return {
            name: [torch.load(Path(folder, f"{name}.{rank}.pt"), weights_only=False) for rank in range(world)]
            for name in cases
        }


def environment() -> dict[str, str]:
    """This process's environment for one that imports this repository and is not a rank of another launcher."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by PyTorch's own reader."""
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


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
