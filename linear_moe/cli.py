"""The `linear-moe` command: finds the subcommand and runs it.

A user's mistake is one line and exit code 2. Training that cannot go on (its loss is not finite) is one line and exit
code 3: a launcher should not start it again as it is. A defect is a traceback and exit code 1.

Imports nothing heavy: a subcommand imports what it needs when its arguments have been read.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from linear_moe import __version__
from linear_moe.commands import check, checkpoint, data, export, generate, import_, mixers, options, plan, train
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


COMMANDS: dict[str, Any] = {
    "train": train,
    "plan": plan,
    "check": check,
    "options": options,
    "mixers": mixers,
    "data": data,
    "export": export,
    "import": import_,
    "checkpoint": checkpoint,
    "generate": generate,
}
"""Modules with HELP, EXAMPLE, `add_arguments(parser)` and `main(args)`, which imports what it needs when it runs."""


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
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=f"example:\n  {command.EXAMPLE}",
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
        return COMMANDS[args.command].main(args) or 0
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
