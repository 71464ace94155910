#!/usr/bin/env bash
# Make .venv with everything the project needs. Does nothing when it is up to date; a run that was cut short starts over.
#
#   bash scripts/setup.sh                         # finds a Python 3.12 or newer
#   PYTHON_BIN=/opt/python3.12 bash scripts/setup.sh
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/.installed

wanted=$(cksum <"$ROOT/requirements.txt")
if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted $ROOT" ]; then
    exit 0
fi

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

python=
for candidate in ${PYTHON_BIN:+"$PYTHON_BIN"} python3.12 python3.13 python3 \
    "$HOME"/.pyenv/versions/3.12*/bin/python "$HOME"/.pyenv/versions/3.1[3-9]*/bin/python; do
    if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.12 or newer was found: install one, or name it with PYTHON_BIN=/path/to/python" >&2
    exit 1
fi

(
    # Two scripts started at once must not install into each other.
    if command -v flock >/dev/null; then flock 9; fi
    [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted $ROOT" ] && exit 0
    echo "setting up $VENV with $("$python" --version) (about 5 GB, a few minutes)"
    rm -f "$STAMP"
    "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --requirement "$ROOT/requirements.txt"
    "$VENV/bin/python" -m pip install --quiet --no-deps --editable "$ROOT"
    echo "$wanted $ROOT" >"$STAMP"
) 9>"$ROOT/.setup.lock"
