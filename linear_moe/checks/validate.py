"""What must hold between the fields of a config, checked before any process group or model exists.

Corpus and tokenizer are checked by `training/data`, a run's checkpoint by `training/checkpoint`; `check.py` calls all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from linear_moe.checks.fields import validate_fields
from linear_moe.checks.nearest import nearest_layout
from linear_moe.config.schema import Config
from linear_moe.options.errors import ConfigError

# What is said of these is what to do about them: another layout is no help.
OWN_FIX = ("training.global_batch", "parallel.tensor_sequence", "parallel.pipeline_layers")


def validate(config: Config, world: int | None = None, *, files: bool = True) -> None:
    """Raises ConfigError at the first thing that cannot work; where the parallel sizes are at fault, with some that do.

    Args:
        config: a tree from `load_config`.
        world: number of ranks; None leaves out what depends on it.
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
    """Really creates and removes a file, in the folder or where it would be made: root passes any permission check."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=".linear-moe-") as file:
            file.write(b"\0")
    except OSError as error:
        where = "" if existing == Path(folder).absolute() else f" in {existing}"
        raise ConfigError(path, folder, f"folder cannot be written: {error.strerror}{where}") from None
