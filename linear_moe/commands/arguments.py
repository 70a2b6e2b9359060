"""Argparse types, and arguments that several commands share; the module imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

DTYPES = ("bf16", "fp32")


def number(kind: type, constraint: str, valid: Callable[[float], bool]) -> Callable[[str], float]:
    """Makes an argparse type for an int or float that is `valid`; `constraint` says the same in words."""

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
    """Argparse type for a size as transformers reads it, for example 5GB."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of KB, MB, GB or TB, for example 5GB")
    return text


def tokens(text: str) -> int:
    """Argparse type for a number of tokens; the suffixes K and M stand for 2**10 and 2**20."""
    if not re.fullmatch(r"[1-9]\d{0,12}[KM]?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number > 0, for example 32768, 32K or 1M")
    return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)


def with_config(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments `config` and `overrides`."""
    parser.add_argument("config", help="YAML file")
    # Without a default, argparse would call the overrides required when the config is missing.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="changes to the config: training.steps=100"
    )


def with_world(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `with_config`, and --world."""
    with_config(parser)
    parser.add_argument("--world", type=int, help="number of ranks; default: the fewest that the parallel sizes allow")
