"""The first words of docstrings: a sentence that begins with one of these has no subject of its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FRAGMENTS = {
    "As", "At", "Both", "By", "For", "From", "How", "In", "It", "Its", "Not", "Of", "On", "That", "These", "This",
    "Those", "To", "What", "Where", "Which", "Who", "Why", "With",
}  # fmt: skip


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of the docstrings of a module, its classes, functions and assigned names."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        before: ast.AST = node
        for statement in node.body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str) and (before is node or isinstance(before, ast.Assign | ast.AnnAssign)):
                    yield statement.lineno, text
            before = statement


def fragments(source: str) -> list[tuple[int, str]]:
    return [(line, text) for line, text in docstrings(source) if text.split()[0].rstrip(",.:;") in FRAGMENTS]


def test_docstrings_begin_with_a_subject() -> None:
    files = [path for folder in ("linear_moe", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    found = {f"{path.relative_to(ROOT)}:{line}": text for path in files for line, text in fragments(path.read_text())}
    assert found == {}


def test_fragments_are_seen() -> None:
    source = '"""Of all."""\nx = 1\n"""What x is."""\nclass A:\n    """Thing."""\n    def f():\n        """As B."""\n'
    assert [line for line, _ in fragments(source)] == [1, 3, 7]
