"""Kernel configurations tuned once per GPU, so that a first step compiles kernels and does not search for minutes.

Files like `NVIDIA_H100.json` hold, for each kernel, the configurations that Triton's autotuner chose, by cache key
(sizes, flags and dtypes of the arguments). `scripts/bench/tune.py` makes these files. A key that the file lacks takes
the configuration of the nearest key that differs in counts only (heads, rows, tokens). Sizes within a head decide which
configurations work at all: some of flash-linear-attention 0.6.0 give wrong results or fault at sizes they were not
chosen for. So for another K or V, and for a kernel whose configuration does not fit the GPU, Triton tunes anew, and the
log warns of the search.

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
"""Names of the values of a key that are counts: a configuration may be used at other counts than it was tuned for."""

STATE = "torch.float32"  # dtype of initial and final states and of their gradients

_SEARCH = (
    "%s: no configuration for %s in %s; Triton searches for one, and for others that are missing, which can take "
    "minutes. `scripts/bench/tune.py --out FOLDER --mixers NAME --widths HIDDEN:HEADS` "
    "writes the configurations to a file, which the environment variable %s can name"
)

_log = logging.getLogger(__name__)


def table_path(gpu: str) -> Path | None:
    """Returns the file of configurations for the GPU named `gpu`.

    The file is that which LINEAR_MOE_TUNED names, else the shipped one whose name begins the GPU's name. None: no
    shipped file has such a name, or the variable is "off".
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen:
        return None if chosen == "off" else Path(chosen)
    files = (path for path in Path(__file__).parent.glob("*.json") if gpu.startswith(path.stem.replace("_", " ")))
    return max(files, key=lambda path: len(path.stem), default=None)


def nearest_tuned(entries: list[Entry], key: list[Any], names: list[str]) -> dict[str, Any] | None:
    """Returns the configuration of the entry nearest to `key` by the ratios of counts; None: no entry can be used.

    All values of the two keys that are no counts must be equal, except that one key may lack dtypes of initial states
    or of their gradients, which are fp32 tensors that a kernel is given or not.

    Args:
        names: names of the key's first values; the remaining values are dtypes.
    """

    def distance(tuned: list[Any]) -> float:
        total = _absent(tuned[len(names) :], key[len(names) :])
        for i, (a, b) in enumerate(zip(tuned[: len(names)], key[: len(names)], strict=True)):
            if names[i] in COUNTS:
                total += abs(math.log2((a + 1) / (b + 1)))
            elif a != b:
                return math.inf
        return total

    best = min(entries, key=lambda entry: distance(entry["key"]), default=None)
    return None if best is None or distance(best["key"]) == math.inf else best["config"]


def _absent(first: list[Any], second: list[Any]) -> float:
    """Returns the number of states that one list of dtypes has and the other lacks; infinity if they differ otherwise.

    Args:
        first, second: dtypes of the arguments in two keys of one kernel.
    """
    shorter, longer = sorted((first, second), key=len)
    rest = iter(longer)
    for dtype in shorter:
        counterpart = next((x for x in rest if x == dtype or x != STATE), None)
        if counterpart != dtype:
            return math.inf
    return float(len(longer) - len(shorter)) if all(x == STATE for x in rest) else math.inf


def tuning_key(tuner: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[str]]:
    """Returns the key under which Triton's `Autotuner` caches its choice, and the names of the key's first values.

    Args:
        tuner: the autotuner of a kernel, which holds the positional arguments of the running call.
        kwargs: the call's keyword arguments.
    """
    given = {name: value for name, value in {**tuner.nargs, **kwargs}.items() if name in tuner.arg_names}
    dtypes = [str(value.dtype) for value in given.values() if hasattr(value, "dtype")]
    names = [name for name in tuner.keys if name in given]
    return tuple([given[name] for name in names] + dtypes), names


def kernel_name(tuner: Any) -> str:
    """Returns the module and name of an autotuner's kernel."""
    return f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"


def describe(config: Any) -> dict[str, Any]:
    """Returns a Triton configuration as plain data, without the fields that are None."""
    return {name: value for name, value in config.all_kwargs().items() if value is not None}


class _Known(Exception):
    """Signal that leaves the autotuner when it is about to search for a configuration that the table has."""


@cache
def install() -> dict[tuple[str, tuple[Any, ...]], Any]:
    """Makes Triton's autotuner look into the table before it searches, for the kernels of flash-linear-attention.

    Returns:
        The configurations taken from the table, by kernel and key; later calls of kernels add to this dictionary.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources

    path = table_path(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    table: dict[str, list[Entry]] = json.loads(path.read_text())["kernels"] if path else {}
    taken: dict[tuple[str, tuple[Any, ...]], Any] = {}
    levels = iter([logging.WARNING])  # for a process' first search, which explains minutes of silence
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
