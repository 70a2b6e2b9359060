"""The `linear-moe` command: finds the subcommand and runs it.

A user's mistake is one line and exit code 2. Training that cannot go on (its loss is not finite) is one line and exit
code 3: a launcher should not start it again as it is. A defect is a traceback and exit code 1.

Imports nothing heavy: a subcommand's module, with its `main(args)`, is imported when its arguments have been read.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from linear_moe import __version__
from linear_moe.commands import arguments
from linear_moe.options.errors import ConfigError

USER_ERROR, TRAINING_ERROR = 2, 3
EXIT_CODES = (
    "exit codes: 0 done, or stopped on a signal after saving; 2 a mistake in what was given; 3 training cannot go on, "
    "for example its loss is not finite; 4 another rank died, hung or failed; 130 interrupted; others: a defect, "
    "with a traceback"
)
# Of all OSErrors, those that a user mends: missing, forbidden, full, read-only, of the wrong kind.
USER_ERRNOS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG,
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    module: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    help: str
    example: str


COMMANDS = {
    "train": Command(
        "linear_moe.commands.train",
        arguments.with_config,
        "train as a config says; run it under torchrun, and again to resume",
        "torchrun --nproc-per-node 8 -m linear_moe train configs/train/a0.3b_2b.yaml \\\n"
        "      data.corpus=/data/slimpajama data.tokenizer.path=/data/qwen2-tokenizer",
    ),
    "plan": Command(
        "linear_moe.plan",
        arguments.plan,
        "parameters, FLOPs, process groups and memory of a config, layouts that fit, or what it costs to share out "
        "sequences; needs no GPU",
        "linear-moe plan configs/train/a1b_7b.yaml parallel.tensor=2 --world 64\n"
        "  linear-moe plan configs/train/a1b_7b.yaml --world 8 --gpu h100\n"
        "  linear-moe plan configs/models/a0.3b_2b.yaml --tokens-per-gpu 32K --gpu h200 --plot sequence.svg",
    ),
    "check": Command(
        "linear_moe.training.preflight",
        arguments.with_world,
        "everything that `train` checks before it starts",
        "linear-moe check configs/train/a0.3b_2b.yaml --world 8 \\\n"
        "      data.corpus=/data/slimpajama data.tokenizer.path=/data/qwen2-tokenizer",
    ),
    "mixers": Command(
        "linear_moe.plan.mixers",
        arguments.mixers,
        "every token mixer: recurrence, paper, where it runs, parameters and state of a layer",
        "linear-moe mixers --hidden 2048 --heads 16",
    ),
    "data": Command(
        "linear_moe.commands.data",
        arguments.data,
        "tokenize text files into an indexed dataset",
        "linear-moe data --help",
    ),
    "export": Command(
        "linear_moe.inference.export",
        arguments.export,
        "write a run's model as a Hugging Face folder",
        "linear-moe export runs/first exported/first",
    ),
    "import": Command(
        "linear_moe.training.import_weights",
        arguments.import_,
        "begin a run with the weights of another: of the same model, or of a dense one that gets experts",
        "linear-moe import runs/dense moe.yaml run=runs/moe --upcycle\n  linear-moe train runs/moe/config.yaml",
    ),
    "checkpoint": Command(
        "linear_moe.commands.checkpoint",
        arguments.checkpoint,
        "what is in a checkpoint, and rewriting one; every checkpoint loads in any layout as it is",
        "linear-moe checkpoint inspect runs/first\n  linear-moe checkpoint reshard runs/first /fast/first --files 16",
    ),
    "generate": Command(
        "linear_moe.inference.generate",
        arguments.generate,
        "continue a prompt with an exported model",
        "linear-moe generate exported/first --prompt 'def main('",
    ),
}


class _Parser(argparse.ArgumentParser):
    """One line per error, like every other user error."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(USER_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    description = "Pretrain, export and serve language models of linear sequence modelling and mixture of experts."
    parser = _Parser(prog="linear-moe", description=description, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"linear-moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments; `a.b=c` overrides may stand anywhere after the config, between options too."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *(word for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def complain(message: str, every_rank: bool = False) -> None:
    """One line on stderr: from one rank of each node, or from every rank for what may have hit that rank only."""
    if every_rank and "RANK" in os.environ:
        message = f"[rank {os.environ['RANK']}] {message}"
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"linear-moe: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. LINEAR_MOE_DEBUG=1 shows the traceback of user errors too."""
    argv = sys.argv[1:] if argv is None else argv
    debug = os.environ.get("LINEAR_MOE_DEBUG") == "1"
    try:
        args = parse(argv)
        return importlib.import_module(COMMANDS[args.command].module).main(args) or 0
    except ConfigError as error:
        if debug:
            raise
        complain(str(error))
        return USER_ERROR
    except BrokenPipeError:  # `linear-moe plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug or error.errno not in USER_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror}", every_rank=True)
        return USER_ERROR
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        faults = sys.modules.get("linear_moe.training.supervision.faults")  # not imported: not its error
        if debug or faults is None or not isinstance(error, faults.TrainingError):
            raise
        if os.environ.get("RANK", "0") == "0":  # raised alike on all ranks
            complain(str(error))
        return TRAINING_ERROR
