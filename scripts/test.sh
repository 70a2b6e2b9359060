#!/usr/bin/env bash
# Sets itself up from nothing and runs everything CI runs: ruff, mypy, pytest (CPU, gloo). Arguments go to pytest.
#   scripts/test.sh                     all
#   scripts/test.sh tests/unit -k gla   some
#   scripts/test.sh --newest            all, with the newest releases of everything instead of the locked ones
# GPU tests run with it on a machine with a GPU; slow proofs with `scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv newest=
if [ "${1:-}" = --newest ]; then
  shift
  venv=.venv-newest newest=--newest
  export LINEAR_MOE_NEWEST=1
fi
scripts/setup.sh $newest
source $venv/bin/activate
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python scripts/requirements.py --versions

status=0
check() { # ends at the first failure, but for the newest releases, of which all breaks are wanted
  "$@" || { status=$?; [ -n "$newest" ] || exit $status; }
}
check ruff check .
check mypy
if [ $# -gt 0 ]; then
  check python -m pytest -q "$@"
else
  # Tests over several processes wait for one another half of the time. A file stays in one worker: its cases share a run.
  check python -m pytest -q -n 3 --dist loadfile
fi
exit $status
