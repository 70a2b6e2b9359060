"""Search for commands in documentation: it returns all commands that are shown, and nothing else."""

from __future__ import annotations

from typing import Any

from tests.unit.documented import BLANK, commands_of, passages_of

PAGE = """Text with `linear-moe plan CONFIG --world
N` and `a.b=c`.
```bash
# a remark
common="a.b=1 c.d=2"
GPUS=8 bash examples/x.sh $common "e.f=g * 2" # the first
bash examples/x.sh ... h=[1,2] [i.j=k ...] | head && linear-moe \\
    checkpoint inspect|reshard "$RUN/x" 2>&1 > out
```
```
$ linear-moe check x.yaml
linear-moe: no
```
```python
linear-moe = 3
```
Then `./scripts/x.sh 1`.
~~~~bash title=x
pip install "linear-moe[gpu]"
```
~~~~
   ```cobol
   linear-moe
   ```
"""
SCRIPT = """#!/bin/bash
# Starts it:  scripts/y.sh CONFIG [a.b=c ...]
#   examples/x.sh 1      some
#   model.x='L * 3' a.b=1
# of linear-moe plan, no command
set -e  # examples/z.sh
"""
MODULE = """'''Does it.

    python scripts/z.py --a 1      # so
    ours      a table
bash is no command here, `torchrun -m linear_moe` is one.
'''
def f():
    '''Does it.

    pytest b    this
    pytest c \\\\
        d

    pytest is
    no command.
    '''
"""


WORKFLOW = """# Runs it:  scripts/y.sh 1
run: { shell: bash }
jobs:
  tests:
    steps:
      - uses: actions/checkout@v4
      - { name: a, run: "bash scripts/x.sh ${{ matrix.python }}" }
      - run: |
          # a remark
          scripts/z.sh &&
            pytest a
        if: linear-moe
"""


def test_commands_are_found() -> None:
    def commands_in(file: str, text: str) -> list[tuple[Any, ...]]:
        commands = commands_of(file, passages_of(file, text))
        return [(int(c.line.where.removeprefix(f"{file}:")), *c.env, *c.words) for c in commands]

    inspect, reshard = ((7, "linear-moe", "checkpoint", action, f"{BLANK}/x") for action in ("inspect", "reshard"))
    first = ("bash", "examples/x.sh", "a.b=1", "c.d=2", "e.f=g * 2")
    assert commands_in("a.md", PAGE) == [
        (6, "GPUS", *first), (7, "GPUS", *first, "h=[1,2]"), (7, "head"), inspect, reshard,
        (11, "linear-moe", "check", "x.yaml"), (19, "pip", "install", "linear-moe[gpu]"), (20, "```"),
        (22, "```cobol"), (1, "linear-moe", "plan", "CONFIG", "--world", "N"), (17, "./scripts/x.sh", "1"),
    ]  # fmt: skip
    assert [c.line.error for c in commands_of("a.md", passages_of("a.md", PAGE))][5:7] == ["linear-moe: no", ""]
    own = (4, "bash", "examples/s.sh", "model.x=L * 3", "a.b=1")
    assert commands_in("examples/s.sh", SCRIPT) == [(2, "scripts/y.sh", "CONFIG"), (3, "examples/x.sh", "1"), own]
    workflow = [(1, "scripts/y.sh", "1"), (7, "bash", "scripts/x.sh", BLANK), (10, "scripts/z.sh"), (11, "pytest", "a")]
    assert commands_in(".github/workflows/a.yml", WORKFLOW) == workflow
    module = [(3, "python", "scripts/z.py", "--a", "1"), (5, "torchrun", "-m", "linear_moe"), (10, "pytest", "b")]
    module.append((11, "pytest", "c", "d"))
    assert commands_in("z.py", MODULE) == module
