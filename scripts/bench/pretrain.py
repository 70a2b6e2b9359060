#!/usr/bin/env python3
"""Pretraining speed of a configuration on this machine, as one JSON file in docs/results/.

The script runs `linear-moe train` under torchrun, reads the run's metrics.jsonl, and writes speed, memory and losses,
with device, versions, command and commit. Means are over the steps after --skip, because the first steps compile and
tune kernels. The learning rate warms up over a fifth of --steps; no checkpoint is saved, and one batch is validated at
the end. Overrides can change these settings too.

    python scripts/bench/pretrain.py configs/train/a0.3b_2b.yaml --steps 50 --name baseline \\
        data.corpus=stdlib data.tokenizer.type=bpe training.global_batch=16
    python scripts/bench/pretrain.py configs/models/tiny.yaml --steps 12 --name tiny --folder /tmp training.dtype=fp32

The presets' own tokenizer is a folder (data.tokenizer.path). In the first example, a BPE trained on the corpus takes
its place. The BPE has 4096 tokens, but the model keeps the 151,936 rows of embedding and head that the preset gives it,
so that speed and memory are those of the preset.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def versions() -> dict[str, str | None]:
    """Versions of the packages that matter for speed; None for a package that is not installed."""
    releases: dict[str, str | None] = {}
    for package in ("torch", "triton", "megatron-core", "fla-core", "transformers"):
        try:
            releases[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            releases[package.replace("-", "_")] = None
    if find_spec("triton") is not None:  # PYTHONPATH may put another Triton in front of the installed one
        releases["triton"] = importlib.import_module("triton").__version__
    return releases


def commit() -> str:
    """Hash of this commit: $COMMIT if it is set, else git's HEAD."""
    given = os.environ.get("COMMIT")
    if given:
        return given
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()


def measure(config: str, overrides: list[str], gpus: int, skip: int) -> dict[str, Any]:
    """Trains in a temporary folder, in place of the config's `run`, and summarises the records of the run."""
    from linear_moe.config.load import load_config

    with tempfile.TemporaryDirectory() as folder:
        extra = [*overrides, f"run={folder}/run"]
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(gpus), "-m", "linear_moe", "train", config]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *launcher[1:], *extra], check=True)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        tree = load_config(config, extra)
    records = [r for r in lines if "event" not in r]
    steady = [r for r in records if r["step"] > skip]
    seconds = sum(r["step_seconds"] for r in steady)

    def mean(key: str) -> float:
        return sum(r[key] * r["step_seconds"] for r in steady) / seconds

    return {
        "preset": Path(config).stem,
        "mixer": tree.model.mixer.type,
        "pattern": tree.model.pattern,
        "sequence_length": tree.training.sequence_length,
        "micro_batch": tree.training.micro_batch,
        "global_batch": tree.training.global_batch,
        "dtype": tree.training.dtype,
        "recompute": tree.training.recompute,
        "overrides": overrides,
        "steps": tree.training.steps,
        "tokens_per_second_per_gpu": mean("tokens_per_second") / gpus,
        "tflops_per_gpu": mean("tflops_per_device"),
        "mfu": mean("mfu") if "mfu" in steady[0] else None,
        "memory_gib": max(r["memory_gib"] for r in records),
        "first_step_seconds": records[0]["first_step_seconds"],
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
    }


def arguments() -> argparse.Namespace:
    """Parses the command line; `overrides` of the result begin with the script's own settings.

    Ends the program with a message for a configuration that is invalid or has too few steps.
    """
    from linear_moe.config.load import load_config
    from linear_moe.options.errors import ConfigError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="a.b=c")
    parser.add_argument("--name", required=True, help="docs/results/NAME.json")
    parser.add_argument("--folder", default="docs/results")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip", type=int, default=10)
    args = parser.parse_intermixed_args()
    own = [f"training.steps={args.steps}", f"schedule.warmup_steps={args.steps // 5}", "training.eval_every=0",
           "training.eval_batches=1", "checkpoint.every=0", "checkpoint.last=false"]  # fmt: skip
    args.overrides = [*own, *args.overrides]
    try:
        steps = load_config(args.config, args.overrides).training.steps
    except ConfigError as error:
        parser.error(str(error))
    if args.skip >= steps:
        parser.error(f"--skip {args.skip} leaves none of {steps} steps")
    return args


def main() -> None:
    args = arguments()
    path = Path(args.folder) / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = measure(args.config, args.overrides, args.gpus, args.skip)
    import torch

    result = {
        "name": args.name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "gpus": args.gpus,
        **versions(),
        "commit": commit(),
        "command": shlex.join(["scripts/bench/pretrain.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rows": [row],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
