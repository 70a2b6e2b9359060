"""Loading and saving of a run's configuration, the tree of `schema.py`, by means of `options/load.py`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from linear_moe.config.schema import Config
from linear_moe.options.load import parse_overrides, read_layers, update


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Loads a YAML file and applies `a.b=c` overrides; raises ConfigError for anything a user can get wrong."""
    config = Config()
    for layer in [*read_layers(Path(path), ()), parse_overrides(overrides)]:
        update(config, layer)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved tree as YAML, atomically; loading the file gives an equal tree."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yaml.safe_dump(config.to_dict(), file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
