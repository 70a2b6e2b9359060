"""Launcher of benchmark jobs on several ranks, which restarts processes when one fails, and measurements of ranks."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import vocab_size
from linear_moe.layout.processes import parallel_layout
from linear_moe.plan.memory import rank_bytes
from linear_moe.plan.ranks import RankModels

ROOT = Path(__file__).parents[2]
TINY = ("model.hidden_size=64", "model.num_heads=4", "model.num_layers=4", "model.pattern=LLLN", "model.vocab_size=512",
        "model.moe.num_experts=8", "model.moe.top_k=2", "model.moe.expert_ffn_size=32", "training.dtype=fp32",
        "training.sequence_length=64")  # fmt: skip
GIB = 2**30
LEFT_GIB = 0.25
STARTED = time.monotonic()


# -- a rank ------------------------------------------------------------------------------------------------------------
def used_gib() -> dict[str, float]:
    """Memory of this rank's device in GiB: allocated, peak, and used by all processes; on a CPU the resident set."""
    if not torch.cuda.is_available():
        from linear_moe.training.supervision.metrics import memory_gib

        return dict.fromkeys(("allocated", "peak", "device"), memory_gib())
    free, total = torch.cuda.mem_get_info()
    allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return {"allocated": allocated / GIB, "peak": peak / GIB, "device": (total - free) / GIB}


def start_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def planned_gib(config: Config, ranks: int, stage: int) -> dict[str, float]:
    """Memory in GiB, by kind, that `plan` gives the ranks of a pipeline stage."""
    models = RankModels(config, vocab_size(config))
    return {k: v / GIB for k, v in rank_bytes(config, parallel_layout(config, ranks), models, stage).items()}


def end_groups() -> float:
    """Destroys all process groups but the default one; returns the GiB that are still allocated. Collective."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):  # Megatron-Core does not destroy its groups
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return used_gib()["allocated"]


# -- the launcher ------------------------------------------------------------------------------------------------------
class Group:
    """Jobs with the same number of ranks, in processes that are restarted when one fails.

    Jobs are dataclasses with `ranks` and a `name` for files. The command `script --worker FOLDER` does the jobs of
    FOLDER/jobs.json, and each rank writes FOLDER/NAME.RANK.json.

    Attributes:
        left: jobs that are not done.
        results: job -> list of its ranks' results, or {"failed": reason, "log": end of the log}.
    """

    script: str

    def __init__(self, jobs: list[Any], devices: str | None, timeout: float):
        self.left, self.devices, self.timeout = jobs, devices, timeout
        self.folder = Path(tempfile.mkdtemp())
        self.results: dict[Any, Any] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.progress = 0.0

    def start(self) -> None:
        (self.folder / "jobs.json").write_text(json.dumps([asdict(job) for job in self.left]))
        ranks = self.left[0].ranks
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, self.script, "--worker", str(self.folder)]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        if self.devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = self.devices
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.progress = time.monotonic()

    def poll(self) -> bool:
        """Collects the results of finished jobs, and restarts or drops failed ones; whether jobs are left."""
        if self.process is None and self.left:
            self.start()
        assert self.process is not None or not self.left
        ended = self.process is not None and self.process.poll() is not None
        while self.left and self._finished(self.left[0]):
            self.progress = time.monotonic()
            job = self.left.pop(0)
            self.results[job] = [json.loads(path.read_text()) for path in self._paths(job)]
            self.report(job, self.results[job])
        late = time.monotonic() - self.progress > self.timeout
        if self.left and ended and self.process is not None and self.process.returncode == 0:
            self.stop()  # the process ended itself because a layout left memory allocated
        elif self.left and (ended or late):
            self._drop(f"took longer than {self.timeout:g} s" if late and not ended else "failed")
        return bool(self.left)

    def _paths(self, job: Any) -> list[Path]:
        return [self.folder / f"{job.name}.{rank}.json" for rank in range(job.ranks)]

    def _finished(self, job: Any) -> bool:
        return all(path.exists() for path in self._paths(job))

    def _drop(self, why: str) -> None:
        """Gives up the job that was running, which failed because of `why` or out of memory."""
        self.stop()
        job, log = self.left.pop(0), (self.folder / "log").read_text(errors="replace")
        memory = "OutOfMemoryError" in log or "out of memory" in log
        self.results[job] = {"failed": "out of memory" if memory else why, "log": log[-6000:]}
        self.report(job, self.results[job])
        self.after_failure(job, memory)

    def after_failure(self, job: Any, memory: bool) -> None:
        """Hook after a failed `job`, which may change the jobs that are left; `memory`: it ran out of memory."""

    def report(self, job: Any, results: Any) -> None:
        """Prints a line about a job that has ended, from its entry in `results`."""
        raise NotImplementedError

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def run(groups: Sequence[Group], seconds: float) -> None:
    """Runs groups side by side until all jobs are done or `seconds` are over."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end and sum(group.poll() for group in groups):
            time.sleep(0.1)
    finally:
        for group in groups:
            for job in group.left:
                log = group.folder / "log"
                group.results[job] = {"failed": "no time left", "log": log.read_text()[-6000:] if log.exists() else ""}
                group.report(job, group.results[job])
            group.left = []
            group.stop()


def gpu_name() -> str:
    """Name of the GPU, from nvidia-smi: a CUDA context in this process would take memory that the jobs need."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
