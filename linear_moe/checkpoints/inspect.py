"""Description of a checkpoint, without a process group and without Megatron-Core."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from linear_moe.checkpoints.reader import MODEL, read_info, read_metadata, verify_checkpoint

OPTIMIZER = "optimizer."
NEEDED = ("step", "samples", "optimizer_step", "world", "config", "dtypes", "files")


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
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
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
        "config_digest": digest[:16],
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
