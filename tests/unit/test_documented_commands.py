"""Every command line that documentation shows, run as far as a CPU can.

The arguments of a line are parsed by the parser of its command, and files of this repository that it names must exist.
A configuration of this repository must pass `linear-moe check` with the line's overrides, on as many ranks as the line
starts. `plan`, `check` and `mixers` are run, and launch scripts up to their first `linear-moe`. Placeholders for the
reader's own values are recognised by rules: words in capitals; a configuration outside configs/, of which only the
overrides are checked; and /data/NAME, which stands for a folder with some text and a tokenizer here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from linear_moe import cli
from linear_moe.config.schema import Config, TokenizerConfig
from linear_moe.options.load import parse_overrides, update
from linear_moe.training.data.tokenizer import make_tokenizer
from tests.unit.documented import (
    BLANK,
    ROOT,
    Command,
    Line,
    Wrong,
    commands_of,
    compare,
    documented,
    is_test,
    parse,
    passages_of,
    quietly,
)

OURS = ("configs/", "docs/", "examples/", "linear_moe/", "requirements/", "scripts/", "tests/")
FOREIGN = ("cd", "curl", "docker", "git", "nvidia-smi", "pip", "source")  # not ours to check
FOREIGN_MODULES = ("build", "pip", "venv")
PROGRAMS = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("scripts/**/*.py")) if "__main__" in p.read_text()]
SHELL = [str(p.relative_to(ROOT)) for p in sorted([*ROOT.glob("examples/*.sh"), *ROOT.glob("scripts/**/*.sh")])]


class Checker:
    """Checks commands in a folder with our configurations and scripts, where `linear-moe` only notes its arguments."""

    def __init__(self, folder: Path, pytest_config: pytest.Config, monkeypatch: pytest.MonkeyPatch):
        self.pytest_config, self.monkeypatch = pytest_config, monkeypatch
        self.path, self.called, self.data = f"{folder}/bin:{os.environ['PATH']}", folder / "called", folder / "data"
        self.done: list[list[str]] = []
        (folder / "configs").symlink_to(ROOT / "configs")
        for name in ("examples", "scripts"):
            shutil.copytree(ROOT / name, folder / name)
        for name in (".venv/bin/activate", "bin/linear-moe", "scripts/setup.sh"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        (folder / "bin" / "linear-moe").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{self.called}\nexit 1\n')
        (folder / "bin" / "linear-moe").chmod(0o755)
        make_tokenizer(TokenizerConfig(type="bytes"), []).save_pretrained(self.data)
        (self.data / "text.txt").write_text("some text\n" * 100_000)
        monkeypatch.chdir(folder)
        for variable in ("LINEAR_MOE_DEBUG", "LOCAL_RANK", "RANK"):
            monkeypatch.delenv(variable, raising=False)
        for path in {(ROOT / program).parent for program in PROGRAMS}:
            monkeypatch.syspath_prepend(path)

    def check(self, command: Command) -> str:
        """Checks a command and returns its kind; raises Wrong if the command would not work."""
        words = [re.sub(r"(?<==)/data/[\w.-]+", str(self.data), word.removeprefix("./")) for word in command.words]
        line = command.line
        compare(command)
        for i, word in enumerate(words):
            if BLANK in word and word.startswith(OURS):  # any file that matches
                matches = sorted(ROOT.glob(word.replace(BLANK, "*")))
                words[i] = str(matches[0].relative_to(ROOT)) if matches else word
            path = words[i].rpartition("=")[2].partition("::")[0]
            if path.startswith(OURS) and not (ROOT / path.replace(BLANK, "*")).exists():
                raise Wrong(f"there is no {path}")
        match words:
            case ["linear-moe", *rest] | ["python" | "python3", "-m", "linear_moe", *rest]:
                return self.linear_moe(rest, 1, line)
            case ["torchrun", *rest]:
                args = quietly(get_args_parser().parse_args, rest)
                if not args.module or args.training_script != "linear_moe":
                    raise Wrong("torchrun starts something that is not ours")
                world = int(args.nproc_per_node) * int(args.nnodes.partition(":")[0])
                return f"torchrun {self.linear_moe(args.training_script_args, world, line)}"
            case ["python" | "python3", "-m", "pytest", *rest] | ["pytest", *rest]:
                return self.pytest(rest)
            case ["python" | "python3", "-m", module, *_] if module in FOREIGN_MODULES:
                return "of others"
            case ["python" | "python3", script, *rest] | [script, *rest] if script.endswith(".py"):
                return self.python(script, rest, line.inline)
            case ["bash", script, *rest] | [script, *rest] if script in SHELL:
                return self.shell(script, rest, command)
            case [program, *_] if program in FOREIGN:
                return "of others"
        raise Wrong("no rule says what this is")

    def linear_moe(self, words: list[str], world: int, line: Line) -> str:
        """Runs a quick subcommand; of the others, runs the checks that come before their start."""
        commands: Any = next(action.choices for action in cli.build_parser()._actions if action.choices)
        name = words[0] if words else ""
        options = commands[name]._option_string_actions if name in commands else {}
        for i, (before, word) in enumerate(pairwise(words), 1):
            if before in options and re.fullmatch("[A-Z]+", word):
                words[i] = next(iter(options[before].choices or ["8"]))
        bare = line.inline and len(words) < 2  # running text only names the command
        args = parse(cli.parse, [*words, "--help"] if bare else words, line.inline)
        if args is None:
            return f"linear-moe {name}".strip()
        config = getattr(args, "config", "")
        if line.error:
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors):
                code = cli.main(words)
            if (code, errors.getvalue().strip()) != (2, line.error):
                raise Wrong(f"refused with other words than the page's, if at all: {errors.getvalue().strip()!r}")
        elif args.command == "mixers" or (config.startswith("configs/") and args.command in ("check", "plan")):
            self.run(words)
        elif config.startswith("configs/"):
            ranks = ["--world", str(world)] if args.command == "train" else []
            self.run(["check", config, *args.overrides, *ranks])
        elif config:
            quietly(lambda: update(Config(), parse_overrides(args.overrides)))
        return f"linear-moe {args.command}"

    def run(self, words: list[str]) -> None:
        if words not in self.done:
            quietly(lambda: sys.exit(cli.main(words)))
            self.done.append(words)

    def python(self, script: str, words: list[str], inline: bool) -> str:
        """Checks a script by its function `arguments()`, and its configuration, if any, like that of `train`."""
        if script not in PROGRAMS:
            raise Wrong(f"{script} is no program")
        words = words or (["--help"] if inline else [])
        args = parse(lambda words: self.arguments(script, words), words, inline)
        if getattr(args, "config", "").startswith("configs/"):
            self.run(["check", args.config, *args.overrides, "--world", str(args.gpus)])
        return "python"

    def arguments(self, script: str, words: list[str]) -> Any:
        self.monkeypatch.setattr(sys, "argv", [script, *words])
        return importlib.import_module(Path(script).stem).arguments()

    def shell(self, script: str, words: list[str], command: Command) -> str:
        """Runs a script that launches a training up to its first `linear-moe`; does not run other scripts."""
        text = (ROOT / script).read_text()
        options = re.findall(r"^ *(-[\w-]+)\)|= (-[\w-]+) \]", text, re.MULTILINE)  # compared with the first argument
        others = words[1:] if words and any(words[0] in option for option in options) else words
        if "scripts/launch.sh" in text:
            if command.line.inline and not words:
                return "bash"
            self.called.unlink(missing_ok=True)
            env = {**os.environ, **command.env, "PATH": self.path}
            done = subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True, check=False)
            if not self.called.exists():
                raise Wrong(f"{script} ended before linear-moe: {done.stderr.strip()}")
            self.linear_moe(self.called.read_text().splitlines(), 1, Line(command.line.where, ""))
        elif "-m pytest" in text:
            self.pytest(others)
        elif others:
            raise Wrong(f"{script} does not know {' '.join(others)}")
        return "bash"

    def pytest(self, words: list[str]) -> str:
        args, unknown = quietly(self.pytest_config._parser.parse_known_and_unknown_args, words)
        marks = {line.partition(":")[0] for line in self.pytest_config.getini("markers")} | {"not", "and", "or"}
        missing = [path for path in args.file_or_dir if not is_test(path)]
        if wrong := [*unknown, *missing, *(set(re.findall(r"\w+", args.markexpr)) - marks)]:
            raise Wrong(f"pytest does not know {' '.join(wrong)}")
        return "pytest"


@pytest.fixture
def checker(tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Checker]:
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Checker(tmp_path, pytestconfig, monkeypatch)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(ROOT / "scripts")):
            del sys.modules[name]


def wrong(checker: Checker, commands: Iterable[Command], kinds: Counter[str]) -> list[str]:
    """Returns a line for each wrong command, with its file and line; counts the right commands in `kinds`."""
    errors = []
    for command in commands:
        try:
            kinds[checker.check(command)] += 1
        except Wrong as reason:
            errors.append(f"{command.line.where}: {shlex.join(command.words)}: {reason}")
    return errors


def test_every_documented_command(checker: Checker) -> None:
    kinds: Counter[str] = Counter()
    errors = wrong(checker, documented(), kinds)
    assert not errors, "\n".join(["", *errors])
    print(dict(kinds))
    commands = {f"linear-moe {name}" for name in cli.COMMANDS}
    assert kinds.keys() >= {*commands, "torchrun linear-moe train", "python", "bash", "of others"}


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_of_scripts(checker: Checker, capsys: pytest.CaptureFixture[str], script: str) -> None:
    with pytest.raises(SystemExit) as stop:
        checker.arguments(script, ["--help"])
    assert not stop.value.code
    assert f"usage: {Path(script).name}" in capsys.readouterr().out


@pytest.mark.parametrize("script", SHELL)
def test_shell_scripts_are_valid(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    if '"$0"; exit 2' in (ROOT / script).read_text():  # prints its header
        done = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and script in done.stdout


WRONG = {
    "linear-moe plan configs/train/a0.3b_2b.yaml --wrold 8": "unrecognized arguments: --wrold",
    "linear-moe plan configs/train/a0.3b_2b.yml": "there is no configs/train/a0.3b_2b.yml",
    "linear-moe train configs/train/quickstart.yaml training.stepz=5": "training.stepz",
    "linear-moe train mine.yaml training.stepz=5": "training.stepz",
    "linear-moe train configs/models/tiny.yaml training.steps=5": "schedule.warmup_steps",
    "torchrun --nproc-per-node 3 -m linear_moe train configs/models/tiny.yaml": "training.global_batch",
    "torchrun --nproc-per-gpu 3 -m linear_moe train mine.yaml": "unrecognized",
    "linear-moe generate": "required",
    "GPUS=8 bash examples/pretrain_a1b_7b.sh data.corpus=/data/text": "data.tokenizer.path",
    "bash examples/quickstart.sh parallel.expert=3": "parallel.expert",
    "bash examples/quickstar.sh": "there is no examples/quickstar.sh",
    "scripts/test.sh tests/uni": "there is no tests/uni",
    "scripts/test.sh --lastfailed": "pytest does not know --lastfailed",
    "scripts/test.sh -m slwo": "pytest does not know slwo",
    "scripts/test.sh tests/unit --newest": "pytest does not know --newest",
    "scripts/setup.sh --fast": "does not know --fast",
    "scripts/lock.sh --quiet": "does not know --quiet",
    "GPUZ=8 bash examples/quickstart.sh": "nothing reads GPUZ",
    "PYTHN=python3.12 scripts/test.sh --newest": "nothing reads PYTHN",
    "COMIT=HEAD python scripts/bench/parallel.py": "nothing reads COMIT",
    "pytest tests/unit/test_packaging.py::test_that_is_not": "pytest does not know tests/unit/test_packaging.py::",
    'pip install "linear-moe[gpuu,quack]"': "linear-moe has no extras gpuu",
    "python -m pip install -e .[dev,setup-$kind,$kind-setup]": "linear-moe has no extras \0-setup",
    "source .venvv/bin/activate": "scripts/setup.sh does not make .venvv/bin/activate",
    "python scripts/bench/mixers.py --mixers glu": "no such mixers: glu",
    "python scripts/bench/sequence.py gla:sp3@32K": "is no case",
    "python scripts/bench/pretrain.py configs/models/tiny.yaml --name x data.tokenizer.type=hf": "data.tokenizer.path",
    "python scripts/bench/pretrain.py configs/models/tiny.yaml --name x --steps 12 training.steps=6": "none of 6 steps",
    "python scripts/bench/overlap.py": "is no program",
    "accelerate launch train.py": "no rule says what this is",
    "$ linear-moe check configs/models/tiny.yaml --world 3\nlinear-moe: because": "refused with other words",
    "`linear-moe mixers nonsense`": "unrecognized arguments: nonsense",
    "`linear-moe nonsense`": "invalid choice: 'nonsense'",
    "`linear-moe checkpoint inspect --jsn`": "unrecognized arguments: --jsn",
    "`python scripts/bench/sequence_plan.py bogus`": "unrecognized arguments: bogus",
    "`./scripts/nope.sh`": "there is no scripts/nope.sh",
    "`pip install linear-moe[quak]`": "linear-moe has no extras quak",
    "`source venv/bin/activate`": "does not make venv/bin/activate",
    "```bash title=x\nlinear-moe generate\n```": "required",
    "~~~\n$ linear-moe generate\n~~~": "required",
    "```rust\nfn main() {}\n```": "'```rust': no rule says what this is",
    "run: scripts/test.sh tests/uni": "there is no tests/uni",
}


def test_mistakes_are_found(checker: Checker) -> None:
    for text, reason in WRONG.items():
        file = ".github/workflows/page.yml" if text.startswith("run:") else "page.md"
        page = text if text.startswith(("run:", "`", "~")) else f"```{'' if text[0] == '$' else 'bash'}\n{text}\n```"
        (error,) = wrong(checker, commands_of(file, passages_of(file, page)), Counter()) or [""]
        assert re.match(rf"{file}:[12]: ", error) and reason in error, (text, error)


def test_pretrain_makes_its_folder_before_training(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checker.data / "a" / "b" / "x.json"
    words = ["configs/models/tiny.yaml", "--name", "x", "--folder", str(path.parent)]
    args = checker.arguments("scripts/bench/pretrain.py", words)
    assert args.overrides[0] == "training.steps=50"
    monkeypatch.setenv("COMMIT", "this")
    monkeypatch.setattr(sys.modules["pretrain"], "measure", lambda *_: {"there": path.parent.is_dir()})
    sys.modules["pretrain"].main()
    assert json.loads(path.read_text())["rows"] == [{"there": True}]
