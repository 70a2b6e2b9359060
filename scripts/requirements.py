#!/usr/bin/env python3
"""Answers about pyproject.toml, the locks and what is installed, for scripts/setup.sh and scripts/test.sh.

python scripts/requirements.py --newest dev,gpu                        the dependencies without upper ends, for pip
python scripts/requirements.py --check requirements/cpu-py3.11.txt     is what is installed what the lock says?
python scripts/requirements.py --versions                              what is installed, beside the windows
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
LOWER = (">=", ">", "!=")
"""Operators of a window that stay when its upper end is lifted."""


def dependencies(extras: list[str]) -> list[Requirement]:
    """The project's own dependencies and those of its `extras`, with their windows."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    return [Requirement(line) for line in [*project["dependencies"], *(x for extra in extras for x in optional[extra])]]


def without_upper_end(requirement: Requirement) -> Requirement:
    open_ended = Requirement(str(requirement))
    open_ended.specifier = SpecifierSet(",".join(str(s) for s in requirement.specifier if s.operator in LOWER))
    return open_ended


def pins(lock: str) -> dict[str, Version]:
    """Name and version of every package that a lock, or a file of choices for it, pins."""
    lines = (line.partition("#")[0].strip() for line in lock.splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def differences(lock: dict[str, Version]) -> list[str]:
    """A line for each installed package whose release is not the lock's; local versions (`+cpu`) do not count."""
    installed: dict[str, Version] = {}
    for found in metadata.distributions():  # the first of a name is the one imported, PYTHONPATH's before the others
        installed.setdefault(canonicalize_name(found.name), Version(found.version))
    return [
        f"{name} {installed[name]} is installed, not {version}"
        for name, version in lock.items()
        if name in installed and installed[name].public != version.public
    ]


def versions() -> list[str]:
    """A line for each direct dependency that is installed: its version, and its window if it lies outside."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    found = []
    for requirement in dependencies(list(extras)):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        tested = requirement.specifier.contains(version, prereleases=True)
        found.append(f"{requirement.name} {version}" + ("" if tested else f"  outside {requirement.specifier}"))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--newest", metavar="EXTRA,...", help="print dependencies with these extras, without upper ends")
    what.add_argument("--check", metavar="LOCK", type=Path, help="compare what is installed with a lock")
    what.add_argument("--versions", action="store_true", help="print what is installed of the direct dependencies")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.versions:
        print(f"Python {sys.version.split()[0]}", *versions(), sep="\n")
        return 0
    if args.newest:
        print(*(without_upper_end(r) for r in dependencies(args.newest.split(","))), sep="\n")
        return 0
    found = differences(pins(args.check.read_text()))
    for line in found:
        print(f"{args.check}: {line}; remove .venv and set up again", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
