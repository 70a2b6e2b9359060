"""Validation of a configuration before any process group or model exists.

`training/preflight.py` calls it together with the checks of the corpus and tokenizer (`training/data`) and of a run's
checkpoint (`training/checkpointing`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from linear_moe.checks.fields import validate_fields
from linear_moe.checks.nearest import nearest_layout
from linear_moe.config.schema import Config
from linear_moe.options.errors import ConfigError

# Errors about these options already say how to fix them; another layout would not help.
OWN_FIX = ("training.global_batch", "parallel.tensor_sequence", "parallel.pipeline_layers")


def validate(config: Config, world: int | None = None, *, files: bool = True) -> None:
    """Raises ConfigError at the first constraint that does not hold.

    If the parallel sizes are the cause, the message names the nearest parallel sizes that work.

    Args:
        config: a tree from `load_config`.
        world: number of ranks; None: constraints that depend on the number of ranks are not checked.
        files: also check that the run folder and the data cache can be written.
    """
    try:
        validate_fields(config, world)
    except ConfigError as error:
        if world is not None and error.path not in OWN_FIX and (near := nearest_layout(config, world)):
            error.args = (f"{error}; nearest layout that works at world size {world}: {near}",)
        raise
    if files:
        _check_writable("run", config.run)
        if config.data.corpus != "synthetic":
            _check_writable("data.cache", config.data.cache)


def _check_writable(path: str, folder: str) -> None:
    """Raises ConfigError unless a file can be written in `folder`, or in its nearest existing parent.

    The check creates a file and removes it, because the user root passes any check of permissions.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=".linear-moe-") as file:
            file.write(b"\0")
    except OSError as error:
        where = "" if existing == Path(folder).absolute() else f" in {existing}"
        raise ConfigError(path, folder, f"folder cannot be written: {error.strerror}{where}") from None
