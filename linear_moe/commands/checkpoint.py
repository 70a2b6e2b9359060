"""`linear-moe checkpoint inspect|reshard`: what is in a checkpoint, and rewriting one."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from linear_moe.commands import arguments
from linear_moe.options.errors import ConfigError

HELP = "what is in a checkpoint, and rewriting one; every checkpoint loads in any layout as it is"
EXAMPLE = "linear-moe checkpoint inspect runs/first\n  linear-moe checkpoint reshard runs/first /fast/first --files 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect|reshard")
    source = "run folder (its latest complete checkpoint), or RUN/checkpoints/step_..."
    inspect = actions.add_parser("inspect", help="what is in it, and whether it is whole")
    inspect.add_argument("source", type=Path, metavar="RUN_OR_STEP", help=source)
    inspect.add_argument("--tensors", metavar="PATTERN", help="list those whose names match: 'model.layers.0.*', '*'")
    inspect.add_argument("--no-verify", action="store_true", help="do not read the files to compare their sums")
    reshard = actions.add_parser("reshard", help="rewrite it in other files, with or without the optimizer's state")
    reshard.add_argument("source", type=Path, metavar="SRC", help=source)
    reshard.add_argument("out", type=Path, metavar="DST", help="run folder to begin with it; must have no checkpoint")
    positive = arguments.number(int, "a whole number from 1 to 65536", lambda n: 1 <= n <= 65536)
    reshard.add_argument("--files", type=positive, default=8, help="that the tensors are spread over (default: 8)")
    for axis in ("tensor", "expert", "expert-tensor"):
        cut = f"cut tensors as parallel.{axis.replace('-', '_')} of so many ranks does (default: that of SRC)"
        reshard.add_argument(f"--{axis}", type=positive, help=cut)
    reshard.add_argument("--no-optimizer", action="store_true", help="leave the optimizer's state out")
    for action in (inspect, reshard):
        action.add_argument("--step", type=int, help="checkpoint of a run folder (default: the latest complete one)")
        action.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    return {"inspect": inspect, "reshard": reshard}[args.action](args)


def inspect(args: argparse.Namespace) -> int:
    """Print what is in a checkpoint, after comparing every file with the sum that it was written with."""
    from linear_moe.checkpoints import inspect as inspect_checkpoint

    start = time.perf_counter()
    folder = inspect_checkpoint.find(args.source, args.step)
    found = inspect_checkpoint.describe_checkpoint(folder, args.tensors, checked=not args.no_verify)
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
