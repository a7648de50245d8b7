#!/usr/bin/env bash
# Make a virtual environment with the pinned packages of cpu.txt and megarl itself, in editable form.
# usage: requirements/setup_cpu.sh [VENV]       (PYTHON=python3.11 to choose the interpreter; pip's own settings apply)
# A stamp in the environment holds the hash of the pins: running it again with nothing changed costs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
pins=requirements/cpu.txt
stamp=$venv/.megarl-setup
hash=$(cat "$pins" setup.py "$0" | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$hash" ] && exit 0

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "megarl needs Python 3.11 or newer; found: ${python:-none} (choose one with PYTHON=/path/to/python3.11)" >&2
    exit 1
fi

started=$SECONDS
say() { printf '[setup %3ds] %s\n' $((SECONDS - started)) "$*"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input --quiet --quiet "$@"; }

say "$("$python" --version) -> $venv"
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
    echo "could not make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv" >&2
    exit 1
fi
say "torch"
pip install --constraint "$pins" "$(grep '^torch==' "$pins")"
say "$(grep -c == "$pins") pinned packages (a few minutes)"
pip install --no-deps --requirement "$pins"
say "megarl, editable"
pip install --no-deps --no-build-isolation --editable .
echo "$hash" > "$stamp"
say "ready"
