"""The command lines that documentation shows, found by where they stand.

In Markdown: in a shell block, after `$`, or in backticks. In a docstring: indented, or in backticks. In a comment:
indented, after a colon, or in backticks. What the reader has to put in is known by rule: `[...]` may be left out, `...`
stands for the arguments of the line above that starts the same, a variable of the shell without a value is BLANK.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from linear_moe import cli

ROOT = Path(__file__).parents[2]
MARKDOWN, COMMENTS = ["README.md", "docs/**/*.md"], ["configs/**/*.yaml", "examples/*.sh", "scripts/**/*.sh"]
DOCSTRINGS = ["scripts/**/*.py", "linear_moe/**/*.py"]
START = r"(?:[A-Z_]+=\S* +)*(?:(?:linear-moe|torchrun|pytest|bash|python3?) +\S|(?:scripts|examples)/\S+\.(?:sh|py)\b)"
OVERRIDE = r"\w+(?:\.\w+)+=(?:'[^']*'|\S)+"
BLANK = "\0"
Passage = tuple[int, str, str]  # line, text, and how it is meant: "shell", "indented", "output" or "prose"


@dataclass
class Line:
    where: str
    text: str
    inline: bool = False  # in running text, where arguments may be left out
    error: str = ""  # what the command answers, where the page shows that it is refused


@dataclass
class Command:
    line: Line
    env: dict[str, str]
    words: list[str]


def documented() -> Iterator[Command]:
    """Every command of the project's documentation."""
    for path in sorted({path for pattern in MARKDOWN + COMMENTS + DOCSTRINGS for path in ROOT.glob(pattern)}):
        file, text = path.relative_to(ROOT).as_posix(), path.read_text()
        for mixer in re.findall(r'^"(\w+)": "linear_moe\.modeling\.mixers\.', text, re.MULTILINE):
            text = text.replace(mixer, "gla")  # the page's own: any is as good
        yield from commands_of(file, passages_of(file, text))
    for name, command in cli.COMMANDS.items():
        lines = enumerate(command.EXAMPLE.splitlines(), 1)
        yield from commands_of(f"linear-moe {name} --help", [[(number, line, "shell") for number, line in lines]])


def passages_of(file: str, text: str) -> list[list[Passage]]:
    """What may hold commands, in lists of consecutive lines."""
    if file.endswith(".py"):
        return list(docstrings(text))
    return [list(markdown(text) if file.endswith(".md") else comments(text, file))]


def markdown(text: str) -> Iterator[Passage]:
    """Yields all lines but those in other languages than the shell's."""
    language: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            language = line.strip()[3:] if language is None else None
        elif language is None:
            yield number, line, "prose"
        elif language in ("bash", "console", "sh", "shell") or (language == "" and line.startswith("$ ")):
            yield number, line.removeprefix("$ "), "shell"
        elif language == "":
            yield number, line, "indented" if re.match(START, line) else "output"


def comments(text: str, file: str) -> Iterator[Passage]:
    """Yields all comments of YAML, and those at the top of a script, where changes alone are meant for that script."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#") and file.endswith(".sh"):
            return
        said = line.partition("#")[2]
        command = re.search(rf"(?:^  +|: +)({START}.*)", said)
        changes = file.endswith(".sh") and re.search(rf"(?:^  +|: +)({OVERRIDE}(?: +{OVERRIDE})*)$", said)
        if command:
            yield number, command[1], "indented"
        elif changes:
            yield number, f"bash {file} ... {changes[1]}", "shell"
        else:
            yield number, said, "prose"


def docstrings(text: str) -> Iterator[list[Passage]]:
    """Yields the lines of every docstring of a Python file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
            lines = enumerate(doc.splitlines(), node.body[0].lineno)
            yield [(number, line, "indented" if line.startswith("    ") else "prose") for number, line in lines]


def lines_of(file: str, groups: Iterable[list[Passage]]) -> Iterator[Line]:
    """The lines that are commands, then those in backticks."""
    for passages in groups:
        yield from whole_lines(file, passages)
        prose = {number: line for number, line, kind in passages if kind == "prose"}
        text = "\n".join(prose.get(number, "") for number in range(1, max(prose, default=0) + 1))
        for span in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)*)`", text):
            if re.match(START, span[1]):
                number = text.count("\n", 0, span.start()) + 1
                yield Line(f"{file}:{number}", " ".join(span[1].split()), inline=True)


def whole_lines(file: str, passages: list[Passage]) -> Iterator[Line]:
    """The lines that are commands; one that ends with a backslash goes on in the next."""
    line, goes_on = None, False
    for number, text, kind in [*passages, (0, "", "prose")]:
        # What follows some spaces in a docstring or comment is a remark.
        text = re.split(" {3,}", text.strip())[0] if kind == "indented" else text.strip()
        if line is not None and goes_on:
            line.text, goes_on = f"{line.text[:-1].strip()} {text}", text.endswith("\\")
            continue
        if line is not None:
            line.error = text if kind == "output" and text.startswith("linear-moe: ") else ""
            yield line
        command = kind == "shell" or (kind == "indented" and re.match(rf"{START}|\w+=[\"']", text))
        line = Line(f"{file}:{number}", text) if command and text and not text.startswith("#") else None
        goes_on = text.endswith("\\")


def commands_of(file: str, groups: Iterable[list[Passage]]) -> Iterator[Command]:
    """The simple commands of these lines: no variables, alternatives, pipes, redirections and what may be left out."""
    variables: dict[str, str] = {}
    above: dict[tuple[str, ...], tuple[dict[str, str], list[str]]] = {}
    for line in lines_of(file, groups):
        pieces = re.split(r"\$\{?(\w+)\}?", re.sub(r"(?<=\s)\[[^\]]*\]", "", line.text))
        said = "".join(variables.get(piece, BLANK) if i % 2 else piece for i, piece in enumerate(pieces))
        for words in simple_commands(shlex.split(said, comments=True)):
            env: dict[str, str] = {}
            while words and re.match(r"[A-Za-z_]\w*=", words[0]):
                name, _, value = words.pop(0).partition("=")
                env[name] = value
            if not words:
                variables |= env
                continue
            start = tuple(words[:2])
            if "..." in words:
                at, (before, arguments) = words.index("..."), above.get(start, ({}, []))
                env, words = before | env, [*words[:at], *arguments, *words[at + 1 :]]
            else:
                above[start] = env, words[2:]
            for chosen in product(*(w.split("|") if re.fullmatch(r"\w+(\|\w+)+", w) else [w] for w in words)):
                yield Command(line, env, list(chosen))


def simple_commands(words: list[str]) -> Iterator[list[str]]:
    """Yields the parts of a line between its pipes and the like, without redirections."""
    found: list[str] = []
    skip = False
    for word in [*words, ";"]:
        if word in (";", "&", "&&", "|", "||"):
            if found:
                yield found
            found, skip = [], False
        elif skip:
            skip = False
        elif re.match(r"\d?>|<", word):
            skip = re.fullmatch(r"\d?>>?|<", word) is not None  # the file is the next word
        else:
            found.append(word)
