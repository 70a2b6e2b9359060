#!/usr/bin/env python3
"""Cost of a mixer on pieces of sequences beside whole sequences: forward and backward on one GPU, no communication.

There is a row for each mixer, in milliseconds of CUDA events (medians) and of kernels' own time (`_busy`):
    whole      one row of --length tokens
    rows       the same number of tokens in two rows: kernels see two pieces of zigzag in this way
    piece      one piece, as with `parallel.sequence_layout=contiguous`, whose neighbours are stubs: all local
               computation of a piece, but no communication
    pieces     two pieces, as with zigzag
    added      piece - whole, and pieces - rows, in busy time; `added_kernels`: microseconds of the kernels that run
               more often or longer
The first steps of all mixers, which compile kernels, run side by side; then one process at a time measures.

    python scripts/bench/sequence_ops.py --out FOLDER                      # the mixers of MIXERS
    python scripts/bench/sequence_ops.py --out FOLDER --mixers all
    python scripts/bench/sequence_ops.py --out FOLDER --device cpu --length 64 --mixers gla
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from queue import Empty
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from mixers import Setting, Work, busy, milliseconds, profiled
from pretrain import commit, versions

from linear_moe.config.strategies import SequenceLayout
from linear_moe.layout.sequence import PieceOrder
from linear_moe.modeling.dims import Dims
from linear_moe.modeling.host import Host, initialize
from linear_moe.modeling.mixers.base import Mixer
from linear_moe.modeling.mixers.registry import MIXERS as ALL
from linear_moe.modeling.mixers.registry import mixer_class, mixer_config
from linear_moe.modeling.tokens import TokenLayout
from linear_moe.training.sequence.cut import cut
from linear_moe.training.sequence.exchange import SequenceGroup
from linear_moe.training.sequence.pieces import pieces_layout

MIXERS = "linear_attention,gla,mamba2,gated_deltanet"
FIELDS: dict[str, dict[str, Any]] = {"gla": {"expand_k": 1.0, "qkv_bias": True}}  # as in configs/models/a0.3b_2b.yaml
ORDERS = {"piece": SequenceLayout.CONTIGUOUS, "pieces": SequenceLayout.ZIGZAG}


def build(name: str, at: Setting) -> Mixer:
    """Builds a mixer in bf16 with the sizes of the preset a0.3b_2b, as in its first layer."""
    host, config = Host(dtype=torch.bfloat16, device=at.device), mixer_config(name, **FIELDS.get(name, {}))
    dims = Dims(at.hidden, at.heads, 12, 0, norm_eps=1e-5, init_std=0.008, output_init_std=0.008 / 24**0.5)
    mixer_class(name).validate(config, dims, 1, "model.mixer")
    mixer = mixer_class(name)(config, dims, host)
    initialize(mixer, host, seed=0)
    return mixer


def layouts(length: int, device: torch.device) -> dict[str, TokenLayout]:
    columns = {"whole": TokenLayout(1, length), "rows": TokenLayout(2, length // 2)}
    positions = torch.arange(length, device=device)[None]
    for column, kind in ORDERS.items():
        order = PieceOrder(1, kind)
        columns[column] = pieces_layout(cut(1, length, order, 0), SequenceGroup(order, 0), device, positions, None)
    return columns


def passes(mixer: Mixer, at: Setting, length: int) -> dict[str, Work]:
    """Makes a forward and backward pass for every column, and runs each of them once."""
    x = torch.randn(length, at.hidden, device=at.device).bfloat16().requires_grad_()
    grad, inputs = torch.randn_like(x), [x, *mixer.parameters()]

    def step_of(layout: TokenLayout) -> Work:
        return lambda: torch.autograd.grad(mixer(x, layout), inputs, grad, allow_unused=True)

    steps = {column: step_of(layout) for column, layout in layouts(length, at.device).items()}
    for step in steps.values():
        step()
    if at.device.type == "cuda":
        torch.cuda.synchronize()
    return steps


def kernels(step: Work, at: Setting) -> Counter[str]:
    """Microseconds of each kernel in one pass."""
    spent: Counter[str] = Counter()
    for event in profiled(step, at, 1, host=False).events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            spent[event.name[:90]] += event.time_range.elapsed_us()
    return spent


def measure(steps: dict[str, Work], at: Setting) -> dict[str, Any]:
    row: dict[str, Any] = {f"{column}_ms": milliseconds(step, at) for column, step in steps.items()}
    if at.device.type != "cuda":
        return row
    running = busy(steps, at, 3)
    for column, (spent, launches) in running.items():
        row |= {f"{column}_busy_ms": spent, f"{column}_launches": launches}
    for column, base in (("piece", "whole"), ("pieces", "rows")):
        row[f"{column}_added_busy_ms"] = running[column][0] - running[base][0]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[column]()
        row[f"{column}_memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    of_pieces, of_rows = kernels(steps["pieces"], at), kernels(steps["rows"], at)
    added = {name: round(of_pieces[name] - of_rows[name]) for name in of_pieces | of_rows}
    longest = sorted(added.items(), key=lambda item: -abs(item[1]))[:20]
    return row | {"added_kernels": {name: spent for name, spent in longest if abs(spent) >= 3}}


def worker(name: str, at: Setting, length: int, lock: Any, queue: Any) -> None:
    since = time.perf_counter()
    row: dict[str, Any] = {"mixer": name, "length": length}
    try:
        steps = passes(build(name, at), at, length)
        row["first_steps_seconds"] = time.perf_counter() - since
        with lock:
            row |= measure(steps, at)
            if at.device.type == "cuda":
                row["device"] = torch.cuda.get_device_name()
                torch.cuda.empty_cache()
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    queue.put(row)


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['mixer']:24} failed: {row['error'].splitlines()[0][:200]}"
    columns = ("whole", "rows", "piece", "pieces")
    spans = "  ".join(
        f"{column} {row[f'{column}_ms']:7.2f} ({row.get(f'{column}_busy_ms', float('nan')):7.2f})" for column in columns
    )
    return f"{row['mixer']:24} {spans}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of sequence_ops.json")
    parser.add_argument("--mixers", default=MIXERS, help="names, comma separated, or: all")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for everything")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    if unknown := set(options.mixers.split(",")) - {"all", *ALL}:
        parser.error(f"no such mixers: {', '.join(sorted(unknown))}; there are {', '.join(sorted(ALL))}")
    return options


def main() -> int:
    options = arguments()
    able = sorted(name for name in ALL if mixer_class(name).capabilities.sequence_parallel)
    names = able if options.mixers == "all" else options.mixers.split(",")
    sizes = (1024, 8) if options.device == "cuda" else (64, 4)
    at = Setting(torch.device(options.device), *sizes, ((1, options.length),), options.repeats)
    context = multiprocessing.get_context("fork")
    lock, queue = context.Lock(), context.Queue()
    processes = [context.Process(target=worker, args=(name, at, options.length, lock, queue)) for name in names]
    for process in processes:
        process.start()
    try:
        revision: str | None = commit()
    except (OSError, subprocess.CalledProcessError):  # a copy of the repository without its history
        revision = None
    until, rows = time.monotonic() + options.timeout, list[dict[str, Any]]()
    while len(rows) < len(names):
        try:
            rows.append(queue.get(timeout=max(0.0, min(5.0, until - time.monotonic()))))
        except Empty:
            if time.monotonic() >= until or not any(process.is_alive() for process in processes):
                break
            continue
        print(line(rows[-1]), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"name": "sequence_ops", **versions(), "commit": revision, "hidden_size": at.hidden, "rows": rows}
        (options.out / "sequence_ops.json").write_text(json.dumps(result, indent=1) + "\n")
    for process in processes:
        process.kill()
    missing = set(names) - {row["mixer"] for row in rows}
    if missing:
        print(f"not done in {options.timeout:g} s: {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if missing or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
