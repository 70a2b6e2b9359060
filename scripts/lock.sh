#!/usr/bin/env bash
# Writes the locks, requirements/*.txt: every package that scripts/setup.sh installs, with its version, resolved by uv
# from the windows in pyproject.toml and the choices in requirements/*.in. docs/dependencies.md says when to run it.
#   scripts/lock.sh                        takes the newest releases that the windows and the choices admit
#   scripts/lock.sh --keep                 keeps all releases that still fit
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  "") upgrade=(--upgrade) ;;
  --keep) upgrade=() ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac

uv=0.13.9
tools=.cache/uv-$uv
if [ ! -x $tools/bin/uv ]; then
  "${PYTHON:-python3}" -m venv --clear $tools
  $tools/bin/pip install --quiet --disable-pip-version-check uv==$uv
fi

# Locks are made for Linux on x86-64, which is tested; other platforms get the same releases, without Linux's own packages.
lock() { # KIND PYTHON
  local file=requirements/$1-py$2.txt
  $tools/bin/uv pip compile pyproject.toml --extra "setup-$1" --constraint "requirements/$1.in" \
    --python-version "$2" --python-platform x86_64-manylinux_2_28 --no-python-downloads --quiet \
    --custom-compile-command scripts/lock.sh "${upgrade[@]}" --output-file "$file"
  echo "$file: $(grep -c == "$file") packages"
}
lock cpu 3.11
lock gpu 3.12
