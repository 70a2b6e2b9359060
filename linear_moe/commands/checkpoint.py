"""`linear-moe checkpoint inspect|reshard`: what is in a checkpoint, and rewriting one."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from linear_moe.options.errors import ConfigError


def main(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    return {"inspect": inspect, "reshard": reshard}[args.action](args)


def inspect(args: argparse.Namespace) -> int:
    """Print what is in a checkpoint, after comparing every file with the sum that it was written with."""
    from linear_moe.checkpoints import inspect as inspect_checkpoint

    start = time.perf_counter()
    folder = inspect_checkpoint.find(args.source, args.step)
    found = inspect_checkpoint.describe(folder, args.tensors, checked=not args.no_verify)
    if args.tensors is not None and not found["tensors"]:
        fix = "names begin with model. or optimizer.; '*' matches all"
        raise ConfigError("--tensors", args.tensors, f"no tensor of {folder} is called so", fix=fix)
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(_lines(found, time.perf_counter() - start)))
    return 0


def _lines(found: dict[str, Any], seconds: float) -> list[str]:
    layout = dict(found["layout"])
    world, distributed = layout.pop("world"), layout.pop("distributed_optimizer")
    sizes = ", ".join(f"{name} {size}" for name, size in layout.items() if size not in (1, False, None))
    optimizer, origin = found["optimizer"], found["imported"]
    state = f"state of step {optimizer['step']}, {_mib(optimizer['bytes'])}" if optimizer else "none"
    whole = f"verified in {seconds:.1f} s" if found["verified"] else "NOT verified"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        found["checkpoint"],
        f"  step        {found['step']:,}  ({found['samples']:,} sequences, {found['tokens']:,} tokens)",
        f"  saved by    {world} ranks{': ' + sizes if sizes else ''}; {versions}",
        f"  config      {found['config_digest']}",
        f"  data        {found['data'] or 'not recorded'}",
        f"  model       {found['parameters']:,} parameters, {_mib(found['model_bytes'])}",
        f"  optimizer   {state}{', distributed' if optimizer and distributed else ''}",
        f"  files       {found['files']}, {_mib(found['bytes'])}, {whole}",
    ]
    if origin:
        lines.insert(2, f"  imported    from {origin['source']}")
    for tensor in found["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        trained = tensor.get("trained_in")
        note = f", trained in {trained}" if trained not in (None, tensor["dtype"]) else ""
        lines.append(f"  {tensor['name']}  {shape}  {tensor['dtype']}{note}  {_mib(tensor['bytes'])}")
    return lines


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**19 else f"{size:,} bytes"


def reshard(args: argparse.Namespace) -> int:
    """Rewrite a checkpoint as the first one of another run folder."""
    from linear_moe.training import platform

    platform.install()
    from linear_moe.training.checkpointing.reshard import reshard as rewrite

    start = time.perf_counter()
    sizes = {axis: getattr(args, axis) for axis in ("tensor", "expert", "expert_tensor") if getattr(args, axis)}
    record = rewrite(args.source, args.out, args.step, files=args.files, sizes=sizes, optimizer=not args.no_optimizer)
    if args.json:
        print(json.dumps(record))
        return 0
    before, after = record["source_bytes"], record["bytes"]
    print(
        f"{record['checkpoint']}: step {record['step']}, {record['tensors']} tensors in {record['pieces']} pieces and "
        f"{record['files']} files, {_mib(after)} (of {_mib(before)}), {time.perf_counter() - start:.1f} s"
    )
    return 0
