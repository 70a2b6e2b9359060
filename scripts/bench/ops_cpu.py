#!/usr/bin/env python3
"""Speed of chunked recurrences against the token-by-token definition on one CPU thread, as docs/results/NAME.json.

Measured are all ops and gate forms of the tests (B1, H4, K = V = 64, fp32), then the recurrence of every mixer with
default options, on the inputs that the mixer computes from random tokens (hidden size 256, 4 heads). Seconds are the
best of a few runs: of the forward pass without autograd, and of forward and backward with gradients of all inputs.

    python scripts/bench/ops_cpu.py
    python scripts/bench/ops_cpu.py --only delta --length 512 --folder /tmp
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from pretrain import commit, versions
from torch import Tensor

from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.base import LinearMixer
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class, mixer_config
from linear_moe.modeling.ops.backends import use_backend
from linear_moe.modeling.tokens import TokenLayout
from tests.unit.modeling.ops.recurrences.cases import OPS, VARIANTS, make_inputs

HEADS, SIZE = 4, 64


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def leaves(value: Any) -> Any:
    """Copies a nested value with floating-point tensors as leaves that require gradients."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    if isinstance(value, dict):
        return {key: leaves(item) for key, item in value.items()}
    return type(value)(map(leaves, value)) if isinstance(value, tuple | list) else value


def seconds(run: Callable[[], object]) -> float:
    """Seconds of the best of 5 runs after a warm-up, or of as many runs as fit into a second.

    The best run is taken because other programs on the machine can only slow a run down.
    """
    times: list[float] = []
    while len(times) < 2 or (len(times) < 6 and sum(times[1:]) < 1.0):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(function: Callable[[Any], Any], inputs: Any) -> dict[str, float]:
    """Seconds of both implementations, and how many times faster the chunks are."""
    inputs = leaves(inputs)
    wanted = [x for x in tensors(inputs) if x.requires_grad]

    def both() -> None:
        outputs = [y for y in tensors(function(inputs)) if y.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)

    def forward() -> None:
        with torch.no_grad():
            function(inputs)

    row: dict[str, float] = {}
    for backend in ("chunk", "reference"):
        with use_backend(backend):
            row |= {f"{backend}_forward_seconds": seconds(forward), f"{backend}_seconds": seconds(both)}
    row["forward_speedup"] = row["reference_forward_seconds"] / row["chunk_forward_seconds"]
    row["speedup"] = row["reference_seconds"] / row["chunk_seconds"]
    return row


def call(op: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return op(**inputs)


def ops(length: int, only: str) -> Iterator[dict[str, Any]]:
    for family, gate in VARIANTS:
        if only in family:
            inputs = make_inputs(family, gate, (1, length, HEADS, SIZE, SIZE), with_state=False)
            yield {"op": family, "gate": gate, **measure(partial(call, OPS[family]), inputs)}


def mixers(length: int, only: str) -> Iterator[dict[str, Any]]:
    dims = Dims(HEADS * SIZE, HEADS, num_layers=2, layer=0, norm_eps=1e-5, init_std=0.02, output_init_std=0.02)
    layout = TokenLayout(1, length)
    for name in sorted(MIXERS):
        cls = mixer_class(name)
        if only not in name or not issubclass(cls, LinearMixer):
            continue
        cls.validate(mixer_config(name), dims, 1, "model.mixer")
        mixer = cls(mixer_config(name), dims, Host())
        initialize(mixer, mixer.host, seed=0)
        x = torch.randn(length, HEADS * SIZE, generator=torch.Generator().manual_seed(0))
        inputs, _ = mixer.project(x, layout, None)
        run = lambda given, mixer=mixer: mixer.recurrence(given, layout, {})  # noqa: E731
        yield {"op": cls.family, "mixer": name, **measure(run, inputs)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", default="", help="only ops and mixers whose name contains this text")
    parser.add_argument("--name", default="ops_cpu", help="FOLDER/NAME.json")
    parser.add_argument("--folder", default="docs/results")
    parser.add_argument("--note", action="append", default=[], help="text to write into the file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    rows = []
    for row in chain(ops(args.length, args.only), mixers(args.length, args.only)):
        rows.append(row)
        name = row["mixer"] if "mixer" in row else f"{row['op']} {row['gate']}"
        print(f"{name:24} {row['chunk_seconds']:8.3f} s, {row['speedup']:6.1f} x;", end=" ")
        print(f"forward {row['chunk_forward_seconds']:8.3f} s, {row['forward_speedup']:6.1f} x", flush=True)
    result = {
        "name": args.name,
        "device": platform.processor() or platform.machine(),
        "gpus": 0,
        "threads": 1,
        **versions(),
        "commit": commit(),
        "command": shlex.join(["scripts/bench/ops_cpu.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "notes": args.note,
        "batch": 1,
        "sequence_length": args.length,
        "heads": HEADS,
        "key_dim": SIZE,
        "value_dim": SIZE,
        "dtype": "fp32",
        "rows": rows,
    }
    path = Path(args.folder) / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
