#!/usr/bin/env bash
# Demo of diffusion models: creates .venv, prunes the embedded pipeline, which draws handwritten digits, to 70 % with magnitude
# pruning, Wanda and OBS-Diff, and writes a table and a contact sheet. Requires Python 3.11 or later and a package index, but no
# GPU, model hub or account.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" diffusion
HF_HUB_OFFLINE=1 .venv/bin/rose-exp -m experiment=digits hydra.sweep.dir=outputs/digits "$@"
.venv/bin/rose-exp-report outputs/digits --baseline OBS-Diff
