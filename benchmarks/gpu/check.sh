#!/usr/bin/env bash
# Checks this project on the GPU of this machine: that it computes there what it computes on the CPU, that training
# resumes as if it had not ended, and how fast a model of 1.1B parameters trains.
#
#   bash benchmarks/gpu/check.sh
#   bash benchmarks/gpu/check.sh --only first-losses speed     # some of the checks; --help names them
#
# Each check is a line of JSON as soon as it is done, in results.jsonl of the folder too, and a row of the table at the
# end. One that this machine cannot run, or that fails, is a row with the reason. The status is 0 when all that ran
# have passed.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

source "$HERE/scripts/common.sh"
forget_settings
gpus=$(count_gpus)
[ "$gpus" -gt 0 ] || die "benchmarks/gpu/check.sh compares a GPU with the CPU, and torch can use no GPU here"
export PYTHON
exec "$PYTHON" "$HERE/benchmarks/gpu/check.py" --gpus "$gpus" "$@"
