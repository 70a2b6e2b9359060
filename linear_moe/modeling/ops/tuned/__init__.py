"""Kernel configurations tuned once per GPU, so that a first step compiles kernels and does not search for minutes.

`NVIDIA_H100.json` and its like hold, per kernel, what Triton's autotuner chose for each of its keys (sizes, flags,
dtypes of the arguments). `scripts/bench/tune.py` makes them. A key that is not there takes the configuration of the
nearest one with the same flags and dtypes; only a kernel without any, or whose configuration does not fit the GPU, is
tuned anew.

The environment variable `LINEAR_MOE_TUNED` names another file, or is "off".
"""

from __future__ import annotations

import json
import logging
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

VARIABLE = "LINEAR_MOE_TUNED"
Entry = dict[str, Any]  # {"key": [...], "config": {...}}

_log = logging.getLogger(__name__)


def table_path(gpu: str) -> Path | None:
    """The file for a GPU of this name: the variable's, else the shipped one whose name begins `gpu`."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    files = (path for path in Path(__file__).parent.glob("*.json") if gpu.startswith(path.stem.replace("_", " ")))
    return max(files, key=lambda path: len(path.stem), default=None)


def nearest(entries: list[Entry], key: list[Any]) -> dict[str, Any] | None:
    """The configuration of the entry nearest to `key`, by ratios of numbers; whatever is no number must be equal."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def distance(other: list[Any]) -> float:
        if len(other) != len(key):
            return math.inf
        total = 0.0
        for a, b in zip(other, key, strict=True):
            if is_size(a) and is_size(b) and a >= 0 and b >= 0:
                total += abs(math.log2((a + 1) / (b + 1)))
            elif a != b:
                return math.inf
        return total

    best = min(entries, key=lambda entry: distance(entry["key"]), default=None)
    return None if best is None or distance(best["key"]) == math.inf else best["config"]


def tuning_key(tuner: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The key under which Triton's `Autotuner` caches its choice, while it runs with these keyword arguments."""
    given = {name: value for name, value in {**tuner.nargs, **kwargs}.items() if name in tuner.arg_names}
    dtypes = [str(value.dtype) for value in given.values() if hasattr(value, "dtype")]
    return tuple([given[name] for name in tuner.keys if name in given] + dtypes)


def kernel_name(tuner: Any) -> str:
    return f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"


def describe(config: Any) -> dict[str, Any]:
    """A Triton configuration as plain data."""
    return {name: value for name, value in config.all_kwargs().items() if value is not None}


class _Known(Exception):
    """Leaves the autotuner when it is about to search for what the table has."""


@cache
def install() -> dict[tuple[str, tuple[Any, ...]], Any]:
    """Make Triton's autotuner look here before it searches, for the kernels of flash-linear-attention.

    Returns:
        What was taken from the table so far, by kernel and key.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources

    path = table_path(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    table: dict[str, list[Entry]] = json.loads(path.read_text())["kernels"] if path else {}
    taken: dict[tuple[str, tuple[Any, ...]], Any] = {}
    search, candidates = Autotuner.run, Autotuner.prune_configs

    def prune_configs(tuner: Any, kwargs: dict[str, Any]) -> list[Any]:  # called only for a key that is not cached
        configs, name, key = candidates(tuner, kwargs), kernel_name(tuner), tuning_key(tuner, kwargs)
        if not name.startswith("fla.") or (name, key) in taken:
            return configs
        wanted = nearest(table.get(name, []), list(key))
        fitting = [config for config in configs if describe(config) == wanted]
        if fitting:
            tuner.cache[key] = taken[name, key] = fitting[0]
            raise _Known(key)
        _log.info("no configuration of %s for %s in %s: tuning", name, key, path)
        return configs

    def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return search(tuner, *args, **kwargs)
        except _Known as known:
            (key,) = known.args
        try:
            return search(tuner, *args, **kwargs)
        except OutOfResources:
            del tuner.cache[key]
            return search(tuner, *args, **kwargs)

    Autotuner.run, Autotuner.prune_configs = run, prune_configs
    return taken
