#!/usr/bin/env bash
# Runs everything that needs a GPU once, limited to eight minutes, and prints a table.
#
#   bash scripts/gpu_check.sh --json gpu_check.json     relative paths start at the repository's root
#   bash scripts/gpu_check.sh --help                    all options
#
# Uses the active Python (or the interpreter in PYTHON) if it has the dependencies, and creates .venv otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python="${PYTHON:-python3}"
if ! "$python" -c "import numba, safetensors, torch, transformers, rose_exp" 2> /dev/null; then
  source scripts/_venv.sh diffusion
  python=.venv/bin/python
fi
exec "$python" scripts/gpu_check.py "$@"
