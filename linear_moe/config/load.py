"""TODO config.load."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
import yaml
from linear_moe.options.errors import ConfigError
from linear_moe.options.fields import OneOf
from linear_moe.config.schema import Config
from linear_moe.options.load import parse_overrides
from linear_moe.options.load import read_layers
from linear_moe.options.load import update


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
