"""Executes the pages of docs/tutorials: `python -m tests.unit.tutorials FOLDER PAGE ...`.

The blocks of a page run from top to bottom in one folder, as a reader would run them: a YAML block whose first line is
`# NAME.yaml` is written to that file, the lines of a shell block and those after `$` are `linear-moe` commands, Python
blocks are parts of one program. A `text` block, or what follows a `$` line, is what the block before has printed: its
lines must occur in that order, `...` stands for anything. A command may fail only where the page shows how it fails.

Each page has a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
PAGES = tuple(sorted(path.name for path in FOLDER.glob("*.md")))


@dataclass
class Block:
    """A fenced block of a page.

    Attributes:
        line: the line of the page that it begins at.
        kind: the language behind the fence, "" where there is none.
        text: the lines inside the fences.
    """

    line: int
    kind: str
    text: str


class Wrong(Exception):
    """The first thing that a page says and that is not so."""


def blocks(page: str) -> Iterator[Block]:
    """Yields all fenced blocks of a page."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield Block(page.count("\n", 0, match.start()) + 1, match[1], match[2])


def commands(text: str) -> list[list[str]]:
    """The arguments of the `linear-moe` commands of a shell block."""
    found = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    for words in found:
        if words[:1] not in ([], ["linear-moe"]):
            raise Wrong(f"no linear-moe command: {shlex.join(words)}")
    return [words[1:] for words in found if words]


def missing(expected: str, output: str) -> str | None:
    """The first line of `expected` that `output` does not have behind those before; None: it has all."""
    lines = iter([line.rstrip() for line in output.splitlines()])
    for wanted in expected.splitlines():
        pattern = re.escape(wanted.strip()).replace(r"\.\.\.", ".*")
        if not any(re.fullmatch(rf"\s*{pattern}", line) for line in lines):
            return wanted
    return None


class Page:
    """Runs blocks in the current folder.

    Attributes:
        output: what the last block has printed.
        failed: the last command that ended with another exit code than 0, and that code.
        ran: how many blocks of each language have run.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.output, self.failed = "", ""
        self.ran: dict[str, int] = {}

    def run(self, block: Block) -> None:
        """Runs a block. Raises Wrong, or what the block raises."""
        self.ran[block.kind] = self.ran.get(block.kind, 0) + 1
        command, _, answer = block.text.partition("\n")
        if block.kind == "text":
            self.expect(block.text)
        elif block.kind == "" and command.startswith("$ "):
            self.check_success()
            self.shell(command.removeprefix("$ "))
            self.expect(answer)
        else:
            self.check_success()
            self.do(block)

    def do(self, block: Block) -> None:
        if block.kind == "bash":
            self.shell(block.text)
        elif block.kind == "python":
            with self.printed():
                exec(compile(block.text, f"line {block.line}", "exec"), self.names)
        elif block.kind == "yaml":
            name = re.match(r"# ([\w.]+\.yaml)\n", block.text)
            if name is not None:  # else a part of a file, to look at
                Path(name[1]).write_text(block.text)
        elif block.kind != "":
            raise Wrong(f"no rule says what a block of {block.kind} is")

    def shell(self, text: str) -> None:
        from linear_moe import cli

        with self.printed():
            for words in commands(text):
                self.check_success()
                try:
                    code = cli.main(words)
                except SystemExit as stop:
                    code = int(stop.code or 0)
                if code:
                    self.failed = f"linear-moe {shlex.join(words)}: exit code {code}"

    @contextlib.contextmanager
    def printed(self) -> Iterator[None]:
        """Keeps what is printed inside, on both streams."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                yield
            finally:
                self.output = output.getvalue()

    def expect(self, text: str) -> None:
        """Compares the last block's output with what the page shows; a failure is right where its line is shown."""
        if (line := missing(text, self.output)) is not None:
            raise Wrong(f"{line!r} is not in what was printed:\n{self.output}")
        if re.search("^linear-moe: ", text, re.MULTILINE):
            self.failed = ""
        self.check_success()

    def check_success(self) -> None:
        if self.failed:
            raise Wrong(f"{self.failed}\n{self.output}")


def execute(page: str, folder: Path) -> dict[str, Any]:
    """Runs a page in a folder: {blocks that ran, by kind; error, "" where all is as the page says}."""
    runner = Page()
    (folder / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(folder):
        for block in blocks((FOLDER / page).read_text()):
            try:
                runner.run(block)
            except BaseException as error:
                where = f"docs/tutorials/{page}:{block.line}: "
                reason = str(error) if isinstance(error, Wrong) else f"{traceback.format_exc()}\n{runner.output}"
                return {"ran": runner.ran, "error": where + reason}
    return {"ran": runner.ran, "error": runner.failed}


def main(folder: Path, pages: list[str]) -> None:
    """Writes PAGE.json to the folder for each of the pages."""
    from linear_moe.training import platform

    platform.install()

    import linear_moe.inference.hf
    import linear_moe.plan.search
    import linear_moe.training.data.dataset
    import linear_moe.training.loop  # noqa: F401

    for page in pages:
        own = folder / page.removesuffix(".md")
        own.mkdir()

        def run(page: str = page, own: Path = own) -> None:
            (folder / f"{page}.json").write_text(json.dumps(execute(page, own)))

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
