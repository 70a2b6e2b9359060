"""`linear-moe checkpoint inspect|reshard`: describe a checkpoint, or rewrite it in other files."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from linear_moe.commands import arguments
from linear_moe.options.errors import ConfigError

HELP = "describe a checkpoint, or rewrite it in other files; every checkpoint loads in any layout without this"
EXAMPLE = "linear-moe checkpoint inspect runs/first\n  linear-moe checkpoint reshard runs/first /fast/first --files 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect|reshard")
    source = "run folder (its latest complete checkpoint), or RUN/checkpoints/step_..."
    inspect = actions.add_parser("inspect", help="describe a checkpoint, and check that it is whole")
    inspect.add_argument("source", type=Path, metavar="RUN_OR_STEP", help=source)
    inspect.add_argument("--tensors", metavar="PATTERN", help="list tensors whose names match: 'model.layers.0.*', '*'")
    inspect.add_argument("--no-verify", action="store_true", help="do not read all files to compare their CRC-32")
    reshard = actions.add_parser("reshard", help="rewrite a checkpoint in other files, with or without optimizer state")
    reshard.add_argument("source", type=Path, metavar="SRC", help=source)
    reshard.add_argument("out", type=Path, metavar="DST", help="run folder whose first checkpoint it becomes")
    positive = arguments.number(int, "a whole number from 1 to 65536", lambda n: 1 <= n <= 65536)
    reshard.add_argument(
        "--files", type=positive, default=8, help="number of files to write the tensors in (default: 8)"
    )
    for axis in ("tensor", "expert", "expert-tensor"):
        cut = f"cut tensors as parallel.{axis.replace('-', '_')} does with this many ranks (default: as in SRC)"
        reshard.add_argument(f"--{axis}", type=positive, help=cut)
    reshard.add_argument("--no-optimizer", action="store_true", help="leave the optimizer's state out")
    for action in (inspect, reshard):
        action.add_argument("--step", type=int, help="checkpoint of a run folder (default: the latest complete one)")
        action.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Runs the action; returns the exit code."""
    return {"inspect": inspect, "reshard": reshard}[args.action](args)


def inspect(args: argparse.Namespace) -> int:
    """Prints a description of a checkpoint, after comparing every file with its recorded CRC-32."""
    from linear_moe.checkpoints.inspect import describe_checkpoint
    from linear_moe.checkpoints.run import find_checkpoint

    start = time.perf_counter()
    folder = find_checkpoint(args.source, args.step)
    description = describe_checkpoint(folder, args.tensors, checked=not args.no_verify)
    if args.tensors is not None and not description["tensors"]:
        fix = "names begin with model. or optimizer.; '*' matches all"
        raise ConfigError("--tensors", args.tensors, f"no tensor of {folder} is called so", fix=fix)
    if args.json:
        print(json.dumps(description))
    else:
        print("\n".join(_lines(description, time.perf_counter() - start)))
    return 0


def _lines(description: dict[str, Any], seconds: float) -> list[str]:
    layout = dict(description["layout"])
    world, distributed = layout.pop("world"), layout.pop("distributed_optimizer")
    sizes = ", ".join(f"{name} {size}" for name, size in layout.items() if size not in (1, False, None))
    optimizer, origin = description["optimizer"], description["imported"]
    state = f"state of step {optimizer['step']}, {_mib(optimizer['bytes'])}" if optimizer else "none"
    whole = f"verified in {seconds:.1f} s" if description["verified"] else "NOT verified"
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    count = f"{description['samples']:,} sequences, {description['tokens']:,} tokens"
    lines = [
        description["checkpoint"],
        f"  step        {description['step']:,}  ({count})",
        f"  saved by    {world} ranks{': ' + sizes if sizes else ''}; {versions}",
        f"  config      {description['config_digest']}",
        f"  data        {description['data'] or 'not recorded'}",
        f"  model       {description['parameters']:,} parameters, {_mib(description['model_bytes'])}",
        f"  optimizer   {state}{', distributed' if optimizer and distributed else ''}",
        f"  files       {description['files']}, {_mib(description['bytes'])}, {whole}",
    ]
    if origin:
        lines.insert(2, f"  imported    from {origin['source']}")
    for tensor in description["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        trained = tensor.get("trained_in")
        note = f", trained in {trained}" if trained not in (None, tensor["dtype"]) else ""
        lines.append(f"  {tensor['name']}  {shape}  {tensor['dtype']}{note}  {_mib(tensor['bytes'])}")
    return lines


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**19 else f"{size:,} bytes"


def reshard(args: argparse.Namespace) -> int:
    """Rewrites a checkpoint as the first one of another run folder; returns the exit code."""
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
