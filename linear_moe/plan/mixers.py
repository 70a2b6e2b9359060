"""`linear-moe mixers`: table of all token mixers with recurrence, backends, capabilities and costs of a layer."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from linear_moe.modeling.config import ModelConfig
from linear_moe.modeling.host import Host
from linear_moe.modeling.mixers.base import MixerConfig
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class, mixer_config
from linear_moe.modeling.model import layer_dims
from linear_moe.modeling.ops import FAMILIES
from linear_moe.modeling.ops.backends import has_fla
from linear_moe.options.errors import ConfigError
from linear_moe.plan import human

DTYPE = torch.bfloat16  # dtype of the model whose states are counted; states declared fp32 stay fp32
LETTERS = {"tensor_parallel": "T", "sequence_parallel": "S", "packing": "P", "decoding": "D"}


def backends(family: str) -> list[str]:
    """Names of the implementations of a family's op; "gpu" only where a GPU and flash-linear-attention are present."""
    implementations = importlib.import_module(f"linear_moe.modeling.ops.{FAMILIES[family]}").IMPLEMENTATIONS
    return [name for name in implementations if name != "gpu" or (torch.cuda.is_available() and has_fla())]


def cost(name: str, hidden: int, heads: int, length: int) -> tuple[int, int]:
    """Counts, for one layer with default options, its parameters and the bytes of its decoding state.

    The state is that of one sequence after `length` tokens. The layer is not the first of its model: some mixers' first
    layer has fewer parameters. Raises ConfigError for a width that the default options do not fit.
    """
    dims = layer_dims(ModelConfig(hidden_size=hidden, num_heads=heads), 1)
    cls, config = mixer_class(name), mixer_config(name)
    cls.validate(config, dims, 1, "model.mixer")
    mixer = cls(config, dims, Host(DTYPE, "meta"))
    shapes = mixer.state_shapes(1, length).values()
    state = sum(math.prod(shape) * (dtype or DTYPE).itemsize for shape, dtype in shapes)
    return sum(p.numel() for p in mixer.parameters()), state


def describe_mixer(name: str, hidden: int, heads: int, length: int) -> dict[str, Any]:
    """Makes one mixer's row, as `--json` prints it; `problem` says why the mixer cannot have this width (else None)."""
    cls, problem = mixer_class(name), None
    params: int | None
    state: int | None
    try:
        params, state = cost(name, hidden, heads, length)
    except ConfigError as error:
        params = state = None
        problem = str(error)
    return {
        "name": name,
        "family": cls.family,
        "recurrence": cls.formula,
        "paper": cls.paper,
        "backends": backends(cls.family),
        "capabilities": dataclasses.asdict(cls.capabilities),
        "params": params,
        "state_bytes": state,
        "problem": problem,
    }


def mixers_summary(row: dict[str, Any]) -> tuple[str, str, str]:
    """Formats a row's capabilities, parameters and state; "*" refers to the row's problem, printed below the table."""
    able = "".join(letter for key, letter in LETTERS.items() if row["capabilities"][key])
    if row["problem"] is not None:
        return able, "*", "*"
    return able, human(row["params"]), human(row["state_bytes"], "B", 1024)


def letters() -> str:
    """The legend of the letters that stand for capabilities."""
    return ", ".join(f"{letter} {key.replace('_', ' ')}" for key, letter in LETTERS.items())


# -- terminal ---------------------------------------------------------------------------------------------------------
def show_mixers(rows: list[dict[str, Any]], hidden: int, heads: int, length: int) -> None:
    """Prints two tables: the mixers' recurrences, and their backends, capabilities and costs."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mixer", no_wrap=True)
    table.add_column("recurrence")
    table.add_column("arXiv", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], escape(row["recurrence"]), row["paper"].removeprefix("arXiv "))
    console.print("[bold cyan]Recurrences[/]")
    console.print(table)

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("mixer", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("backends")
    table.add_column("can", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("state", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], row["family"], " ".join(row["backends"]), *mixers_summary(row))
    console.print(
        f"[bold cyan]One layer with default options, hidden_size {hidden}, num_heads {heads}, bf16; "
        f"state of one sequence after {length} tokens; backends on this machine[/]"
    )
    console.print(table)
    console.print(f"can: {letters()}")
    for row in rows:
        if row["problem"] is not None:
            console.print(f"* {row['name']}: {row['problem']}", markup=False)


# -- docs/mixers.md ---------------------------------------------------------------------------------------------------
HEADER = """# Mixers

Made by `linear-moe mixers --markdown` from the registry; do not edit.

Choose a mixer by `model.mixer.type=NAME` and set its options as `model.mixer.OPTION=VALUE`. A new one is one file and
one line: [adding a mixer](adding_a_mixer.md).

Parameters and decoding state are those of one layer with default options, in bf16, at `hidden_size` {hidden} and
`num_heads` {heads}; the layer is not a model's first, which is smaller with some mixers. The state is that of one
sequence after {length} tokens. Letters in the column "can":
{letters}."""


def markdown(hidden: int, heads: int, length: int) -> str:
    """Writes the page about all mixers, docs/mixers.md; its text is the same on every machine."""
    rows = [describe_mixer(name, hidden, heads, length) for name in sorted(MIXERS)]
    lines = [
        *HEADER.format(hidden=hidden, heads=heads, length=length, letters=letters()).splitlines(),
        "",
        "| mixer | recurrence | family | can | parameters | state | paper |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for row in rows:
        name, recurrence = f"[{row['name']}](#{row['name']})", f"`{row['recurrence']}`"
        lines.append(table_row(name, recurrence, row["family"], *mixers_summary(row), links(row["paper"])))
    lines += [f"\\* {row['name']}: {row['problem']}" for row in rows if row["problem"] is not None]
    for row in rows:
        lines += section(row)
    return "\n".join(lines).rstrip() + "\n"


def section(row: dict[str, Any]) -> Iterator[str]:
    """Yields the lines about one mixer: heading, docstrings of its module and class, recurrence and options."""
    cls = mixer_class(row["name"])
    module = sys.modules[cls.__module__]
    yield from ("", f"## {row['name']}", "", inspect.cleandoc(module.__doc__ or ""), "", f"`{row['recurrence']}`")
    if cls.__doc__:
        yield from ("", inspect.cleandoc(cls.__doc__))
    yield from ("", "| option | type | default | |", "|---|---|---|---|")
    for field in dataclasses.fields(cls.Config):
        if field.name != "type":
            yield option(cls.Config, field)


def option(config: type[MixerConfig], field: dataclasses.Field[Any]) -> str:
    """Writes one row of a mixer's table of options."""
    choices, default = field.metadata.get("choices"), json.dumps(getattr(config(), field.name))
    kind = ", ".join(json.dumps(c) for c in choices) if choices else str(field.type).replace("None", "null")
    return table_row(f"`{field.name}`", kind, f"`{default}`", field.metadata["doc"])


def table_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def links(papers: str) -> str:
    """Turns every "arXiv NUMBER" of `papers` into a Markdown link."""
    return re.sub(r"arXiv (\S+?\.\d+)", r"[\1](https://arxiv.org/abs/\1)", papers)
