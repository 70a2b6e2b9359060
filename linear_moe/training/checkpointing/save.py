"""Saves checkpoints: every rank's part or none, and never over a good checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.futures import Future

from linear_moe.checkpoints.reader import FORMAT, INFO, LATEST, complete_checkpoints, file_crc, step_name
from linear_moe.config.schema import Config
from linear_moe.options.errors import ConfigError
from linear_moe.training.checkpointing import state
from linear_moe.training.checkpointing.collective import on_rank_0

logger = logging.getLogger(__name__)

THREADS = 8
"""Number of files that one process writes at a time."""


class SaveError(ConfigError):
    """A checkpoint could not be written. Raised on all ranks; earlier checkpoints are unchanged."""


def save(config: Config, step: int, model: list[Any], optimizer: MegatronOptimizer, *, data: str | None = None) -> Path:
    """Saves a checkpoint after optimizer step `step`, and returns its folder. Collective.

    The checkpoint is written to a sibling folder. Its sizes are checked, the folder is renamed, and only then `latest`
    names it. Then older checkpoints are removed, but for the last `checkpoint.keep`; and checkpoints of later steps,
    which a run that went back to an earlier checkpoint has abandoned.

    The format and the planners are Megatron-Core's, but its `dist_checkpointing.save` is not used: it writes in forked
    processes, and on rank 0 alone between collectives, so that the other ranks wait for ever when one of these writes
    fails, for example on a full disk (0.16.1 and 0.19.2). PyTorch's writer runs in this process, and reports the
    failure of any rank to all ranks.

    Args:
        data: fingerprint of the training data, for `check_data_unchanged`; None: a resume accepts any data.

    Raises:
        SaveError: no space, no permission, ...; on all ranks. The partial checkpoint has been removed.
    """
    checkpoints = Path(config.run) / "checkpoints"
    final, partial = checkpoints / step_name(step), checkpoints / f".{step_name(step)}.partial"
    shards = state.main_weights(model, optimizer) | state.moments(model, optimizer)
    mains = {key: [s for s in parts if is_main_replica(s.replica_id)] for key, parts in shards.items()}
    tensors = {key: parts for key, parts in mains.items() if parts}
    needed = _total_bytes([s.data for parts in tensors.values() for s in parts], model)
    objects = {o.unique_key: [o] for o in state.saved_objects() if is_main_replica(o.replica_id)}
    info = checkpoint_info(config, step, state.optimizer_step(optimizer), _dtypes(model)) | {"data": data}
    try:
        on_rank_0(lambda: prepare(partial, needed))
        sums = _write(partial, mcore_to_pyt_state_dict(tensors | objects))
        on_rank_0(lambda: publish(partial, final, info | {"world": dist.get_world_size()}, sums))
    except OSError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        reason = f"checkpoint not saved: {error.strerror or error}"
        raise SaveError(str(final), ..., reason, fix=_way_out(checkpoints)) from error
    on_rank_0(lambda: _prune(checkpoints, step, config.checkpoint.keep))
    return final


def _total_bytes(tensors: list[torch.Tensor], model: list[Any]) -> int:
    """Bytes that all ranks together will write, with room for the format's metadata. Collective."""
    local = sum(t.numel() * t.element_size() + 2048 for t in tensors) + 2**16
    device = next(iter(state.named_parameters(model).values())).device
    total = torch.tensor(local, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def _dtypes(model: list[Any]) -> dict[str, str]:
    """Dtypes of all ranks' parameters, by parameter name. Collective."""
    dtypes: list[Any] = [None] * dist.get_world_size()
    local = {name: dtype_name(p) for name, p in state.named_parameters(model).items()}
    dist.all_gather_object(dtypes, local)
    return {name: dtype for rank in dtypes for name, dtype in rank.items()}


def dtype_name(parameter: torch.Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def checkpoint_info(config: Config, step: int, optimizer_step: int, dtypes: dict[str, str]) -> dict[str, Any]:
    """Content of `checkpoint.json`, without `world`, `data`, and the entries that `publish` adds."""
    import megatron.core

    return {
        "format": FORMAT,
        "step": step,
        "samples": step * config.training.global_batch,
        "optimizer_step": optimizer_step,
        "config": config.to_dict(),
        "dtypes": dtypes,
        "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
    }


def prepare(partial: Path, needed: int) -> None:
    """Makes the empty folder `partial`. OSError if the disk has no room for `needed` bytes."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(None, f"it needs {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free")


class _Summed:
    """A file, written from begin to end, with the CRC-32 of the bytes given to it, whatever the disk makes of them."""

    def __init__(self, file: Any):
        self.file, self.crc = file, 0

    def write(self, data: Any) -> int:
        written = self.file.write(data)
        assert written == memoryview(data).nbytes
        self.crc = zlib.crc32(data, self.crc)
        return written

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


class _Files(FileSystem):
    """PyTorch's file system, which also keeps the CRC-32 of every file that this process writes, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            if mode != "wb":
                yield file
                return
            summed = _Summed(file)
            yield summed
            name = Path(path).name.removesuffix(".tmp")  # the metadata file is written as .tmp and then renamed
            self.sums[name] = summed.crc


class CheckpointWriter(FileSystemWriter):
    """PyTorch's checkpoint writer, with CRC-32 sums of its files and the operating system's errors.

    PyTorch's serialisation raises errors of its own; the OSError behind them is raised instead.

    Args:
        folder: folder to write to.
        count: number of files, over which the tensors are shared out by size; at most `THREADS` are written at a time.
    """

    def __init__(self, folder: Path, count: int = 1):
        ahead = 10_000_000 if count == 1 else 0  # bytes copied from the GPU ahead; not with several threads
        super().__init__(folder, thread_count=count, sync_files=True, per_thread_copy_ahead=ahead)
        self.fs = self.files = _Files()

    def _write_data(self, planner: Any, file_queue: Any) -> Any:
        """Writes in own threads: PyTorch (2.11, 2.13) reports no error of the threads that it would start itself."""
        threads, self.thread_count = min(self.thread_count, THREADS), 1
        write = super()._write_data
        if threads == 1:
            return write(planner, file_queue)
        with ThreadPoolExecutor(threads) as pool:
            parts = [pool.submit(write, planner, file_queue) for _ in range(threads)]
        written: Future[list[Any]] = Future()
        written.set_result([result for part in parts for result in part.result().wait()])
        return written

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _system_error(error) from error

    def finish(self, metadata: Any, results: Any) -> None:
        try:
            super().finish(metadata, results)
        except Exception as error:
            raise _system_error(error) from error


def _system_error(error: BaseException) -> BaseException:
    """The OSError in the chain of causes of `error`; `error` itself where there is none."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return OSError(link.errno, link.strerror)
        link = link.__cause__ or link.__context__
    return error


def _write(folder: Path, tensors: dict[str, Any]) -> dict[str, int]:
    """Writes this rank's file, and returns the CRC-32 of every rank's files, by name. Collective."""
    writer = CheckpointWriter(folder)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    try:
        dcp.save(tensors, storage_writer=writer, planner=planner)
    except CheckpointException as failure:  # raised on every rank, with the errors of all ranks
        errors = [error for error, _ in failure.failures.values()]
        system = next((error for error in errors if isinstance(error, OSError)), None)
        if system is None:
            raise
        raise system from failure
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, writer.files.sums)
    return {name: crc for sums in everyone for name, crc in sums.items()}


def publish(partial: Path, final: Path, info: dict[str, Any], sums: dict[str, int]) -> None:
    """Checks the written files, adds `checkpoint.json`, renames `partial` to `final`, and names it in `latest`.

    Args:
        info: content of `checkpoint.json`; the files' sizes and CRC-32 sums are added.
        sums: CRC-32 of files by name; those of the other files in `partial` are added to it.

    Raises:
        OSError: a piece is missing, or a file is too short.
    """
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    # The state that no rank owns: Megatron-Core 0.16.1 reads it from this file, 0.19.2 from the object `common_state`.
    torch.save({}, partial / "common.pt")
    metadata = FileSystemReader(partial).read_metadata()
    planned = sum(len(getattr(entry, "chunks", [None])) for entry in metadata.state_dict_metadata.values())
    if len(metadata.storage_data) != planned:
        raise OSError(None, f"{len(metadata.storage_data)} of {planned} pieces were written")
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    files = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
    for name, end in ends.items():
        if files.get(name, 0) < end:
            raise OSError(None, f"{name} has {files.get(name, 0)} of {end} bytes")
    sums |= {name: file_crc(partial / name) for name in files if name not in sums}
    _write_text(partial / INFO, json.dumps(info | {"files": files, "crc32": sums}, indent=1))
    _sync(partial)
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
    temporary = final.with_name(f".{LATEST}.partial")
    _write_text(temporary, final.name + "\n")
    temporary.replace(final.with_name(LATEST))
    _sync(final.parent)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes the folder's entries (new and renamed files) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    """Removes all checkpoints but that of `step` and the `keep - 1` before it, and the leftovers of killed saves."""
    try:
        complete = complete_checkpoints(checkpoints)
        kept = complete[: complete.index(checkpoints / step_name(step)) + 1][-keep:]
        for folder in [folder for folder in complete if folder not in kept]:
            (folder / INFO).unlink()  # first, because a checkpoint that is half removed must not count as complete
            shutil.rmtree(folder)
        for leftover in checkpoints.glob(".step_*"):
            shutil.rmtree(leftover)
    except OSError as error:
        logger.warning("%s: an old checkpoint could not be removed: %s", checkpoints, error)


def _way_out(checkpoints: Path) -> str:
    """The `fix` of a SaveError: which checkpoint stays valid, and what to do."""
    complete = complete_checkpoints(checkpoints)
    kept = f"{complete[-1].name} stays valid" if complete else "there is no earlier one"
    return f"{kept}; free some space or change `run`, and rerun the command"
