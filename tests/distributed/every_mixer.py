"""Runs the quick start's commands for mixer after mixer, in one process: importing takes longer than training."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from linear_moe.cli import main
from tests.distributed.harness import ROOT

STEPS, SAVED = 60, 40  # last step of a run, and step of the checkpoint from which it is resumed
PROMPT = "def f("
CONFIG = str(ROOT / "configs" / "train" / "quickstart.yaml")
# Options that shorten the quick start: two layers, one process, and a tokenizer that needs no training.
OVERRIDES = f"""
model.num_layers=2 model.pattern=LN parallel.expert=1
data.tokenizer.type=bytes data.validation_fraction=0.2
training.sequence_length=64 training.micro_batch=4 training.global_batch=4
training.steps={STEPS} training.eval_every=0 training.eval_batches=2
schedule.warmup_steps=5 checkpoint.every={SAVED} logging.tensorboard=false
""".split()


def command(*argv: str) -> str:
    """Runs a command, and returns its output. AssertionError unless it succeeds."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(argv)
    assert code == 0, f"{argv} returned {code}:\n{errors.getvalue()[-4000:]}"
    return output.getvalue()


def quick_start(name: str, folder: Path) -> dict[str, Any]:
    """Trains; removes the last checkpoint and resumes from the one before; exports; generates.

    Returns:
        the records of both trainings, and the output of `generate --json` with and without a cache.
    """
    run = folder / name
    train = ["train", CONFIG, *OVERRIDES, f"model.mixer.type={name}", f"run={run}", f"data.cache={folder / 'data'}"]
    train.append(f"data.corpus={folder / 'corpus'}")
    metrics, records = run / "metrics.jsonl", []
    for again in (False, True):
        if again:
            shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
        metrics.unlink(missing_ok=True)
        command(*train)
        records.append([json.loads(line) for line in metrics.read_text().splitlines()])
    command("export", str(run), str(run / "export"))
    generate = ["generate", str(run / "export"), "--prompt", PROMPT, "--max-new-tokens", "24", "--ignore-eos", "--json"]
    texts = [json.loads(command(*generate, *flags)) for flags in ([], ["--no-cache"])]
    shutil.rmtree(run)
    return {"training": records[0], "resumed": records[1], "cached": texts[0], "recomputed": texts[1]}


def all_of(names: list[str], folder: Path) -> None:
    """Writes NAME.json for each mixer: the result of `quick_start` and its seconds, or the error that ended it."""
    for name in names:
        start = time.perf_counter()
        try:
            result = quick_start(name, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
            leave_groups()
        result["seconds"] = time.perf_counter() - start
        (folder / f"{name}.json").write_text(json.dumps(result))


def leave_groups() -> None:
    """Destroys process groups that a failed training has left behind."""
    import torch.distributed as dist

    from linear_moe.training import parallel

    if dist.is_initialized():
        parallel.destroy()


if __name__ == "__main__":
    all_of(sys.argv[2:], Path(sys.argv[1]))
