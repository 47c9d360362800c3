#!/usr/bin/env bash
# Runs the tests except the slow ones. Creates .venv on first use. Arguments go to pytest:
#   bash scripts/test.sh              all tests except the slow ones
#   bash scripts/test.sh -m unit      unit tests only
#   bash scripts/test.sh -m slow      slow tests only, with the exhaustive ones
#   bash scripts/test.sh -m "slow and not exhaustive"      slow tests as in .ci/run
#   bash scripts/test.sh -m ""        all tests
# Two worker processes run with one thread each. WORKERS sets another number of workers; WORKERS=0 runs the tests in one process
# with all threads.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" dev
workers="${WORKERS:-2}"
[ "$workers" = 0 ] || export OMP_NUM_THREADS=1
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n "$workers" --dist worksteal -m "not slow" "$@"
