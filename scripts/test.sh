#!/usr/bin/env bash
# The tests, from nothing: makes .venv and runs pytest. Arguments go to pytest: bash scripts/test.sh -m 'not slow'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" dev
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest "$@"
