"""`linear-moe export`: write a run's model as a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from linear_moe.commands import arguments

HELP = "write a run's model as a Hugging Face folder"
EXAMPLE = "linear-moe export runs/first exported/first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the latest complete one)")
    parser.add_argument("--dtype", choices=arguments.DTYPES, help="default: as trained")
    parser.add_argument(
        "--max-shard-size", type=arguments.size, default="5GB", help="of a weights file, at most (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Runs `linear-moe export`; returns the exit code."""
    from transformers.utils import logging

    from linear_moe.inference.export import export

    logging.disable_progress_bar()
    start = time.perf_counter()
    record = export(
        args.run,
        args.out,
        step=args.step,
        dtype=args.dtype,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        say=(lambda text: None) if args.json else print,
    )
    if args.json:
        print(json.dumps(record))
    else:
        print(
            f"{args.out}: {record['parameters']:,} parameters in {record['dtype']}, verified bit for bit, "
            f"{time.perf_counter() - start:.1f} s"
        )
    return 0
