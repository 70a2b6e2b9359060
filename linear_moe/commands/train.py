"""`linear-moe train`: train a model, after all checks that need no process group."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from linear_moe.commands import arguments

HELP = "train a model as a config says; run it under torchrun, and run it again to resume"
EXAMPLE = r"""torchrun --nproc-per-node 8 -m linear_moe train configs/train/a0.3b_2b.yaml \
      data.corpus=/data/slimpajama data.tokenizer.path=/data/qwen2-tokenizer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.with_config(parser)


def main(args: argparse.Namespace) -> int:
    """Trains as the configuration says; running the command again resumes the training. Returns the exit code."""
    from linear_moe.config.load import load_config
    from linear_moe.training.preflight import check_run
    from linear_moe.training.supervision.faults import end_with_parent, lock_run

    config = load_config(args.config, args.overrides)
    check_run(config, int(os.environ.get("WORLD_SIZE", 1)))
    end_with_parent()
    lock = lock_run(Path(config.run)) if os.environ.get("RANK", "0") == "0" else None

    from linear_moe.training import platform
    from linear_moe.training.supervision import watch

    platform.install()

    from linear_moe.training.checkpointing.load import check_data_unchanged
    from linear_moe.training.data import prepare_data
    from linear_moe.training.loop import train

    with watch.watching(config):
        watch.mark("preparing the data")
        data = prepare_data(config)
        check_data_unchanged(config, data.fingerprint)
        code = train(config, data)
    if lock is not None:
        lock.close()
    return code
