"""`linear-moe train`: every check that needs no process group, then the groups, then the loop."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path

from linear_moe.check import check
from linear_moe.config.load import load_config
from linear_moe.training.faults import end_with_parent, lock_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="changes to it: training.steps=100 model.mixer.type=mamba2")


def quiet() -> None:
    """Megatron-Core warns on every start of what it would do with packages that we do without (Transformer Engine,
    Apex), and of its own deprecated defaults; a user can do nothing about either.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def main(args: argparse.Namespace) -> int:
    """Train as the configuration says; rerunning the same command resumes. Returns the exit code."""
    quiet()
    config = load_config(args.config, args.overrides)
    check(config, int(os.environ.get("WORLD_SIZE", 1)))
    end_with_parent()
    lock = lock_run(Path(config.run)) if os.environ.get("RANK", "0") == "0" else None

    from linear_moe.training import platform

    platform.install()

    from linear_moe.training.checkpoint.load import check_data_unchanged
    from linear_moe.training.data import prepare_data
    from linear_moe.training.loop import train

    data = prepare_data(config)
    check_data_unchanged(config, data.fingerprint)
    code = train(config, data)
    if lock is not None:
        lock.close()
    return code
