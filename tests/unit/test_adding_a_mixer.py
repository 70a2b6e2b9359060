"""Code of docs/adding_a_mixer.md: a mixer registered as the page says passes the tests of the registry's mixers."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from linear_moe.cli import main
from linear_moe.modeling.mixers.registry import MIXERS, mixer_class
from tests.unit.modeling.mixers import common, test_fields, test_mixers, test_saved, test_validate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_mixer.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {match[1]: code for kind, code in BLOCKS if kind == "python" and (match := re.match(r"# (\S+\.py)\n", code))}
MIXER_FILE, TEST_FILE = FILES
(LINE,) = [code for kind, code in BLOCKS if kind == "python" and code not in FILES.values()]
(COMMANDS,) = [code.splitlines() for kind, code in BLOCKS if kind == "bash"]
((NAME, TARGET),) = ast.literal_eval(f"{{{LINE}}}").items()


def module(file: str) -> ModuleType:
    """Makes the module that a file of the page would be."""
    name = file.removesuffix(".py").replace("/", ".")
    made = importlib.util.module_from_spec(ModuleSpec(name, loader=None))
    sys.modules[name] = made
    exec(compile(FILES[file], file, "exec"), made.__dict__)
    return made


@pytest.fixture(scope="module")
def tests() -> Iterator[ModuleType]:
    """Registers the page's mixer; returns the module of its test file."""
    assert NAME not in MIXERS and not importlib.util.find_spec(TARGET.partition(":")[0])
    MIXERS[NAME] = TARGET
    made = [module(MIXER_FILE), module(TEST_FILE)]
    yield made[1]
    del MIXERS[NAME]
    for each in made:
        del sys.modules[each.__name__]


def of_every_mixer(*modules: ModuleType) -> list[Callable[..., None]]:
    """Tests that take a mixer's name, and perhaps one of its configs."""
    functions = [f for m in modules for name, f in inspect.getmembers(m, inspect.isfunction) if name[:5] == "test_"]
    return [f for f in functions if any(mark.args[0] in MIXER_ARGUMENTS for mark in getattr(f, "pytestmark", []))]


MIXER_ARGUMENTS = ("name", ("name", "fields"))
MODULES = (test_mixers, test_saved, test_validate, test_fields)
CHECKS = of_every_mixer(*MODULES)


def calls(function: Callable[..., None], variants: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All arguments of a parametrised test, with the page's mixer and configs in place of the registry's."""
    choices: list[list[dict[str, Any]]] = []
    for mark in function.pytestmark:  # type: ignore[attr-defined]
        names, values = mark.args[:2]
        if names == "name":
            choices.append([{"name": NAME}])
        elif names == ("name", "fields"):
            choices.append([{"name": NAME, "fields": fields} for fields in variants])
        else:
            choices.append([{names: value} for value in values])
    for parts in product(*choices):
        yield {key: value for part in parts for key, value in part.items()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_registry_wide(check: Callable[..., None], tests: ModuleType) -> None:
    for arguments in calls(check, tests.VARIANTS):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if "monkeypatch" in inspect.signature(check).parameters:
                arguments["monkeypatch"] = monkeypatch
            check(**arguments)


def test_there_are_checks() -> None:
    assert len(CHECKS) > 12
    assert {f.__module__ for f in CHECKS} == {m.__name__ for m in MODULES}


def test_its_own_tests(tests: ModuleType) -> None:
    own = [f for name, f in inspect.getmembers(tests, inspect.isfunction) if name[:5] == "test_"]
    assert own
    for function in own:
        function()
    options = {key for fields in tests.VARIANTS for key in fields}
    assert options | {"type", "num_heads"} == set(vars(common.build(NAME, {}).config))
    assert mixer_class(NAME).__doc__


def test_commands(tests: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = 0
    for line in COMMANDS:
        words = shlex.split(line.partition(">")[0])
        if words[0] == "linear-moe":
            assert main(words[1:]) == 0
            assert NAME in capsys.readouterr().out
            ran += 1
        else:
            assert (ROOT / next(word for word in words if word != "bash")).is_file()
    assert ran == 3


@pytest.mark.parametrize("file", FILES)
def test_ruff(file: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", file, "-"]
    done = subprocess.run(command, cwd=ROOT, input=FILES[file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_where_the_page_says() -> None:
    for path in re.findall(r"`((?:linear_moe|tests|scripts|configs)/[\w/]+(?:\.\w+)?/?)`", PAGE):
        assert path in FILES or (ROOT / path).exists(), path
