"""Types of arguments, and arguments that several commands have. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

DTYPES = ("bf16", "fp32")


def number(kind: type, constraint: str, valid: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: an int or float that is `valid`, as `constraint` says in words."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"{text!r}: must be {constraint}")
        return value

    return parse


def size(text: str) -> str:
    """An argparse type: a size in words that transformers reads."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of KB, MB, GB or TB, for example 5GB")
    return text


def tokens(text: str) -> int:
    """An argparse type: a number of tokens; K and M are 2**10 and 2**20."""
    if not re.fullmatch(r"[1-9]\d{0,12}[KM]?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number > 0, for example 32768, 32K or 1M")
    return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)


def with_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    # With a default, or argparse calls them required when the config is missing.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="changes to it: training.steps=100 model.pattern=LLLN"
    )


def with_world(parser: argparse.ArgumentParser) -> None:
    with_config(parser)
    parser.add_argument("--world", type=int, help="number of ranks; default: the fewest that the parallel sizes allow")
