#!/usr/bin/env python3
"""Compares pyproject.toml, the locks and what is installed, for scripts/setup.sh and scripts/test.sh.

python scripts/requirements.py --newest setup-cpu                      prints dependencies without upper ends, for pip
python scripts/requirements.py --check requirements/cpu-py3.11.txt     compares the installed packages with a lock
python scripts/requirements.py --versions                              prints the installed versions and their windows
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
LOWER = (">=", ">", "!=")
"""Operators of a window that stay when its upper end is lifted."""


def dependencies(extras: Iterable[str]) -> Iterator[Requirement]:
    """Yields the project's own dependencies and those of its `extras`, with their windows."""
    yield from map(Requirement, PROJECT["dependencies"])
    yield from of_extras(extras)


def of_extras(extras: Iterable[str]) -> Iterator[Requirement]:
    """Yields the requirements of `extras`, and of the extras that these name."""
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if requirement.name == PROJECT["name"]:
                yield from of_extras(sorted(requirement.extras))
            else:
                yield requirement


def without_upper_end(requirement: Requirement) -> Requirement:
    """A copy of `requirement` that any later release satisfies too."""
    lifted = Requirement(str(requirement))
    lifted.specifier = SpecifierSet(",".join(str(s) for s in requirement.specifier if s.operator in LOWER))
    return lifted


def pins(lock: str) -> dict[str, Version]:
    """Name and version of every package that the text of a lock, or of the choices for one, pins."""
    lines = (line.partition("#")[0].strip() for line in lock.splitlines())
    requirements = (Requirement(line) for line in lines if line)
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in requirements}


def needed(name: str, extras: Iterable[str] = ()) -> Iterator[tuple[str, str | None]]:
    """Yields each distribution that `name` with `extras` needs, directly or not, and its installed version or None."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(name), extra) for extra in ("", *extras)]
    while waiting:
        if (node := waiting.pop()) in seen:
            continue
        seen.add(node)
        package, extra = node
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            yield package, None
            continue
        yield package, distribution.version
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]


def differences(lock: dict[str, Version], name: str, extras: Iterable[str] = ()) -> list[str]:
    """A line for each distribution that `name` needs and that is not installed as `lock` says.

    Local versions do not count: 2.13.0+cpu is the same as 2.13.0. `name` itself does not count either.
    """
    lines = []
    for package, version in sorted(set(needed(name, extras)) - {(canonicalize_name(name), metadata.version(name))}):
        if version is None:
            lines.append(f"{package} is not installed")
        elif package not in lock:
            lines.append(f"{package} {version} is installed, which is not in the lock")
        elif Version(version).public != lock[package].public:
            lines.append(f"{package} {version} is installed, not {lock[package]}")
    return lines


def versions() -> list[str]:
    """A line for each direct dependency that is installed: its version, and its window if it lies outside."""
    lines = []
    for requirement in dependencies(PROJECT["optional-dependencies"]):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        tested = requirement.specifier.contains(version, prereleases=True)
        lines.append(f"{requirement.name} {version}" + ("" if tested else f"  outside {requirement.specifier}"))
    return list(dict.fromkeys(lines))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--newest", metavar="EXTRA,...", help="print dependencies with these extras, without upper ends"
    )
    action.add_argument("--check", metavar="LOCK", type=Path, help="compare what is installed with a lock")
    action.add_argument("--versions", action="store_true", help="print what is installed of the direct dependencies")
    parser.add_argument("--extra", action="append", default=[], help="with --check: an extra that was installed too")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.versions:
        print(f"Python {sys.version.split()[0]}", *versions(), sep="\n")
        return 0
    if args.newest:
        print(*(without_upper_end(r) for r in dependencies(args.newest.split(","))), sep="\n")
        return 0
    problems = differences(pins(args.check.read_text()), PROJECT["name"], args.extra)
    for line in problems:
        print(f"{args.check}: {line}; remove .venv and set up again", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
