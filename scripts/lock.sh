#!/usr/bin/env bash
# Writes the locks, requirements/*.txt: every package that scripts/setup.sh installs, with its version, resolved by uv
# from the windows in pyproject.toml and the choices in requirements/*.in. docs/dependencies.md says when to run it.
#   scripts/lock.sh                        the newest releases that the windows and the choices admit
#   scripts/lock.sh --keep                 as they are, but for what no longer fits
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  "") upgrade=(--upgrade) ;;
  --keep) upgrade=() ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac

tools=.cache/lock
[ -x $tools/bin/uv ] || { "${PYTHON:-python3}" -m venv $tools && $tools/bin/pip install --quiet "uv>=0.13,<0.14"; }

# Linux on x86-64, as what is tested; other platforms have the same releases, less what only Linux needs.
lock() { # NAME PYTHON EXTRA...
  local name=$1 python=$2 extras=() extra
  shift 2
  for extra in "$@"; do extras+=(--extra "$extra"); done
  $tools/bin/uv pip compile pyproject.toml "${extras[@]}" --constraint "requirements/$name.in" \
    --python-version "$python" --python-platform x86_64-manylinux_2_28 --no-python-downloads --quiet \
    --custom-compile-command scripts/lock.sh "${upgrade[@]}" --output-file "requirements/$name-py$python.txt"
  echo "requirements/$name-py$python.txt: $(grep -c == "requirements/$name-py$python.txt") packages"
}
lock cpu 3.11 dev
lock gpu 3.12 dev gpu quack
