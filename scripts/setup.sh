#!/usr/bin/env bash
# Make .venv with everything the project needs. Does nothing when it is up to date; a run that was cut short starts over.
#
#   bash scripts/setup.sh                         # finds a Python 3.12 or newer
#   PYTHON_BIN=/opt/python3.12 bash scripts/setup.sh
#   bash scripts/setup.sh --light                 # without torch: enough to prune and convert (about 0.1 GB)
#
# Where PYTHON_BIN (or python3) has torch and TransformerEngine, as in NVIDIA's containers, .venv sees its packages and
# gets only what is missing: that torch, and what is compiled for it, stay as they are.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/.installed

wanted="$(cksum <"$ROOT/requirements.txt") $ROOT"
light=     # --light: to install no more than that
light_does= # --or-light, as the scripts that need no torch say: whichever is there does
case ${1:-} in
    --light) light=1 light_does=1 ;;
    --or-light) light_does=1 ;;
    ?*)
        echo "error: $1: the only flag is --light" >&2
        exit 2
        ;;
esac

is_up_to_date() {
    local stamp
    stamp=$(cat "$STAMP" 2>/dev/null) || return 1
    [ -x "$VENV/bin/python" ] && { [ "$stamp" = "$wanted" ] || [ "$light_does $stamp" = "1 light $wanted" ]; }
}

if is_up_to_date; then
    exit 0
fi

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

has_gpu_packages() {
    "$1" -c 'import sys; from importlib.util import find_spec as find
sys.exit(not (find("torch") and find("transformer_engine")))' >/dev/null 2>&1
}

python= beside=
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
if [ -z "$light" ] && is_new_enough "${PYTHON_BIN:-python3}" && has_gpu_packages "${PYTHON_BIN:-python3}"; then
    python=${PYTHON_BIN:-python3} beside=1
fi

# The packages of a container keep their versions, by constraints of our own: its may be older than what Megatron needs.
install_beside() {
    "$python" -m venv --clear --without-pip --system-site-packages "$VENV" # its pip serves, and often it has no ensurepip
    "$python" "$ROOT/scripts/missing_packages.py" "$ROOT/requirements.txt" "$VENV"
    PIP_CONSTRAINT='' "$VENV/bin/python" -m pip install --quiet --constraint "$VENV/kept.txt" \
        --requirement "$VENV/missing.txt" --editable "$ROOT[train]"
}

install_light() {
    "$python" -m venv "$VENV"
    sed 's/\[[a-z]*\]//' "$ROOT/requirements.txt" >"$VENV/constraints.txt" # constraints have no extras
    "$VENV/bin/python" -m pip install --quiet --constraint "$VENV/constraints.txt" --editable "$ROOT"
}

# What the programs import, so that the first start of one is as quick as the next; a failure is for them to tell.
compile_imported() {
    (cd "$ROOT" && PYTHONDONTWRITEBYTECODE='' "$VENV/bin/python" -c 'import pretrain_gpt, tools.evaluate, transformers
from transformers import AutoModelForCausalLM
transformers.LlamaForCausalLM, transformers.AutoTokenizer' >/dev/null 2>&1) || true
}

install_all() {
    "$python" -m venv "$VENV"
    # pip would compile whatever it installs, most of which nothing here imports: a minute and a half.
    "$VENV/bin/python" -m pip install --quiet --no-compile --requirement "$ROOT/requirements.txt"
    "$VENV/bin/python" -m pip install --quiet --no-deps --editable "$ROOT"
    compile_imported
}

(
    # Two scripts started at once must not install into each other.
    if command -v flock >/dev/null; then flock 9; fi
    is_up_to_date && exit 0
    if [ -n "$light" ]; then
        echo "setting up $VENV with $("$python" --version), for pruning and converting alone (about 0.1 GB)"
    elif [ -n "$beside" ]; then
        echo "setting up $VENV beside the torch and TransformerEngine of $("$python" --version) (a few minutes)"
    else
        echo "setting up $VENV with $("$python" --version) (about 5 GB, a few minutes)"
    fi
    rm -f "$STAMP"
    if [ -n "$light" ]; then install_light; elif [ -n "$beside" ]; then install_beside; else install_all; fi
    echo "${light:+light }$wanted" >"$STAMP"
) 9>"$ROOT/.setup.lock"
