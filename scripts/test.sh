#!/usr/bin/env bash
# Set up, then run the tests, several files at a time. Flags of pytest may follow, e.g. -x -k pruning.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

source "$HERE/scripts/common.sh"
cd "$ROOT"
# The tests start hundreds of processes: Python may keep the code that it compiles for one.
export PYTHONDONTWRITEBYTECODE=
# One more than there are cores, and at most 4: many tests wait for processes of their own.
workers=$(($(nproc) < 4 ? $(nproc) + 1 : 4))
"$PYTHON" -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
