#!/usr/bin/env bash
# Makes .venv with linear-moe and the tested releases of its dependencies (requirements/*.txt); needs Python >= 3.11.
# Ends at once if .venv is up to date. Afterwards: source .venv/bin/activate
#   PYTHON=python3.12 scripts/setup.sh    uses that interpreter
#   scripts/setup.sh --newest             makes .venv-newest with the newest releases, tested or not
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  "") venv=.venv ;;
  --newest) venv=.venv-newest ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "setup: $python not found; set PYTHON to a Python >= 3.11" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "setup: $("$python" --version) is too old; set PYTHON to a Python >= 3.11" >&2; exit 2; }

kind=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then kind=gpu; fi
version() { "$1" -c 'import sys; print("py%d.%d" % sys.version_info[:2])'; }
lock=requirements/$kind-$(version "$python").txt
[ -f "$lock" ] || lock=requirements/$kind.in

stamp=$("$python" --version; echo "$lock"; cat pyproject.toml "$lock" scripts/setup.sh)
if [ $venv = .venv ] && [ "$(cat $venv/.installed 2>/dev/null)" = "$stamp" ]; then exit 0; fi

# A .venv of another Python version, or one that was left unfinished, is made anew.
if ! { $venv/bin/python -m pip --version && [ "$(version $venv/bin/python)" = "$(version "$python")" ]; } >/dev/null 2>&1
then "$python" -m venv --clear $venv; fi
pip() { $venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
rm -f $venv/.installed
if [ $venv = .venv-newest ]; then
  echo "setup: installing the newest releases into $venv (minutes)"
  pip install --upgrade packaging
  $venv/bin/python scripts/requirements.py --newest setup-$kind >$venv/newest.txt
  pip install --upgrade --upgrade-strategy eager -r $venv/newest.txt
  pip install --no-deps --no-build-isolation -e .
else
  echo "setup: installing the releases of $lock into $venv (a minute; longer if pip must fetch a CUDA build of torch)"
  case $lock in *.in)
    echo "setup: there is no lock for $("$python" --version) with a $kind, only $(echo requirements/*.txt): what $lock" \
      "leaves open is the newest inside the windows of pyproject.toml" >&2 ;;
  esac
  pip install -c "$lock" "setuptools>=77"
  pip install -c "$lock" --no-build-isolation -e ".[setup-$kind]"
  case $lock in *.txt) $venv/bin/python scripts/requirements.py --check "$lock" --extra setup-$kind ;; esac
fi
printf '%s\n' "$stamp" >$venv/.installed
