#!/usr/bin/env bash
# Creates .venv and runs the tests. Arguments are passed to pytest: bash scripts/test.sh -m 'not slow'
# WORKERS: number of test files to run in parallel, each with OMP_NUM_THREADS=1 (default: 2); 0: run them sequentially with all threads.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" dev
workers="${WORKERS:-2}"
[ "$workers" = 0 ] || export OMP_NUM_THREADS=1
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n "$workers" --dist loadfile "$@"
