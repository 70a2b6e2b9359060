"""`linear-moe mixers`: list all token mixers with recurrence, paper, backends, parameters and state of a layer."""

from __future__ import annotations

import argparse
import json

from linear_moe.commands import arguments

HELP = "list all token mixers with recurrence, paper, backends, parameters and decoding state of a layer"
EXAMPLE = "linear-moe mixers --hidden 2048 --heads 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    positive = arguments.number(int, "a whole number from 1 to 2**20", lambda n: 1 <= n <= 2**20)
    parser.add_argument("--hidden", type=positive, default=1024, help="width of the residual stream (default: 1024)")
    parser.add_argument("--heads", type=positive, default=8, help="model.num_heads (default: 8)")
    length = "tokens of the sequence whose decoding state is counted (default: 2048)"
    parser.add_argument("--length", type=positive, default=2048, help=length)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print docs/mixers.md, with options and weight names")


def main(args: argparse.Namespace) -> int:
    from linear_moe.modeling.mixers.registry import MIXERS
    from linear_moe.plan.mixers import describe_mixer, markdown, show_mixers

    sizes = args.hidden, args.heads, args.length
    if args.markdown:
        print(markdown(*sizes), end="")
        return 0
    rows = [describe_mixer(name, *sizes) for name in sorted(MIXERS)]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show_mixers(rows, *sizes)
    return 0
