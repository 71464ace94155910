#!/usr/bin/env bash
# Set up, then run the tests, a file at a time on each core. Flags of pytest may follow, e.g. -x -k pruning.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

source "$HERE/scripts/common.sh"
cd "$ROOT"
"$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
