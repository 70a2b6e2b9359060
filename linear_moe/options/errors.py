"""ConfigError, the exception for every mistake of a user; the command line prints its text and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class ConfigError(ValueError):
    """Mistake of a user, as a text of one line: `path = value: constraint; did you mean ...? fix`.

    Args:
        path: dotted config path ("model.moe.top_k"), or a file or command-line argument.
        value: the offending value; `...` where there is none, for example for a missing file.
        constraint: the constraint that does not hold, in words.
        candidates: valid names; the text offers the ones near `value`, or all of them when none is near.
        near_to: the text with which candidates are compared, if not `value`.
        list_all: whether the text lists all candidates even when some are near.
        fix: how the user can correct the mistake.
    """

    def __init__(
        self,
        path: str,
        value: object,
        constraint: str,
        *,
        candidates: Iterable[str] = (),
        near_to: str | None = None,
        list_all: bool = False,
        fix: str = "",
    ):
        self.path, self.value, self.constraint = path, value, constraint
        candidates = sorted(candidates)
        self.near = difflib.get_close_matches(str(value) if near_to is None else near_to, candidates, n=3, cutoff=0.6)
        head = path if value is ... else f"{path} = {value!r}"
        parts = [f"{head}: {constraint}"]
        if self.near:
            parts.append("did you mean " + " or ".join(repr(n) for n in self.near) + "?")
        if candidates and (list_all or not self.near):
            parts.append("valid: " + ", ".join(candidates))
        if fix:
            parts.append(fix)
        super().__init__("; ".join(parts).replace("\n", " "))


def nearest(value: int, valid: Callable[[int], bool] = lambda n: True, step: int = 1) -> str:
    """Returns a `fix` such as "nearest valid: 6 or 8".

    The numbers are the closest smaller and larger positive multiples of `step` that are `valid`. The search covers
    10,000 multiples in each direction; the text is "" if none of them is valid.
    """
    far, start = 10_000, max(value, 0) // step * step
    below = next((n for n in range(start, 0, -step)[:far] if n != value and valid(n)), None)
    above = next((n for n in range(start + step, start + far * step, step) if valid(n)), None)
    near = " or ".join(str(n) for n in (below, above) if n is not None)
    return f"nearest valid: {near}" if near else ""


def one_line(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
