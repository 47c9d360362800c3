#!/usr/bin/env bash
# The tests, from nothing: makes .venv and runs pytest. Arguments go to pytest: bash scripts/test.sh -m 'not slow'
# Two files of tests at a time, each with OMP_NUM_THREADS=1, unless WORKERS says another number; 0: one after the other, with all threads.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" dev
workers="${WORKERS:-2}"
[ "$workers" = 0 ] || export OMP_NUM_THREADS=1
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n "$workers" --dist loadfile "$@"
