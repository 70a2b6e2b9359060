#!/usr/bin/env bash
# Makes .venv with linear-moe and what it needs, from nothing but Python >= 3.11. Quick when it is there already.
# Without an NVIDIA GPU, torch is pinned to a release with a CPU build (constraints-cpu.txt).
# PYTHON=python3.12 scripts/setup.sh picks the interpreter. Afterwards: source .venv/bin/activate
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "setup: $python not found; set PYTHON to a Python >= 3.11" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "setup: $("$python" --version) is too old; set PYTHON to a Python >= 3.11" >&2; exit 2; }

extras=dev
constraints=(-c constraints-cpu.txt)
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  extras=dev,gpu
  constraints=()
fi

stamp=$("$python" --version; echo "$extras"; cat setup.py constraints-cpu.txt)
if [ "$(cat .venv/.installed 2>/dev/null)" = "$stamp" ]; then exit 0; fi

echo "setup: installing into .venv (about a minute)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${constraints[@]}" -e ".[$extras]"
printf '%s\n' "$stamp" >.venv/.installed
