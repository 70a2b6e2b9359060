"""Kernel configurations tuned once per GPU, so that a first step compiles kernels and does not search for minutes.

`NVIDIA_H100.json` and its like hold, per kernel, what Triton's autotuner chose for each of its keys (sizes, flags,
dtypes of the arguments). `scripts/bench/tune.py` makes them. A key that is not there takes the configuration of the
nearest one that differs in counts only (heads, rows, tokens). Sizes within a head decide which configurations work at
all (some of flash-linear-attention 0.6.0's give wrong results or fault at sizes they were not chosen for), so for
another K or V, or a kernel whose configuration does not fit the GPU, Triton tunes anew (and the log warns of it).

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

COUNTS = {"B", "H", "HQ", "HV", "G", "N", "T", "T_BUCKET", "NB", "NC"}
"""Names of key values that may differ from the table's."""

STATE = "torch.float32"  # dtype of initial and final states and of their gradients

_SEARCH = (
    "%s: no configuration for %s in %s; Triton searches for one, and for others that are missing, which can take "
    "minutes. `scripts/bench/tune.py --out FOLDER --mixers NAME --widths HIDDEN:HEADS` "
    "makes a file of them that %s can name"
)

_log = logging.getLogger(__name__)


def table_path(gpu: str) -> Path | None:
    """The file for a GPU of this name: the variable's, else the shipped one whose name begins `gpu`."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    files = (path for path in Path(__file__).parent.glob("*.json") if gpu.startswith(path.stem.replace("_", " ")))
    return max(files, key=lambda path: len(path.stem), default=None)


def nearest_tuned(entries: list[Entry], key: list[Any], names: list[str]) -> dict[str, Any] | None:
    """The configuration of the entry nearest to `key`, by ratios of counts; whatever is no count must be equal.

    Only initial states and their gradients, in fp32, may be given to one and not to the other.

    Args:
        names: of the key's first values; the others are dtypes.
    """

    def distance(other: list[Any]) -> float:
        total = _absent(other[len(names) :], key[len(names) :])
        for i, (a, b) in enumerate(zip(other[: len(names)], key[: len(names)], strict=True)):
            if names[i] in COUNTS:
                total += abs(math.log2((a + 1) / (b + 1)))
            elif a != b:
                return math.inf
        return total

    best = min(entries, key=lambda entry: distance(entry["key"]), default=None)
    return None if best is None or distance(best["key"]) == math.inf else best["config"]


def _absent(one: list[Any], other: list[Any]) -> float:
    """How many states one list of dtypes has more than the other; infinite if they differ otherwise."""
    fewer, more = sorted((one, other), key=len)
    rest = iter(more)
    for dtype in fewer:
        found = next((x for x in rest if x == dtype or x != STATE), None)
        if found != dtype:
            return math.inf
    return float(len(more) - len(fewer)) if all(x == STATE for x in rest) else math.inf


def tuning_key(tuner: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[str]]:
    """The key under which Triton's `Autotuner` caches its choice for these keyword arguments; names of its values."""
    given = {name: value for name, value in {**tuner.nargs, **kwargs}.items() if name in tuner.arg_names}
    dtypes = [str(value.dtype) for value in given.values() if hasattr(value, "dtype")]
    names = [name for name in tuner.keys if name in given]
    return tuple([given[name] for name in names] + dtypes), names


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
    levels = iter([logging.WARNING])  # of a process' first search: it explains minutes of silence
    search, candidates = Autotuner.run, Autotuner.prune_configs

    def prune_configs(tuner: Any, kwargs: dict[str, Any]) -> list[Any]:  # called only for a key that is not cached
        configs, name, (key, names) = candidates(tuner, kwargs), kernel_name(tuner), tuning_key(tuner, kwargs)
        if not name.startswith("fla.") or (name, key) in taken:
            return configs
        wanted = nearest_tuned(table.get(name, []), list(key), names)
        fitting = [config for config in configs if describe(config) == wanted]
        if fitting:
            tuner.cache[key] = taken[name, key] = fitting[0]
            raise _Known(key)
        if len(configs) > 1:
            sizes, table_name = dict(zip(names, key, strict=False)), path or "no file"
            _log.log(next(levels, logging.INFO), _SEARCH, name, sizes, table_name, VARIABLE)
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
