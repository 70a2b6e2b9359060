"""`linear-moe options`: the options of a configuration, with types, defaults, constraints and what they mean."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linear_moe.options.describe import Option

HELP = "the options of a configuration: type, default, constraint and meaning of each"
EXAMPLE = "linear-moe options training\n  linear-moe options model.mixer --type mamba2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default="", help="section or option: training, training.steps")
    parser.add_argument("--type", metavar="NAME", help="with a path to a mixer: list the options of this mixer")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print docs/configuration.md")


def main(args: argparse.Namespace) -> int:
    """Prints the options that `args` asks for; returns the exit code."""
    from linear_moe.config.page import markdown
    from linear_moe.config.schema import Config
    from linear_moe.options.describe import select
    from linear_moe.options.errors import ConfigError

    if args.markdown:
        if args.path or args.type:
            raise ConfigError("--markdown", ..., "is the page of all options", fix="leave out the path and --type")
        print(markdown(), end="")
        return 0
    sections = select(Config(), args.path, args.type)
    if args.json:
        print(json.dumps([option.to_json() for section in sections for option in section.options], indent=2))
        return 0
    for i, section in enumerate(sections):
        if i:
            print()
        if section.doc:
            print(_filled(f"{section.path or 'the configuration'}: {section.doc}", ""))
        for option in section.options:
            print(_lines(option))
    return 0


def _lines(option: Option) -> str:
    """An option for people: path, default and constraint on one line, the documentation below."""
    from linear_moe.options.describe import as_yaml

    kind = ", ".join([option.type, *option.bounds])
    if option.choices is not None:
        kind = f"one of {option.constraint}"
    return f"  {option.path}={as_yaml(option.default)}  ({kind})\n{_filled(option.doc, '    ')}"


def _filled(text: str, indent: str) -> str:
    """The text in lines that fit the terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
