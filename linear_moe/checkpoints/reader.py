"""Reading of checkpoints on disk, without a process group and without Megatron-Core.

Layout: `RUN/checkpoints/step_00000100/` holds `checkpoint.json` (step, configuration, data types, every file with its
size and CRC-32; the file is written last), `.metadata` and `*.distcp` (tensors, in PyTorch's format) and
`metadata.json` (Megatron-Core's format mark). `RUN/checkpoints/latest` names the folder to resume from.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from linear_moe.options.errors import ConfigError

INFO, LATEST, MODEL = "checkpoint.json", "latest", "model."
FORMAT = 1

logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether every file that the checkpoint was saved with exists in its full size."""
    try:
        files = json.loads((folder / INFO).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, oldest first."""
    if not checkpoints.is_dir():
        return []
    folders = [f for f in checkpoints.iterdir() if re.fullmatch(r"step_\d{8,}", f.name)]
    return sorted((f for f in folders if is_complete(f)), key=lambda f: int(f.name.removeprefix("step_")))


def latest_checkpoint(checkpoints: Path, *, warn: bool = True) -> Path | None:
    """Returns the checkpoint to resume from: the one that `latest` names or, if it is incomplete, the newest complete.

    With `warn`, a warning is logged if the checkpoint is not the one that `latest` names. Raises ConfigError if
    `latest` names a checkpoint and no checkpoint is complete: training must not silently start from nothing.
    """
    named = None
    try:
        named = (checkpoints / LATEST).read_text().strip()
        if named and is_complete(checkpoints / named):
            return checkpoints / named
    except FileNotFoundError:
        pass
    complete = complete_checkpoints(checkpoints)
    if complete:
        problem = f"names {named}, which is missing or incomplete" if named else "is missing"
        if warn:
            message = "%s %s: taking the newest complete checkpoint, %s"
            logger.warning(message, checkpoints / LATEST, problem, complete[-1].name)
        return complete[-1]
    if named:
        raise ConfigError(
            str(checkpoints / LATEST),
            named,
            "is missing or incomplete, and so is every other checkpoint",
            fix="delete the checkpoints folder to start again, or choose another run folder",
        )
    return None


def read_info(checkpoint: Path, needed: Iterable[str] = ("step", "dtypes", "files")) -> dict[str, Any]:
    """Reads `checkpoint.json`, the record of a checkpoint.

    Its keys are format, step, samples, optimizer_step, world, config, data, dtypes, versions, files and crc32. Raises
    ConfigError if the file cannot be read, has another format, or lacks a key of `needed`.
    """
    try:
        info = json.loads((checkpoint / INFO).read_text())
    except OSError as error:
        raise ConfigError(str(checkpoint), ..., f"is not a checkpoint ({error})") from None
    except ValueError as error:
        raise damaged(checkpoint / INFO, f"is not valid JSON ({error})") from None
    if not isinstance(info, dict):
        raise damaged(checkpoint / INFO, "is damaged: not a JSON object")
    if info.get("format") != FORMAT:
        raise ConfigError(str(checkpoint), info.get("format"), f"this version reads checkpoint format {FORMAT}")
    missing = [key for key in needed if key not in info]
    if missing:
        raise damaged(checkpoint / INFO, f"is damaged: it has no {missing[0]!r}")
    return info


def damaged(file: Path, constraint: str) -> ConfigError:
    """Makes the error for a broken file of a checkpoint; its fix names the newest other complete checkpoint, if any."""
    others = [folder.name for folder in complete_checkpoints(file.parent.parent) if folder != file.parent]
    older = f"{others[-1]} is then the newest one" if others else "there is no other one"
    return ConfigError(str(file), ..., constraint, fix=f"remove {file.parent}; {older}")


def file_crc(path: Path) -> int:
    """CRC-32 of a file (4 GB/s on one core; it finds storage errors, not forgeries)."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def verify_checkpoint_files(checkpoint: Path, part: int = 0, parts: int = 1) -> tuple[str, str] | None:
    """Compares the content of a checkpoint's files with the CRC-32 that was recorded when they were written.

    Returns the name of the first broken file and its problem, the arguments of `damaged`, or None if all files are
    whole. Of several callers, the one with number `part` of `parts` checks every `parts`-th file. A checkpoint that
    `save` did not write may record no CRC-32; then no file is checked.
    """
    sums = read_info(checkpoint).get("crc32", {})

    def verify(name: str) -> tuple[str, str] | None:
        try:
            right = file_crc(checkpoint / name) == sums[name]
        except OSError as error:
            return name, f"cannot be read: {error.strerror}"
        return None if right else (name, "is damaged: its content is not what was written")

    with ThreadPoolExecutor(4) as threads:
        return next(filter(None, threads.map(verify, sorted(sums)[part::parts])), None)


def verify_checkpoint(folder: Path) -> None:
    """Raises ConfigError unless every file has the content that was written, by its CRC-32."""
    wrong = verify_checkpoint_files(folder)
    if wrong is not None:
        raise damaged(folder / wrong[0], wrong[1])


def read_tensors(checkpoint: Path, tensors: dict[str, Any], planner: LoadPlanner | None = None) -> None:
    """Reads the values of `tensors` (by checkpoint key) in place, converted to their dtypes, in this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is intended
        load(tensors, storage_reader=FileSystemReader(checkpoint), planner=planner, no_dist=True)


def read_metadata(folder: Path) -> Metadata:
    """Reads the list of a checkpoint's tensors and of their places in files; raises ConfigError if it is damaged."""
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # unpickling raises anything
        raise damaged(folder / ".metadata", f"is damaged: {type(error).__name__}: {error}") from None


def weight_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Full (unsharded) shape of every model parameter of a checkpoint, by name."""
    return {
        key.removeprefix(MODEL): tuple(tensor.size)
        for key, tensor in metadata.state_dict_metadata.items()
        if key.startswith(MODEL) and isinstance(tensor, TensorStorageMetadata)
    }


def load_full_weights(checkpoint_folder: str | Path, *, fp32: bool = False) -> dict[str, Tensor]:
    """Loads every model parameter, unsharded, on the CPU, by its name; the layout that saved it does not matter.

    Args:
        checkpoint_folder: `RUN/checkpoints/step_...`.
        fp32: load the optimizer's fp32 weights; else every parameter has the dtype in which it was trained (the fp32
            weights, rounded as in training).

    Raises:
        ConfigError: a file is missing or damaged.
    """
    folder = Path(checkpoint_folder)
    verify_checkpoint(folder)
    dtypes = read_info(folder)["dtypes"]
    tensors: dict[str, Any] = {
        MODEL + name: torch.empty(shape, dtype=torch.float32 if fp32 else getattr(torch, dtypes[name]))
        for name, shape in weight_shapes(read_metadata(folder)).items()
    }
    read_tensors(folder, tensors)
    return {key.removeprefix(MODEL): tensor for key, tensor in tensors.items()}
