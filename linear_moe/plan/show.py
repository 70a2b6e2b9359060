"""`linear-moe plan` on the terminal."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable

from linear_moe.config.load import load_config
from linear_moe.config.schema import Config
from linear_moe.plan.memory import KINDS
from linear_moe.plan.model import Plan, make_plan


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    plan = make_plan(config, args.world)
    if args.json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        show(plan, config, args.config)
    return 0


def human(number: float, unit: str = "", base: int = 1000) -> str:
    """3 significant digits with a prefix: 2.49 B parameters, 1.96 GFLOP, 4.63 GiB (base 1024)."""
    prefixes = ("", "k", "M", "G", "T", "P") if unit else ("", "k", "M", "B", "T")
    power = 0
    while number >= base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    prefix = prefixes[power].upper() + "i" if base == 1024 and power else prefixes[power]
    digits = max(0, 2 - int(math.log10(number))) if power else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def show(plan: Plan, config: Config, title: str) -> None:
    """The plan as tables on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)

    def show_table(name: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, show_header=bool(columns[0]))
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row, style="bold" if row[0] in ("total", "active without embeddings") else "")
        console.print(f"[bold cyan]{escape(name)}[/]")
        console.print(table)

    layers = [(str(i), p.mixer, p.ffn, human(p.params), human(p.active_params)) for i, p in enumerate(plan.layers)]
    columns = ("layer", "mixer", "ffn", "parameters", "active per token")
    show_table(f"{title}: {len(layers)} layers, {config.model.pattern}", columns, layers)

    length = config.training.sequence_length
    totals = [
        ("parameters", human(plan.total_params)),
        ("active per token", human(plan.active_params)),
        ("active without embeddings", human(plan.active_params_without_embeddings)),
        ("vocabulary", f"{plan.vocab_size:,}"),
        ("forward per token", human(plan.forward_flops, "FLOP")),
        ("training per token", human(3 * plan.forward_flops, "FLOP")),
    ]
    show_table(f"Model, at sequence length {length}", ("", ""), totals)

    groups = []
    for axis, ranks in plan.layout.groups.items():
        members = " ".join(map(str, ranks[0][:6])) + (" ..." if len(ranks[0]) > 6 else "")
        groups.append((axis, str(len(ranks[0])), str(len(ranks)), members))
    show_table(f"Process groups, world size {plan.layout.world}", ("axis", "size", "groups", "first group"), groups)

    memory = [(kind, human(plan.memory[kind], "B", 1024)) for kind in KINDS]
    show_table("Memory of the fullest rank; activations are an estimate", ("", ""), memory)
