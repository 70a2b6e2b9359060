"""Import rules: the layers of the architecture in the table of docs/design.md, and others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.cli import COMMANDS

ROOT = Path(__file__).parents[2]
MIXER_FILES = ("linear_moe.modeling.mixers.base", "linear_moe.modeling.mixers.registry")


def layers() -> dict[str, int]:
    """Reads the layer of each part of the package from the table in docs/design.md."""
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    return {room: int(layer) for layer, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}


LAYERS = layers()


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(source: str, module: str) -> set[str]:
    """Dotted names that a module imports, also inside functions and for types; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, Path]:
    paths = sorted((ROOT / "linear_moe").rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def forbidden(module: str, name: str) -> bool:
    """Whether `module` must not import `name`."""
    parts = name.split(".")
    if parts[0] == "linear_moe":
        room, other = module.split(".")[1], parts[1]
        if other in LAYERS and other != room and LAYERS[other] >= LAYERS[room]:
            return True
        if within(module, "linear_moe.modeling.ops") and not within(name, "linear_moe.modeling.ops"):
            return True
        by_name = within(name, "linear_moe.modeling.mixers") and not within(name, *MIXER_FILES)
        return by_name and not within(module, "linear_moe.modeling.mixers")
    if parts[0] == "megatron":
        return not within(module, "linear_moe.training")
    if parts[0] == "transformers":
        return not within(module, "linear_moe.training.data", "linear_moe.inference", "linear_moe.commands")
    if parts[0] == "triton":
        return not re.search(r"\b(\w+_)?triton$", module) and module != "linear_moe.modeling.ops.tuned"
    return False


def violations(source: str, module: str) -> list[str]:
    return [f"{module} imports {name}" for name in sorted(imports(source, module)) if forbidden(module, name)]


def test_the_table_has_every_room() -> None:
    inside = {name.split(".")[1] for name in modules() if "." in name}
    assert inside == LAYERS.keys()


def test_nothing_imports_upwards() -> None:
    assert [v for name, path in modules().items() if "." in name for v in violations(path.read_text(), name)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linear_moe.modeling.ops.recurrences.decay.chunk", "from linear_moe.modeling.host import Host"),
        ("linear_moe.modeling.model", "def f():\n    import megatron.core"),
        ("linear_moe.modeling.mixers.gla", "from linear_moe import training"),
        ("linear_moe.training.sequence.lsm", "from linear_moe.modeling.mixers import gla"),
        ("linear_moe.inference.export", "from ..training.loop import train"),
        ("linear_moe.plan.search", "if TYPE_CHECKING:\n    from linear_moe.training.loop import train"),
        ("linear_moe.config.schema", "from linear_moe.layout.sequence import Order"),
        ("linear_moe.checks.validate", "from megatron.core import parallel_state"),
        ("linear_moe.checkpoints.reader", "import transformers"),
        ("linear_moe.modeling.ops.fused.norms", "import triton"),
    ],
)
def test_rules_see_violations(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Finds groups of nodes that reach each other: Tarjan's strongly connected components of more than one node."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                components.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return components


def test_files_import_each_other_in_one_direction() -> None:
    """Files do not import each other in circles; imports inside functions and for types count too."""
    known = modules()
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for imported in imports(path.read_text(), name):
            target = imported if imported in known else imported.rpartition(".")[0]
            if target in known and target != name:
                graph[name].add(target)
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize(("folder", "most"), [("", 4), ("modeling/ops", 6), ("training", 10)])
def test_few_files_lie_flat(folder: str, most: int) -> None:
    files = [path.name for path in (ROOT / "linear_moe" / folder).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= most, files


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
