"""The import rule of the architecture, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.cli import COMMANDS

ROOT = Path(__file__).parents[2]
BASIS = ("linear_moe.modeling.mixers.base", "linear_moe.modeling.mixers.registry")

# package: (what it must not import, exceptions)
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear_moe.modeling.ops": (("linear_moe", "megatron", "transformers"), ("linear_moe.modeling.ops",)),
    "linear_moe.modeling": (("linear_moe.training", "linear_moe.inference", "megatron", "transformers"), ()),
    "linear_moe.training": (("linear_moe.modeling.mixers",), BASIS),
    "linear_moe.inference": (("linear_moe.training", "megatron"), ()),
    "linear_moe.config": (("linear_moe.training", "linear_moe.inference", "megatron", "transformers"), ()),
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(source: str, module: str) -> set[str]:
    """Dotted names that a module imports anywhere, also inside functions; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str) -> list[str]:
    return [
        f"{module} imports {name}"
        for package, (forbidden, allowed) in RULES.items()
        if within(module, package)
        for name in sorted(imports(source, module))
        if any(within(name, f) for f in forbidden) and not any(within(name, a) for a in allowed)
    ]


def modules() -> list[tuple[str, Path]]:
    paths = sorted((ROOT / "linear_moe").rglob("*.py"))
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p) for p in paths]


def test_rule_holds() -> None:
    assert len(modules()) > 40
    assert [v for name, path in modules() for v in violations(path.read_text(), name)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linear_moe.modeling.ops.recurrences.decay.chunk", "from linear_moe.modeling.host import Host"),
        ("linear_moe.modeling.model", "def f():\n    import megatron.core"),
        ("linear_moe.modeling.mixers.gla", "from linear_moe import training"),
        ("linear_moe.training.sequence.lsm", "from linear_moe.modeling.mixers import gla"),
        ("linear_moe.inference.export", "from ..training.loop import train"),
        ("linear_moe.checks.validate", "from megatron.core import parallel_state"),
    ],
)
def test_rule_sees_violations(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


WORDS = ["--help", *(f"{name} --help" for name in COMMANDS), "plan --wrold 2", "generate x --seed y"]


@pytest.mark.parametrize("argv", WORDS)
def test_help_and_wrong_arguments_import_nothing_heavy(argv: str) -> None:
    code = (
        "import sys\nfrom linear_moe.cli import main\n"
        f"try: main({argv.split()})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'yaml', 'rich', 'numpy', 'transformers', 'megatron') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
