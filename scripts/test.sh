#!/usr/bin/env bash
# Sets itself up from nothing and runs everything CI runs: ruff, mypy, pytest (CPU, gloo). Arguments go to pytest.
#   scripts/test.sh                     all
#   scripts/test.sh tests/unit -k gla   some
# GPU tests run with it on a machine with a GPU; slow proofs with `scripts/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
source .venv/bin/activate
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ruff check .
mypy
if [ $# -gt 0 ]; then
  exec python -m pytest -q "$@"
fi
# Tests over several processes wait for one another half of the time: three groups run beside each other.
folder=$(mktemp -d)
beside() { { python -m pytest -q "${@:2}" >"$folder/$1" 2>&1 || echo "$1" >>"$folder/failed"; } & }
beside unit tests --ignore tests/distributed
beside sequences tests/distributed/test_sequence*.py
status=0
python -m pytest -q tests/distributed --ignore-glob='*/test_sequence*' || status=$?
wait
cat "$folder/unit" "$folder/sequences"
[ ! -e "$folder/failed" ] && exit $status
exit 1
