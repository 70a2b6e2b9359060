"""Search for the parallel layout nearest to one that does not work."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from linear_moe.checks.fields import validate_fields
from linear_moe.config.schema import Config
from linear_moe.layout.processes import MAX_WORLD
from linear_moe.options.errors import ConfigError

TRIES = 200  # layouts that `nearest_layout` tries; for a large model they take a second or two


def nearest_layout(config: Config, world: int) -> str:
    """Returns overrides of the config's parallel sizes with which it works on `world` ranks.

    The overrides change as few sizes as possible, and these by the smallest factors. Returns "" if no sizes work: then
    the error has another cause.
    """
    axes = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "sequence")
    given = {axis: getattr(config.parallel, axis) for axis in axes}

    def is_valid(sizes: dict[str, int], world: int | None) -> bool:
        split = config.parallel.pipeline_layers
        same = split is not None and len(split) == sizes["pipeline"] * sizes["virtual_pipeline"]
        changes: dict[str, Any] = {"pipeline_layers": split if same else None, **sizes}
        try:
            validate_fields(replace(config, parallel=replace(config.parallel, **changes)), world)
        except ConfigError:
            return False
        return True

    if not 1 <= world <= MAX_WORLD or not is_valid(dict.fromkeys(axes, 1), None):
        return ""
    parts = [n for n in range(1, min(world, 2**16) + 1) if world % n == 0]

    def distance(axis: str, size: int) -> float:
        return abs(math.log(size / given[axis]))

    choices = [{1, *sorted(parts, key=partial(distance, axis))[:6]} for axis in axes]
    choices[axes.index("virtual_pipeline")] = {given["virtual_pipeline"], 2, 1}
    choices[axes.index("sequence")] = {given["sequence"], 1}
    layouts: list[tuple[int, float, dict[str, int]]] = []  # (sizes changed, distance, all sizes)
    for values in product(*choices):
        sizes = dict(zip(axes, values, strict=True))
        tensor, pipeline, virtual, expert, inside, sequence = values
        if (
            world % (tensor * sequence * pipeline)
            or world % (expert * inside * pipeline)
            or (virtual > 1 and pipeline == 1)
        ):
            continue
        changed = [axis for axis in axes if sizes[axis] != given[axis]]
        layouts.append((len(changed), sum(distance(axis, sizes[axis]) for axis in changed), sizes))
    layouts.sort(key=lambda entry: entry[:2])
    near = next((sizes for _, _, sizes in layouts[:TRIES] if is_valid(sizes, world)), None)
    return "" if near is None else " ".join(f"parallel.{a}={near[a]}" for a in axes if near[a] != given[a])
