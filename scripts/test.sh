#!/usr/bin/env bash
# Sets the environment up and runs all checks of CI: ruff, mypy, pytest (CPU, gloo). Arguments are passed to pytest.
#   scripts/test.sh                     runs all tests
#   scripts/test.sh tests/unit -k gla   runs some tests
#   scripts/test.sh --newest            runs all tests with the newest releases instead of the locked ones
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
check() { # ends the script at the first failure, except with --newest, which shall report all failures
  "$@" || { status=$?; [ -n "$newest" ] || exit $status; }
}
check ruff check .
check mypy
if [ $# -gt 0 ]; then
  check python -m pytest -q "$@"
else
  # Tests over several processes spend half of their time waiting, so that three workers fit. A file stays in one worker,
  # because its cases share a run.
  check python -m pytest -q -n 3 --dist loadfile
fi
exit $status
