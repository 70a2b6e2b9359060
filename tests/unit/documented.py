"""The command lines that documentation shows, found by where they stand; and checks that need only our files.

In Markdown: in a shell block, after `$`, or in backticks. In a docstring: indented, a paragraph of them, or in
backticks. In a comment: indented, after a colon, or in backticks. In a workflow: in its `run:`. What the reader has to
put in is known by rule: `[...]` may be left out, `...` stands for the arguments of the line above that starts the same,
a variable of the shell without a value, or of a workflow, is BLANK.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import filter as fitting
from itertools import groupby, product
from pathlib import Path
from typing import Any

import yaml

from linear_moe import cli
from linear_moe.options.errors import ConfigError

ROOT = Path(__file__).parents[2]
MARKDOWN, COMMENTS = ["README.md", "docs/**/*.md"], ["configs/**/*.yaml", "examples/*.sh", "scripts/**/*.sh"]
DOCSTRINGS, WORKFLOWS = ["scripts/**/*.py", "linear_moe/**/*.py"], [".github/workflows/*.y*ml"]
SHELLS, LANGUAGES = ("bash", "console", "sh", "shell"), ("json", "python", "text", "toml", "yaml")  # of blocks
SCRIPT = r"(?:scripts|examples)/[\w./-]+\.(?:sh|py)\b"
PROGRAM = r"(?:linear-moe|torchrun|pytest|(?:ba)?sh|python3?|pip3?|source)"
START = rf"(?:[A-Z_]+=\S* +)*(?:{PROGRAM} +\S|(?:\./)?{SCRIPT})"
OVERRIDE = r"\w+(?:\.\w+)+=(?:'[^']*'|\S)+"
BLANK = "\0"
WELL_KNOWN = ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH")  # variables of other programs
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
    patterns = MARKDOWN + COMMENTS + DOCSTRINGS + WORKFLOWS
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        file, text = path.relative_to(ROOT).as_posix(), path.read_text()
        for mixer in re.findall(r'^"(\w+)": "linear_moe\.modeling\.mixers\.', text, re.MULTILINE):
            text = text.replace(mixer, "gla")  # the page's own: any is as good
        yield from commands_of(file, passages_of(file, text))
    for name, command in cli.COMMANDS.items():
        lines = enumerate(command.EXAMPLE.splitlines(), 1)
        yield from commands_of(f"linear-moe {name} --help", [[(number, line, "shell") for number, line in lines]])


def passages_of(file: str, text: str) -> list[list[Passage]]:
    """Passages that may hold commands, in lists of consecutive lines."""
    if file.endswith(".py"):
        return list(docstrings(text))
    if file.startswith(".github/"):
        return [list(comments(text, file)), list(runs(text))]
    return [list(markdown(text) if file.endswith(".md") else comments(text, file))]


def markdown(text: str) -> Iterator[Passage]:
    """Yields all lines but those in other languages than the shell's. A fence of an unknown one stands as a command."""
    fence = language = ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})\s*([^\s`]*)[^`]*$", line)
        if mark and not fence:
            fence, language = mark[1], mark[2]
            if language not in ("", *SHELLS, *LANGUAGES):
                yield number, fence + language, "shell"
        elif not fence:
            yield number, line, "prose"
        elif mark and mark[1].startswith(fence) and not mark[2]:
            fence = ""
        elif language in SHELLS or (language == "" and line.startswith("$ ")):
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


def runs(text: str) -> Iterator[Passage]:
    """Yields the lines of every `run:` of a workflow."""
    nodes = [yaml.compose(text)]
    for node in nodes:
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            nodes.append(value)
            if key.value == "run" and isinstance(value, yaml.ScalarNode):
                first = value.start_mark.line + (2 if value.style in ("|", ">") else 1)
                yield from ((number, line, "shell") for number, line in enumerate(value.value.splitlines(), first))


def docstrings(text: str) -> Iterator[list[Passage]]:
    """Yields the lines of every docstring of a Python file. Formatters move a docstring's only indented lines left."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
            passages: list[Passage] = []
            for _, group in groupby(enumerate(doc.splitlines(), node.body[0].lineno), lambda line: bool(line[1])):
                paragraph = list(group)
                alone = re.match(START, paragraph[0][1]) and all(re.match(rf" |{START}", line) for _, line in paragraph)
                kinds = ["indented" if alone or line.startswith("    ") else "prose" for _, line in paragraph]
                passages += [(number, line, kind) for (number, line), kind in zip(paragraph, kinds, strict=True)]
            yield passages


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
        pieces = re.split(r"\$(?:\{\{.*?\}\}|\{?(\w+)\}?)", re.sub(r"(?<=\s)\[[^\]]*\]", "", line.text))
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


class Wrong(Exception):
    """The reason why a documented command is wrong."""


def quietly(call: Callable[..., Any], *args: Any) -> Any:
    """Returns the call's result, or None where the call ends the program; a failure is Wrong, with its last line."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            return call(*args)
        except SystemExit as stop:
            if stop.code:
                raise Wrong(errors.getvalue().strip().rpartition("\n")[2] or str(stop.code)) from None
        except ConfigError as error:
            raise Wrong(str(error)) from None
    return None


def parse(parser: Callable[[list[str]], Any], words: list[str], inline: bool) -> Any:
    """The parsed arguments, in running text with what it leaves out."""
    tries = [words, [*words, "X"], [*words, "X", "X"]] if inline else [words]
    for attempt in tries[:-1]:
        with contextlib.suppress(Wrong):
            return quietly(parser, attempt)
    return quietly(parser, tries[-1])


def compare(command: Command) -> None:
    """Raises Wrong for an extra, an environment or a variable that our files do not know."""
    if extras := unknown_extras(command.words):
        raise Wrong(f"linear-moe has no extras {', '.join(extras)}")
    if command.words[0] == "source" and not is_environment(command.words[-1]):
        raise Wrong(f"scripts/setup.sh does not make {command.words[-1]}")
    if unread := unread_variables(command):
        raise Wrong(f"nothing reads {', '.join(unread)}")


def unknown_extras(words: list[str]) -> list[str]:
    """The extras of linear-moe that a command asks for and pyproject.toml does not have."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"(?<!\S)(?:linear[-_]moe|\./?)\[([^]]*)\]", " ".join(words))
    return [e for e in ",".join(asked).split(",") if e and not fitting(extras, e.strip().replace(BLANK, "*"))]


def unread_variables(command: Command) -> list[str]:
    """The variables set before a script of ours that neither it, nor one it calls, nor its neighbours read."""
    texts: dict[str, str] = {}
    waiting = [" ".join(command.words)]
    while waiting:
        for script in re.findall(SCRIPT, waiting.pop()):
            if script not in texts and (ROOT / script).is_file():
                files = (ROOT / script).parent.glob("*.py") if script.endswith(".py") else [ROOT / script]
                texts[script] = "".join(path.read_text() for path in files)
                waiting.append(texts[script])
    names = [name for name in command.env if name not in WELL_KNOWN] if texts else []
    read = "".join([*texts.values(), *(path.read_text() for path in ROOT.glob("linear_moe/**/*.py"))]) if names else ""
    return [name for name in names if not re.search(rf"""\$\{{{name}:|(["']){name}\1""", read)]


def is_test(path: str) -> bool:
    """Whether pytest finds this: a file, a folder, or FILE::NAME::NAME."""
    file, *names = path.partition("[")[0].split("::")
    text = (ROOT / file).read_text() if names and (ROOT / file).is_file() else ""
    found = [re.search(rf"^ *(?:async def|def|class) {re.escape(name)}\b", text, re.MULTILINE) for name in names]
    return (ROOT / file).exists() and all(found)


def is_environment(script: str) -> bool:
    """Whether `source` finds this: the `activate` of an environment that scripts/setup.sh makes, or of the reader's."""
    ours = re.findall(r"\bvenv=(\S+)", (ROOT / "scripts" / "setup.sh").read_text())
    return script in [f"{venv}/bin/activate" for venv in ours] or re.match(rf"{BLANK}|[A-Z]+/", script) is not None
