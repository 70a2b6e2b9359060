"""Loading and saving a run's configuration: `options/load.py` for the tree in `schema.py`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from linear_moe.config.schema import Config
from linear_moe.options.load import parse_overrides, read_layers, update


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The tree of a YAML file and `a.b=c` overrides. Raises ConfigError for anything a user can get wrong."""
    config = Config()
    for layer in [*read_layers(Path(path), ()), parse_overrides(overrides)]:
        update(config, layer)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved tree as YAML, atomically; loading it gives an equal tree."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yaml.safe_dump(config.to_dict(), file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
