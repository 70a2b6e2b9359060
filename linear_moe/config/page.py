"""docs/configuration.md, made from the fields of the configuration."""

from __future__ import annotations

from collections.abc import Iterator

from linear_moe.config.schema import Config
from linear_moe.options.describe import Option, Section, as_yaml, describe

HEADER = """# Configuration

Made by `linear-moe options --markdown` from the fields of the configuration; do not edit.

A run is one YAML file. Each heading below is a section of it, each row an option, which any command that takes a
configuration changes by `section.option=VALUE`; [your own YAML](tutorials/your_yaml.md) shows both. `include: FILE` at
the top of a file, or a list of files, reads those first, relative to the file, which then changes what they say.

The options of mixers are in [mixers](mixers.md). In a terminal `linear-moe options training` lists a section, and
`linear-moe options model.mixer --type mamba2` the options of a mixer. What has to hold between options is checked, and
told in one line, by `linear-moe check`."""


def markdown() -> str:
    """The page about all options; the same on every machine."""
    lines = HEADER.splitlines()
    for section in describe(Config()):
        lines += ["", *_section(section)]
    return "\n".join(lines) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.path or 'At the top'}"
    if section.doc:
        yield from ("", section.doc)
    if section.options:
        yield from ("", "| option | type | default | values | meaning |", "|---|---|---|---|---|")
        yield from map(_row, section.options)


def _row(option: Option) -> str:
    name = option.path.rpartition(".")[2]
    kind = option.type if option.variants is None else f"[{option.type}]({option.variants.noun}s.md)"
    cells = f"`{name}`", kind, f"`{as_yaml(option.default)}`", option.constraint, option.doc
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
