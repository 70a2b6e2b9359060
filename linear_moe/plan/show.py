"""Terminal output of `linear-moe plan`: a plan, or a list of layouts, as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from linear_moe.config.schema import Config
from linear_moe.plan.memory import KINDS
from linear_moe.plan.plan import Plan
from linear_moe.plan.search import Candidate, Proposals

ROWS = 12  # rows of a table or list of layouts that are shown; --json prints all of them


def human(number: float, unit: str = "", base: int = 1000) -> str:
    """Formats a number with 3 significant digits and a prefix: 2.49 B parameters, 1.96 GFLOP, 4.63 GiB (base 1024)."""
    prefixes = ("", "k", "M", "G", "T", "P") if unit else ("", "k", "M", "B", "T")
    power = 0
    while number >= base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    prefix = prefixes[power].upper() + "i" if base == 1024 and power else prefixes[power]
    digits = max(0, 2 - int(math.log10(number))) if power else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def show_table(name: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Prints a table under its name; without a header if the first column has no name."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_header=bool(columns[0]))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] in ("total", "active without embeddings") else "")
    console.print(f"[bold cyan]{escape(name)}[/]")
    console.print(table)


def show(plan: Plan, config: Config, title: str) -> None:
    """Prints the plan as tables."""
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
    show_table("Memory of the fullest rank, as PyTorch's allocator counts it", ("", ""), memory)
    print("Activations are an estimate. The driver, NCCL and fragmentation come on top; --gpu leaves room for them.")


def word(value: object) -> str:
    """Writes a value as in an override on the command line."""
    text = json.dumps(value, separators=(",", ":")) if isinstance(value, list | bool | None) else str(value)
    return f"'{text}'" if isinstance(value, list) else text


def show_layouts(proposals: Proposals, config: Config, path: str) -> None:
    """Prints the layouts that fit as a table, and the others by the reason against them; at most ROWS of each.

    `path` is the file of the configuration.
    """
    world, gpu = proposals.world, proposals.cluster.gpu
    limit = proposals.limit / 2**30

    def row(candidate: Candidate) -> tuple[str, ...]:
        config, layout, memory = candidate.config, candidate.layout, candidate.memory
        recompute, modules = config.training.recompute, config.training.recompute_modules
        assert layout is not None and memory is not None and candidate.seconds is not None
        seconds, speed = candidate.seconds, proposals.speed(candidate)
        overhead = 1 - seconds["compute"] / seconds["total"]
        return (
            candidate.name,
            str(layout.data),
            str(config.training.micro_batch),
            "+".join(modules if recompute == "selective" else [recompute, *modules]),
            f"{memory['total'] / 2**30:.1f}",
            f"{seconds['total']:.2f}",
            f"{100 * overhead:.0f} %",
            human(speed["tokens_per_second_per_gpu"]),
            f"{100 * speed['mfu']:.0f} %",
        )

    columns = ("layout", "DP", "micro", "recompute", "GiB", "s/step", "overhead", "tokens/s/GPU", "MFU")
    memory = f"{limit:.1f} of {gpu.memory_gib:g} GiB a GPU to use"
    count = f"{len(proposals.fit)} layouts fit"
    title = f"{path} on {world} GPUs, {memory}: {count}"
    if proposals.fit:
        limited = f", the first {ROWS} of them" if len(proposals.fit) > ROWS else ""
        show_table(title + limited, columns, map(row, proposals.fit[:ROWS]))
        given = Candidate(config).overrides()
        changes = {name: value for name, value in proposals.fit[0].overrides().items() if value != given[name]}
        print(" ".join(["The fastest:", path, *(f"{name}={word(value)}" for name, value in changes.items())]))
    else:
        print(f"{title}. What helps: more GPUs, a shorter training.sequence_length, optimizer.moments=bf16")
    for title, candidates in (("Too big, at their smallest", proposals.big), ("Not legal", proposals.illegal)):
        by_reason: dict[str, list[str]] = {}
        for candidate in candidates:
            by_reason.setdefault(candidate.reason, []).append(candidate.name)
        lines = []
        for reason, names in by_reason.items():
            others = [f"{len(names) - ROWS} more"] if len(names) > ROWS else []
            lines.append(f"  {', '.join([*names[:ROWS], *others])}: {reason}")
        if len(lines) > ROWS:
            lines[ROWS:] = [f"  and {len(lines) - ROWS} more: --json has all"]
        if lines:
            print(f"\n{title}:", *lines, sep="\n")
