"""Description and verification of a checkpoint, without a process group and without Megatron-Core."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from linear_moe.checkpoints.reader import (
    INFO,
    MODEL,
    complete_checkpoints,
    damaged,
    latest_checkpoint,
    read_info,
    verify_checkpoint_files,
)
from linear_moe.options.errors import ConfigError

OPTIMIZER = "optimizer."
NEEDED = ("step", "samples", "optimizer_step", "world", "config", "dtypes", "files")


def find(place: Path, step: int | None = None) -> Path:
    """Finds the step folder that a user means by `place`: that folder itself, or one of the run folder `place`.

    Of a run, the folder of `step` is returned (None: of the latest checkpoint). Raises ConfigError if there is no such
    checkpoint, or if it is incomplete; the message names the file that is missing or short.
    """
    if not place.is_dir():
        raise ConfigError("checkpoint", str(place), "is no folder", fix="give a run folder or RUN/checkpoints/step_...")
    if (place / INFO).exists() or place.name.lstrip(".").startswith("step_"):
        if step is not None:
            raise ConfigError("--step", step, f"{place} is one step", fix="leave it out")
        check_complete(place)
        return place
    checkpoints = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    if step is not None:
        folder = next((f for f in checkpoints.glob("step_*") if int(f.name.removeprefix("step_") or -1) == step), None)
        if folder is None:
            there = ", ".join(str(read_info(f)["step"]) for f in complete_checkpoints(checkpoints)) or "none"
            raise ConfigError("--step", step, f"{checkpoints} has no such checkpoint", fix=f"complete are: {there}")
        check_complete(folder)
        return folder
    latest = latest_checkpoint(checkpoints, warn=False)
    if latest is None:
        for folder in sorted(checkpoints.glob("step_*")):
            check_complete(folder)
        raise ConfigError("checkpoint", str(place), "is neither a run folder with a checkpoint nor a checkpoint")
    return latest


def check_complete(folder: Path) -> None:
    """Raises ConfigError for the first file that is missing, or does not have the size recorded when it was saved."""
    if folder.name.startswith("."):
        raise ConfigError(
            "checkpoint", str(folder), "was left behind by a save that did not end", fix=f"rm -r {folder}"
        )
    files = read_info(folder, NEEDED)["files"]
    for name, size in files.items():
        try:
            present = (folder / name).stat().st_size
        except OSError as error:
            raise damaged(folder / name, f"is missing: {error.strerror}") from None
        if present != size:
            raise damaged(folder / name, f"is incomplete: {present:,} of {size:,} bytes")


def verify_checkpoint(folder: Path) -> None:
    """Raises ConfigError unless every file has the content that was written, by its CRC-32."""
    wrong = verify_checkpoint_files(folder)
    if wrong is not None:
        raise damaged(folder / wrong[0], wrong[1])


def read_metadata(folder: Path) -> Metadata:
    """Reads the list of a checkpoint's tensors and of their places in files; raises ConfigError if it is damaged."""
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # unpickling raises anything
        raise damaged(folder / ".metadata", f"is damaged: {type(error).__name__}: {error}") from None


def describe_checkpoint(folder: Path, pattern: str | None = None, *, checked: bool = True) -> dict[str, Any]:
    """Returns the description that `linear-moe checkpoint inspect --json` prints, with stable keys.

    Args:
        folder: a complete checkpoint.
        pattern: shell pattern of the names of tensors to list, for example `model.layers.0.*`; None: list no tensors.
        checked: compare the content of all files with the CRC-32 recorded when they were written.

    Raises:
        ConfigError: a file is damaged.
    """
    info = read_info(folder, NEEDED)
    if checked:
        verify_checkpoint(folder)
    config, parallel = info["config"], info["config"]["parallel"]
    tensors = [
        _tensor(name, entry, info["dtypes"])
        for name, entry in sorted(read_metadata(folder).state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata)
    ]
    model = [t for t in tensors if t["name"].startswith(MODEL)]
    state = [t for t in tensors if t["name"].startswith(OPTIMIZER)]
    return {
        "checkpoint": str(folder),
        "step": info["step"],
        "samples": info["samples"],
        "tokens": info["samples"] * config["training"]["sequence_length"],
        "config_digest": digest(config),
        "data": info.get("data"),
        "imported": info.get("imported"),
        "versions": info.get("versions", {}),
        "layout": {"world": info["world"], **parallel, "distributed_optimizer": config["optimizer"]["distributed"]},
        "parameters": sum(math.prod(t["shape"]) for t in model),
        "model_bytes": sum(t["bytes"] for t in model),
        "optimizer": {"step": info["optimizer_step"], "tensors": len(state), "bytes": sum(t["bytes"] for t in state)}
        if state
        else None,
        "files": len(info["files"]),
        "bytes": sum(info["files"].values()),
        "verified": checked and bool(info.get("crc32")),
        "tensors": [t for t in tensors if fnmatch.fnmatchcase(t["name"], pattern)] if pattern else [],
    }


def digest(config: dict[str, Any]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a configuration; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _tensor(name: str, entry: TensorStorageMetadata, dtypes: dict[str, str]) -> dict[str, Any]:
    kind = entry.properties.dtype
    description = {
        "name": name,
        "shape": list(entry.size),
        "dtype": str(kind).removeprefix("torch."),
        "bytes": math.prod(entry.size) * kind.itemsize,
        "pieces": len(entry.chunks),
    }
    if name.startswith(MODEL):
        description["trained_in"] = dtypes.get(name.removeprefix(MODEL))
    return description
