#!/usr/bin/env bash
# Builds the documentation as a site, from nothing but Python >= 3.11: site/index.html. A warning is an error.
#   scripts/docs.sh            once
#   scripts/docs.sh --serve    on a port of this machine, anew after every change
# In an environment of its own, .venv-docs, with the extra `docs` of pyproject.toml; the package itself is read, not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  "") command=(build --strict --quiet) ;;
  --serve) command=(serve) ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac

python=${PYTHON:-python3} venv=.venv-docs
wanted=$("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")')
if [ "$(cat $venv/.installed 2>/dev/null)" != "$wanted" ]; then
  echo "docs: installing into $venv"
  "$python" -m venv $venv
  $venv/bin/python -m pip --quiet --disable-pip-version-check install -r <(printf '%s\n' "$wanted")
  printf '%s\n' "$wanted" >$venv/.installed
fi
NO_MKDOCS_2_WARNING=1 $venv/bin/mkdocs "${command[@]}"
[ "${1:-}" = --serve ] || echo "docs: site/index.html"
